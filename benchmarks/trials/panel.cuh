// Linear layer for at most 64 quantised tokens: out[m, n] = x[m, k] . weight[n, k]^T with block scales, limited by how fast the weights stream.
//
// A multiprocessor takes in 54 bytes/ns from L2 (fitted, heuristics.py), and its share of the memory's bandwidth is 34: tokens that are fetched again for every
// few rows of the weight are what decode.cuh loses with 64 of them. Here a CTA owns a panel as wide as its share of the weight, 2 x COLUMNS rows of it,
// and fetches the tokens once for all of them, only those there are. Tokens take wgmma's 64-row side, so that a thread needs two of their scales.
// A cluster of SPLIT CTAs owns a panel and splits k; fp32 sums meet in the CTA that owns their columns, which adds them in the order of ranks.
//
// Warp roles (384 threads):
//   warps 0..3    producers, one lane each: weights, one contiguous copy a k-block; their scales; tokens; their scales.
//   warps 4..11   two math warpgroups, each on COLUMNS of the panel, all tokens.
// x: e4m3 codes in tiles [k-block][64][128], swizzled (quantize.cuh); weights and their scales as layout.py packs them. Weights may be requested
// before the previous kernel has ended, as far as `prefetch` stages reach.
// Barriers per stage: full (one arrival per producer + bytes), empty (one arrival per math warp). exchanged: 1 arrival + bytes of the peers' sums.
#include "wgmma.cuh"
#include "wgmma_columns.cuh"

constexpr u32 kTokens = 64, kTokenBytes = kTokens * kBlockK, kPanel = 2 * COLUMNS, kWeightBytes = kPanel * kBlockK;
constexpr u32 kStageBytes = kWeightBytes + kTokenBytes, kStageScales = kTokens + kScaleFloats;
constexpr u32 kGroups = COLUMNS / 8, kOwned = kGroups / SPLIT;  // of 8 columns and all tokens, of a warpgroup; of which a CTA adds up
constexpr u32 kGroupBytes = 256 * 16;                           // both warpgroups' lanes, 4 sums each
constexpr u32 kProducers = 4, kMathWarps = 8;

static_assert(COLUMNS % 8 == 0 && COLUMNS <= 128, "a warpgroup's columns lie in two scale blocks at most");
static_assert(kGroups % SPLIT == 0, "every CTA of a cluster owns as many columns");

struct Output {
    void* data;
    const void* bias;
    i64 stride;
    u32 m, n, type, bias_type, paired;  // paired: 16-bit elements, 4-byte aligned rows, n even

    DEVICE void write_pair(float first, float second, u32 row, u32 column) const {
        if (row >= m || column >= n) return;
        const bool both = column + 1 < n;
        const i64 at = row * stride + column;
        if (bias != nullptr) {
            first += load_element(bias, column, bias_type);
            if (both) second += load_element(bias, column + 1, bias_type);
        }
        if (paired) {
            *reinterpret_cast<u32*>(static_cast<u16*>(data) + at) = pack_elements(first, second, type);
        } else {
            store_element(data, at, type, first);
            if (both) store_element(data, at + 1, type, second);
        }
    }
};

extern "C" __global__ void __launch_bounds__(384, 1)
panel(const u8* __restrict__ x, const float* __restrict__ scale_a, void* __restrict__ out, const u8* __restrict__ weight, const float* __restrict__ scale_b,
      const void* __restrict__ bias, i64 out_stride, u32 m, u32 n, u32 k_blocks, u32 n_aligned, u32 m_aligned, u32 scale_b_stride, u32 num_stages,
      u32 prefetch, u32 out_type, u32 bias_type, u32 out_paired) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: stages | room for sums | scales of the stages | barriers
    u8* const room = shared + num_stages * kStageBytes;
    const u32 stages = smem_address(shared), scales = stages + num_stages * kStageBytes + kGroups * kGroupBytes;
    const u32 full = scales + num_stages * kStageScales * 4, empty = full + num_stages * 8, exchanged = empty + num_stages * 8;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = SPLIT > 1 ? cluster_rank() : 0;
    const u32 first_tile = blockIdx.x / SPLIT, tile_step = gridDim.x / SPLIT, tiles = ceil_div(n, kPanel);
    const u32 first_block = k_blocks * rank / SPLIT, blocks = k_blocks * (rank + 1) / SPLIT - first_block;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < num_stages; ++s) {
            barrier_init(full + 8 * s, kProducers);
            barrier_init(empty + 8 * s, kMathWarps);
        }
        if (SPLIT > 1) {
            barrier_init(exchanged, 1);
            barrier_expect(exchanged, kGroups * kGroupBytes);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (SPLIT > 1) cluster_arrive_relaxed();  // waited for before the first access to a peer's shared memory
    launch_next_kernel();

    if (warp < kProducers) {
        const bool leader = elect_lane();
        const u32 total = (SPLIT > 1 ? 1 : ceil_div(tiles - first_tile, tile_step)) * blocks;  // a cluster has one tile
        const u32 token_bytes = (m + 7) / 8 * 8 * kBlockK;
        u32 row = first_tile * kPanel, block = first_block;
        Ring ring;
        auto produce = [&](u32 first, u32 last) {
            for (u32 item = first; item < last; ++item, ring.advance(num_stages)) {
                const u32 s = ring.stage, bar = full + 8 * s, of_stage = scales + s * kStageScales * 4;
                barrier_wait(empty + 8 * s, ring.parity ^ 1);
                if (warp == 0) {
                    const u32 bytes = min(kPanel, n_aligned - row) * kBlockK;
                    barrier_expect(bar, bytes);
                    bulk_copy(stages + s * kStageBytes, weight + (static_cast<i64>(block) * n_aligned + row) * kBlockK, bytes, bar);
                } else if (warp == 1) {
                    barrier_expect(bar, kScaleFloats * 4);
                    bulk_copy(of_stage + kTokens * 4, scale_b + static_cast<i64>(block) * scale_b_stride + min(row / 128 & ~3u, scale_b_stride - kScaleFloats),
                              kScaleFloats * 4, bar);
                } else if (warp == 2) {
                    barrier_expect(bar, token_bytes);
                    bulk_copy(stages + s * kStageBytes + kWeightBytes, x + static_cast<i64>(block) * kTokenBytes, token_bytes, bar);
                } else {
                    barrier_expect(bar, m_aligned * 4);
                    bulk_copy(of_stage, scale_a + static_cast<i64>(block) * m_aligned, m_aligned * 4, bar);
                }
                if (++block == first_block + blocks) {
                    block = first_block;
                    row += tile_step * kPanel;
                }
            }
        };
        const u32 early = min(total, warp == 0 ? prefetch : warp == 1 ? num_stages : 0);
        if (leader) produce(0, early);
        __syncwarp();
        wait_for_previous_kernel();
        if (leader) produce(early, total);
        __syncwarp();
        if (SPLIT > 1) cluster_wait();
        return;
    }

    const u32 math = __shfl_sync(0xffffffffu, warp / 4 - 1, 0), slot = (threadIdx.x - 128) * 16;
    const u32 own_a = matrix_descriptor_low(stages + kWeightBytes), own_b = matrix_descriptor_low(stages + math * COLUMNS * kBlockK);
    const u32 row_scales = scales + (warp % 4 * 16 + lane / 4) * 4;
    const Output output{out, bias, out_stride, m, n, out_type, bias_type, out_paired};
    Ring ring;
    if (SPLIT > 1) cluster_wait();
    for (u32 tile = first_tile; tile < tiles; tile += tile_step) {
        const u32 column = tile * kPanel + math * COLUMNS, first_scale = min(tile * kPanel / 128 & ~3u, scale_b_stride - kScaleFloats);
        // A warpgroup whose columns all lie past n multiplies like the others: what it reads exists, and it writes nothing.
        const u32 scale_index = min(column / 128 - first_scale, kScaleFloats - 2), boundary = 128 - column % 128;  // where the second block starts
        float sum[COLUMNS / 2];
#pragma unroll
        for (u32 i = 0; i < COLUMNS / 2; ++i) sum[i] = 0.f;
        for (u32 block = 0; block < blocks; ++block, ring.advance(num_stages)) {
            const u32 s = ring.stage, low_a = own_a + s * (kStageBytes / 16), low_b = own_b + s * (kStageBytes / 16);
            barrier_wait(full + 8 * s, ring.parity);
            float partial[COLUMNS / 2];
            fence_registers(partial);
            wgmma_fence();
#pragma unroll
            for (u32 i = 0; i < kBlockK / 32; ++i)
                Wgmma<COLUMNS>::multiply(partial, matrix_descriptor_at(low_a + 2 * i), matrix_descriptor_at(low_b + 2 * i), i > 0);
            wgmma_commit();
            const u32 of_stage = s * kStageScales * 4;
            const float row_low = load_shared(row_scales + of_stage), row_high = load_shared(row_scales + of_stage + 32);
            const float2 of_blocks = {load_shared(scales + of_stage + (kTokens + scale_index) * 4), load_shared(scales + of_stage + (kTokens + scale_index + 1) * 4)};
            const float low = row_low * of_blocks.x, high = row_high * of_blocks.x, next_low = row_low * of_blocks.y, next_high = row_high * of_blocks.y;
            wgmma_wait<0>();
            fence_registers(partial);
            __syncwarp();  // one lane arrives for all
            barrier_arrive_after(empty + 8 * s, next_low, next_high, lane == 0);
#pragma unroll
            for (u32 g = 0; g < kGroups; ++g) {
                const bool first = g * 8 < boundary;
                const float scale_low = first ? low : next_low, scale_high = first ? high : next_high;
                sum[4 * g] += scale_low * partial[4 * g], sum[4 * g + 1] += scale_low * partial[4 * g + 1];
                sum[4 * g + 2] += scale_high * partial[4 * g + 2], sum[4 * g + 3] += scale_high * partial[4 * g + 3];
            }
        }
        if (tile == first_tile) wait_for_previous_kernel();  // it may still read what this kernel overwrites
        // Group g of a warpgroup belongs to rank g / kOwned, whose room holds [g % kOwned][source][thread]. Also with one source: writing straight
        // from the unrolled registers takes NVRTC a hundred times as long to compile. A thread reads what its like wrote: nothing to wait for.
#pragma unroll
        for (u32 g = 0; g < kGroups; ++g) {
            const float4 v = {sum[4 * g], sum[4 * g + 1], sum[4 * g + 2], sum[4 * g + 3]};
            u8* const place = room + (g % kOwned * SPLIT + rank) * kGroupBytes + slot;
            if (SPLIT == 1) *reinterpret_cast<float4*>(place) = v;
            else store_async(map_to_rank(smem_address(place), g / kOwned), v, map_to_rank(exchanged, g / kOwned));
        }
        if (SPLIT > 1) barrier_wait(exchanged, 0);
        for (u32 g = 0; g < kOwned; ++g) {
            float4 total = {0.f, 0.f, 0.f, 0.f};
            for (u32 r = 0; r < SPLIT; ++r) {
                const float4 part = *reinterpret_cast<const float4*>(room + (g * SPLIT + r) * kGroupBytes + slot);
                total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
            }
            const u32 row = warp % 4 * 16 + lane / 4, at = column + (rank * kOwned + g) * 8 + lane % 4 * 2;
            output.write_pair(total.x, total.y, row, at);
            output.write_pair(total.z, total.w, row + 8, at);
        }
        if (SPLIT > 1) break;  // a cluster has one tile
    }
}
