// The GEMM of gemm.cuh for few k-blocks, where the end of a tile takes as long as its products: the same sums in the same order, the same bits. Its weights stay
// (stationary.cuh), so L2 is asked for little but activations. CTAs beside each other have neighbouring columns of the same rows, so that memory is sent long
// pieces of rows of outputs.
//
// Warp roles:
//   warpgroup 0      producers. A lane each of the first warps fetches the tiles of a and their scales for one math warpgroup, a lane of the warp behind them weights.
//   warpgroups 1..W  math.
#include "output.cuh"
#include "stationary.cuh"

constexpr u32 kStored = 64;  // columns of a box of outputs
constexpr u32 kOutputBytes = kRows * kColumns * 2;

extern "C" __global__ void __launch_bounds__(128 * (1 + kWarpgroups), 1)
gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_out,
     const u8* __restrict__ packed_b, const float* __restrict__ scale_a, const float* __restrict__ scale_b, void* __restrict__ out,
     const void* __restrict__ bias, i64 out_stride, u32 m, u32 n, u32 k_blocks, u32 m_aligned, u32 scale_b_stride, u32 run, u32 out_type, u32 bias_type, u32 mapped_out,
     u32 n_aligned, u32 bytes_a) {
    extern __shared__ __align__(1024) u8 shared[];
    const Room room = room_at(smem_address(shared), k_blocks, kOutputBytes);
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);

    if (threadIdx.x == 0) {
        prefetch_map(&map_a);
        if (!packed_b) prefetch_map(&map_b);
        initialise_barriers(room);
    }
    __syncthreads();
    launch_next_kernel();

    const u32 tiles_m = ceil_div(m, kRows), tiles_n = ceil_div(n, kColumns), num_runs = ceil_div(tiles_m, run) * tiles_n;
    const u32 last_m = m_aligned > kRows ? m_aligned - kRows : 0;  // no tile begins behind it
    auto tiles_of = [&](u32 index) { return min(run, tiles_m - index / tiles_n * run); };
    auto row_of = [&](u32 index, u32 i) { return min((index / tiles_n * run + i) * kRows, last_m); };

    if (warpgroup == 0) {
        give_registers_to_math();
        const u32 producer = threadIdx.x / 32;
        if (producer < kWarpgroups && elect_lane()) {
            wait_for_previous_kernel();
            const u32 first_stage = producer * room.num_stages;
            u32 next = producer;  // of this run's tiles; those of the runs before count
            Ring ring;
            for (u32 index = blockIdx.x; index < num_runs; next -= tiles_of(index), index += gridDim.x)
                for (; next < tiles_of(index); next += kWarpgroups) {
                    const u32 row = row_of(index, next), scale_bytes = min(kRows, m_aligned - row) * 4;
                    for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(room.num_stages)) {
                        const u32 s = first_stage + ring.stage, bar = room.full + 8 * s;
                        barrier_wait(room.empty + 8 * s, ring.parity ^ 1);
                        barrier_expect(bar, bytes_a + scale_bytes);
                        tensor_copy(room.rows + s * kBytesA, &map_a, 0, row, kb, bar);
                        bulk_copy(room.scales_a + s * kStageScaleBytes, scale_a + static_cast<i64>(kb) * m_aligned + row, scale_bytes, bar);
                    }
                }
        } else if (producer == kWarpgroups && elect_lane()) {
            if (!packed_b) wait_for_previous_kernel();
            Ring slots;
            for (u32 index = blockIdx.x; index < num_runs; index += gridDim.x) {
                const u32 column = index % tiles_n * kColumns;
                const float* const scales = scale_b + first_scale_of(column, scale_b_stride);
                if (packed_b) {
                    // Rows of a packed b. What lies past them stays as it is: no output needs it.
                    fetch_run(room, slots, packed_b + static_cast<i64>(column) * kBlockK, scales, min(kColumns, n_aligned - column), k_blocks, n_aligned, scale_b_stride);
                    continue;
                }
                for (u32 kb = 0; kb < k_blocks; ++kb, slots.advance(room.num_slots)) {
                    const u32 slot = slots.stage, bar = room.weights_full + 8 * slot;
                    barrier_wait(room.weights_empty + 8 * slot, slots.parity ^ 1);
                    barrier_expect(bar, kBytesB + kBlockScaleBytes);
                    tensor_copy(room.weights + slot * kBytesB, &map_b, 0, column, kb, bar);
                    bulk_copy(room.scales_b + slot * kBlockScaleBytes, scales + static_cast<i64>(kb) * scale_b_stride, kBlockScaleBytes, bar);
                }
            }
        }
    } else {
        take_registers_for_math();
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, own_outputs = room.outputs + (warpgroup - 1) * kOutputBytes;
        const Output output{out, bias, out_stride, m, n, out_type, bias_type};
        const Places at = places_of(room, warpgroup - 1, warp, lane);
        u32 next = warpgroup - 1;  // of this run's tiles
        bool waits = true;
        Ring ring, slots;

        for (u32 index = blockIdx.x; index < num_runs; index += gridDim.x) {
            const u32 count = tiles_of(index), column = index % tiles_n * kColumns;
            const u32 block_offset = (column / 128 - first_scale_of(column, scale_b_stride)) * 4;
            const Ring of_run = slots;
            if (next >= count) pass_run(room, slots, k_blocks, lane);
            for (bool fresh = true; next < count; next += kWarpgroups, fresh = false) {
                const u32 row = row_of(index, next);
                float sum[1][kColumns / 2];
                slots = of_run;
                multiply_tile(sum[0], room, at, ring, slots, k_blocks, 0, block_offset, fresh, next + kWarpgroups >= count, lane);
                if (waits) wait_for_previous_kernel();  // it may still read what this kernel overwrites
                waits = false;
                if (bias != nullptr) output.add_bias(sum[0], column, lane);
                if (mapped_out) {
                    if (lane == 0) bulk_wait_read();  // of the last tile's outputs
                    __syncwarp();
                    store_slices<kStored, kRows>(&map_out, sum, own_outputs, warp * 16, column, row, out_type, lane);
                } else {
                    output.write(sum[0], row + warp * 16, column, lane);
                }
            }
            next -= count;
        }
        if (mapped_out && lane == 0) bulk_wait();
    }
}
