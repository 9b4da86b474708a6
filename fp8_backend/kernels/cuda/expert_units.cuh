// What the kernels for few rows an expert share: the list of units (an expert and at most ROWS of its rows) that every CTA computes by itself
// from the expert ids, the ring of stages, and the copies of activations that fill them beside the weights.
//
// Every CTA does the same sums in the same order, so all of them, and the kernels after them, agree where a row lies. At 512 pairs of token and
// expert it takes about a microsecond, less than a launch.
#pragma once
#include "arrivals.cuh"
#include "group.cuh"
#include "wgmma.cuh"

constexpr u32 kThreads = 384, kMathThreads = 256;
constexpr u32 kActivationBytes = ROWS * kBlockK;
constexpr u32 kStageScales = ROWS + 4;   // floats a stage: of the activations' rows, of the weight's blocks of 128 rows
// k-blocks of a stage at most, as far as registers reach: their products are in flight together, and share a wait and a release. A stage of one takes 200 to 250 ns
// from full to empty, however few bytes it has (measured).
constexpr u32 kMaxDepth = ROWS == 128 ? 1 : 4;
constexpr u32 kMaxStages = 64;
// The number of stages is a multiple: two math warpgroups take them in turn; with 128 rows, each takes all.
constexpr u32 kRingUnit = ROWS == 128 ? 1 : 2;
constexpr u16 kNowhere = 0xffff;
constexpr u32 kLoaderArrivals = 32;  // on a full barrier: lanes whose copies are complete

struct Units {
    u32* count;      // [num_groups] rows of a group
    u32* start;      // [num_groups] where they lie in `order`
    u32* totals;     // [2][16] rows and units of the warps, while units are listed
    u16* expert;     // [units]
    u16* chunk;      // [units] which ROWS rows of the group
    u16* order;      // [pairs] (token, slot) pairs, sorted by group
    u16* group_of;   // [pairs] group of a pair
    u16* rank;       // [pairs] its place among the pairs of the group
    u32 number;      // of units

    // Takes its arrays from `memory`, 16-byte aligned; expert_shared_bytes of experts_decode.py is the same sum.
    DEVICE void place(u8* memory, u32 num_groups, u32 pairs, u32 most_units) {
        totals = reinterpret_cast<u32*>(memory);
        count = totals + 32;
        start = count + num_groups;
        expert = reinterpret_cast<u16*>(start + num_groups);
        chunk = expert + most_units;
        order = chunk + most_units;
        group_of = order + pairs;
        rank = group_of + pairs;
        number = 0;
    }

    // Sorts pairs by group, in the order of their index. Ends with the counts known to all threads.
    DEVICE void sort(const void* ids, u32 wide_ids, const int* expert_map, u32 pairs, u32 num_groups) {
        for (u32 g = threadIdx.x; g < num_groups; g += kThreads) count[g] = 0;
        for (u32 p = threadIdx.x; p < pairs; p += kThreads) {
            int id = wide_ids ? static_cast<int>(static_cast<const i64*>(ids)[p]) : static_cast<const int*>(ids)[p];
            if (id >= 0 && expert_map != nullptr) id = expert_map[id];
            group_of[p] = id < 0 ? kNowhere : static_cast<u16>(id);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            const u32 below_lane = (1u << threadIdx.x) - 1;
            for (u32 first = 0; first < pairs; first += 32) {
                const u32 p = first + threadIdx.x;
                const u32 group = p < pairs ? group_of[p] : kNowhere;
                const u32 same = __match_any_sync(0xffffffffu, group);
                const u32 before = group != kNowhere ? count[group] : 0;
                __syncwarp();
                if (group != kNowhere) {
                    rank[p] = static_cast<u16>(before + __popc(same & below_lane));
                    if ((same & below_lane) == 0) count[group] = before + __popc(same);
                }
                __syncwarp();
            }
        }
        __syncthreads();
    }

    // Lists the units of groups whose counts are known; sets start and number. Returns the rows of all groups.
    DEVICE u32 list(u32 num_groups) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        u32 rows_before = 0, units_before = 0;
        for (u32 first = 0; first < num_groups; first += kThreads) {
            const u32 g = first + threadIdx.x, rows = g < num_groups ? count[g] : 0, units = ceil_div(rows, u32(ROWS));
            u32 rows_sum = rows, units_sum = units;  // of the warp up to and with this lane
#pragma unroll
            for (u32 distance = 1; distance < 32; distance *= 2) {
                const u32 other_rows = __shfl_up_sync(0xffffffffu, rows_sum, distance);
                const u32 other_units = __shfl_up_sync(0xffffffffu, units_sum, distance);
                if (lane >= distance) rows_sum += other_rows, units_sum += other_units;
            }
            __syncthreads();  // totals of the round before have been read
            if (lane == 31) totals[warp] = rows_sum, totals[16 + warp] = units_sum;
            __syncthreads();
            u32 row = rows_before + rows_sum - rows, unit = units_before + units_sum - units;
            for (u32 w = 0; w < kThreads / 32; ++w) {
                if (w < warp) row += totals[w], unit += totals[16 + w];
                rows_before += totals[w], units_before += totals[16 + w];
            }
            if (g < num_groups) start[g] = row;
            for (u32 c = 0; c < units; ++c) {
                expert[unit + c] = static_cast<u16>(g);
                chunk[unit + c] = static_cast<u16>(c);
            }
        }
        number = units_before;
        __syncthreads();
        return rows_before;
    }

    DEVICE void fill_order(u32 pairs) {
        for (u32 p = threadIdx.x; p < pairs; p += kThreads)
            if (group_of[p] != kNowhere) order[start[group_of[p]] + rank[p]] = static_cast<u16>(p);
        __syncthreads();
    }

    DEVICE u32 rows(u32 unit) const { return min(count[expert[unit]] - chunk[unit] * ROWS, u32(ROWS)); }
    DEVICE u32 first_row(u32 unit) const { return start[expert[unit]] + chunk[unit] * ROWS; }
};

// Shared memory of the ring: weights of all stages | activations of all stages | their scales. Barriers lie elsewhere. A stage holds up to `depth`
// k-blocks of one unit; `per_unit` stages hold all.
struct Stages {
    u32 weights, activations, full, empty, block_bytes, depth, per_unit, number;
    float* scales;

    // As many stages of about `stage_bytes` of weights as fit `bytes`. wgmma reads 64 rows from any weight tile: past a small one into what follows,
    // whose products are not kept.
    DEVICE void place(u8* memory, u32 bytes, u32 bytes_of_block, u32 stage_bytes, u32 k_blocks, u32 barriers) {
        block_bytes = bytes_of_block;
        depth = max(min(stage_bytes / block_bytes, kMaxDepth), 1u);
        per_unit = ceil_div(k_blocks, depth);
        depth = ceil_div(k_blocks, per_unit);
        number = min(bytes / (depth * (block_bytes + kActivationBytes + kStageScales * 4)), kMaxStages) / kRingUnit * kRingUnit;
        weights = smem_address(memory);
        activations = weights + number * depth * block_bytes;
        scales = reinterpret_cast<float*>(memory + number * depth * (block_bytes + kActivationBytes));
        full = barriers;
        empty = barriers + kMaxStages * 8;
    }
    // Called by all threads; ends with all barriers ready.
    DEVICE void init_barriers(u32 producers, u32 consumers) const {
        if (threadIdx.x < number) {
            barrier_init(full + 8 * threadIdx.x, producers + kLoaderArrivals);
            barrier_init(empty + 8 * threadIdx.x, consumers * kArrivalsOfWarp);
        }
        barrier_init_fence();
        __syncthreads();
    }
    // Of block `slot` of a stage.
    DEVICE u32 weight_tile(u32 stage, u32 slot) const { return weights + (stage * depth + slot) * block_bytes; }
    DEVICE u32 activation_tile(u32 stage, u32 slot) const { return activations + (stage * depth + slot) * kActivationBytes; }
    DEVICE float* block_scales(u32 stage, u32 slot) const { return scales + (stage * depth + slot) * kStageScales; }
};

// Where chunk `chunk` (16 bytes) of row `row` lies in a tile of 128-byte rows, swizzled.
DEVICE u32 swizzled(u32 row, u32 chunk) { return row * kBlockK + (chunk ^ row % 8) * 16; }

// Quantised activations of one k-block, 8 lanes a row, as asynchronous copies.
struct CodeSource {
    static constexpr u32 kSlots = ROWS / 4;
    const u8* codes[kSlots];
    u32 rows;

    template <class Address> DEVICE void set(u32 rows_, u32 lane, Address address) {
        rows = rows_;
#pragma unroll
        for (u32 i = 0; i < kSlots; ++i) {
            const u32 row = i * 4 + lane / 8;
            codes[i] = row < rows ? address(row) + lane % 8 * 16 : nullptr;
        }
    }
    DEVICE void copy(u32 target, u32 block, u32 lane) const {
#pragma unroll
        for (u32 i = 0; i < kSlots; ++i) {
            if (i * 4 >= rows) break;
            if (codes[i] != nullptr) copy_16_async(target + swizzled(i * 4 + lane / 8, lane % 8), codes[i] + static_cast<i64>(block) * kBlockK);
        }
    }
};
