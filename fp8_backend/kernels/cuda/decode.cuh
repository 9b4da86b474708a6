// Linear layer for few tokens: out[m, n] = x[m, k] . weight[n, k]^T with block scales, limited by how fast the weights stream from memory.
//
// Weights take wgmma's 64-row side and tokens its N side (TOKENS = 8..64), so nothing is padded to 64 tokens. A cluster of SPLIT CTAs owns
// `rows` rows of the weight (a run-time multiple of 8, at most 128) and splits k; each CTA pushes its fp32 sums to the CTA of the cluster
// that owns them, which adds them in rank order: no atomics, no workspace, the same bits every run.
//
// Warp roles (384 threads):
//   warp 0        fetches weights, one contiguous copy of rows x 128 bytes a k-block, before the previous kernel has ended.
//   warps 1..3    FUSED: help to quantise.
//   warps 4..11   two math warpgroups, 64 rows each; FUSED: quantise first.
// FUSED = 1: x is 16-bit or fp32; every CTA quantises the columns of its k range once, into shared memory, exactly as quantize.cuh does.
// FUSED = 0: x arrives as e4m3 codes through a 3D map {128 bytes of k, rows, k-blocks} and MN-major scales, fetched stage by stage.
// Barriers per stage: full (1 arrival + bytes), empty (one arrival per active math warp). Named barrier 1: all but warp 0 (quantised
// tokens are ready); named barrier 2: the math warps (sums are exchanged).
#include "group.cuh"
#include "wgmma.cuh"

constexpr u32 kRows = 128, kTileBytes = kRows * kBlockK;
constexpr u32 kTokenBytes = TOKENS * kBlockK;
constexpr u32 kStageBytes = kTileBytes + (FUSED ? 0 : kTokenBytes);
constexpr u32 kMathWarps = 8, kUnroll = TOKENS <= 16 ? 4 : 2;
constexpr u32 kTokenStride = 20;  // floats between tokens in the exchange buffer: 16 rows + 4 against bank conflicts
constexpr u32 kSliceFloats = TOKENS * kTokenStride;
constexpr u32 kSlicesOwned = kMathWarps / SPLIT;

static_assert(kMathWarps % SPLIT == 0, "every CTA of the cluster owns the same number of 16-row slices");

#if FUSED
// Quantises [m, blocks * 128] columns of x from `first_column` on into swizzled tiles [block][TOKENS][128] and scales [block][TOKENS].
DEVICE void quantise_tokens(const void* x, i64 stride, u32 type, u32 vectorised, u32 m, u32 k, u32 first_block, u32 blocks, u8* tokens,
                            float* scales, u32 thread, u32 threads) {
    const u32 lane = thread % kGroupLanes, groups = m * blocks, stride_groups = threads / kGroupLanes;
    constexpr u32 kBatch = 4;  // loads in flight a thread
    // The bound is the warp's, not the lane's: both halves of a warp shuffle together.
    for (u32 base = thread / 32 * 2; base < groups; base += stride_groups * kBatch) {
        Group group[kBatch];
#pragma unroll
        for (u32 b = 0; b < kBatch; ++b) {
            const u32 index = base + thread % 32 / kGroupLanes + b * stride_groups;
            const u32 column = (first_block + index / m) * kBlockK + lane * 8;
            const u32 valid = index < groups && column < k ? min(k - column, 8u) : 0;
            group[b].load(x, static_cast<i64>(index % m) * stride + column, valid, type, vectorised);
        }
#pragma unroll
        for (u32 b = 0; b < kBatch; ++b) {
            const u32 index = base + thread % 32 / kGroupLanes + b * stride_groups, token = index % m, block = index / m;
            const float largest = group[b].amax();
            if (index >= groups) continue;
            u8* row = tokens + block * kTokenBytes + token * kBlockK;
            *reinterpret_cast<uint2*>(row + ((lane / 2) ^ (token % 8)) * 16 + lane % 2 * 8) = group[b].codes(largest);
            if (lane == 0) scales[block * TOKENS + token] = group_scale(largest);
        }
    }
}
#endif

struct Sums {
    float value[TOKENS / 2];
};

// One group of kCount k-blocks: kCount x 4 wgmma in flight at once, then promotion. Stages are released as they are done with.
template <u32 kCount>
DEVICE void multiply_blocks(Sums& sum, Ring<NUM_STAGES>& ring, u32 block, u32 stages, u32 row, u32 resident_tokens, const float* resident_scales,
                            const float* stage_scales, const float (&low)[kCount], const float (&high)[kCount], u32 full, u32 empty, u32 lane) {
    float partial[kCount][TOKENS / 2];
    u32 stage[kCount];
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        stage[u] = ring.stage;
        barrier_wait(full + 8 * stage[u], ring.parity);
        ring.advance();
    }
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) fence_registers(partial[u]);
    wgmma_fence();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        const u32 tile = stages + stage[u] * kStageBytes;
        const u64 weight = matrix_descriptor(tile + row * kBlockK);
        const u64 tokens = matrix_descriptor(FUSED ? resident_tokens + (block + u) * kTokenBytes : tile + kTileBytes);
#pragma unroll
        for (u32 i = 0; i < kBlockK / 32; ++i) Wgmma<TOKENS>::multiply(partial[u], weight + 2 * i, tokens + 2 * i, i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) fence_registers(partial[u]);
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        const float* scale_a = FUSED ? resident_scales + (block + u) * TOKENS : stage_scales + stage[u] * TOKENS;
#pragma unroll
        for (u32 j = 0; j < TOKENS / 8; ++j) {
            const float2 scale = *reinterpret_cast<const float2*>(scale_a + j * 8 + lane % 4 * 2);
            sum.value[4 * j] += scale.x * low[u] * partial[u][4 * j];
            sum.value[4 * j + 1] += scale.y * low[u] * partial[u][4 * j + 1];
            sum.value[4 * j + 2] += scale.x * high[u] * partial[u][4 * j + 2];
            sum.value[4 * j + 3] += scale.y * high[u] * partial[u][4 * j + 3];
        }
        if (lane == 0) barrier_arrive(empty + 8 * stage[u]);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
decode(const __grid_constant__ TensorMap map_x, const void* __restrict__ x, const u8* __restrict__ weight, const float* __restrict__ scale_a,
       const float* __restrict__ scale_b, void* __restrict__ out, const void* __restrict__ bias, i64 x_stride, i64 out_stride, u32 m, u32 n,
       u32 k, u32 k_blocks, u32 n_aligned, u32 m_aligned, u32 scale_b_stride, u32 rows, u32 x_type, u32 x_vectorised, u32 out_type,
       u32 bias_type, u32 out_paired) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: stages | FUSED: tokens of the k range | exchange buffer | scales (FUSED: of the k range, else of the stages) | barriers
    const u32 blocks_most = ceil_div(k_blocks, u32(SPLIT));
    u8* const resident = shared + NUM_STAGES * kStageBytes;
    float* const exchange = reinterpret_cast<float*>(resident + (FUSED ? blocks_most * kTokenBytes : 0));
    float* const scales = exchange + kMathWarps * kSliceFloats;
    const u32 stages = smem_address(shared);
    const u32 full = smem_address(scales + (FUSED ? blocks_most : NUM_STAGES) * TOKENS), empty = full + NUM_STAGES * 8;

    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = SPLIT > 1 ? cluster_rank() : 0;
    const u32 tiles = ceil_div(n, rows), first_tile = blockIdx.x / SPLIT, tile_step = gridDim.x / SPLIT;
    const u32 first_block = k_blocks * rank / SPLIT, blocks = k_blocks * (rank + 1) / SPLIT - first_block;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < NUM_STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, rows > 64 ? kMathWarps : kMathWarps / 2);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (SPLIT > 1) cluster_arrive();  // waited for before the first access to a peer's shared memory
    launch_next_kernel();

    if (warp == 0) {
        if (elect_lane()) {
            const u32 total = first_tile < tiles ? ((tiles - 1 - first_tile) / tile_step + 1) * blocks : 0;
            const u32 token_scale_bytes = min(u32(TOKENS), m_aligned) * 4;
            Ring<NUM_STAGES> ring;
            auto fetch_weight = [&](u32 item, u32 s) {
                const u32 row = (first_tile + item / blocks * tile_step) * rows;
                const u32 bytes = min(rows, n_aligned - row) * kBlockK;
                barrier_expect(full + 8 * s, bytes + (FUSED ? 0 : kTokenBytes + token_scale_bytes));
                bulk_copy(stages + s * kStageBytes, weight + (static_cast<i64>(first_block + item % blocks) * n_aligned + row) * kBlockK, bytes,
                          full + 8 * s);
            };
            auto fetch_tokens = [&](u32 item, u32 s) {
                const u32 block = first_block + item % blocks;
                tensor_copy(stages + s * kStageBytes + kTileBytes, &map_x, 0, 0, block, full + 8 * s);
                bulk_copy(smem_address(scales + s * TOKENS), scale_a + static_cast<i64>(block) * m_aligned, token_scale_bytes, full + 8 * s);
            };
            const u32 ahead = min(total, u32(NUM_STAGES));
            for (u32 item = 0; item < ahead; ++item) fetch_weight(item, item);
            if (!FUSED) {
                wait_for_previous_kernel();
                for (u32 item = 0; item < ahead; ++item) fetch_tokens(item, item);
            }
            for (u32 item = ahead; item < total; ++item, ring.advance()) {
                barrier_wait(empty + 8 * ring.stage, ring.parity);
                fetch_weight(item, ring.stage);
                if (!FUSED) fetch_tokens(item, ring.stage);
            }
        }
        __syncwarp();
    } else {
        wait_for_previous_kernel();
#if FUSED
        const u32 thread = threadIdx.x - 32;
        quantise_tokens(x, x_stride, x_type, x_vectorised, m, k, first_block, blocks, resident, scales, thread, 352);
        fence_async_shared();
        named_barrier(1, 352);
#endif
    }

    if (warp >= 4) {
        const u32 math_warp = warp - 4, row_in_tile = math_warp / 4 * 64 + math_warp % 4 * 16 + lane / 4;
        const bool active = math_warp / 4 * 64 < rows;
        const u32 n_blocks = ceil_div(n, 128u);
        Ring<NUM_STAGES> ring;
        for (u32 t = first_tile; t < tiles; t += tile_step) {
            const u32 first_row = t * rows;
            Sums sum;
#pragma unroll
            for (u32 i = 0; i < TOKENS / 2; ++i) sum.value[i] = 0.f;
            if (active) {
                const float* row_low = scale_b + static_cast<i64>(min((first_row + row_in_tile) / 128, n_blocks - 1)) * scale_b_stride + first_block;
                const float* row_high = scale_b + static_cast<i64>(min((first_row + row_in_tile + 8) / 128, n_blocks - 1)) * scale_b_stride + first_block;
                u32 block = 0;
                for (; block + kUnroll <= blocks; block += kUnroll) {
                    float low[kUnroll], high[kUnroll];
#pragma unroll
                    for (u32 u = 0; u < kUnroll; ++u) {
                        low[u] = __ldg(row_low + block + u);
                        high[u] = __ldg(row_high + block + u);
                    }
                    multiply_blocks<kUnroll>(sum, ring, block, stages, math_warp / 4 * 64, smem_address(resident), scales, scales, low, high,
                                             full, empty, lane);
                }
                for (; block < blocks; ++block) {
                    const float low[1] = {__ldg(row_low + block)}, high[1] = {__ldg(row_high + block)};
                    multiply_blocks<1>(sum, ring, block, stages, math_warp / 4 * 64, smem_address(resident), scales, scales, low, high, full,
                                       empty, lane);
                }
            }
            if (SPLIT > 1) cluster_wait();
            // Exchange: slice w (16 rows) belongs to rank w / kSlicesOwned; its buffer there is [source rank][slice][token][row].
            const u32 owner = math_warp / kSlicesOwned, slot = rank * kSlicesOwned + math_warp % kSlicesOwned;
            const u32 local = smem_address(exchange + slot * kSliceFloats);
            const u32 target = (SPLIT > 1 ? map_to_rank(local, owner) : local) + (lane % 4 * 2 * kTokenStride + lane / 4) * 4;
#pragma unroll
            for (u32 i = 0; i < TOKENS / 2; ++i) {
                const u32 offset = ((i / 4 * 8 + i % 2) * kTokenStride + i / 2 % 2 * 8) * 4;
                asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(target + offset), "f"(sum.value[i]) : "memory");
            }
            if (SPLIT == 1) named_barrier(2, kMathWarps * 32);
            else cluster_arrive(), cluster_wait();

            for (u32 e = math_warp * 32 + lane; e < kSlicesOwned * TOKENS * 8; e += kMathWarps * 32) {
                const u32 pair = e % 8, token = e / 8 % TOKENS, slice = e / (8 * TOKENS);
                const u32 row = (rank * kSlicesOwned + slice) * 16 + pair * 2, column = first_row + row;
                if (token >= m || row >= rows || column >= n) continue;
                float2 y = {0.f, 0.f};
#pragma unroll
                for (u32 source = 0; source < SPLIT; ++source) {
                    const float2 part = *reinterpret_cast<const float2*>(exchange + (source * kSlicesOwned + slice) * kSliceFloats + token * kTokenStride + pair * 2);
                    y.x += part.x;
                    y.y += part.y;
                }
                if (bias != nullptr) {
                    y.x += load_element(bias, column, bias_type);
                    if (column + 1 < n) y.y += load_element(bias, column + 1, bias_type);
                }
                const i64 offset = token * out_stride + column;
                if (out_paired) {
                    *reinterpret_cast<u32*>(static_cast<u16*>(out) + offset) = pack_elements(y.x, y.y, out_type);
                } else {
                    store_element(out, offset, out_type, y.x);
                    if (column + 1 < n) store_element(out, offset + 1, out_type, y.y);
                }
            }
            if (SPLIT == 1) named_barrier(2, kMathWarps * 32);  // the buffer is reused by the next tile
        }
    } else if (SPLIT > 1) {
        cluster_wait();
        cluster_arrive();
        cluster_wait();
    }
}
