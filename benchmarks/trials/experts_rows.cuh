// The second GEMM of the experts for few tokens, cut as the first one is: y[pair, column] = h[pair] . w2[expert]^T, one row for each (token, expert) pair,
// which combine.cuh then adds up by token.
//
// experts_down.cuh gives a CTA 8 to 64 rows of the weight of every expert and pays about 200 ns for each of their k-blocks, whatever its bytes; with 128 small
// experts that is three times the time of streaming. Here the row groups (8 rows of the weight) of all experts hit form a line, of which each CTA takes an
// equal run, in tiles of up to 128 rows: fewer, larger stages, the same bytes for every CTA. The sums of a token meet in one more launch.
//
// Warp roles (384 threads):
//   warps 0, 1    producers, one lane each: the first 64 rows of each stage's tiles, the others.
//   warps 2, 3    loaders, taking stages in turn: codes of h, their scales and the weight's.
//   warps 4..11   two math warpgroups, taking stages in turn; at the end of a tile one hands its sums to the other, in turn.
// Barriers: full (the producers + bytes; 32 lanes of a loader) and empty (the 4 warps of the math warpgroup that owns the stage) per stage. Named barriers 2
// and 3: 256 math threads, sums are handed over.
#define MATRICES 2
#define FUSED 0
#include "expert_walk.cuh"

constexpr u32 kProducers = 2;

struct Sums {
    float first[ROWS / 2], second[ROWS / 2];  // rows 0..63 of the tile, rows 64..127
};

// The kCount k-blocks of a stage. The scales are read while the products run: a stage whose reads have only been issued must not be released.
template <u32 kCount>
DEVICE void multiply(Sums& sum, const Stages& stages, u32 stage, bool tall, u32 in_block, u32 low, u32 lane) {
    float first[kCount][ROWS / 2], second[kCount][ROWS / 2], of_weight[kCount][4];
    float2 of_rows[kCount][ROWS / 8];
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        fence_registers(first[u]);
        fence_registers(second[u]);
    }
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < kBlockK / 32; ++i) {
#pragma unroll
        for (u32 u = 0; u < kCount; ++u) {
            const u32 base = stages.weight_tile(stage, u);
            const u64 x = matrix_descriptor(stages.activation_tile(stage, u));
            Wgmma<ROWS>::multiply(first[u], matrix_descriptor(base) + 2 * i, x + 2 * i, i > 0);
            Wgmma<ROWS>::multiply(second[u], matrix_descriptor(tall ? base + 64 * kBlockK : base) + 2 * i, x + 2 * i, i > 0);
        }
    }
    wgmma_commit();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        const u32 scales = smem_address(stages.block_scales(stage, u)), of_blocks = scales + ROWS * 4;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) of_weight[u][i] = load_shared(of_blocks + min((in_block + low + i % 2 * 8 + i / 2 * 64) / 128, 1u) * 4);
#pragma unroll
        for (u32 j = 0; j < ROWS / 8; ++j) of_rows[u][j] = load_shared_pair(scales + (j * 8 + lane % 4 * 2) * 4);
    }
    wgmma_wait<0>();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        fence_registers(first[u]);
        fence_registers(second[u]);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive_after(stages.empty + 8 * stage, of_rows[kCount - 1][ROWS / 8 - 1].y);
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
#pragma unroll
        for (u32 j = 0; j < ROWS / 8; ++j) {
            const float2 scale = of_rows[u][j];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const float of_token = i % 2 ? scale.y : scale.x;
                sum.first[4 * j + i] += of_token * of_weight[u][i / 2] * first[u][4 * j + i];
                sum.second[4 * j + i] += of_token * of_weight[u][2 + i / 2] * second[u][4 * j + i];
            }
        }
    }
}

// h: codes [sorted rows][k_blocks * 128], scale_h [k_blocks][scale_h_block_stride]. weight: [group][k_blocks][n_aligned][128] packed, scale_b
// [group][k_blocks][scale_b_row]. y: [pairs][n] of 16-bit `type`; rows of pairs without an expert here are not written.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
experts_rows(const u8* h, const float* scale_h, const u8* __restrict__ weight, const float* __restrict__ scale_b, void* y, const void* ids,
             const int* expert_map, i64 weight_stride, i64 scale_b_stride, i64 scale_h_block_stride, u32 pairs, u32 num_groups, u32 n, u32 n_aligned,
             u32 k_blocks, u32 scale_b_row, u32 tile_groups, u32 ring_bytes, u32 stage_bytes, u32 wide_ids, u32 type) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: ring | barriers | handed-over sums | units
    u8* const barriers = shared + ring_bytes;
    u8* const handed_over = barriers + 2 * kMaxStages * 8;
    Units units;
    units.place(handed_over + ROWS * 512, num_groups, pairs, pairs);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    launch_next_kernel();
    // Expert ids are older than the kernels before this one, each of which lets the next start only once they are written.
    units.sort(ids, wide_ids, expert_map, pairs, num_groups);
    units.list(num_groups);
    units.fill_order(pairs);
    const u32 unit_groups = n_aligned / 8;
    const u32 run = ceil_div(units.number * unit_groups, gridDim.x);
    if (run == 0) {
        wait_for_previous_kernel();  // nobody may take this kernel's end for that of the one before
        return;
    }
    const u32 widest = ceil_div(run, ceil_div(run, tile_groups));
    Stages stages;
    stages.place(shared, ring_bytes, widest * 8 * kBlockK, stage_bytes, k_blocks, smem_address(barriers));
    stages.init_barriers(kProducers, 4);
    Walk walk(units, unit_groups, widest, run);
    Tile tile;
    Ring ring;

    if (warp < kProducers) {
        if (elect_lane()) {
            while (walk.advance(tile)) {
                const u32 all = tile.groups * 8, mine = warp == 0 ? min(all, 64u) : all - min(all, 64u), bytes = mine * kBlockK;
                const u8* source = weight + tile.expert * weight_stride + static_cast<i64>(tile.row + warp * 64) * kBlockK;
                for (u32 block = 0; block < k_blocks; ring.advance(stages.number)) {
                    const u32 count = min(stages.depth, k_blocks - block), bar = stages.full + 8 * ring.stage;
                    barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                    barrier_expect(bar, count * bytes);
                    for (u32 slot = 0; slot < count; ++slot, ++block, source += static_cast<i64>(n_aligned) * kBlockK)
                        if (bytes) bulk_copy(stages.weight_tile(ring.stage, slot) + warp * 64 * kBlockK, source, bytes, bar);
                }
            }
        }
        __syncwarp();
    } else if (warp < 4) {
        wait_for_previous_kernel();
        while (walk.advance(tile)) {
            const u32 first = units.first_row(tile.unit);
            CodeSource source;
            source.set(tile.rows, lane, [&](u32 row) { return h + static_cast<i64>(first + row) * k_blocks * kBlockK; });
            const bool of_weight = lane >= ROWS && lane < ROWS + 2;
            const float* scale =
                of_weight ? scale_b + tile.expert * scale_b_stride + tile.row / 128 + lane - ROWS : scale_h + first + lane;
            const i64 step = of_weight ? scale_b_row : scale_h_block_stride;
            for (u32 first_block = 0; first_block < k_blocks; first_block += stages.depth, ring.advance(stages.number)) {
                if (ring.stage % 2 != warp % 2) continue;
                barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                const u32 count = min(stages.depth, k_blocks - first_block);
                for (u32 slot = 0; slot < count; ++slot) {
                    source.copy(stages.activation_tile(ring.stage, slot), first_block + slot, lane);
                    if (of_weight || lane < tile.rows)
                        copy_4_async(smem_address(stages.block_scales(ring.stage, slot) + lane), scale + (first_block + slot) * step);
                }
                barrier_arrive_after_copies(stages.full + 8 * ring.stage);
            }
        }
    } else {
        const u32 warpgroup = (warp - 4) / 4, thread = threadIdx.x % 128;
        const u32 low = warp % 4 * 16 + lane / 4, high = low + 8;  // rows of the lane in a half of the tile
        float4* const place = reinterpret_cast<float4*>(handed_over) + thread;
        u32 receiver = 0;  // the warpgroup that finishes this tile
        wait_for_previous_kernel();  // what comes before may still read what y overwrites
        for (; walk.advance(tile); receiver ^= 1) {
            Sums sum;
#pragma unroll
            for (u32 i = 0; i < ROWS / 2; ++i) sum.first[i] = sum.second[i] = 0.f;
            const bool tall = tile.groups > 8;
            const u32 in_block = tile.row % 128;
            for (u32 block = 0; block < k_blocks; block += stages.depth, ring.advance(stages.number)) {
                if (ring.stage % 2 != warpgroup) continue;
                const u32 count = min(stages.depth, k_blocks - block);
                barrier_wait(stages.full + 8 * ring.stage, ring.parity);
                fence_async_shared();  // the loader's copies are no writes of the asynchronous kind
                if (count == 1) multiply<1>(sum, stages, ring.stage, tall, in_block, low, lane);
                else if (count == 2) multiply<kAtMost2>(sum, stages, ring.stage, tall, in_block, low, lane);
                else if (count == 3) multiply<kAtMost3>(sum, stages, ring.stage, tall, in_block, low, lane);
                else multiply<kMaxDepth>(sum, stages, ring.stage, tall, in_block, low, lane);
            }

            // A thread gives, at its next tile, into the place it has just read: no barrier says that the place is free.
            if (warpgroup != receiver) {
#pragma unroll
                for (u32 j = 0; j < ROWS / 8; ++j) {
                    place[2 * j * 128] = make_float4(sum.first[4 * j], sum.first[4 * j + 1], sum.first[4 * j + 2], sum.first[4 * j + 3]);
                    place[(2 * j + 1) * 128] = make_float4(sum.second[4 * j], sum.second[4 * j + 1], sum.second[4 * j + 2], sum.second[4 * j + 3]);
                }
                named_barrier_arrive(2 + receiver, kMathThreads);
                continue;
            }
            named_barrier(2 + receiver, kMathThreads);
            const u32 first_row = units.first_row(tile.unit), rows = min(tile.groups * 8, n - tile.row);
#pragma unroll
            for (u32 j = 0; j < ROWS / 8; ++j) {
                const float4 a = place[2 * j * 128], b = place[(2 * j + 1) * 128];
                const float first[4] = {sum.first[4 * j] + a.x, sum.first[4 * j + 1] + a.y, sum.first[4 * j + 2] + a.z, sum.first[4 * j + 3] + a.w};
                const float second[4] = {sum.second[4 * j] + b.x, sum.second[4 * j + 1] + b.y, sum.second[4 * j + 2] + b.z, sum.second[4 * j + 3] + b.w};
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const u32 column = j * 8 + lane % 4 * 2 + i % 2, row = i < 2 ? low : high;
                    if (column >= tile.rows) continue;
                    const i64 line = static_cast<i64>(units.order[first_row + column]) * n + tile.row;
                    if (row < rows) store_element(y, line + row, type, first[i]);
                    if (row + 64 < rows) store_element(y, line + row + 64, type, second[i]);
                }
            }
        }
    }
}
