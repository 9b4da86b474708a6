// Dense FP8 GEMM with block scales: out[m, n] = sum over k-blocks of (a[m, kb] . b[n, kb]) * scale_a[m, kb] * scale_b[n / 128, kb] (+ bias).
//
// Persistent CTAs walk output tiles of BLOCK_M x BLOCK_N. Warp roles:
//   warpgroup 0      producers. A lane each of warps 0, 1 and 2 fetches, per stage, the tile of a, the tile of b (tensor copies), and the
//                    scales (bulk copies); the other warp idles (a warpgroup is the unit that can give registers away).
//   warpgroups 1..W  math. Each owns BLOCK_M / W rows: WAVES slices of 64 rows and BLOCK_N columns.
// Barriers per stage: full (3 arrivals + bytes), filled by the copies; empty (one arrival per math warp). The tensor core accumulates one
// 128-deep block of k in `partial`; promotion scales it into fp32 `sum`, because the FP8 accumulator keeps fewer bits than fp32.
//
// AHEAD kernels, of one slice a warpgroup, issue the product of the next block before they wait for that of the last one: two sets of
// products beside the sums. Elsewhere the time from a product's end to the warpgroup's next one decides, so little is done between them:
// descriptors stay in uniform registers, a stage is released by one comparison and its arrivals, the next stage's barrier is asked for
// before the promotion. What lost is in docs/kernel-notes-gemm.md: turns, tiles of 128 x 256 with a in registers, 64 columns at a time,
// clusters that share a or b.
//
// 16-bit outputs leave through the copy engine while the next tile is computed, from a room of their own: were it the last stages of the
// tile, their next data would be late.
//
// SPLIT_K kernels can be launched in clusters of 2, 4 or 8 that share the k-blocks of one tile: every CTA sends its sums to the CTA that
// owns their columns (st.async, counted by the barrier `exchanged`), which adds them in the order of ranks.
//
// a and a row-major b come through 3D maps {128 bytes of k, rows, k-blocks}, swizzled by the copy, out-of-range rows as zeros. These take the
// copy engine longer than rows that exist, so there are few of a: the last tile of rows is a whole one that ends with a's rows (rounded up to 4, for its
// scales), and writes some of them twice, the same bits; where a has fewer rows than a tile, boxes have no more than these (bytes_a a stage), and no
// output needs the others. A packed b is swizzled in memory,
// and a tile of it contiguous; by contract it is complete, so it is fetched before the previous kernel has ended.
#include "arrivals.cuh"
#include "output.cuh"
#include "tiles.cuh"

constexpr u32 kWaves = BLOCK_M / (64 * MATH_WARPGROUPS);
// Columns that share a scale of b in every tile: tiles start at multiples of BLOCK_N, blocks of scales at multiples of 128.
constexpr u32 kScaled = BLOCK_N % 128 == 0 ? 128 : BLOCK_N % 64 == 0 ? 64 : 32;
constexpr u32 kScales = BLOCK_N / kScaled;
constexpr u32 kStored = BLOCK_N % 64 == 0 ? 64 : 32;  // columns of a box of outputs, as many bytes as its rows are swizzled by
constexpr bool kPeeled = UNROLLED && NUM_STAGES <= 4;
constexpr u32 kShares = kWaves * (BLOCK_N / 8);  // of a math warpgroup in the exchange
constexpr u32 kRoomBytes = BLOCK_M * BLOCK_N * (SPLIT_K ? 4 : 2);  // outputs on their way to memory, or sums to another CTA
constexpr u32 kBytesA = BLOCK_M * kBlockK, kBytesB = BLOCK_N * kBlockK;
constexpr u32 kStageBytes = kBytesA + kBytesB, kStageStep = kStageBytes / 16;  // of descriptors
constexpr u32 kStageScaleBytes = (BLOCK_M + kScaleFloats) * 4;
constexpr u32 kProducers = 3;
constexpr u32 kEmptyArrivals = MATH_WARPGROUPS * 4 * kArrivalsOfWarp;
constexpr u32 kShareBytes = kExchangedBytes<MATH_WARPGROUPS>;

static_assert(BLOCK_M % (64 * MATH_WARPGROUPS) == 0 && BLOCK_N % 32 == 0, "tiles are whole wgmma slices, and boxes of outputs");
static_assert(!AHEAD || kWaves == 1, "two sets of products for one slice alone");
static_assert(!SPLIT_K || kShares % 4 == 0, "up to 4 CTAs, and 8 where GemmConfig.splits says so, own as many shares each");

struct Tile {
    u32 m, n;  // of this CTA, in elements
};

// Tiles in strips of `strip` columns of tiles, n fastest, so that a wave of CTAs shares rows of a and b in L2; without strips m fastest, so
// that CTAs beside each other share a tile of b as it comes from memory. No tile begins behind `last_m`.
DEVICE Tile tile_at(u32 index, u32 tiles_m, u32 tiles_n, u32 strip, u32 last_m) {
    if (strip == 0) return {min(index % tiles_m * BLOCK_M, last_m), index / tiles_m * BLOCK_N};
    const u32 per_strip = strip * tiles_m;
    const u32 first = index / per_strip * strip;
    const u32 width = min(strip, tiles_n - first);
    const u32 local = index % per_strip;
    return {min(local / width * BLOCK_M, last_m), (first + local % width) * BLOCK_N};
}

extern "C" __global__ void __launch_bounds__(128 * (1 + MATH_WARPGROUPS), CTAS_PER_SM)
gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_out,
     const u8* __restrict__ packed_b, const float* __restrict__ scale_a, const float* __restrict__ scale_b, void* __restrict__ out,
     const void* __restrict__ bias, i64 out_stride, u32 m, u32 n, u32 k_blocks, u32 m_aligned, u32 scale_b_stride, u32 strip, u32 out_type, u32 bias_type, u32 mapped_out,
     u32 n_aligned, u32 bytes_a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 tiles = smem_address(shared);
    const u32 room = tiles + NUM_STAGES * kStageBytes, scales = room + kRoomBytes;
    const u32 full = scales + NUM_STAGES * kStageScaleBytes, empty = full + NUM_STAGES * 8;
    const u32 exchanged = empty + NUM_STAGES * 8;  // of SPLIT_K kernels
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), split = SPLIT_K ? cluster_size() : 1;
    const u32 split_rank = SPLIT_K ? cluster_rank() : 0;

    if (threadIdx.x == 0) {
        prefetch_map(&map_a);
        if (!packed_b) prefetch_map(&map_b);
        for (u32 s = 0; s < NUM_STAGES; ++s) {
            barrier_init(full + 8 * s, kProducers);
            barrier_init(empty + 8 * s, kEmptyArrivals);
        }
        if (split > 1) {
            barrier_init(exchanged, 1);
            barrier_expect(exchanged, kShares * kShareBytes);
        }
        barrier_init_fence();
    }
    meet(split);
    launch_next_kernel();

    const u32 tiles_m = ceil_div(m, u32(BLOCK_M)), tiles_n = ceil_div(n, u32(BLOCK_N));
    const u32 last_m = m_aligned > BLOCK_M ? m_aligned - BLOCK_M : 0;
    const u32 first_tile = blockIdx.x / split, tile_step = gridDim.x / split, num_tiles = tiles_m * tiles_n;
    const u32 first_block = k_blocks * split_rank / split, end_block = k_blocks * (split_rank + 1) / split;
    Ring ring;

    if (warpgroup == 0) {
        if (MATH_WARPGROUPS == 2) give_registers<40>();
        const u32 producer = threadIdx.x / 32;
        if (producer < kProducers && elect_lane()) {
            if (producer != 1 || !packed_b) wait_for_previous_kernel();
            for (u32 t = first_tile; t < num_tiles; t += tile_step) {
                const Tile tile = tile_at(t, tiles_m, tiles_n, strip, last_m);
                const u32 scale_rows = min(u32(BLOCK_M), m_aligned - tile.m);
                // Rows of a packed b. What lies past them stays as it is: no output needs it.
                const u32 rows_b = tile.n < n_aligned ? min(u32(BLOCK_N), n_aligned - tile.n) : 0;
                const float* tile_scale_a = scale_a + tile.m;
                const float* tile_scale_b = scale_b + first_scale_of(tile.n, scale_b_stride);
                for (u32 kb = first_block; kb < end_block; ++kb, ring.advance(NUM_STAGES)) {
                    const u32 s = ring.stage, bar = full + 8 * s;
                    barrier_wait(empty + 8 * s, ring.parity ^ 1);
                    if (producer == 0) {
                        barrier_expect(bar, bytes_a);
                        tensor_copy(tiles + s * kStageBytes, &map_a, 0, tile.m, kb, bar);
                    } else if (producer == 1) {
                        const u32 target = tiles + s * kStageBytes + kBytesA;
                        barrier_expect(bar, packed_b ? rows_b * kBlockK : kBytesB);
                        if (packed_b) {
                            const u8* source = packed_b + (static_cast<i64>(kb) * n_aligned + tile.n) * kBlockK;
                            if (rows_b) bulk_copy(target, source, rows_b * kBlockK, bar);
                        } else tensor_copy(target, &map_b, 0, tile.n, kb, bar);
                    } else {
                        const u32 target = scales + s * kStageScaleBytes;
                        barrier_expect(bar, (scale_rows + kScaleFloats) * 4);
                        bulk_copy(target, tile_scale_a + static_cast<i64>(kb) * m_aligned, scale_rows * 4, bar);
                        bulk_copy(target + BLOCK_M * 4, tile_scale_b + static_cast<i64>(kb) * scale_b_stride, kScaleFloats * 4, bar);
                    }
                }
            }
        }
    } else {
        if (MATH_WARPGROUPS == 2) take_registers<232>();
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
        const u32 row_in_tile = (warpgroup - 1) * kWaves * 64;
        const Output output{out, bias, out_stride, m, n, out_type, bias_type};
        const bool stores_by_copy = mapped_out && split == 1;
        const u32 own_a = matrix_descriptor_low(tiles + row_in_tile * kBlockK), own_b = matrix_descriptor_low(tiles + kBytesA);
        // From a shuffle, for ptxas would compute it anew in every block.
        const u32 row_scales = __shfl_sync(0xffffffffu, scales + (row_in_tile + warp * 16 + lane / 4) * 4, lane);
        // Descriptors of the ring's stage, where that is no constant: found while products are under way, or the first one waits for six operations in turn.
        u32 at_a = own_a, at_b = own_b;
        auto find_stage = [&] {
            at_a = ring.stage ? at_a + kStageStep : own_a;
            at_b = ring.stage ? at_b + kStageStep : own_b;
        };
        bool full_already = false;

        for (u32 t = first_tile; t < num_tiles; t += tile_step) {
            const Tile tile = tile_at(t, tiles_m, tiles_n, strip, last_m);
            u32 block_scale[kScales];
#pragma unroll
            for (u32 i = 0; i < kScales; ++i) {
                const u32 column = tile.n + i * kScaled;
                const u32 tile_scale_b = column < n ? column / 128 - first_scale_of(tile.n, scale_b_stride) : 0;
                // Plus 0, which ptxas cannot know: it moves a value that all lanes share to a uniform register, and waits for that.
                block_scale[i] = scales + (BLOCK_M + tile_scale_b) * 4 + lane * (k_blocks >> 31);
            }
            float sum[kWaves][BLOCK_N / 2];
#pragma unroll
            for (u32 wave = 0; wave < kWaves; ++wave)
#pragma unroll
                for (u32 i = 0; i < BLOCK_N / 2; ++i) sum[wave][i] = 0.f;
            // The product of a stage and slice, under way.
            auto issue = [&](float (&partial)[BLOCK_N / 2], u32 s, u32 wave) {
                const u32 stage_a = UNROLLED ? own_a + s * kStageStep : at_a, low_a = stage_a + wave * (64 * kBlockK / 16);
                const u32 low_b = UNROLLED ? own_b + s * kStageStep : at_b;
                fence_registers(partial);
                wgmma_fence();
                issue_product<BLOCK_N>(partial, low_a, low_b);
            };
            auto multiply_block = [&](u32 s) {
                if (!full_already) barrier_wait(full + 8 * s, ring.parity);
                float scale_of_block[kScales];
#pragma unroll
                for (u32 wave = 0; wave < kWaves; ++wave) {
                    float partial[BLOCK_N / 2];
                    issue(partial, s, wave);
                    if (kScales > 2) __syncwarp();  // or ptxas waits for so many scales between the first product and the second
#pragma unroll
                    for (u32 i = 0; i < (wave == 0 ? kScales : 0); ++i) scale_of_block[i] = load_shared(block_scale[i] + s * kStageScaleBytes);
                    const float low_row = load_shared(row_scales + s * kStageScaleBytes + wave * 256);
                    const float high_row = load_shared(row_scales + s * kStageScaleBytes + wave * 256 + 32);
                    float low[kScales], high[kScales];
#pragma unroll
                    for (u32 i = 0; i < kScales; ++i) {
                        low[i] = low_row * scale_of_block[i];
                        high[i] = high_row * scale_of_block[i];
                    }
                    wgmma_wait<0>();
                    fence_registers(partial);
                    if (wave == kWaves - 1) {
                        __syncwarp();
                        barrier_arrive_after_words(empty + 8 * s, low[0], high[0], arrives_for_warp(lane));
                        ring.stage = s;
                        ring.advance(NUM_STAGES);
                        find_stage();
                        full_already = barrier_passed(full + 8 * ring.stage, ring.parity);
                    }
#pragma unroll
                    for (u32 i = 0; i < BLOCK_N / 2; ++i) sum[wave][i] += (i % 4 < 2 ? low : high)[i * 2 / kScaled] * partial[i];
                }
            };
            u32 remaining = end_block - first_block;
            if constexpr (AHEAD) {
                float even[BLOCK_N / 2], odd[BLOCK_N / 2];
                auto finish = [&](float (&partial)[BLOCK_N / 2], float (&next)[BLOCK_N / 2], bool more) {
                    const u32 s = ring.stage;
                    const float low_row = load_shared(row_scales + s * kStageScaleBytes), high_row = load_shared(row_scales + s * kStageScaleBytes + 32);
                    float low[kScales], high[kScales];
#pragma unroll
                    for (u32 i = 0; i < kScales; ++i) {
                        const float of_block = load_shared(block_scale[i] + s * kStageScaleBytes);
                        low[i] = low_row * of_block;
                        high[i] = high_row * of_block;
                    }
                    ring.advance(NUM_STAGES);
                    find_stage();
                    if (more) {
                        barrier_wait(full + 8 * ring.stage, ring.parity);
                        issue(next, ring.stage, 0);
                        wgmma_wait<1>();
                    } else {
                        wgmma_wait<0>();
                    }
                    fence_registers(partial);
                    __syncwarp();
                    barrier_arrive_after_words(empty + 8 * s, low[0], high[0], arrives_for_warp(lane));
#pragma unroll
                    for (u32 i = 0; i < BLOCK_N / 2; ++i) sum[0][i] += (i % 4 < 2 ? low : high)[i * 2 / kScaled] * partial[i];
                };
                if (remaining > 0) {
                    barrier_wait(full + 8 * ring.stage, ring.parity);
                    issue(even, ring.stage, 0);
                    for (; remaining > 2; remaining -= 2) {
                        finish(even, odd, true);
                        finish(odd, even, true);
                    }
                    if (remaining == 2) {
                        finish(even, odd, true);
                        finish(odd, even, false);
                    } else {
                        finish(even, odd, false);
                    }
                    remaining = 0;
                }
            }
            if (UNROLLED) {  // rounds of all stages, whose addresses are constants; before and after them what makes them whole
#pragma unroll
                for (u32 s = 1; s < (kPeeled ? NUM_STAGES : 1); ++s)
                    if (s == ring.stage && remaining > 0) {
                        multiply_block(s);
                        --remaining;
                    }
                for (; !kPeeled && ring.stage != 0 && remaining > 0; --remaining) multiply_block(ring.stage);
                for (; remaining >= NUM_STAGES; remaining -= NUM_STAGES)
#pragma unroll
                    for (u32 s = 0; s < NUM_STAGES; ++s) multiply_block(s);
#pragma unroll
                for (u32 s = 0; s + 1 < (kPeeled ? NUM_STAGES : 1); ++s)
                    if (remaining > 0) {
                        multiply_block(s);
                        --remaining;
                    }
            }
            for (; remaining > 0; --remaining) multiply_block(ring.stage);
            if (t == first_tile) wait_for_previous_kernel();  // it may still read what this kernel overwrites
            if (SPLIT_K && split > 1) {
                const u32 owned = kShares / split, slot = (warpgroup - 1) * 2048 + threadIdx.x % 128 * 16;
                send_sums<MATH_WARPGROUPS>(sum, room, exchanged, split, split_rank, slot);
                barrier_wait(exchanged, 0);
                for (u32 i = 0; i < owned; ++i) {
                    const float4 total = received_sum<MATH_WARPGROUPS>(shared + NUM_STAGES * kStageBytes, i, owned, split, slot);
                    const Share share = share_at<BLOCK_N / 8>(split_rank * owned + i);
                    const u32 row = tile.m + row_in_tile + share.slice * 64 + warp * 16 + share.row + lane / 4;
                    output.write_sixteen(total, row, tile.n + share.column, lane, mapped_out);
                }
                break;  // one tile a cluster: the exchange is used once
            }
#pragma unroll
            for (u32 wave = 0; wave < kWaves; ++wave)
                if (bias != nullptr) output.add_bias(sum[wave], tile.n, lane);
            const u32 first_row = row_in_tile + warp * 16;
            if (stores_by_copy) {
                if (lane == 0) bulk_wait_read();  // of the last tile's outputs
                __syncwarp();
                store_slices<kStored, BLOCK_M>(&map_out, sum, room, first_row, tile.n, tile.m, out_type, lane);
            } else {
#pragma unroll
                for (u32 wave = 0; wave < kWaves; ++wave) output.write(sum[wave], tile.m + first_row + wave * 64, tile.n, lane);
            }
        }
        if (stores_by_copy && lane == 0) bulk_wait();
    }
}
