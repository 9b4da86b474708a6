// FP8 GEMM whose activations have 16 bits: out[m, n] = x[m, k] . b[n, k]^T with block scales (+ bias), the rows of x quantised on their way to the
// tensor core. For a weight of few columns, where a launch that writes codes takes as long as the products.
//
// Persistent CTAs walk output tiles of 128 rows x 256 columns, columns first, so that CTAs side by side share rows of x. Warp roles:
//   warpgroup 0      producers. A lane each of warps 0, 1 and 2 fetches rows of x (tensor copies), rows of the packed weight, and its scales (bulk copies).
//   warpgroups 1, 2  math: 64 rows and all columns each. A thread takes from shared memory what its operand registers hold of two rows, finds with
//                    its quad the amax of these, and packs the codes; codes and scales are quantize.cuh's, and are nowhere in memory.
// Two rings, since rows of x are free again as soon as they are codes. Barriers per stage of x: full (1 arrival + bytes), empty (one arrival a math
// warp). Per stage of b: full (2 arrivals + bytes), empty (one arrival a math warp). The tensor core accumulates one k-block in `partial`; promotion
// scales it into `sum` (promotion.cuh says why).
//
// There are no registers for the next block's codes beside a product: it is quantised behind the last one, while the other warpgroup has the tensor core.
// With tiles of 128 columns there would be, and a k-block takes as long for half the products (docs/kernel-notes-gemm.md).
//
// A stage of x is two boxes of 64 columns, rows of 128 bytes as the copy swizzles them. 16 lanes of a warp read 8 bytes each at a time, of 4 rows:
// without conflicts, if those of odd rows read the other half of the box.
//
// In a launch of clusters of 2, 4 or 8, a cluster shares the k-blocks of one tile: sums are exchanged (output.cuh) through the ring of x, once all CTAs
// of the cluster have read theirs.
#include "arrivals.cuh"
#include "group.cuh"
#include "output.cuh"
#include "promotion.cuh"
#include "tiles.cuh"

constexpr u32 kTileRows = 128, kTileColumns = 256, kSlices = kTileColumns / 128, kMathWarps = 8;
constexpr u32 kBoxBytes = kTileRows * kBlockK, kBytesX = 2 * kBoxBytes, kBytesB = kTileColumns * kBlockK;
constexpr u32 kStagesX = STAGES_X, kStagesB = STAGES_B;
constexpr u32 kProducers = 3;
constexpr u32 kEmptyArrivals = kMathWarps * kArrivalsOfWarp;
constexpr u32 kShares = kSlices * 16;  // of a math warpgroup in the exchange

static_assert(kShares * kExchangedBytes<2> <= kStagesX * kBytesX, "sums of all CTAs of a cluster fit the ring of x");

// What a lane has of its two rows of a k-block, that at lane / 4 of its warp's 16 and that 8 further: four neighbours at 4 * (lane % 4) of each run of
// 16 columns. First come those of the first half of a box, in odd rows those of its second half.
struct RawRows {
    uint2 four[2][2][2][2];  // row, box, half, run

    // at: row and columns of the lane in the first box of a stage, swizzled.
    DEVICE void load(u32 row, u32 at) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            four[row][i / 4][i / 2 % 2][i % 2] = load_shared_words((at ^ i % 4 * 32) + i / 4 * kBoxBytes + row * 8 * kBlockK);
    }
};

struct QuantisedRows {
    u32 codes[kBlockK / 32][4];  // as wgmma takes them, once arranged
    float scale[2];

    template <bool kIsBf16> DEVICE void take(const RawRows& raw, u32 lane) {
        constexpr auto larger = kIsBf16 ? larger_magnitude_bf16 : larger_magnitude_f16;
        constexpr auto low = kIsBf16 ? low_bf16 : low_f16;
        constexpr auto high = kIsBf16 ? high_bf16 : high_f16;
        float largest[2];
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            u32 pairs[8];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                const uint2 four = raw.four[row][i / 4][i / 2 % 2][i % 2];
                pairs[i] = larger(four.x, four.y);
            }
#pragma unroll
            for (u32 distance = 4; distance > 0; distance /= 2)
#pragma unroll
                for (u32 i = 0; i < distance; ++i) pairs[i] = larger(pairs[i], pairs[i + distance]);
            largest[row] = fmaxf(fmaxf(kMinAmax, fabsf(low(pairs[0]))), fabsf(high(pairs[0])));
        }
#pragma unroll
        for (u32 row = 0; row < 2; ++row) largest[row] = quad_max(largest[row]);
        // One division a lane, and the quad has both factors of both rows.
        const float factor = group_factor(lane & 2 ? largest[1] : largest[0], lane % 2);
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            const float inverse = __shfl_sync(0xffffffffu, factor, lane / 4 * 4 + row * 2 + 1);
            scale[row] = __shfl_sync(0xffffffffu, factor, lane / 4 * 4 + row * 2);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                const uint2 four = raw.four[row][i / 4][i / 2 % 2][i % 2];
                codes[i / 2][i % 2 * 2 + row] = code_word(low(four.x), high(four.x), low(four.y), high(four.y), inverse);
            }
        }
    }

    // Puts the halves of boxes where they belong.
    DEVICE void arrange(u32 lane) {
        const bool odd = lane / 4 % 2;
#pragma unroll
        for (u32 box = 0; box < 2; ++box)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 first = codes[2 * box][i], second = codes[2 * box + 1][i];
                codes[2 * box][i] = odd ? second : first;
                codes[2 * box + 1][i] = odd ? first : second;
            }
    }
};

// k_blocks: of 128 columns of x, the last one filled with zeros by the copy. box_rows: rows of a box of x, no more than x has. strides: of rows, in
// elements. vectorised: 16-bit outputs, rows 16-byte aligned, n % 8 == 0, no bias; aligned: as Output::write_sixteen has it.
extern "C" __global__ void __launch_bounds__(384, 1)
gemm_quantize(const __grid_constant__ TensorMap map_x, const u8* __restrict__ packed_b, const float* __restrict__ scale_b, void* __restrict__ out,
              const void* __restrict__ bias, i64 out_stride, u32 m, u32 n, u32 n_aligned, u32 k_blocks, u32 scale_b_stride, u32 box_rows, u32 x_type,
              u32 out_type, u32 bias_type, u32 vectorised, u32 aligned) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 rows_x = smem_address(shared), rows_b = rows_x + kStagesX * kBytesX, scales = rows_b + kStagesB * kBytesB;
    const u32 full_x = scales + kStagesB * kScaleFloats * 4, empty_x = full_x + 8 * kStagesX;
    const u32 full_b = empty_x + 8 * kStagesX, empty_b = full_b + 8 * kStagesB, exchanged = empty_b + 8 * kStagesB;
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), split = cluster_size(), split_rank = cluster_rank();

    if (threadIdx.x == 0) {
        prefetch_map(&map_x);
        for (u32 s = 0; s < kStagesX; ++s) {
            barrier_init(full_x + 8 * s, 1);
            barrier_init(empty_x + 8 * s, kEmptyArrivals);
        }
        for (u32 s = 0; s < kStagesB; ++s) {
            barrier_init(full_b + 8 * s, kProducers - 1);
            barrier_init(empty_b + 8 * s, kEmptyArrivals);
        }
        barrier_init(exchanged, 1);
        if (split > 1) barrier_expect(exchanged, kShares * kExchangedBytes<2>);
        barrier_init_fence();
    }
    meet(split);
    launch_next_kernel();

    const u32 tiles_n = ceil_div(n, kTileColumns), num_tiles = ceil_div(m, kTileRows) * tiles_n;
    const u32 first_tile = blockIdx.x / split, tile_step = gridDim.x / split;
    const u32 first_block = k_blocks * split_rank / split, end_block = k_blocks * (split_rank + 1) / split;
    // The last tile of rows ends with the last row: rows that x does not have would be filled with zeros, slowly.
    const u32 last_m = m - box_rows;
    Ring ring;

    if (warpgroup == 0) {
        give_registers<40>();
        const u32 producer = threadIdx.x / 32;
        if (producer < kProducers && elect_lane()) {
            if (producer == 0) wait_for_previous_kernel();  // weights are there already, by contract
            for (u32 t = first_tile; t < num_tiles; t += tile_step) {
                const u32 tile_m = min(t / tiles_n * kTileRows, last_m), tile_n = t % tiles_n * kTileColumns;
                if (producer == 0) {
                    for (u32 kb = first_block; kb < end_block; ++kb, ring.advance(kStagesX)) {
                        const u32 bar = full_x + 8 * ring.stage, target = rows_x + ring.stage * kBytesX;
                        barrier_wait(empty_x + 8 * ring.stage, ring.parity ^ 1);
                        barrier_expect(bar, 2 * box_rows * kBlockK);
                        tensor_copy(target, &map_x, kb * kBlockK, tile_m, 0, bar);
                        tensor_copy(target + kBoxBytes, &map_x, kb * kBlockK + kBlockK / 2, tile_m, 0, bar);
                    }
                } else {
                    const u32 bytes = min(kTileColumns, n_aligned - tile_n) * kBlockK;
                    const float* tile_scale = scale_b + first_scale_of(tile_n, scale_b_stride);
                    for (u32 kb = first_block; kb < end_block; ++kb, ring.advance(kStagesB)) {
                        const u32 s = ring.stage, bar = full_b + 8 * s;
                        barrier_wait(empty_b + 8 * s, ring.parity ^ 1);
                        if (producer == 1) {
                            barrier_expect(bar, bytes);
                            bulk_copy(rows_b + s * kBytesB, packed_b + (static_cast<i64>(kb) * n_aligned + tile_n) * kBlockK, bytes, bar);
                        } else {
                            barrier_expect(bar, kScaleFloats * 4);
                            bulk_copy(scales + s * kScaleFloats * 4, tile_scale + static_cast<i64>(kb) * scale_b_stride, kScaleFloats * 4, bar);
                        }
                    }
                }
            }
        }
        if (split > 1) {  // the math warps wait for all threads of the cluster
            __syncwarp();
            cluster_arrive_relaxed();
            cluster_wait();
        }
    } else {
        take_registers<232>();
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, releases = arrives_for_warp(lane);
        const u32 row_in_tile = (warpgroup - 1) * 64 + warp * 16, row = row_in_tile + lane / 4;
        const u32 own_x = rows_x + row * kBlockK + ((lane % 4 / 2 ^ row % 8 ^ row % 2 * 4) * 16) + lane % 2 * 8;
        const u32 own_b = matrix_descriptor_low(rows_b);
        const Output output{out, bias, out_stride, m, n, out_type, bias_type};
        Ring ring_x;

        for (u32 t = first_tile; t < num_tiles; t += tile_step) {
            const u32 tile_m = min(t / tiles_n * kTileRows, last_m), tile_n = t % tiles_n * kTileColumns;
            u32 block_scale[kSlices];
#pragma unroll
            for (u32 slice = 0; slice < kSlices; ++slice) {
                const u32 column = tile_n + slice * 128;
                block_scale[slice] = scales + (column < n ? column / 128 - first_scale_of(tile_n, scale_b_stride) : 0) * 4;
            }
            float sum[kSlices][64];
#pragma unroll
            for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
                for (u32 i = 0; i < 64; ++i) sum[slice][i] = 0.f;
            RawRows raw;
            QuantisedRows rows;
            auto load = [&](u32 row) {
                if (row == 0) barrier_wait(full_x + 8 * ring_x.stage, ring_x.parity);
                raw.load(row, own_x + ring_x.stage * kBytesX);
            };
            auto quantise = [&] {
                if (x_type == kBf16) rows.take<true>(raw, lane);
                else rows.take<false>(raw, lane);
                barrier_arrive_after_words(empty_x + 8 * ring_x.stage, rows.scale[0], rows.scale[1], releases);
                ring_x.advance(kStagesX);
            };
            load(0);
            load(1);
            auto multiply_block = [&](bool more) {  // more: k-blocks follow
                const u32 s = ring.stage;
                quantise();
                rows.arrange(lane);
                barrier_wait(full_b + 8 * s, ring.parity);
#pragma unroll
                for (u32 slice = 0; slice < kSlices; ++slice) {
                    const u32 low_b = own_b + s * (kBytesB / 16) + slice * (128 * kBlockK / 16);
                    float partial[64];
                    fence_registers(partial);
                    wgmma_fence();
#pragma unroll
                    for (u32 i = 0; i < kBlockK / 32; ++i) Wgmma<128>::multiply(partial, rows.codes[i], matrix_descriptor_at(low_b + 2 * i), i > 0);
                    wgmma_commit();
                    const float scale = load_shared(block_scale[slice] + s * kScaleFloats * 4), low = rows.scale[0] * scale, high = rows.scale[1] * scale;
                    wgmma_wait<0>();
                    fence_registers(partial);
                    const bool last = slice == kSlices - 1;
                    if (last) {
                        __syncwarp();
                        barrier_arrive_after_words(empty_b + 8 * s, low, high, releases);
                        ring.advance(kStagesB);
                        if (split > 1 && !more) cluster_arrive_relaxed();  // this warp has read all that it needs of the ring of x
                    }
                    // A row of the next block takes the registers of every half of what is promoted.
#pragma unroll
                    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
                        for (u32 i = half * 32; i < half * 32 + 32; ++i) sum[slice][i] += (i % 4 < 2 ? low : high) * partial[i];
                        if (last && more) load(half);
                    }
                }
            };
            for (u32 kb = first_block; kb + 1 < end_block; ++kb) multiply_block(true);
            multiply_block(false);
            if (t == first_tile) wait_for_previous_kernel();  // it may still read what this kernel overwrites
            if (split > 1) {
                const u32 owned = kShares / split, slot = (warpgroup - 1) * 2048 + threadIdx.x % 128 * 16;
                cluster_wait();
                send_sums<2>(sum, rows_x, exchanged, split, split_rank, slot);
                barrier_wait(exchanged, 0);
                for (u32 i = 0; i < owned; ++i) {
                    const float4 total = received_sum<2>(shared, i, owned, split, slot);
                    const Share share = share_at<16>(split_rank * owned + i);
                    output.write_sixteen(total, tile_m + row + share.row, tile_n + share.slice * 128 + share.column, lane, aligned);
                }
                break;  // one tile a cluster: the exchange is used once
            }
#pragma unroll
            for (u32 slice = 0; slice < kSlices; ++slice) {
                const u32 column = tile_n + slice * 128;
                if (bias != nullptr) output.add_bias(sum[slice], column, lane);
                const u32 element = out_type == kF32 ? 4 : 2;
                u8* const row_low = static_cast<u8*>(out) + static_cast<i64>(tile_m + row) * out_stride * element;
                u8* const row_high = row_low + 8 * out_stride * element;
                write_rows<128>(sum[slice], row_low, row_high, column, n, out_type, vectorised, tile_m + row < m, tile_m + row + 8 < m, lane);
            }
        }
    }
}
