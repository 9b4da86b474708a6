// The first GEMM of the experts for few tokens: out[row of the sorted pairs, column] = silu(gate) * up in float32, limited by how fast the weights of
// the experts that have tokens stream from memory.
//
// Weights take wgmma's 64-row side, rows of activations its N side (ROWS = 8 or 16). The work is a line of row groups (8 gate rows of the weight and the 8
// up rows that belong to them), unit after unit (expert_units.cuh); each CTA takes an equal run of it and cuts that into tiles of at most `tile_groups`.
// So all CTAs stream the same number of bytes, whatever the routing, and no sum crosses a CTA.
//
// Warp roles (384 threads):
//   warps 0, 1    producers, one lane each: gate rows, up rows of each stage.
//   warps 2, 3    loaders, taking stages in turn: activations, their scales and the weight's.
//   warps 4..11   two math warpgroups, taking stages in turn; at the end of a tile one hands its sums to the other, in turn.
// Barriers: full (the producers + bytes; kLoaderArrivals) and empty (the 4 warps of the math warpgroup that owns the stage) per stage. Named barriers 2 and 3:
// 256 math threads, sums are handed over.
#include "expert_walk.cuh"

constexpr u32 kProducers = 2;
constexpr u32 kGroupBytes = 2 * 8 * kBlockK;

struct Sums {
    float first[ROWS / 2], second[ROWS / 2];  // gate, up
};

// Which of the weight scales of a stage belong to a lane's rows.
struct ScaleIndex {
    u32 first_low, first_high, second_low, second_high;
};

// The kCount k-blocks of a stage. The scales are read while the products run: a stage whose reads have only been issued must not be released.
template <u32 kCount>
DEVICE void multiply(Sums& sum, const Stages& stages, u32 stage, u32 second_offset, const ScaleIndex& index, u32 lane) {
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
            const u64 a = matrix_descriptor(base), b = matrix_descriptor(base + second_offset), x = matrix_descriptor(stages.activation_tile(stage, u));
            Wgmma<ROWS>::multiply(first[u], a + 2 * i, x + 2 * i, i > 0);
            Wgmma<ROWS>::multiply(second[u], b + 2 * i, x + 2 * i, i > 0);
        }
    }
    wgmma_commit();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        const u32 scales = smem_address(stages.block_scales(stage, u));
        of_weight[u][0] = load_shared(scales + (ROWS + index.first_low) * 4), of_weight[u][1] = load_shared(scales + (ROWS + index.first_high) * 4);
        of_weight[u][2] = load_shared(scales + (ROWS + index.second_low) * 4), of_weight[u][3] = load_shared(scales + (ROWS + index.second_high) * 4);
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
    if (arrives_for_warp(lane)) barrier_arrive_after(stages.empty + 8 * stage, of_rows[kCount - 1][ROWS / 8 - 1].y);
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
#pragma unroll
        for (u32 j = 0; j < ROWS / 8; ++j) {
            const float2 scale = of_rows[u][j];
            sum.first[4 * j] += scale.x * of_weight[u][0] * first[u][4 * j];
            sum.first[4 * j + 1] += scale.y * of_weight[u][0] * first[u][4 * j + 1];
            sum.first[4 * j + 2] += scale.x * of_weight[u][1] * first[u][4 * j + 2];
            sum.first[4 * j + 3] += scale.y * of_weight[u][1] * first[u][4 * j + 3];
            sum.second[4 * j] += scale.x * of_weight[u][2] * second[u][4 * j];
            sum.second[4 * j + 1] += scale.y * of_weight[u][2] * second[u][4 * j + 1];
            sum.second[4 * j + 2] += scale.x * of_weight[u][3] * second[u][4 * j + 2];
            sum.second[4 * j + 3] += scale.y * of_weight[u][3] * second[u][4 * j + 3];
        }
    }
}

// x: codes, of which the row of pair p is p / divisor. Pairs of token and expert are sorted by expert.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
experts_up(const u8* x, const float* scale_x, const u8* __restrict__ weight, const float* __restrict__ scale_b, float* out, const void* ids,
           const int* expert_map, i64 scale_x_block_stride, i64 weight_stride, i64 scale_b_stride, u32 pairs, u32 divisor, u32 num_groups, u32 n,
           u32 k_blocks, u32 scale_b_row, u32 tile_groups, u32 ring_bytes, u32 stage_bytes, u32 wide_ids) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: ring | barriers | handed-over sums | units
    u8* const barriers = shared + ring_bytes;
    u8* const handed_over = barriers + 2 * kMaxStages * 8;
    Units units;
    units.place(handed_over + ROWS * 512, num_groups, pairs, pairs);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // Expert ids are older than the kernel that quantised the activations, which lets this one start only once they are written.
    launch_next_kernel();
    units.sort(ids, wide_ids, expert_map, pairs, num_groups);
    units.list(num_groups);
    units.fill_order(pairs);
    const u32 unit_groups = n / 8;
    const u32 run = ceil_div(units.number * unit_groups, gridDim.x);
    if (run == 0) {
        wait_for_previous_kernel();  // nobody may take this kernel's end for that of the one before
        return;
    }
    const u32 widest = ceil_div(run, ceil_div(run, tile_groups));
    Stages stages;
    stages.place(shared, ring_bytes, widest * kGroupBytes, stage_bytes, k_blocks, smem_address(barriers));
    stages.init_barriers(kProducers, 4);
    Walk walk(units, unit_groups, widest, run);
    Tile tile;
    Ring ring;

    if (warp < kProducers) {
        if (elect_lane()) {
            while (walk.advance(tile)) {
                const u32 bytes = tile.groups * 8 * kBlockK;
                const u8* source = weight + tile.expert * weight_stride + static_cast<i64>(tile.row + warp * n) * kBlockK;
                for (u32 block = 0; block < k_blocks; ring.advance(stages.number)) {
                    const u32 count = min(stages.depth, k_blocks - block), bar = stages.full + 8 * ring.stage;
                    barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                    barrier_expect(bar, count * bytes);
                    for (u32 slot = 0; slot < count; ++slot, ++block, source += static_cast<i64>(2 * n) * kBlockK)
                        bulk_copy(stages.weight_tile(ring.stage, slot) + warp * bytes, source, bytes, bar);
                }
            }
        }
        __syncwarp();
    } else if (warp == 2 || warp == 3) {
        wait_for_previous_kernel();
        while (walk.advance(tile)) {
            const u32 first = units.first_row(tile.unit);
            constexpr u32 kScaleRounds = (kStageScales + 31) / 32;
            // Scale i of a stage, for the lane's i: lane, lane + 32, ...: of row i of the activations, or of block i - ROWS of the weight.
            const float* scale_of[kScaleRounds];
            i64 scale_step[kScaleRounds];
#pragma unroll
            for (u32 s = 0; s < kScaleRounds; ++s) {
                const u32 i = s * 32 + lane;
                scale_of[s] = nullptr;
                if (i >= ROWS && i < ROWS + 4) {
                    const u32 row = tile.row + (i - ROWS >= 2 ? n : 0);
                    scale_of[s] = scale_b + tile.expert * scale_b_stride + row / 128 + (i - ROWS) % 2;
                    scale_step[s] = scale_b_row;
                } else if (i < tile.rows) {
                    scale_of[s] = scale_x + units.order[first + i] / divisor;
                    scale_step[s] = scale_x_block_stride;
                }
            }
            CodeSource source;
            source.set(tile.rows, lane, [&](u32 row) {
                return x + static_cast<i64>(units.order[first + row] / divisor) * k_blocks * kBlockK;
            });
            for (u32 first_block = 0; first_block < k_blocks; first_block += stages.depth, ring.advance(stages.number)) {
                if (ring.stage % 2 != warp % 2) continue;
                barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                const u32 count = min(stages.depth, k_blocks - first_block);
                for (u32 slot = 0; slot < count; ++slot) {
                    const u32 target = smem_address(stages.block_scales(ring.stage, slot));
                    source.copy(stages.activation_tile(ring.stage, slot), first_block + slot, lane);
#pragma unroll
                    for (u32 s = 0; s < kScaleRounds; ++s)
                        if (scale_of[s] != nullptr) copy_4_async(target + (s * 32 + lane) * 4, scale_of[s] + (first_block + slot) * scale_step[s]);
                }
                barrier_arrive_after_copies(stages.full + 8 * ring.stage);
            }
        }
    } else if (warp >= 4) {
        const u32 warpgroup = (warp - 4) / 4, thread = threadIdx.x % 128;
        const u32 low = warp % 4 * 16 + lane / 4, high = low + 8;  // rows of the lane in a half of the tile
        float4* const place = reinterpret_cast<float4*>(handed_over) + thread;
        u32 receiver = 0;  // the warpgroup that finishes this tile
        for (; walk.advance(tile); receiver ^= 1) {
            Sums sum;
#pragma unroll
            for (u32 i = 0; i < ROWS / 2; ++i) sum.first[i] = sum.second[i] = 0.f;
            const u32 in_block = tile.row % 128;
            const u32 half_low = (in_block + low) / 128, half_high = (in_block + high) / 128;
            const ScaleIndex index{half_low, half_high, 2 + half_low, 2 + half_high};
            const u32 second_offset = tile.groups * 8 * kBlockK;
            for (u32 block = 0; block < k_blocks; block += stages.depth, ring.advance(stages.number)) {
                if (ring.stage % 2 != warpgroup) continue;
                const u32 count = min(stages.depth, k_blocks - block);
                barrier_wait(stages.full + 8 * ring.stage, ring.parity);
                fence_async_shared();  // the loader's copies are no writes of the asynchronous kind
                if (count == 1) multiply<1>(sum, stages, ring.stage, second_offset, index, lane);
                else if (count == 2) multiply<2>(sum, stages, ring.stage, second_offset, index, lane);
                else if (count == 3) multiply<3>(sum, stages, ring.stage, second_offset, index, lane);
                else multiply<kMaxDepth>(sum, stages, ring.stage, second_offset, index, lane);
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
            const u32 first_row = units.first_row(tile.unit);
#pragma unroll
            for (u32 j = 0; j < ROWS / 8; ++j) {
                const float4 a = place[2 * j * 128], b = place[(2 * j + 1) * 128];
                const float first[4] = {sum.first[4 * j] + a.x, sum.first[4 * j + 1] + a.y, sum.first[4 * j + 2] + a.z, sum.first[4 * j + 3] + a.w};
                const float second[4] = {sum.second[4 * j] + b.x, sum.second[4 * j + 1] + b.y, sum.second[4 * j + 2] + b.z, sum.second[4 * j + 3] + b.w};
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const u32 token = j * 8 + lane % 4 * 2 + i % 2, row = i < 2 ? low : high;
                    if (token >= tile.rows) continue;
                    if (row < tile.groups * 8)
                        out[static_cast<i64>(first_row + token) * n + tile.row + row] = first[i] / (1.f + expf(-first[i])) * second[i];
                }
            }
        }
    }
}
