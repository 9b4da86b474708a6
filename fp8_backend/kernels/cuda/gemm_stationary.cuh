// The GEMM of gemm.cuh for few k-blocks (at most 6), where the end of a tile takes as long as its products: the same sums in the same order, the same bits.
//
// A CTA takes runs of tiles of 64 rows x 128 columns that lie below each other, and keeps the weights of these columns for a run: L2 is asked for little but
// activations. CTAs beside each other have neighbouring columns of the same rows, so that memory is sent long pieces of rows of outputs. Weights come to a ring of
// k-blocks, each with its scales; those of the next run follow where there is room, and else as each warpgroup's last tile of the run lets k-blocks go. Warp roles:
//   warpgroup 0        producers. A lane each of warps 0 to 2 fetches the tiles of a and their scales for one math warpgroup, a lane of warp 3 weights.
//   warpgroups 1 to 3  math. They take tiles in turn, so that the end of one lies under the products of the others; each has a ring of stages of its own.
// Barriers per stage: full (1 arrival + bytes), empty (one arrival per warp of its warpgroup). Per slot, a k-block of weights: full (1 arrival + bytes), empty
// (one arrival per math warp). A warpgroup without a tile in a run waits for its weights all the same: a phase is told by its parity, so none may be missed.
#include "arrivals.cuh"
#include "output.cuh"
#include "tiles.cuh"

constexpr u32 kRows = 64, kColumns = 128, kWarpgroups = 3;
constexpr u32 kBytesA = kRows * kBlockK, kBytesB = kColumns * kBlockK, kStageScaleBytes = kRows * 4, kBlockScaleBytes = kScaleFloats * 4;
constexpr u32 kStored = 64;  // columns of a box of outputs
constexpr u32 kRoomBytes = kRows * kColumns * 2;
// Of a math warpgroup. More than three, and fewer k-blocks of the next run's weights, gain nothing.
constexpr u32 kLeastStages = 3, kMaxStages = 8;
constexpr u32 kBytesOfStages = kWarpgroups * (kBytesA + kStageScaleBytes + 2 * 8);  // one stage of each math warpgroup
constexpr u32 kBytesOfSlot = kBytesB + kBlockScaleBytes + 2 * 8;
constexpr u32 kBytesOfRings = SHARED_BYTES - kWarpgroups * kRoomBytes;

extern "C" __global__ void __launch_bounds__(128 * (1 + kWarpgroups), 1)
gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_out,
     const u8* __restrict__ packed_b, const float* __restrict__ scale_a, const float* __restrict__ scale_b, void* __restrict__ out,
     const void* __restrict__ bias, i64 out_stride, u32 m, u32 n, u32 k_blocks, u32 m_aligned, u32 scale_b_stride, u32 run, u32 out_type, u32 bias_type, u32 mapped_out,
     u32 n_aligned, u32 bytes_a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 num_slots = min(2 * k_blocks, (kBytesOfRings - kLeastStages * kBytesOfStages) / kBytesOfSlot);
    const u32 num_stages = min(kMaxStages, (kBytesOfRings - num_slots * kBytesOfSlot) / kBytesOfStages), all_stages = kWarpgroups * num_stages;
    const u32 weights = smem_address(shared), rooms = weights + num_slots * kBytesB, tiles = rooms + kWarpgroups * kRoomBytes;
    const u32 scales_a = tiles + all_stages * kBytesA, scales_b = scales_a + all_stages * kStageScaleBytes;
    const u32 full = scales_b + num_slots * kBlockScaleBytes, empty = full + all_stages * 8;
    const u32 weights_full = empty + all_stages * 8, weights_empty = weights_full + num_slots * 8;
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);

    if (threadIdx.x == 0) {
        prefetch_map(&map_a);
        if (!packed_b) prefetch_map(&map_b);
        for (u32 s = 0; s < all_stages; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 4 * kArrivalsOfWarp);
        }
        for (u32 slot = 0; slot < num_slots; ++slot) {
            barrier_init(weights_full + 8 * slot, 1);
            barrier_init(weights_empty + 8 * slot, kWarpgroups * 4 * kArrivalsOfWarp);
        }
        barrier_init_fence();
    }
    __syncthreads();
    launch_next_kernel();

    const u32 tiles_m = ceil_div(m, kRows), tiles_n = ceil_div(n, kColumns), num_runs = ceil_div(tiles_m, run) * tiles_n;
    const u32 last_m = m_aligned > kRows ? m_aligned - kRows : 0;  // no tile begins behind it
    auto tiles_of = [&](u32 index) { return min(run, tiles_m - index / tiles_n * run); };
    auto row_of = [&](u32 index, u32 i) { return min((index / tiles_n * run + i) * kRows, last_m); };

    if (warpgroup == 0) {
        give_registers<32>();
        const u32 producer = threadIdx.x / 32;
        if (producer < kWarpgroups && elect_lane()) {
            wait_for_previous_kernel();
            const u32 first_stage = producer * num_stages;
            u32 next = producer;  // of this run's tiles; those of the runs before count
            Ring ring;
            for (u32 index = blockIdx.x; index < num_runs; next -= tiles_of(index), index += gridDim.x)
                for (; next < tiles_of(index); next += kWarpgroups) {
                    const u32 row = row_of(index, next), scale_bytes = min(kRows, m_aligned - row) * 4;
                    for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(num_stages)) {
                        const u32 s = first_stage + ring.stage, bar = full + 8 * s;
                        barrier_wait(empty + 8 * s, ring.parity ^ 1);
                        barrier_expect(bar, bytes_a + scale_bytes);
                        tensor_copy(tiles + s * kBytesA, &map_a, 0, row, kb, bar);
                        bulk_copy(scales_a + s * kStageScaleBytes, scale_a + static_cast<i64>(kb) * m_aligned + row, scale_bytes, bar);
                    }
                }
        } else if (producer == kWarpgroups && elect_lane()) {
            if (!packed_b) wait_for_previous_kernel();
            Ring slots;
            for (u32 index = blockIdx.x; index < num_runs; index += gridDim.x) {
                const u32 column = index % tiles_n * kColumns;
                // Rows of a packed b. What lies past them stays as it is: no output needs it.
                const u32 bytes_b = packed_b ? min(kColumns, n_aligned - column) * kBlockK : kBytesB;
                const float* const column_scale = scale_b + first_scale_of(column, scale_b_stride);
                for (u32 kb = 0; kb < k_blocks; ++kb, slots.advance(num_slots)) {
                    const u32 slot = slots.stage, bar = weights_full + 8 * slot, target = weights + slot * kBytesB;
                    barrier_wait(weights_empty + 8 * slot, slots.parity ^ 1);
                    barrier_expect(bar, bytes_b + kBlockScaleBytes);
                    if (packed_b) bulk_copy(target, packed_b + (static_cast<i64>(kb) * n_aligned + column) * kBlockK, bytes_b, bar);
                    else tensor_copy(target, &map_b, 0, column, kb, bar);
                    bulk_copy(scales_b + slot * kBlockScaleBytes, column_scale + static_cast<i64>(kb) * scale_b_stride, kBlockScaleBytes, bar);
                }
            }
        }
    } else {
        take_registers<160>();
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, turn = warpgroup - 1, first_stage = turn * num_stages;
        const u32 own_full = full + 8 * first_stage, own_empty = empty + 8 * first_stage, own_room = rooms + turn * kRoomBytes;
        const Output output{out, bias, out_stride, m, n, out_type, bias_type};
        const u32 own_a = matrix_descriptor_low(tiles + first_stage * kBytesA), first_b = matrix_descriptor_low(weights);
        // From a shuffle, for ptxas would compute it anew in every block.
        const u32 row_scales = __shfl_sync(0xffffffffu, scales_a + first_stage * kStageScaleBytes + (warp * 16 + lane / 4) * 4, lane);
        u32 next = turn;  // of this run's tiles
        bool waits = true;
        Ring ring, slots;

        for (u32 index = blockIdx.x; index < num_runs; index += gridDim.x) {
            const u32 count = tiles_of(index), column = index % tiles_n * kColumns;
            const u32 block_scales = scales_b + (column / 128 - first_scale_of(column, scale_b_stride)) * 4;
            if (next >= count)
                for (u32 kb = 0; kb < k_blocks; ++kb, slots.advance(num_slots)) {
                    barrier_wait(weights_full + 8 * slots.stage, slots.parity);
                    __syncwarp();
                    if (arrives_for_warp(lane)) barrier_arrive(weights_empty + 8 * slots.stage);
                }
            const Ring of_run = slots;
            for (bool fresh = true; next < count; next += kWarpgroups, fresh = false) {
                const u32 row = row_of(index, next);
                const bool last = next + kWarpgroups >= count;  // of this warpgroup in the run
                float sum[1][kColumns / 2], partial[kColumns / 2];
#pragma unroll
                for (u32 i = 0; i < kColumns / 2; ++i) sum[0][i] = 0.f;
                slots = of_run;
                for (u32 kb = 0; kb < k_blocks; ++kb) {
                    const u32 s = ring.stage, slot = slots.stage;
                    barrier_wait(own_full + 8 * s, ring.parity);
                    if (fresh) barrier_wait(weights_full + 8 * slot, slots.parity);
                    fence_registers(partial);
                    wgmma_fence();
                    issue_product<kColumns>(partial, own_a + s * (kBytesA / 16), first_b + slot * (kBytesB / 16));
                    const float of_block = load_shared(block_scales + slot * kBlockScaleBytes);
                    const float low = load_shared(row_scales + s * kStageScaleBytes) * of_block;
                    const float high = load_shared(row_scales + s * kStageScaleBytes + 32) * of_block;
                    ring.advance(num_stages);
                    slots.advance(num_slots);
                    wgmma_wait<0>();
                    fence_registers(partial);
                    __syncwarp();
                    barrier_arrive_after_words(own_empty + 8 * s, low, high, arrives_for_warp(lane));
                    if (last) barrier_arrive_after_words(weights_empty + 8 * slot, low, high, arrives_for_warp(lane));
#pragma unroll
                    for (u32 i = 0; i < kColumns / 2; ++i) sum[0][i] += (i % 4 < 2 ? low : high) * partial[i];
                }

                if (waits) wait_for_previous_kernel();  // it may still read what this kernel overwrites
                waits = false;
                if (bias != nullptr) output.add_bias(sum[0], column, lane);
                if (mapped_out) {
                    if (lane == 0) bulk_wait_read();  // of the last tile's outputs
                    __syncwarp();
                    store_slices<kStored, kRows>(&map_out, sum, own_room, warp * 16, column, row, out_type, lane);
                } else {
                    output.write(sum[0], row + warp * 16, column, lane);
                }
            }
            next -= count;
        }
        if (mapped_out && lane == 0) bulk_wait();
    }
}
