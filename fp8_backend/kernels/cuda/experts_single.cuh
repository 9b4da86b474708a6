// All of the experts op for few tokens in one launch: out[token] = sum over its experts of weight * w2 . (silu(gate) * up), gate and up halves of w13 . x.
//
// Every CTA fetches an equal run of row groups (8 gate and the 8 up rows) of the experts hit, waits until all CTAs have written their part of
// h = silu(gate) * up, and then owns `down_rows` rows of the hidden dimension of all experts hit. Its weights of the second GEMM are on their way while it
// waits. Each CTA quantises all of x, and all of h, for itself: a launch or a wait of the whole grid more would take longer.
//
// Tokens take wgmma's 64-row side, as registers: rows 0 to 7 are all tokens of the call, and those that an expert does not have are not added. A stage, 64 rows
// of weights or several k-blocks of fewer, is the N side of one product, whose rows 8u to 8u + 7 are the tokens' codes of k-block u: where row and column are of
// the same k-block it counts. A product takes its time however narrow it is.
//
// The launch is a cooperative one: all CTAs run at once, one a multiprocessor, or none does. So no two launches share `grid_arrivals`.
//
// Warp roles (640 threads):
//   warps 0, 1    producers, one lane each: gate and up rows of a stage; later its even and its odd k-blocks.
//   warps 2, 3    the same for the scales of weights. All four list the experts hit first.
//   warps 4..19   four math warpgroups, which take stages in turn. First they quantise x.
// Barriers: full (4 producers + bytes) and empty (4 warps of a warpgroup) per stage. Named: 1 producers, 2 experts are listed and x is quantised (all threads),
// 3 math threads.
#include "arrivals.cuh"
#include "group.cuh"
#include "wgmma.cuh"

constexpr u32 kProducers = 128, kTeams = 4, kMathThreads = kTeams * 128, kThreads = kProducers + kMathThreads;
constexpr u32 kSlotBytes = 8192, kMaxDepth = 4;  // of a stage: weights; k-blocks
constexpr u32 kSlotScales = 2 * kMaxDepth * kScaleFloats;
constexpr u32 kWindow = 8;          // stages on their way at most (measured: 7 to 10 are alike, 5 and all of the ring slower)
constexpr u32 kTileGroups = 4;      // most row groups of a tile of the first GEMM: they fill a stage
constexpr u32 kMaxTokens = 8;
constexpr u32 kMaxPairs = kProducers;
constexpr u32 kNowhere = 0xffffffffu, kAbsent = 0xff;
constexpr u32 kPartials = kTeams * 8 * 32;  // pairs of sums in a buffer: 8 column groups of each team

__device__ u32 grid_arrivals;

// The experts hit, and what of them each token wants: which (token, slot) pair, and its router weight.
struct Routed {
    u32 group[kMaxPairs], unit_of[kMaxPairs], expert[kMaxPairs];  // of a pair, of the first pair of an expert, of a unit
    float router[kMaxPairs], weight[kMaxPairs][kMaxTokens];       // of a pair; of a unit's tokens
    u8 pair[kMaxPairs][kMaxTokens];                               // of a unit's tokens, or kAbsent
    u32 leaders[kProducers / 32], units;

    // By the producers, a pair each. A token that names an expert twice wants its first pair, by the sum of the weights.
    DEVICE void list(const int* ids, const int* expert_map, const float* router_weights, u32 pairs, u32 top_k, u32 num_groups) {
        const u32 p = threadIdx.x, lane = p % 32, warp = p / 32, token = p / top_k;
        u32 own = kNowhere;
        if (p < pairs) {
            int id = __ldcg(ids + p);
            router[p] = __ldcg(router_weights + p);
            if (id >= 0 && expert_map != nullptr) id = expert_map[id];
            if (id >= 0 && static_cast<u32>(id) < num_groups) own = static_cast<u32>(id);
        }
        group[p] = own;
        *reinterpret_cast<uint2*>(pair[p]) = make_uint2(kNowhere, kNowhere);
        named_barrier(1, kProducers);
        u32 first = kNowhere;
        for (u32 q = 0; q < pairs; q += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(group + q);
            const u32 others[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                if (others[i] == own) first = min(first, q + i);
        }
        const bool leads = own != kNowhere && first == p;
        const u32 leading = __ballot_sync(0xffffffffu, leads);
        if (lane == 0) leaders[warp] = __popc(leading);
        named_barrier(1, kProducers);
        u32 unit = __popc(leading & ((1u << lane) - 1)), all = 0;
#pragma unroll
        for (u32 w = 0; w < kProducers / 32; ++w) {
            if (w < warp) unit += leaders[w];
            all += leaders[w];
        }
        if (leads) expert[unit] = own, unit_of[p] = unit;
        if (p == 0) units = all;
        named_barrier(1, kProducers);
        if (own != kNowhere) {
            bool again = false;
            float sum = 0.f;
            for (u32 q = token * top_k; q < (token + 1) * top_k; ++q) {
                if (group[q] != own) continue;
                again = again || q < p;
                sum += router[q];
            }
            if (!again) pair[unit_of[first]][token] = static_cast<u8>(p), weight[unit_of[first]][token] = sum;
        }
        named_barrier(1, kProducers);
    }
};

// A run of row groups of the first GEMM, cut into tiles of one unit each.
struct Walk {
    u32 unit_groups, tile_groups, next, end;
    u32 unit, row, groups;  // the tile: its unit, first gate row, groups

    DEVICE bool advance() {
        if (next >= end) return false;
        unit = next / unit_groups;
        const u32 first = next - unit * unit_groups, left = min(unit_groups - first, end - next);
        groups = ceil_div(left, ceil_div(left, tile_groups));
        row = first * 8;
        next += groups;
        return true;
    }
};

DEVICE u32 depth_of_down(u32 block_bytes) { return min(kSlotBytes / block_bytes, kMaxDepth); }

// Quantises rows of k_blocks groups into shared memory, codes [k_blocks][rows][128] swizzled by row, scales [k_blocks][rows]. A half-warp of the math warps
// takes a group, kDeep of them at once: loads and shuffles overlap. load(group, row, block, lane, exists).
template <class Load> DEVICE void quantise(u32 rows, u32 k_blocks, u32 codes, float* scales, Load load) {
    constexpr u32 kDeep = 4, kHalves = kMathThreads / kGroupLanes;
    const u32 lane = threadIdx.x % kGroupLanes, half = (threadIdx.x - kProducers) / kGroupLanes, items = rows * k_blocks;
    for (u32 base = 0; base < items; base += kDeep * kHalves) {
        Group group[kDeep];
        float largest[kDeep];
#pragma unroll
        for (u32 d = 0; d < kDeep; ++d) {
            const u32 item = base + d * kHalves + half, row = item / k_blocks;
            load(group[d], row, item - row * k_blocks, lane, item < items);
        }
#pragma unroll
        for (u32 d = 0; d < kDeep; ++d) largest[d] = group[d].lane_amax();
        reduce_amax(largest);
#pragma unroll
        for (u32 d = 0; d < kDeep; ++d) {
            const u32 item = base + d * kHalves + half, row = item / k_blocks, place = (item - row * k_blocks) * rows + row;
            if (item >= items) continue;
            store_shared_pair(codes + place * kBlockK + (lane / 2 ^ row % 8) * 16 + lane % 2 * 8, group[d].codes(largest[d]));
            if (lane == 0) scales[place] = group_scale(largest[d]);
        }
    }
}

// Quantised activations in shared memory, [k_blocks][pitch] rows.
struct Activations {
    u32 codes;
    const float* scales;
    u32 pitch, k_blocks;
};

// What the product of a stage adds to the sums of a warp's k-blocks, 2 * kWarp and the next, of the `count` that the stage has.
template <u32 kGroups, u32 kMatrices, u32 kWarp>
DEVICE void promote(float (&sum)[16], const float (&partial)[32], const float (&of_row)[2], const float (&of_weight)[2][kMatrices][2], u32 boundary, u32 count,
                    bool wanted) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        constexpr u32 kEach = kGroups / kMatrices;
        const u32 block = 2 * kWarp + i;
        if (block * kGroups + kGroups > 8 || block >= count) break;
#pragma unroll
        for (u32 group = 0; group < kGroups; ++group) {
            const u32 j = block * kGroups + group;
            const float(&two)[2] = of_weight[i][group / kEach];
            const float scale = of_row[i] * (group % kEach < boundary ? two[0] : two[1]);
            if (wanted) sum[2 * group] += scale * partial[4 * j + 2 * i], sum[2 * group + 1] += scale * partial[4 * j + 2 * i + 1];
        }
    }
}

// Adds the product of a stage to the sums of a warp: columns 8j + 2(lane % 4) + {0, 1} of a k-block, of token lane / 4, are sum[2j], sum[2j + 1]. Returns a value
// that depends on the last loads from the stage.
// kGroups: column groups of a k-block (8 do no harm where there are 5 to 7). kMatrices: how many follow each other in it. row: of codes, for token lane % 8.
// sum_row: for token lane / 4, whose scales are times `factor`; wanted: whether its sums change. boundary: column groups of a matrix up to the next scale of
// weights. scale: where the first one of each matrix is.
template <u32 kGroups, u32 kMatrices>
DEVICE float multiply_stage(float (&sum)[16], const Activations& x, u32 row, u32 sum_row, float factor, bool wanted, u32 boundary, const u32 (&scale)[2], u32 stage,
                            const float* scales, u32 first_block, u32 count, u32 lane, u32 warp) {
    constexpr u32 kDepth = kGroups <= 2 ? 4 : kGroups <= 4 ? 2 : 1;
    const bool takes_part = warp < (kDepth == 4 ? 2 : 1);
    u32 a[kBlockK / 32][4] = {};
    const u32 last_block = x.k_blocks - 1, block = first_block + 2 * warp;
    if (takes_part) {
        const u32 address = x.codes + (min(block + lane / 8 % 2, last_block) * x.pitch + row) * kBlockK + (lane / 16 ^ row % 8) * 16;
#pragma unroll
        for (u32 i = 0; i < kBlockK / 32; ++i) load_matrices(a[i], address ^ 32 * i);
    }
    float partial[32];
    fence_registers(partial);
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < kBlockK / 32; ++i) Wgmma<64>::multiply(partial, a[i], matrix_descriptor(stage) + 2 * i, i > 0);
    wgmma_commit();
    float of_weight[2][kMatrices][2], of_row[2], seen = 0.f;
    if (takes_part) {
#pragma unroll
        for (u32 i = 0; i < (kDepth == 1 ? 1 : 2); ++i) {
            of_row[i] = x.scales[min(block + i, last_block) * x.pitch + sum_row] * factor;
#pragma unroll
            for (u32 matrix = 0; matrix < kMatrices; ++matrix) {
                const float* two = scales + (2 * warp + i) * kMatrices * kScaleFloats + scale[matrix];
                of_weight[i][matrix][0] = two[0], of_weight[i][matrix][1] = two[1];
                seen += two[0] + two[1];
            }
        }
    }
    wgmma_wait<0>();
    fence_registers(partial);
    if (warp == 0) promote<kGroups, kMatrices, 0>(sum, partial, of_row, of_weight, boundary, count, wanted);
    else if (kDepth == 4 && warp == 1) promote<kGroups, kMatrices, 1>(sum, partial, of_row, of_weight, boundary, count, wanted);
    return seen;
}

template <class... Arguments> DEVICE float multiply_up(u32 groups, float (&sum)[16], const Arguments&... arguments) {
    switch (groups) {
        case 1: return multiply_stage<2, 2>(sum, arguments...);
        case 2: return multiply_stage<4, 2>(sum, arguments...);
        case 3: return multiply_stage<6, 2>(sum, arguments...);
        default: return multiply_stage<8, 2>(sum, arguments...);
    }
}
template <class... Arguments> DEVICE float multiply_down(u32 groups, float (&sum)[16], const Arguments&... arguments) {
    switch (groups) {
        case 1: return multiply_stage<1, 1>(sum, arguments...);
        case 2: return multiply_stage<2, 1>(sum, arguments...);
        case 3: return multiply_stage<3, 1>(sum, arguments...);
        case 4: return multiply_stage<4, 1>(sum, arguments...);
        default: return multiply_stage<8, 1>(sum, arguments...);
    }
}

// A team's way around the ring, whose number of stages is a multiple of the teams': all laps of a slot are one team's, since a wait tells a lap only from its
// neighbours.
struct Turns {
    u32 ring;
    const float* scales;
    u32 full, empty, num_stages, slot, parity, before;  // before: stages of the walk until the team's next one

    // multiply(stage, its scales) returns a value that depends on the last loads from the stage.
    template <class Multiply> DEVICE void take(u32 lane, Multiply multiply) {
        barrier_wait(full + 8 * slot, parity);
        const float seen = multiply(ring + slot * kSlotBytes, scales + slot * kSlotScales);
        __syncwarp();
        if (arrives_for_warp(lane)) barrier_arrive_after(empty + 8 * slot, seen);
        slot += kTeams;
        if (slot >= num_stages) slot -= num_stages, parity ^= 1;
    }
};

// x: rows of 16-bit elements. w13, w2, scales: packed, of one expert every `stride` bytes or floats. h: [pairs][n] float32. n: columns of h.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
experts_single(const void* x, const u8* __restrict__ w13, const float* __restrict__ scale_13, const u8* __restrict__ w2, const float* __restrict__ scale_2,
               void* out, float* h, const int* ids, const int* expert_map, const float* router_weights, i64 x_stride, i64 w13_stride, i64 scale_13_stride,
               i64 w2_stride, i64 scale_2_stride, u32 m, u32 top_k, u32 num_groups, u32 hidden, u32 k_blocks, u32 n, u32 hidden_aligned, u32 scale_13_row,
               u32 scale_2_row, u32 down_rows, u32 num_stages, u32 type, u32 vectorised) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: ring | sums of the math warps | codes of x, then of h | experts hit | scales of weights | barriers | scales of codes
    const u32 pairs = m * top_k, h_blocks = n / kBlockK;
    const u32 groups_of_codes = max(m * k_blocks, pairs * h_blocks);
    float2* const partial = reinterpret_cast<float2*>(shared + num_stages * kSlotBytes);
    u8* const code_memory = reinterpret_cast<u8*>(partial + 2 * kPartials);
    Routed& routed = *reinterpret_cast<Routed*>(code_memory + groups_of_codes * kBlockK);
    float* const weight_scales = reinterpret_cast<float*>(reinterpret_cast<u8*>(&routed) + (sizeof(Routed) + 15) / 16 * 16);
    u8* const barriers = reinterpret_cast<u8*>(weight_scales + num_stages * kSlotScales);
    float* const code_scales = reinterpret_cast<float*>(barriers + num_stages * 16);
    const u32 ring = smem_address(shared), full = smem_address(barriers), empty = full + 8 * num_stages, codes = smem_address(code_memory);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x < num_stages) {
        barrier_init(full + 8 * threadIdx.x, kProducers / 32);
        barrier_init(empty + 8 * threadIdx.x, 4 * kArrivalsOfWarp);
    }
    barrier_init_fence();
    __syncthreads();
    launch_next_kernel();
    wait_for_previous_kernel();

    const u32 unit_groups = n / 8, tiles = ceil_div(hidden_aligned, down_rows);
    // Stages of the first GEMM hold as many k-blocks as their tiles leave room for.
    auto walk_of_all = [&](u32& depth) {
        const u32 all = routed.units * unit_groups, run = ceil_div(all, gridDim.x);
        const u32 widest = run ? ceil_div(run, ceil_div(run, kTileGroups)) : 1;
        depth = kTileGroups / widest;
        return Walk{unit_groups, widest, min(blockIdx.x * run, all), min(blockIdx.x * run + run, all)};
    };

    if (warp < kProducers / 32) {
        give_registers<32>();
        routed.list(ids, expert_map, router_weights, pairs, top_k, num_groups);
        named_barrier_arrive(2, kThreads);
        if (elect_lane()) {
            const u32 part = warp % 2, of_scales = warp / 2;
            Ring at, landing;
            u32 depth, ahead = 0;
            // Waits for room for the next stage, and until no more than kWindow are on their way: what others ask of the memory system queues behind them.
            auto begin_stage = [&] {
                if (++ahead > kWindow) {
                    barrier_wait(full + 8 * landing.stage, landing.parity);
                    landing.advance(num_stages);
                }
                barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
            };
            Walk walk = walk_of_all(depth);
            while (walk.advance()) {
                const u32 expert = routed.expert[walk.unit], row = walk.row + part * n, bytes = walk.groups * 8 * kBlockK;
                const u8* source = w13 + expert * w13_stride + static_cast<i64>(row) * kBlockK;
                const float* scale_source = scale_13 + expert * scale_13_stride + (row / 128 & ~3u);
                for (u32 block = 0; block < k_blocks; block += depth, at.advance(num_stages)) {
                    const u32 count = min(depth, k_blocks - block), bar = full + 8 * at.stage;
                    begin_stage();
                    barrier_expect(bar, count * (of_scales ? kScaleFloats * 4 : bytes));
                    for (u32 i = 0; i < count; ++i) {
                        if (of_scales)
                            bulk_copy(smem_address(weight_scales + at.stage * kSlotScales + (2 * i + part) * kScaleFloats),
                                      scale_source + static_cast<i64>(block + i) * scale_13_row, kScaleFloats * 4, bar);
                        else
                            bulk_copy(ring + at.stage * kSlotBytes + (2 * i + part) * bytes, source + static_cast<i64>(block + i) * 2 * n * kBlockK, bytes, bar);
                    }
                }
            }
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const u32 row = tile * down_rows, bytes = min(down_rows, hidden_aligned - row) * kBlockK, down_depth = depth_of_down(bytes);
                for (u32 unit = 0; unit < routed.units; ++unit) {
                    const u32 expert = routed.expert[unit];
                    const u8* source = w2 + expert * w2_stride + static_cast<i64>(row) * kBlockK;
                    const float* scale_source = scale_2 + expert * scale_2_stride + (row / 128 & ~3u);
                    for (u32 block = 0; block < h_blocks; block += down_depth, at.advance(num_stages)) {
                        const u32 count = min(down_depth, h_blocks - block), bar = full + 8 * at.stage, mine = (count + 1 - part) / 2;
                        begin_stage();
                        if (mine == 0) barrier_arrive(bar);
                        else barrier_expect(bar, mine * (of_scales ? kScaleFloats * 4 : bytes));
                        for (u32 i = part; i < count; i += 2) {
                            if (of_scales)
                                bulk_copy(smem_address(weight_scales + at.stage * kSlotScales + i * kScaleFloats),
                                          scale_source + static_cast<i64>(block + i) * scale_2_row, kScaleFloats * 4, bar);
                            else
                                bulk_copy(ring + at.stage * kSlotBytes + i * bytes, source + static_cast<i64>(block + i) * hidden_aligned * kBlockK, bytes, bar);
                        }
                    }
                }
            }
        }
        return;
    }

    take_registers<112>();
    const u32 team = __shfl_sync(0xffffffffu, warp / 4 - 1, 0), thread = threadIdx.x - kProducers;
    const u32 in_team = (warp - team) % 4;  // the one or two warps with tokens are others in each team: a warp always issues from the same quarter
    quantise(m, k_blocks, codes, code_scales, [&](Group& group, u32 row, u32 block, u32 group_lane, bool exists) {
        const u32 column = block * kBlockK + group_lane * 8;
        RawGroup raw;
        raw.load(x, row * x_stride + column, exists && column < hidden ? min(hidden - column, 8u) : 0, vectorised);
        group.expand(raw, type);
    });
    named_barrier(2, kThreads);

    const u32 units = routed.units, token = lane / 4, round = thread == 0 ? grid_round(&grid_arrivals) : 0;
    Turns turns{ring, weight_scales, full, empty, num_stages, team, 0, team};
    u32 depth;
    Walk walk = walk_of_all(depth);
    const u32 up_stages = ceil_div(k_blocks, depth);
    const Activations of_x{codes, code_scales, m, k_blocks};
    for (u32 buffer = 0; walk.advance(); buffer ^= 1) {
        const u32 groups = walk.groups, boundary = (128 - walk.row % 128) / 8;
        const u32 scale[2] = {walk.row / 128 % 4, kScaleFloats + (walk.row + n) / 128 % 4};
        float sum[16] = {};
        for (; turns.before < up_stages; turns.before += kTeams)
            turns.take(lane, [&](u32 stage, const float* scales) {
                const u32 block = turns.before * depth;
                return multiply_up(groups, sum, of_x, min(lane % 8, m - 1), min(token, m - 1), 1.f, true, boundary, scale, stage, scales, block,
                                   min(depth, k_blocks - block), lane, in_team);
            });
        turns.before -= up_stages;
        float2* const sums = partial + buffer * kPartials;
        const u32 warps = groups == 1 ? 2 : 1;  // that have sums
        if (in_team < warps) {
#pragma unroll
            for (u32 j = 0; j < 8; ++j)
                if (j < 2 * groups) sums[(team * 8 + in_team * 2 * groups + j) * 32 + lane] = {sum[2 * j], sum[2 * j + 1]};
        }
        named_barrier(3, kMathThreads);  // who still reads the other buffer has not come here
        const u32 pair = routed.pair[walk.unit][token];
        if (thread < groups * 32 && pair != kAbsent) {
            float2 gate{}, up{};
            for (u32 t = 0; t < kTeams; ++t)
                for (u32 w = 0; w < warps; ++w) {
                    const float2* of_warp = sums + (t * 8 + w * 2 * groups + thread / 32) * 32 + lane;
                    gate.x += of_warp[0].x, gate.y += of_warp[0].y, up.x += of_warp[groups * 32].x, up.y += of_warp[groups * 32].y;
                }
            float* const target = h + static_cast<i64>(pair) * n + walk.row + thread / 32 * 8 + lane % 4 * 2;
            target[0] = gate.x / (1.f + expf(-gate.x)) * up.x, target[1] = gate.y / (1.f + expf(-gate.y)) * up.y;
        }
    }

    if (units) {
        named_barrier(3, kMathThreads);
        if (thread == 0) meet_grid(&grid_arrivals, round, blockIdx.x == 0, gridDim.x);
        named_barrier(3, kMathThreads);
        quantise(pairs, h_blocks, codes, code_scales, [&](Group& group, u32 row, u32 block, u32 group_lane, bool exists) {
            const bool written = exists && routed.group[row] != kNowhere;
            const float4* source = reinterpret_cast<const float4*>(h + static_cast<i64>(row) * n + block * kBlockK) + group_lane * 2;
            const float4 low = written ? __ldcg(source) : make_float4(0.f, 0.f, 0.f, 0.f), high = written ? __ldcg(source + 1) : low;
            group.value[0] = low.x, group.value[1] = low.y, group.value[2] = low.z, group.value[3] = low.w;
            group.value[4] = high.x, group.value[5] = high.y, group.value[6] = high.z, group.value[7] = high.w;
        });
    }

    const Activations of_h{codes, code_scales, pairs, h_blocks};
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u32 row = tile * down_rows, here = min(down_rows, hidden_aligned - row), boundary = (128 - row % 128) / 8;
        const u32 down_depth = depth_of_down(here * kBlockK), unit_stages = ceil_div(h_blocks, down_depth);
        const u32 scale[2] = {row / 128 % 4, 0};
        float sum[16] = {};
        named_barrier(3, kMathThreads);  // codes of h are there; sums of the tile before have been read
        u32 unit = 0, part = turns.before;
        auto settle = [&] {
            for (; part >= unit_stages; part -= unit_stages) ++unit;
        };
        for (settle(); unit < units; part += kTeams, settle()) {
            const u32 load_pair = routed.pair[unit][lane % 8], pair = routed.pair[unit][token];
            const float router = routed.weight[unit][token];
            turns.take(lane, [&](u32 stage, const float* scales) {
                const u32 block = part * down_depth;
                return multiply_down(here / 8, sum, of_h, load_pair == kAbsent ? 0 : load_pair, pair == kAbsent ? 0 : pair, router, pair != kAbsent, boundary,
                                     scale, stage, scales, block, min(down_depth, h_blocks - block), lane, in_team);
            });
        }
        turns.before = part + (unit - units) * unit_stages;
        if (in_team < 2) {
#pragma unroll
            for (u32 j = 0; j < 8; ++j) partial[((team * 2 + in_team) * 8 + j) * 32 + lane] = {sum[2 * j], sum[2 * j + 1]};
        }
        named_barrier(3, kMathThreads);
        for (u32 i = thread; i < m * here; i += kMathThreads) {
            const u32 of_token = i / here, in_tile = i - of_token * here;
            if (row + in_tile >= hidden) continue;
            const float* const sums = reinterpret_cast<const float*>(partial + in_tile / 8 * 32 + of_token * 4 + in_tile % 8 / 2) + in_tile % 2;
            float value = 0.f;
            for (u32 t = 0; t < 2 * kTeams; ++t) value += sums[t * 8 * 32 * 2];
            store_element(out, static_cast<i64>(of_token) * hidden + row + in_tile, type, value);
        }
    }
}
