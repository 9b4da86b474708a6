// The second GEMM of the experts for few tokens, and the sum over a token's experts: out[token] = sum of weight * (w2[expert] . h[pair]).
//
// A CTA owns `rows` rows of the hidden dimension (a multiple of 8, at most 64) of all experts that have tokens, and streams them one expert after the
// other: whatever the routing, all CTAs have the same work, and the sum over experts stays in a CTA's shared memory, in the order of the experts: no
// workspace, no atomics, no kernel behind it. Weights take wgmma's 64-row side, rows of h its N side (ROWS = 8 or 16).
//
// h is codes and scales, in the order of the rows of experts_up.cuh.
//
// Warp roles (384 threads):
//   warps 0, 1    producers, one lane each, taking stages in turn: one contiguous copy of rows x 128 bytes of w2.
//   warps 2, 3    loaders, taking stages in turn: h, its scales and the weight's.
//   warps 4..11   two math warpgroups, taking stages in turn, each with a sum of its own.
// Barriers: full (a producer + bytes; kLoaderArrivals) and empty (the 4 warps of the math warpgroup that owns the stage) per stage. Named barrier 2: 256
// math threads, all sums are complete or zero again.
#include "expert_units.cuh"

struct Sums {
    float value[ROWS / 2];
};

// The kCount k-blocks of a stage. The scales are read while the products run: a stage whose reads have only been issued must not be released.
template <u32 kCount> DEVICE void multiply(Sums& sum, const Stages& stages, u32 stage, u32 scale_low, u32 scale_high, u32 lane) {
    float partial[kCount][ROWS / 2], of_weight[kCount][2];
    float2 of_rows[kCount][ROWS / 8];
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) fence_registers(partial[u]);
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < kBlockK / 32; ++i) {
#pragma unroll
        for (u32 u = 0; u < kCount; ++u)
            Wgmma<ROWS>::multiply(partial[u], matrix_descriptor(stages.weight_tile(stage, u)) + 2 * i,
                                  matrix_descriptor(stages.activation_tile(stage, u)) + 2 * i, i > 0);
    }
    wgmma_commit();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        const u32 scales = smem_address(stages.block_scales(stage, u));
        of_weight[u][0] = load_shared(scales + (ROWS + scale_low) * 4), of_weight[u][1] = load_shared(scales + (ROWS + scale_high) * 4);
#pragma unroll
        for (u32 j = 0; j < ROWS / 8; ++j) of_rows[u][j] = load_shared_pair(scales + (j * 8 + lane % 4 * 2) * 4);
    }
    wgmma_wait<0>();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        fence_registers(partial[u]);
    }
    __syncwarp();
    if (arrives_for_warp(lane)) barrier_arrive_after(stages.empty + 8 * stage, of_rows[kCount - 1][ROWS / 8 - 1].y);
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
#pragma unroll
        for (u32 j = 0; j < ROWS / 8; ++j) {
            const float2 scale = of_rows[u][j];
            sum.value[4 * j] += scale.x * of_weight[u][0] * partial[u][4 * j];
            sum.value[4 * j + 1] += scale.y * of_weight[u][0] * partial[u][4 * j + 1];
            sum.value[4 * j + 2] += scale.x * of_weight[u][1] * partial[u][4 * j + 2];
            sum.value[4 * j + 3] += scale.y * of_weight[u][1] * partial[u][4 * j + 3];
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
experts_down(const u8* h, const float* scale_h, const u8* __restrict__ weight, const float* __restrict__ scale_b, void* out, const void* ids,
             const int* expert_map, const float* router_weights, i64 weight_stride,
             i64 scale_b_stride, i64 scale_h_block_stride, u32 m, u32 top_k, u32 num_groups, u32 n, u32 n_aligned, u32 k_blocks, u32 scale_b_row,
             u32 rows, u32 ring_bytes, u32 stage_bytes, u32 wide_ids, u32 out_type) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: ring | barriers | sums [2][m][rows] | router weight and token of each sorted pair | units
    const u32 pairs = m * top_k;
    u8* const barriers = shared + ring_bytes;
    float* const sums = reinterpret_cast<float*>(barriers + 2 * kMaxStages * 8);
    float* const weight_of = sums + 2 * m * rows;
    u32* const token_of = reinterpret_cast<u32*>(weight_of + pairs);
    Units units;
    units.place(reinterpret_cast<u8*>(token_of + pairs), num_groups, pairs, pairs);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    launch_next_kernel();

    // Ids and router weights are older than the kernels before this one, each of which lets the next start only once they are written.
    units.sort(ids, wide_ids, expert_map, pairs, num_groups);
    const u32 sorted = units.list(num_groups);
    units.fill_order(pairs);
    bool repeated = false;  // a token that names an expert twice: its two columns of a tile meet in one sum
    for (u32 i = threadIdx.x; i < sorted; i += kThreads) {
        const u32 pair = units.order[i], token = pair / top_k;
        weight_of[i] = router_weights != nullptr ? router_weights[pair] : 1.f;
        token_of[i] = token;
        for (u32 other = token * top_k; other < pair; ++other) repeated = repeated || units.group_of[other] == units.group_of[pair];
    }
    const bool in_turn_of_columns = __syncthreads_or(repeated);
    Stages stages;
    stages.place(shared, ring_bytes, rows * kBlockK, stage_bytes, k_blocks, smem_address(barriers));
    stages.init_barriers(1, 4);
    const u32 tiles = ceil_div(n, rows);

    if (warp < 2) {
        if (elect_lane()) {
            Ring ring;
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const u32 bytes = min(rows, n_aligned - tile * rows) * kBlockK;
                for (u32 unit = 0; unit < units.number; ++unit) {
                    const u8* source = weight + units.expert[unit] * weight_stride + static_cast<i64>(tile * rows) * kBlockK;
                    for (u32 first = 0; first < k_blocks; first += stages.depth, ring.advance(stages.number)) {
                        if (ring.stage % 2 != warp) continue;
                        const u32 count = min(stages.depth, k_blocks - first), bar = stages.full + 8 * ring.stage;
                        barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                        barrier_expect(bar, count * bytes);
                        for (u32 slot = 0; slot < count; ++slot)
                            bulk_copy(stages.weight_tile(ring.stage, slot), source + static_cast<i64>(first + slot) * n_aligned * kBlockK, bytes, bar);
                    }
                }
            }
        }
        __syncwarp();
    } else if (warp < 4) {
        wait_for_previous_kernel();
        Ring ring;
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            for (u32 unit = 0; unit < units.number; ++unit) {
                if (stages.per_unit == 1 && ring.stage % 2 != warp % 2) {
                    ring.advance(stages.number);
                    continue;
                }
                const u32 first = units.first_row(unit), unit_rows = units.rows(unit);
                CodeSource source;
                source.set(unit_rows, lane, [&](u32 row) { return h + static_cast<i64>(first + row) * k_blocks * kBlockK; });
                const bool of_weight = lane >= ROWS && lane < ROWS + 2;
                const float* scale = of_weight ? scale_b + units.expert[unit] * scale_b_stride + tile * rows / 128 + lane - ROWS : scale_h + first + lane;
                const i64 step = of_weight ? scale_b_row : scale_h_block_stride;
                for (u32 first_block = 0; first_block < k_blocks; first_block += stages.depth, ring.advance(stages.number)) {
                    if (ring.stage % 2 != warp % 2) continue;
                    barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                    const u32 count = min(stages.depth, k_blocks - first_block);
                    for (u32 slot = 0; slot < count; ++slot) {
                        source.copy(stages.activation_tile(ring.stage, slot), first_block + slot, lane);
                        if (of_weight || lane < unit_rows)
                            copy_4_async(smem_address(stages.block_scales(ring.stage, slot) + lane), scale + (first_block + slot) * step);
                    }
                    barrier_arrive_after_copies(stages.full + 8 * ring.stage);
                }
            }
        }
    } else {
        const u32 warpgroup = (warp - 4) / 4, thread = threadIdx.x - 128;
        const u32 low = warp % 4 * 16 + lane / 4, high = low + 8;
        float* const mine = sums + warpgroup * m * rows;
        wait_for_previous_kernel();  // also because what comes before may still read what `out` overwrites
        Ring ring;
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            for (u32 i = thread; i < 2 * m * rows; i += kMathThreads) sums[i] = 0.f;
            named_barrier(2, kMathThreads);
            const u32 in_block = tile * rows % 128, scale_low = (in_block + low) / 128, scale_high = (in_block + high) / 128;
            for (u32 unit = 0; unit < units.number; ++unit) {
                Sums sum;
#pragma unroll
                for (u32 i = 0; i < ROWS / 2; ++i) sum.value[i] = 0.f;
                bool any = false;
                for (u32 block = 0; block < k_blocks; block += stages.depth, ring.advance(stages.number)) {
                    if (ring.stage % 2 != warpgroup) continue;
                    any = true;
                    const u32 count = min(stages.depth, k_blocks - block);
                    barrier_wait(stages.full + 8 * ring.stage, ring.parity);
                    fence_async_shared();  // the loader's copies are no writes of the asynchronous kind
                    if (count == 1) multiply<1>(sum, stages, ring.stage, scale_low, scale_high, lane);
                    else if (count == 2) multiply<2>(sum, stages, ring.stage, scale_low, scale_high, lane);
                    else if (count == 3) multiply<3>(sum, stages, ring.stage, scale_low, scale_high, lane);
                    else multiply<kMaxDepth>(sum, stages, ring.stage, scale_low, scale_high, lane);
                }
                if (!any) continue;
                // A warp owns its rows of `mine`; lanes differ in rows and tokens, unless a token is there twice.
                const u32 first = units.first_row(unit), unit_rows = units.rows(unit);
#pragma unroll
                for (u32 j = 0; j < ROWS / 8; ++j) {
                    for (u32 turn = 0; turn < (in_turn_of_columns ? 4 : 1); ++turn) {
                        if (!in_turn_of_columns || turn == lane % 4) {
#pragma unroll
                            for (u32 i = 0; i < 2; ++i) {
                                const u32 column = j * 8 + lane % 4 * 2 + i;
                                if (column >= unit_rows) continue;
                                const float router = weight_of[first + column];
                                float* const place = mine + token_of[first + column] * rows;
                                if (low < rows) place[low] += router * sum.value[4 * j + i];
                                if (high < rows) place[high] += router * sum.value[4 * j + 2 + i];
                            }
                        }
                        __syncwarp();
                    }
                }
            }
            named_barrier(2, kMathThreads);
            const u32 exist = min(rows, n - tile * rows);
            for (u32 i = thread; i < m * rows; i += kMathThreads) {
                const u32 token = i / rows, row = i - token * rows;
                if (row < exist) store_element(out, static_cast<i64>(token) * n + tile * rows + row, out_type, sums[i] + sums[i + m * rows]);
            }
            named_barrier(2, kMathThreads);
        }
    }
}
