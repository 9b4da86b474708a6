// The masked grouped GEMM for many rows a group: out[g, :rows_g] = a[g, :rows_g] . weight[g]^T with block scales, limited by the tensor core.
//
// Persistent: CTAs take tiles of 128 rows of activations (wgmma's 64-row side, twice) x 256 rows of the weight in turn, from a list of units (a group
// and at most 128 of its rows, expert_units.cuh) that each computes from masked_m. All tiles of a unit come one after the other, so the rows and the
// weights that CTAs share are in L2. Where the last round has tiles for no more than half of the CTAs, each of these is cut in two.
//
// Before the previous kernel has ended, weights of as many k-blocks as there are stages are asked for on a guess (`guess`): that every group is one
// unit. A wrong one costs these bytes: their stages go around the ring once, multiplied by nobody.
//
// Warp roles (384 threads):
//   warp 0        producer, one lane: the weight's rows, one contiguous copy a k-block.
//   warp 1        producer, one lane: activations, through a 3D map {128 bytes of k, box_rows <= 128 of the rows of all groups, k-blocks}.
//   warp 2        scales of both, as asynchronous copies.
//   warps 4..11   two math warpgroups (promotion.cuh): 64 rows of the tile each, or, where a unit has no more than 64, 128 of its columns each.
// Barriers: full (2 producers + bytes; 32 lanes of warp 2, once their copies are complete) and empty (8 math warps) per stage. A guess is warp 0's
// arrival and its bytes on the first phase of full, right or wrong.
#define ROWS 128
#include "expert_units.cuh"
#include "promotion.cuh"

constexpr u32 kColumns = 256, kWeightBytes = kColumns * kBlockK;

// What a CTA does in one of its turns: a tile, or 128 of its columns.
struct Turn {
    u32 unit, column;
    bool half;
};
// The turns of all CTAs: tiles, then halves of those that are cut.
struct Turns {
    u32 columns, whole, number;

    DEVICE Turns(u32 units, u32 columns_) : columns(columns_) {
        const u32 tiles = units * columns, rest = tiles % gridDim.x;
        whole = 2 * rest <= gridDim.x ? tiles - rest : tiles;
        number = whole + 2 * (tiles - whole);
    }
    DEVICE Turn at(u32 index) const {
        const u32 tile = index < whole ? index : whole + (index - whole) / 2, unit = tile / columns;
        const u32 column = (tile - unit * columns) * kColumns + (index < whole ? 0 : (index - whole) % 2 * 128);
        return {unit, column, index >= whole};
    }
};

struct StageLayout {
    static constexpr u32 kRows = kActivationBytes, kWeight = kWeightBytes, kScaleA = kStageScales * 4, kScaleB = kStageScales * 4;
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
masked(const __grid_constant__ TensorMap map_a, const float* scale_a, const u8* __restrict__ weight, const float* __restrict__ scale_b, void* out,
       const int* masked_m, i64 scale_a_group_stride, i64 scale_a_block_stride, i64 weight_stride, i64 scale_b_stride, u32 num_groups, u32 most_units,
       u32 max_rows, u32 n, u32 n_aligned, u32 k_blocks, u32 scale_b_row, u32 box_rows, u32 ring_bytes, u32 out_type, u32 vectorised, u32 guess) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: ring | barriers | units
    u8* const barriers = shared + ring_bytes;
    Units units;
    units.place(barriers + 2 * kMaxStages * 8, num_groups, 0, most_units);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) prefetch_map(&map_a);
    Stages stages;
    stages.place(shared, ring_bytes, kWeightBytes, kWeightBytes, k_blocks, smem_address(barriers));
    stages.init_barriers(2, 8);
    auto fetch_weights = [&](u32 group, const Turn& turn, u32 block, u32 stage) {
        const u32 bar = stages.full + 8 * stage, bytes = min(turn.half ? 128 : kColumns, n_aligned - turn.column) * kBlockK;
        barrier_expect(bar, bytes);
        bulk_copy(stages.weight_tile(stage, 0), weight + group * weight_stride + (static_cast<i64>(block) * n_aligned + turn.column) * kBlockK, bytes, bar);
    };
    // The previous kernel writes masked_m, activations and their scales; weights are older.
    const u32 columns = ceil_div(n, kColumns);
    const Turns guessed_turns(num_groups, columns);
    const Turn guessed = guessed_turns.at(blockIdx.x);
    u32 fetched = 0;  // k-blocks of weights that have been asked for ahead
    if (guess && blockIdx.x < guessed_turns.number && guessed.column < n) {
        fetched = min(k_blocks, stages.number);
#pragma unroll 1
        for (u32 s = 0; threadIdx.x == 0 && s < fetched; ++s) fetch_weights(guessed.unit, guessed, s, s);
    }
    wait_for_previous_kernel();
    launch_next_kernel();
    for (u32 g = threadIdx.x; g < num_groups; g += kThreads) units.count[g] = min(static_cast<u32>(max(masked_m[g], 0)), max_rows);
    __syncthreads();
    units.list(num_groups);
    const Turns turns(units.number, columns);
    Ring ring;
    const Turn first = turns.at(blockIdx.x);
    const bool right = blockIdx.x < turns.number && units.expert[first.unit] == guessed.unit && first.column == guessed.column && first.half == guessed.half;
    if (!right) {  // what has been asked for lands, even if this CTA has no turn at all
#pragma unroll 1
        for (; fetched > 0; --fetched, ring.advance(stages.number)) {
            if (threadIdx.x == 32 || warp == 2) {
                barrier_arrive(stages.full + 8 * ring.stage);
            } else if (warp >= 4 && arrives_for_warp(lane)) {
                barrier_wait(stages.full + 8 * ring.stage, 0);
                barrier_arrive(stages.empty + 8 * ring.stage);
            }
        }
        __syncwarp();
    }

    if (warp < 4) {
        give_registers<40>();
        if (warp < 2 && elect_lane()) {
            for (u32 index = blockIdx.x; index < turns.number; index += gridDim.x) {
                const Turn turn = turns.at(index);
                if (turn.column >= n) continue;
                const u32 group = units.expert[turn.unit];
                for (u32 block = 0; block < k_blocks; ++block, ring.advance(stages.number)) {
                    if (warp == 0 && fetched > 0) {  // not waited for: the others may have filled this stage, and the math warps emptied it, a phase ago
                        --fetched;
                        continue;
                    }
                    barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                    if (warp == 0) {
                        fetch_weights(group, turn, block, ring.stage);
                    } else {
                        const u32 bar = stages.full + 8 * ring.stage;
                        barrier_expect(bar, box_rows * kBlockK);
                        tensor_copy(stages.activation_tile(ring.stage, 0), &map_a, 0, group * max_rows + units.chunk[turn.unit] * ROWS, block, bar);
                    }
                }
            }
        } else if (warp == 2) {
            for (u32 index = blockIdx.x; index < turns.number; index += gridDim.x) {
                const Turn turn = turns.at(index);
                if (turn.column >= n) continue;
                const u32 group = units.expert[turn.unit], rows = units.rows(turn.unit);
                const float* of_rows = scale_a + group * scale_a_group_stride + units.chunk[turn.unit] * ROWS;
                const float* of_weight = scale_b + group * scale_b_stride + turn.column / 128;
                for (u32 block = 0; block < k_blocks; ++block, ring.advance(stages.number)) {
                    barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                    const u32 target = smem_address(stages.block_scales(ring.stage, 0));
#pragma unroll
                    for (u32 i = 0; i < ROWS; i += 32)
                        if (i + lane < rows) copy_4_async(target + (i + lane) * 4, of_rows + block * scale_a_block_stride + i + lane);
                    if (lane < 2) copy_4_async(target + (ROWS + lane) * 4, of_weight + static_cast<i64>(block) * scale_b_row + lane);  // padded: both exist
                    barrier_arrive_after_copies(stages.full + 8 * ring.stage);
                }
            }
        }
        __syncwarp();
        return;
    }

    take_registers<232>();
    const u32 math = __shfl_sync(0xffffffffu, warp / 4 - 1, 0);
    const u32 weights = matrix_descriptor_low(stages.weight_tile(0, 0)), scales = smem_address(stages.block_scales(0, 0));
    const u32 element = out_type == kF32 ? 4 : 2;
    for (u32 index = blockIdx.x; index < turns.number; index += gridDim.x) {
        const Turn turn = turns.at(index);
        if (turn.column >= n) continue;
        const u32 unit = turn.unit, rows = units.rows(unit);
        const bool narrow = rows <= 64 && !turn.half, one_slice = narrow || turn.half;
        const u32 half = narrow ? math : 0, warp_row = (narrow ? 0 : math * 64) + warp % 4 * 16, low = warp_row + lane / 4;  // and 8 further down
        auto operands_from = [&](u32 of_half) {
            const u32 of_rows = stages.activation_tile(0, 0) + (warp_row + lane % 16) * kBlockK + (lane / 16 ^ lane % 8) * 16;
            const u32 scale_of_0 = scales + (ROWS + of_half) * 4, scale_of_1 = scales + (ROWS + 1) * 4;
            return Operands{of_rows, weights + of_half * (128 * kBlockK / 16), scales + low * 4, {scale_of_0, scale_of_1}, stages.full, stages.empty};
        };
        float sum[2][64];
        barrier_wait(stages.full + 8 * ring.stage, ring.parity);
        if (one_slice) multiply_blocks<1, StageLayout>(sum, operands_from(half), ring, stages.number, k_blocks, lane);
        else multiply_blocks<2, StageLayout>(sum, operands_from(0), ring, stages.number, k_blocks, lane);
        const i64 line = static_cast<i64>(units.expert[unit]) * max_rows + units.chunk[unit] * ROWS + low;
        u8* row_low = static_cast<u8*>(out) + line * n * element;
        u8* row_high = row_low + 8ll * n * element;
        const u32 first_column = turn.column + half * 128;
        write_rows<128>(sum[0], row_low, row_high, first_column, n, out_type, vectorised, low < rows, low + 8 < rows, lane);
        if (!one_slice) write_rows<128>(sum[1], row_low, row_high, first_column + 128, n, out_type, vectorised, low < rows, low + 8 < rows, lane);
    }
}
