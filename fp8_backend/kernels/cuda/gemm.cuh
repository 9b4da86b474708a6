// Dense FP8 GEMM with block scales: out[m, n] = sum over k-blocks of (a[m, kb] . b[n, kb]) * scale_a[m, kb] * scale_b[n / 128, kb] (+ bias).
//
// Persistent CTAs walk output tiles of BLOCK_M x BLOCK_N. Warp roles:
//   warpgroup 0      producer. Lane 0 of warp 0 fetches, per stage, the tiles of a and b by tensor copies and the scales of a by a bulk
//                    copy; the other warps idle (a warpgroup is the unit that can give registers away).
//   warpgroups 1..W  math. Each owns BLOCK_M / W rows: WAVES slices of 64, each SPLITS pieces of MMA_N columns.
// Barriers per stage: full (3 arrivals + bytes), filled by the copies; empty (one arrival per math warp of every CTA that receives what
// this CTA's producer writes). The tensor core accumulates one 128-deep block of k in `partial`; promotion scales it into fp32 `sum`,
// because the FP8 accumulator keeps fewer bits than fp32.
//
// The math warpgroups take turns to issue wgmma (named barriers 1..W: own threads wait, the predecessor's arrive), so that one promotes
// while another's wgmma runs. Left alone they fall into step, and the tensor core idles while both promote: 1400 clocks a k-block of
// 256 x 128, in turns 1300 (docs/kernel-notes.md; the tensor core alone would need 1024).
//
// Clusters: CLUSTER_M CTAs with the same columns fetch one slice of b each and multicast it; CLUSTER_N CTAs with the same rows
// do so with a. Both operands come through 3D maps {128 bytes of k, rows, k-blocks}, so that row-major tensors (swizzled by the copy) and packed ones
// (swizzled in memory) look alike. Out-of-range rows arrive as zeros.
#include "wgmma.cuh"

constexpr u32 kWaves = BLOCK_M / (64 * MATH_WARPGROUPS);
constexpr u32 kMmaN = BLOCK_N < 128 ? BLOCK_N : 128;
constexpr u32 kSplits = BLOCK_N / kMmaN;
constexpr u32 kSlices = kWaves * kSplits;
constexpr u32 kCluster = CLUSTER_M * CLUSTER_N;
constexpr u32 kBytesA = BLOCK_M * kBlockK, kBytesB = BLOCK_N * kBlockK;
constexpr u32 kStageBytes = kBytesA + kBytesB;
constexpr u32 kStageScaleBytes = (BLOCK_M + kScaleFloats) * 4;
constexpr u32 kProducers = 3;
constexpr u32 kEmptyArrivals = MATH_WARPGROUPS * 4 * (CLUSTER_M + CLUSTER_N - 1);

static_assert(BLOCK_M % (64 * MATH_WARPGROUPS) == 0 && BLOCK_N % kMmaN == 0, "tiles are whole wgmma slices");
static_assert(128 % kMmaN == 0, "a slice of columns must not straddle two scale blocks");
static_assert(BLOCK_M % (8 * CLUSTER_N) == 0 && BLOCK_N % (8 * CLUSTER_M) == 0, "multicast slices are whole swizzle periods");

struct Tile {
    u32 m, n;  // of this CTA, in elements
};

// Tiles in strips of `strip` cluster columns, n fastest, so that a wave of CTAs shares rows of a and b in L2.
DEVICE Tile tile_at(u32 index, u32 tiles_m, u32 tiles_n, u32 strip, u32 rank) {
    const u32 per_strip = strip * tiles_m;
    const u32 first = index / per_strip * strip;
    const u32 width = min(strip, tiles_n - first);
    const u32 local = index % per_strip;
    const u32 cluster_m = local / width, cluster_n = first + local % width;
    return {(cluster_m * CLUSTER_M + rank % CLUSTER_M) * BLOCK_M, (cluster_n * CLUSTER_N + rank / CLUSTER_M) * BLOCK_N};
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

// Where the 8 weight scales fetched for a tile start in a row of scales; tiles past the last column stay inside the row.
DEVICE u32 first_scale_of(const Tile& tile, u32 scale_b_stride) { return min(tile.n / 128 & ~3u, scale_b_stride - kScaleFloats); }

struct Output {
    void* data;
    const void* bias;
    i64 stride;
    u32 m, n, type, bias_type, vectorised;  // vectorised: 16-bit elements, rows and base 16-byte aligned, n % 8 == 0

    // Writes a 64 x kMmaN slice; lane's accumulators as wgmma leaves them, row = first row of this warp's 16.
    DEVICE void write(float (&sum)[kMmaN / 2], u32 row, u32 column, u32 lane) const {
        if (bias != nullptr) {
#pragma unroll
            for (u32 i = 0; i < kMmaN / 2; ++i) {
                const u32 c = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
                if (c < n) sum[i] += load_element(bias, c, bias_type);
            }
        }
        // With 32 columns at hand each lane gathers 8 neighbours from its quad and stores 16 bytes; a quad writes 64 contiguous bytes.
        constexpr bool kQuads = kMmaN % 32 == 0;
        if (kQuads && vectorised) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 r = row + lane / 4 + half * 8;
#pragma unroll
                for (u32 j = 0; j < kMmaN / 32; ++j) {
                    u32 words[4];
#pragma unroll
                    for (u32 g = 0; g < 4; ++g) {
                        const u32 i = (j * 4 + g) * 4 + half * 2;
                        words[g] = pack_elements(sum[i], sum[i + 1], type);
                    }
                    transpose_quad(words, lane);
                    const u32 c = column + j * 32 + lane % 4 * 8;
                    if (r < m && c < n)
                        *reinterpret_cast<uint4*>(static_cast<u16*>(data) + r * stride + c) = {words[0], words[1], words[2], words[3]};
                }
            }
            return;
        }
#pragma unroll
        for (u32 i = 0; i < kMmaN / 2; ++i) {
            const u32 r = row + lane / 4 + i / 2 % 2 * 8, c = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (r < m && c < n) store_element(data, r * stride + c, type, sum[i]);
        }
    }
};

extern "C" __global__ void __launch_bounds__(128 * (1 + MATH_WARPGROUPS), 1)
gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const float* __restrict__ scale_a,
     const float* __restrict__ scale_b, void* __restrict__ out, const void* __restrict__ bias, i64 out_stride, u32 m, u32 n, u32 k_blocks,
     u32 m_aligned, u32 scale_b_stride, u32 strip, u32 out_type, u32 bias_type, u32 vectorised) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 tiles = smem_address(shared);
    const u32 scales = tiles + NUM_STAGES * kStageBytes;
    const u32 full = scales + NUM_STAGES * kStageScaleBytes, empty = full + NUM_STAGES * 8;
    const u32 warpgroup = threadIdx.x / 128, rank = kCluster > 1 ? cluster_rank() : 0;

    if (threadIdx.x == 0) {
        prefetch_map(&map_a);
        prefetch_map(&map_b);
        for (u32 s = 0; s < NUM_STAGES; ++s) {
            barrier_init(full + 8 * s, kProducers);
            barrier_init(empty + 8 * s, kEmptyArrivals);
        }
        barrier_init_fence();
    }
    if (kCluster > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
    launch_next_kernel();

    const u32 tiles_m = ceil_div(m, u32(BLOCK_M * CLUSTER_M)), tiles_n = ceil_div(n, u32(BLOCK_N * CLUSTER_N));
    const u32 first_tile = blockIdx.x / kCluster, tile_step = gridDim.x / kCluster, num_tiles = tiles_m * tiles_n;
    Ring ring;

    if (warpgroup == 0) {
        if (MATH_WARPGROUPS > 1) give_registers<MATH_WARPGROUPS == 2 ? 40 : 32>();
        const u32 producer = threadIdx.x / 32;
        if (producer < kProducers && elect_lane()) {
            wait_for_previous_kernel();
            const u32 rank_m = rank % CLUSTER_M, rank_n = rank / CLUSTER_M;
            u16 ranks_a = 0, ranks_b = 0;
            for (u32 i = 0; i < CLUSTER_N; ++i) ranks_a |= 1 << (rank_m + CLUSTER_M * i);
            for (u32 i = 0; i < CLUSTER_M; ++i) ranks_b |= 1 << (i + CLUSTER_M * rank_n);
            const u32 offset_a = rank_n * (BLOCK_M / CLUSTER_N), offset_b = rank_m * (BLOCK_N / CLUSTER_M);
            for (u32 t = first_tile; t < num_tiles; t += tile_step) {
                const Tile tile = tile_at(t, tiles_m, tiles_n, strip, rank);
                const u32 scale_rows = tile.m < m_aligned ? min(u32(BLOCK_M), m_aligned - tile.m) : 0;
                const float* tile_scale_a = scale_a + tile.m;
                const float* tile_scale_b = scale_b + first_scale_of(tile, scale_b_stride);
                for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(NUM_STAGES)) {
                    const u32 s = ring.stage, bar = full + 8 * s;
                    barrier_wait(empty + 8 * s, ring.parity ^ 1);
                    if (producer == 0) {
                        const u32 target = tiles + s * kStageBytes + offset_a * kBlockK;
                        barrier_expect(bar, kBytesA);
                        if (CLUSTER_N > 1) tensor_copy_multicast(target, &map_a, 0, tile.m + offset_a, kb, bar, ranks_a);
                        else tensor_copy(target, &map_a, 0, tile.m, kb, bar);
                    } else if (producer == 1) {
                        const u32 target = tiles + s * kStageBytes + kBytesA + offset_b * kBlockK;
                        barrier_expect(bar, kBytesB);
                        if (CLUSTER_M > 1) tensor_copy_multicast(target, &map_b, 0, tile.n + offset_b, kb, bar, ranks_b);
                        else tensor_copy(target, &map_b, 0, tile.n, kb, bar);
                    } else {
                        const u32 target = scales + s * kStageScaleBytes;
                        barrier_expect(bar, (scale_rows + kScaleFloats) * 4);
                        if (scale_rows) bulk_copy(target, tile_scale_a + static_cast<i64>(kb) * m_aligned, scale_rows * 4, bar);
                        bulk_copy(target + BLOCK_M * 4, tile_scale_b + static_cast<i64>(kb) * scale_b_stride, kScaleFloats * 4, bar);
                    }
                }
            }
        }
    } else {
        if (MATH_WARPGROUPS == 2) take_registers<232>();
        if (MATH_WARPGROUPS == 3) take_registers<160>();
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, rank_m = rank % CLUSTER_M, rank_n = rank / CLUSTER_M;
        const u32 row_in_tile = (warpgroup - 1) * kWaves * 64;
        const Output output{out, bias, out_stride, m, n, out_type, bias_type, vectorised};
        // Waits for this warpgroup's turn to issue wgmma, and hands the turn on.
        auto take_turn = [&] {
            if (MATH_WARPGROUPS > 1) named_barrier(warpgroup, 256);
        };
        auto pass_turn = [&] {
            if (MATH_WARPGROUPS > 1) named_barrier_arrive(warpgroup % MATH_WARPGROUPS + 1, 256);
        };
        if (warpgroup == MATH_WARPGROUPS) pass_turn();

        for (u32 t = first_tile; t < num_tiles; t += tile_step) {
            const Tile tile = tile_at(t, tiles_m, tiles_n, strip, rank);
            const u32 tile_scale_b = tile.n < n ? tile.n / 128 - first_scale_of(tile, scale_b_stride) : 0;
            float sum[kSlices][kMmaN / 2];
#pragma unroll
            for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
                for (u32 i = 0; i < kMmaN / 2; ++i) sum[slice][i] = 0.f;
            for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(NUM_STAGES)) {
                const u32 s = ring.stage, a = tiles + s * kStageBytes, b = a + kBytesA;
                const float* stage_scales = reinterpret_cast<const float*>(shared + NUM_STAGES * kStageBytes + s * kStageScaleBytes);
                barrier_wait(full + 8 * s, ring.parity);
#pragma unroll
                for (u32 slice = 0; slice < kSlices; ++slice) {
                    const u32 wave = slice / kSplits, split = slice % kSplits;
                    const u32 row = row_in_tile + wave * 64;
                    const u64 descriptor_a = matrix_descriptor(a + row * kBlockK);
                    const u64 descriptor_b = matrix_descriptor(b + split * kMmaN * kBlockK);
                    float partial[kMmaN / 2];
                    take_turn();
                    fence_registers(partial);
                    wgmma_fence();
#pragma unroll
                    for (u32 i = 0; i < kBlockK / 32; ++i)
                        Wgmma<kMmaN>::multiply(partial, descriptor_a + 2 * i, descriptor_b + 2 * i, i > 0);
                    wgmma_commit();
                    pass_turn();
                    const float block_scale_b = stage_scales[BLOCK_M + tile_scale_b + split];
                    const float low = stage_scales[row + warp * 16 + lane / 4] * block_scale_b;
                    const float high = stage_scales[row + warp * 16 + lane / 4 + 8] * block_scale_b;
                    wgmma_wait<0>();
                    fence_registers(partial);
                    if (slice == kSlices - 1) {  // nothing reads this stage any more
                        if (kCluster == 1) {
                            if (lane == 0) barrier_arrive(empty + 8 * s);
                        } else {
                            if (lane < CLUSTER_N) barrier_arrive_peer(empty + 8 * s, rank_m + CLUSTER_M * lane);
                            else if (lane < CLUSTER_N + CLUSTER_M && lane - CLUSTER_N != rank_m)
                                barrier_arrive_peer(empty + 8 * s, lane - CLUSTER_N + CLUSTER_M * rank_n);
                        }
                    }
#pragma unroll
                    for (u32 i = 0; i < kMmaN / 2; ++i) sum[slice][i] += (i % 4 < 2 ? low : high) * partial[i];
                    fence_registers(sum[slice]);  // promote before the next turn is taken, not while it is held
                }
            }
            if (t == first_tile) wait_for_previous_kernel();  // it may still read what this kernel overwrites
#pragma unroll
            for (u32 slice = 0; slice < kSlices; ++slice) {
                const u32 row = tile.m + row_in_tile + slice / kSplits * 64 + warp * 16;
                output.write(sum[slice], row, tile.n + slice % kSplits * kMmaN, lane);
            }
        }
    }
    if (MATH_WARPGROUPS > 1 && warpgroup == 1) named_barrier(1, 256);  // the last turn that was passed
    if (kCluster > 1) {  // a peer may still arrive at this CTA's barriers
        __syncwarp();
        cluster_arrive();
        cluster_wait();
    }
}
