// What a math warpgroup of the grouped GEMMs does with its stages: 64 rows of activations times one or two slices of 128 rows of the weight.
//
// The rows go to registers (ldmatrix), once for both slices: shared memory, 128 bytes a clock, would otherwise be asked for 144 KiB a
// k-block of 128 x 256, which is longer than the tensor core takes. The tensor core accumulates one k-block in `partial`; promotion scales it
// into `sum`, because the FP8 accumulator keeps fewer bits than float32. Warpgroups do not take turns (docs/kernel-notes-moe.md).
#pragma once
#include "arrivals.cuh"
#include "wgmma.cuh"

// Where a lane finds its operands in stage 0: addresses in shared memory, of barriers too.
struct Operands {
    u32 rows;        // what ldmatrix takes: of row lane % 16 of its warp's 16, the 16 bytes of chunk lane / 16, swizzled
    u32 weight;      // descriptor of the first slice, low word
    u32 scale_a;     // of row lane / 4; that of the row 8 further is 32 bytes further
    u32 scale_b[2];  // of the slices
    u32 full, empty; // barriers
};

// Sets sum[slice] to the sum of k_blocks products, from the stage at which the ring stands; that one has been waited for.
// Layout: kRows, kWeight, kScaleA, kScaleB are the bytes from a stage to the next.
template <u32 kSlices, class Layout> DEVICE void multiply_blocks(float (&sum)[2][64], const Operands& at, Ring& ring, u32 num_stages, u32 k_blocks, u32 lane) {
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 64; ++i) sum[slice][i] = 0.f;
    u32 rows = at.rows, scale_a = at.scale_a, empty = at.empty, releases = arrives_for_warp(lane);
    u32 of_slice[kSlices];
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice) of_slice[slice] = at.scale_b[slice];
    // Kept in registers, not computed again in every block.
    keep_in_registers(rows, scale_a, empty, releases, of_slice[0], of_slice[kSlices - 1]);
    u32 a[kBlockK / 32][4];
    auto load_rows = [&] {
        const u32 address = rows + ring.stage * Layout::kRows;
#pragma unroll
        for (u32 i = 0; i < kBlockK / 32; ++i) load_matrices(a[i], address ^ 32 * i);
    };
    load_rows();
    for (u32 block = 0; block < k_blocks; ++block) {
        const u32 s = ring.stage;
        float row_low, row_high;
#pragma unroll
        for (u32 slice = 0; slice < kSlices; ++slice) {
            const u32 weight = at.weight + s * (Layout::kWeight / 16) + slice * (128 * kBlockK / 16);
            float partial[64];
            fence_registers(partial);
            wgmma_fence();
#pragma unroll
            for (u32 i = 0; i < kBlockK / 32; ++i) Wgmma<128>::multiply(partial, a[i], matrix_descriptor_at(weight + 2 * i), i > 0);
            wgmma_commit();
            if (slice == 0) {
                row_low = load_shared(scale_a + s * Layout::kScaleA);
                row_high = load_shared(scale_a + s * Layout::kScaleA + 32);
            }
            const float scale_b = load_shared(of_slice[slice] + s * Layout::kScaleB), low = row_low * scale_b, high = row_high * scale_b;
            wgmma_wait<0>();
            fence_registers(partial);
            if (slice == kSlices - 1) {  // nothing reads this stage any more
                __syncwarp();  // all lanes have read its scales
                barrier_arrive_after_words(empty + 8 * s, low, high, releases);
                ring.advance(num_stages);
                if (block + 1 < k_blocks) {  // the next rows are on their way while this block is promoted
                    barrier_wait(at.full + 8 * ring.stage, ring.parity);
                    load_rows();
                }
            }
#pragma unroll
            for (u32 i = 0; i < 64; ++i) sum[slice][i] += (i % 4 < 2 ? low : high) * partial[i];
        }
    }
}

// Transposes 4x4 words among the 4 lanes of a quad: afterwards word p of lane q is what word q of lane p was.
DEVICE void transpose_quad(u32 (&words)[4], u32 lane) {
#pragma unroll
    for (u32 distance = 1; distance <= 2; distance *= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if (i & distance) continue;
            const u32 sent = upper ? words[i] : words[i + distance];
            const u32 received = __shfl_xor_sync(0xffffffffu, sent, distance);
            if (upper) words[i] = received;
            else words[i + distance] = received;
        }
    }
}

// Two rows of a slice of 64, 8 apart, which lie in `sum`: kColumns from `column`, of which those below n exist. vectorised: 16-bit elements, rows 16-byte
// aligned, n % 8 == 0. Otherwise by element, and `sum` is lost: registers have no index at run time, so they move up by a group of 8 columns after each.
// A loop, for it is code that few need, and all kernels of a layer share an instruction cache (docs/kernel-notes-moe.md, 2026-11-27).
template <u32 kColumns>
DEVICE void write_rows(float (&sum)[64], u8* row_low, u8* row_high, u32 column, u32 n, u32 type, u32 vectorised, bool valid_low, bool valid_high, u32 lane) {
    if (vectorised) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
#pragma unroll
            for (u32 j = 0; j < kColumns / 32; ++j) {
                u32 words[4];
#pragma unroll
                for (u32 g = 0; g < 4; ++g) {
                    const u32 i = (j * 4 + g) * 4 + half * 2;
                    words[g] = pack_elements(sum[i], sum[i + 1], type);
                }
                transpose_quad(words, lane);
                const u32 c = column + j * 32 + lane % 4 * 8;
                u8* const row = half ? row_high : row_low;
                if ((half ? valid_high : valid_low) && c < n) *reinterpret_cast<uint4*>(row + c * 2) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        return;
    }
    const u32 past = min(column + kColumns, n);
#pragma unroll 1
    for (u32 c = column + lane % 4 * 2; c < past; c += 8) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            if ((i < 2 ? valid_low : valid_high) && c + i % 2 < n) store_element(i < 2 ? row_low : row_high, c + i % 2, type, sum[i]);
#pragma unroll
        for (u32 i = 4; i < kColumns / 2; ++i) sum[i - 4] = sum[i];
    }
}
