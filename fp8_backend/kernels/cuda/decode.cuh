// Linear layer for few tokens: out[m, n] = x[m, k] . weight[n, k]^T with block scales, limited by how fast the weights stream from memory.
//
// Weights take wgmma's 64-row side and tokens its N side (TOKENS = 8 or 16), so nothing is padded to 64 tokens. A cluster of SPLIT CTAs owns
// `rows` rows of the weight (a run-time multiple of 8) and splits k. The two math warpgroups split the rows, or with at most 64 of those k once
// more. fp32 sums meet in one CTA, which adds them in a fixed order: no atomics, no workspace, the same bits every run.
// Registers and, if it is asked for, shared memory leave room for two CTAs on a multiprocessor, of this kernel or of the next.
//
// Warp roles (384 threads):
//   warps 0..3    producers, one lane each: 0 fetches weights, one contiguous copy of rows x 128 bytes a k-block; 1 their scales; FUSED = 0: 2 the
//                 tokens, 3 their scales. Several, because a lane issues a copy every 40 ns or so (measured). FUSED = 1: 2 and 3 help to quantise.
//   warps 4..11   two math warpgroups; FUSED = 1: quantise first.
// FUSED = 1: x has rows as nearly every call has them (CommonRows); every CTA quantises the columns of its k range once, into shared memory (group.cuh).
// FUSED = 0: x arrives as e4m3 codes in tiles [k-block][TOKENS][128], swizzled, and MN-major scales (quantize.cuh), fetched stage by stage.
// What may be requested before the previous kernel has ended: weights, as far as the stages reach. FUSED = 1: `prefetch` stages in flight at any
// time, so that the tokens queue behind no more than those; FUSED = 0: `prefetch` stages in all. The memory system answers a
// multiprocessor in about the order of its requests: with 128 KiB of weights queued, activations that are in L2 arrive 2.7 us late (measured).
// Barriers: full (one arrival per producer + bytes) and empty (one arrival per math warp) per stage; exchanged (1 arrival + bytes), filled by
// the peers' sums. Named barrier 1: warps 2..11 (quantised tokens are ready); 2: the math warps (exchange inside one CTA); 3: warps 0
// and 2..11 (FUSED: activations are requested, the weights behind them may follow).
//
// A stage holds exactly `rows` rows, so wgmma, which always reads 64, may read past them: those accumulators are never stored.
#include "arrivals.cuh"
#include "group.cuh"
#include "wgmma.cuh"

constexpr u32 kTokenBytes = TOKENS * kBlockK, kTokenGroups = TOKENS / 8;
constexpr u32 kUnroll = 4;  // k-blocks whose wgmma are in flight together
constexpr u32 kMathWarps = 8, kThreads = 384, kProducers = FUSED ? 2 : 4;
constexpr u32 kQuantisers = kThreads - 32 * kProducers, kRequested = kQuantisers + 32;  // threads of named barriers 1 and 3
constexpr u32 kStageScales = (FUSED ? 0 : TOKENS) + kScaleFloats;  // floats a stage: of the tokens, of the weight
constexpr u32 kFragmentBytes = 512;  // 16 rows x 8 tokens of fp32, as the 32 lanes of a warp hold them: 16 bytes each

#if FUSED

struct TokenSource {
    const void* x;
    i64 stride;
    u32 m, k, first_block, blocks;
};

// Quantises groups base, base + kStep, ... of this half-warp. Straight-line code, groups that do not exist included: each is a chain of latencies,
// and kCount of them overlap.
constexpr u32 kStep = kQuantisers / kGroupLanes;
template <u32 kCount>
DEVICE void quantise_groups(const TokenSource& source, u64 reciprocal, u32 base, u32 lane, u8* tokens, float* scales, bool& requested) {
    RawGroup raw[kCount];
    u32 block[kCount], token[kCount];
    float largest[kCount];
#pragma unroll
    for (u32 b = 0; b < kCount; ++b) {
        const u32 index = base + b * kStep;
        block[b] = index * reciprocal >> 32;
        token[b] = index - block[b] * source.m;
        const u32 column = (source.first_block + block[b]) * kBlockK + lane * 8;
        const u32 valid = block[b] < source.blocks && column < source.k ? 8 : 0;
        raw[b].load(source.x, static_cast<i64>(token[b]) * source.stride + column, valid, CommonRows::vectorised);
    }
    if (!requested) named_barrier_arrive(3, kRequested);
    requested = true;
#pragma unroll
    for (u32 b = 0; b < kCount; ++b) {
        Group group;
        group.expand(raw[b], CommonRows::type);
        largest[b] = group.lane_amax();
    }
    reduce_amax(largest);
#pragma unroll
    for (u32 b = 0; b < kCount; ++b) {
        Group group;
        group.expand(raw[b], CommonRows::type);
        const uint2 codes = group.codes(largest[b]);
        const float scale = group_scale(largest[b]);
        if (block[b] >= source.blocks) continue;
        u8* row = tokens + block[b] * kTokenBytes + token[b] * kBlockK;
        *reinterpret_cast<uint2*>(row + ((lane / 2) ^ (token[b] % 8)) * 16 + lane % 2 * 8) = codes;
        if (lane == 0) scales[block[b] * TOKENS + token[b]] = scale;
    }
}

// Quantises the columns of this CTA's k-blocks into swizzled tiles [block][TOKENS][128] and scales [block][TOKENS].
DEVICE void quantise_tokens(const TokenSource& source, u8* tokens, float* scales, u32 thread) {
    const u32 lane = thread % kGroupLanes, half = thread % 32 / kGroupLanes, groups = source.m * source.blocks;
    const u64 reciprocal = (0xffffffffull + source.m) / source.m;  // index / m == index * reciprocal >> 32 for every index < 2^20
    bool requested = false;
    // Bounds and branches are the warp's, not the lane's: both halves of a warp shuffle together.
    u32 base = thread / 32 * 2;
    while (base < groups) {
        const u32 left = ceil_div(groups - base, kStep);
        const u32 count = left > 2 ? 4 : left;
        if (count == 4) quantise_groups<4>(source, reciprocal, base + half, lane, tokens, scales, requested);
        else if (count == 2) quantise_groups<2>(source, reciprocal, base + half, lane, tokens, scales, requested);
        else quantise_groups<1>(source, reciprocal, base + half, lane, tokens, scales, requested);
        base += count * kStep;
    }
    if (!requested) named_barrier_arrive(3, kRequested);
}
#endif

struct Sums {
    float value[TOKENS / 2];
};

struct Stages {
    u32 base, bytes, weight_bytes, count, full, empty, scales;
};

// FUSED: tokens and their scales by k-block of this CTA.
struct Resident {
    u32 codes, scales;
};

// kCount k-blocks: kCount x 4 wgmma in flight at once, then promotion with the scales.
template <u32 kCount>
DEVICE void multiply_blocks(Sums& sum, Ring& ring, u32 block, const Stages& stages, const Resident& resident, u32 first_row, u32 scale_low,
                            u32 scale_high, u32 lane) {
    float partial[kCount][TOKENS / 2];
    u32 stage[kCount];
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        stage[u] = ring.stage;
        barrier_wait(stages.full + 8 * stage[u], ring.parity);
        ring.advance(stages.count);
        fence_registers(partial[u]);
    }
    wgmma_fence();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        const u32 base = stages.base + stage[u] * stages.bytes;
        const u64 weight = matrix_descriptor(base + first_row * kBlockK);
        const u64 x = matrix_descriptor(FUSED ? resident.codes + (block + u) * kTokenBytes : base + stages.weight_bytes);
#pragma unroll
        for (u32 i = 0; i < kBlockK / 32; ++i) Wgmma<TOKENS>::multiply(partial[u], weight + 2 * i, x + 2 * i, i > 0);
    }
    wgmma_commit();
    // A lane's scales: of its two rows of the weight, and of its two tokens in each group of 8. Read while wgmma runs.
    float low[kCount], high[kCount];
    float2 scale[kCount][kTokenGroups];
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        const u32 weight_scales = stages.scales + ((stage[u] + 1) * kStageScales - kScaleFloats) * 4;
        const u32 token_scales = FUSED ? resident.scales + (block + u) * TOKENS * 4 : stages.scales + stage[u] * kStageScales * 4;
        low[u] = load_shared(weight_scales + scale_low * 4);
        high[u] = load_shared(weight_scales + scale_high * 4);
#pragma unroll
        for (u32 j = 0; j < kTokenGroups; ++j) scale[u][j] = load_shared_pair(token_scales + (j * 8 + lane % 4 * 2) * 4);
    }
    wgmma_wait<0>();
#pragma unroll
    for (u32 u = 0; u < kCount; ++u) {
        __syncwarp();  // one lane arrives for all
        if (arrives_for_warp(lane)) barrier_arrive_after(stages.empty + 8 * stage[u], scale[u][kTokenGroups - 1].y);
        fence_registers(partial[u]);
#pragma unroll
        for (u32 j = 0; j < kTokenGroups; ++j) {
            sum.value[4 * j] += scale[u][j].x * low[u] * partial[u][4 * j];
            sum.value[4 * j + 1] += scale[u][j].y * low[u] * partial[u][4 * j + 1];
            sum.value[4 * j + 2] += scale[u][j].x * high[u] * partial[u][4 * j + 2];
            sum.value[4 * j + 3] += scale[u][j].y * high[u] * partial[u][4 * j + 3];
        }
    }
}

struct Output {
    void* data;
    const void* bias;
    i64 stride;
    u32 m, n, type, bias_type, aligned;  // bytes of a row of 16-bit outputs that can be written together, 8 or 4 (n even), or 0

    DEVICE void write_pair(float first, float second, u32 row, u32 token) const {
        if (token >= m || row >= n) return;
        const bool both = row + 1 < n;
        if (bias != nullptr) {
            first += load_element(bias, row, bias_type);
            if (both) second += load_element(bias, row + 1, bias_type);
        }
        const i64 offset = token * stride + row;
        if (aligned) {
            *reinterpret_cast<u32*>(static_cast<u16*>(data) + offset) = pack_elements(first, second, type);
        } else {
            store_element(data, offset, type, first);
            if (both) store_element(data, offset + 1, type, second);
        }
    }

    // As nearly every call has it, for which `write` has code of its own (with_rows, elements.cuh, says why).
    DEVICE bool is_common() const { return type == kBf16 && bias == nullptr && aligned == 8; }

    // Writes a fragment: 16 rows of the weight from first_row on, of which `rows` exist, x 8 tokens. Neighbouring rows meet in a lane: two of them,
    // or four, so that one store of the warp writes all 32 bytes that a token has here. Half of these at a time: 0.1 us longer (docs/kernel-notes.md, 2026-11-27).
    template <bool kCommon> DEVICE void write(float4 v, u32 first_row, u32 rows, u32 first_token, u32 lane) const {
        const bool even = (lane / 4) % 2 == 0;
        const float from_low = __shfl_xor_sync(0xffffffffu, even ? v.y : v.x, 4);
        const float from_high = __shfl_xor_sync(0xffffffffu, even ? v.w : v.z, 4);
        const u32 token = first_token + lane % 4 * 2 + (even ? 0 : 1), row = lane / 8 * 2;
        float2 low = even ? float2{v.x, from_low} : float2{from_low, v.y};
        float2 high = even ? float2{v.z, from_high} : float2{from_high, v.w};
        if ((kCommon || aligned == 8) && rows >= 16 && first_row + 16 <= n) {
            if (!kCommon && bias != nullptr) {
                low.x += load_element(bias, first_row + row, bias_type), low.y += load_element(bias, first_row + row + 1, bias_type);
                high.x += load_element(bias, first_row + row + 8, bias_type), high.y += load_element(bias, first_row + row + 9, bias_type);
            }
            const bool keeps_low = lane / 8 % 2 == 0;
            const u32 kind = kCommon ? kBf16 : type;
            const u32 own_low = pack_elements(low.x, low.y, kind), own_high = pack_elements(high.x, high.y, kind);
            const u32 other = __shfl_xor_sync(0xffffffffu, keeps_low ? own_high : own_low, 8);
            const u32 first = keeps_low ? row : row + 6;
            if (token < m)
                *reinterpret_cast<uint2*>(static_cast<u16*>(data) + token * stride + first_row + first) =
                    keeps_low ? uint2{own_low, other} : uint2{other, own_high};
            return;
        }
        if (row < rows) write_pair(low.x, low.y, first_row + row, token);
        if (row + 8 < rows) write_pair(high.x, high.y, first_row + row + 8, token);
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 2)
decode(const void* x, const float* __restrict__ scale_a, void* __restrict__ out, const u8* __restrict__ weight, const float* __restrict__ scale_b,
       const void* __restrict__ bias, i64 x_stride, i64 out_stride, u32 m, u32 n,
       u32 k, u32 k_blocks, u32 n_aligned, u32 m_aligned, u32 scale_b_stride, u32 rows, u32 num_stages, u32 prefetch, u32 out_type, u32 bias_type,
       u32 out_aligned) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: stages | FUSED: tokens of the k range | exchange buffer | scales of the stages | FUSED: scales of the k range | barriers
    const bool k_halves = rows <= 64;  // the math warpgroups split k
    const u32 slices = k_halves ? 4 : 8, sources = SPLIT * (k_halves ? 2 : 1);  // of 16 rows; of sums for each
    const u32 fragments = slices * kTokenGroups, exchange_bytes = ceil_div(fragments, u32(SPLIT)) * sources * kFragmentBytes;
    const u32 blocks_most = ceil_div(k_blocks, u32(SPLIT)), weight_bytes = rows * kBlockK;
    const u32 stage_bytes = weight_bytes + (FUSED ? 0 : kTokenBytes);
    u8* const resident = shared + num_stages * stage_bytes;
    u8* const exchange = resident + (FUSED ? blocks_most * kTokenBytes : 0);
    float* const scales = reinterpret_cast<float*>(exchange + exchange_bytes);
    float* const resident_scales = scales + num_stages * kStageScales;
    const u32 exchanged = smem_address(resident_scales + (FUSED ? blocks_most * TOKENS : 0)), full = exchanged + 8, empty = full + num_stages * 8;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 rank = SPLIT > 1 ? cluster_rank() : 0;
    const Stages stages{smem_address(shared), stage_bytes, weight_bytes, num_stages, full, empty, smem_address(scales)};
    const u32 first_tile = blockIdx.x / SPLIT, tile_step = gridDim.x / SPLIT;
    const u32 first_block = k_blocks * rank / SPLIT, blocks = k_blocks * (rank + 1) / SPLIT - first_block;

    if (warp == 0) {
        if (lane < num_stages) {
            barrier_init(full + 8 * lane, kProducers);
            barrier_init(empty + 8 * lane, kMathWarps * kArrivalsOfWarp);
        }
        if (lane == 0) barrier_init(exchanged, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (SPLIT > 1) {
        if (threadIdx.x == 0) barrier_expect(exchanged, (fragments - rank + SPLIT - 1) / SPLIT * sources * kFragmentBytes);
        cluster_arrive_relaxed();  // waited for before the first access to a peer's shared memory
    }
    launch_next_kernel();

    if (warp < kProducers) {
        const bool leader = elect_lane();
        // Tiles first_tile, first_tile + tile_step, ...; a cluster has one.
        const u32 total = (SPLIT > 1 ? 1 : ceil_div(ceil_div(n, rows) - first_tile, tile_step)) * blocks;
        const u32 token_scale_bytes = min(u32(TOKENS), m_aligned) * 4;
        u32 row = first_tile * rows, block = first_block;  // of the next item
        Ring ring;
        auto produce = [&](u32 first, u32 last) {
            for (u32 item = first; item < last; ++item, ring.advance(num_stages)) {
                const u32 s = ring.stage, bar = full + 8 * s;
                barrier_wait(empty + 8 * s, ring.parity ^ 1);
                if (warp == 0) {
                    const u32 bytes = min(rows, n_aligned - row) * kBlockK;
                    barrier_expect(bar, bytes);
                    bulk_copy(stages.base + s * stage_bytes, weight + (static_cast<i64>(block) * n_aligned + row) * kBlockK, bytes, bar);
                } else if (warp == 1) {
                    barrier_expect(bar, kScaleFloats * 4);
                    bulk_copy(smem_address(scales + (s + 1) * kStageScales - kScaleFloats),
                              scale_b + static_cast<i64>(block) * scale_b_stride + (row / 128 & ~3u), kScaleFloats * 4, bar);
                } else if (warp == 2) {
                    barrier_expect(bar, kTokenBytes);
                    bulk_copy(stages.base + s * stage_bytes + weight_bytes, static_cast<const u8*>(x) + static_cast<i64>(block) * kTokenBytes, kTokenBytes,
                              bar);
                } else {
                    barrier_expect(bar, token_scale_bytes);
                    bulk_copy(smem_address(scales + s * kStageScales), scale_a + static_cast<i64>(block) * m_aligned, token_scale_bytes, bar);
                }
                if (++block == first_block + blocks) {
                    block = first_block;
                    row += tile_step * rows;
                }
            }
        };
        const u32 early = min(total, warp == 0 && !FUSED ? prefetch : warp <= 1 ? num_stages : 0);
        if (leader) {
            const u32 at_once = warp == 0 ? min(early, prefetch) : early;
            produce(0, at_once);
            for (u32 item = at_once; item < early; ++item) {
                barrier_wait(full + 8 * (item - prefetch), 0);
                produce(item, item + 1);
            }
        }
        __syncwarp();
        wait_for_previous_kernel();
        if (FUSED && warp == 0) named_barrier(3, kRequested);
        if (leader) produce(early, total);
        __syncwarp();
    } else {
        wait_for_previous_kernel();
#if FUSED
        const TokenSource source{x, x_stride, m, k, first_block, blocks};
        quantise_tokens(source, resident, resident_scales, threadIdx.x - 32 * kProducers);
        fence_async_shared();
        named_barrier(1, kQuantisers);
#endif
    }

    if (warp >= 4) {
        const u32 math_warp = warp - 4, warpgroup = math_warp / 4;
        const u32 slice = math_warp % slices, first_row = k_halves ? 0 : warpgroup * 64;  // of this warp; of its warpgroup's wgmma
        const u32 source = k_halves ? rank * 2 + warpgroup : rank;
        const Resident resident_tokens{smem_address(resident), smem_address(resident_scales)};
        const Output output{out, bias, out_stride, m, n, out_type, bias_type, out_aligned};
        Ring ring;
        for (u32 first_row_of_tile = first_tile * rows; first_row_of_tile < n; first_row_of_tile += tile_step * rows) {
            const u32 row_low = first_row_of_tile + slice * 16 + lane / 4, first_scale = first_row_of_tile / 128 & ~3u;
            const u32 scale_low = row_low / 128 - first_scale, scale_high = (row_low + 8) / 128 - first_scale;
            Sums sum;
#pragma unroll
            for (u32 i = 0; i < TOKENS / 2; ++i) sum.value[i] = 0.f;
            for (u32 block = 0; block < blocks; block += kUnroll) {
                const u32 count = min(kUnroll, blocks - block);
                if (k_halves && block / kUnroll % 2 != warpgroup) {
                    // Not this warpgroup's: it waits and releases all the same. One that skipped phases would take a barrier still in phase p for
                    // one that has completed p + 1: they have the same parity.
                    for (u32 u = 0; u < count; ++u, ring.advance(num_stages)) {
                        barrier_wait(full + 8 * ring.stage, ring.parity);
                        __syncwarp();  // one lane arrives for all
                        if (arrives_for_warp(lane)) barrier_arrive(empty + 8 * ring.stage);
                    }
                } else if (count == kUnroll) {
                    multiply_blocks<kUnroll>(sum, ring, block, stages, resident_tokens, first_row, scale_low, scale_high, lane);
                } else {
                    if (count >= 2)
                        multiply_blocks<2>(sum, ring, block, stages, resident_tokens, first_row, scale_low, scale_high, lane);
                    if (count % 2 == 1)
                        multiply_blocks<1>(sum, ring, block + count - 1, stages, resident_tokens, first_row, scale_low, scale_high, lane);
                }
            }

            // Fragment f of 16 rows x 8 tokens belongs to rank f % SPLIT, whose buffer holds [f / SPLIT][source][lane]. Also with one source:
            // writing straight from the unrolled registers takes NVRTC up to 43 s to compile, through the buffer 0.3 s.
            if (SPLIT > 1) cluster_wait();
#pragma unroll
            for (u32 j = 0; j < kTokenGroups; ++j) {
                const float4 v = {sum.value[4 * j], sum.value[4 * j + 1], sum.value[4 * j + 2], sum.value[4 * j + 3]};
                const u32 fragment = slice * kTokenGroups + j;
                u8* const place = exchange + (fragment / SPLIT * sources + source) * kFragmentBytes + lane * 16;
                if (SPLIT == 1) *reinterpret_cast<float4*>(place) = v;
                else store_async(map_to_rank(smem_address(place), fragment % SPLIT), v, map_to_rank(exchanged, fragment % SPLIT));
            }
            if (SPLIT == 1) named_barrier(2, kMathWarps * 32);
            else barrier_wait(exchanged, 0);
            for (u32 fragment = rank + math_warp * SPLIT; fragment < fragments; fragment += kMathWarps * SPLIT) {
                const u8* place = exchange + fragment / SPLIT * sources * kFragmentBytes + lane * 16;
                float4 v = *reinterpret_cast<const float4*>(place);
                for (u32 i = 1; i < sources; ++i) {
                    const float4 part = *reinterpret_cast<const float4*>(place + i * kFragmentBytes);
                    v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
                }
                const u32 row = fragment / kTokenGroups * 16;
                if (row >= rows) continue;
                if (output.is_common()) output.write<true>(v, first_row_of_tile + row, rows - row, fragment % kTokenGroups * 8, lane);
                else output.write<false>(v, first_row_of_tile + row, rows - row, fragment % kTokenGroups * 8, lane);
            }
            if (SPLIT > 1) break;  // a cluster has one tile; saying so saves registers
            named_barrier(2, kMathWarps * 32);  // the next tile writes the buffer again
        }
    } else if (SPLIT > 1) {
        cluster_wait();
    }
}
