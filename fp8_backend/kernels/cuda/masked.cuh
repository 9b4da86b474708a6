// The masked grouped GEMM for many rows a group: out[g, :rows_g] = a[g, :rows_g] . weight[g]^T with block scales, limited by the tensor core.
//
// Persistent: CTAs take tiles of 128 rows of activations (wgmma's 64-row side, twice) x 128 rows of the weight in turn, from a list of units (a group
// and at most 128 of its rows, expert_units.cuh) that each computes from masked_m. All tiles of a unit come one after the other, so the rows and the
// weights that CTAs share are in L2.
//
// Warp roles (384 threads):
//   warp 0        producer, one lane: the weight's rows, one contiguous copy a k-block.
//   warp 1        producer, one lane: activations, through a 3D map {128 bytes of k, box_rows <= 128 of the rows of all groups, k-blocks}.
//   warp 2        scales of both, as asynchronous copies.
//   warps 4..11   two math warpgroups, 64 rows of the tile each; the second rests where a unit has no more.
// Barriers: full (2 producers + bytes; 32 lanes of warp 2, once their copies are complete) and empty (8 math warps) per stage.
#define MATRICES 1
#define FUSED 0
#define ROWS 128
#include "expert_units.cuh"

constexpr u32 kTileRows = 128;

DEVICE void store_pair(void* out, i64 offset, u32 type, u32 paired, u32 exist, float first, float second) {
    if (paired && exist >= 2) {
        *reinterpret_cast<u32*>(static_cast<u16*>(out) + offset) = pack_elements(first, second, type);
        return;
    }
    if (exist >= 1) store_element(out, offset, type, first);
    if (exist >= 2) store_element(out, offset + 1, type, second);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
masked(const __grid_constant__ TensorMap map_a, const float* scale_a, const u8* __restrict__ weight, const float* __restrict__ scale_b, void* out,
       const int* masked_m, i64 scale_a_group_stride, i64 scale_a_block_stride, i64 weight_stride, i64 scale_b_stride, u32 num_groups, u32 most_units,
       u32 max_rows, u32 n, u32 n_aligned, u32 k_blocks, u32 scale_b_row, u32 box_rows, u32 ring_bytes, u32 out_type, u32 out_paired) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: ring | barriers | units
    u8* const barriers = shared + ring_bytes;
    Units units;
    units.place(barriers + 2 * kMaxStages * 8, num_groups, 0, most_units);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_previous_kernel();
    launch_next_kernel();
    for (u32 g = threadIdx.x; g < num_groups; g += kThreads) units.count[g] = min(static_cast<u32>(max(masked_m[g], 0)), max_rows);
    __syncthreads();
    units.list(num_groups);
    Stages stages;
    stages.place(shared, ring_bytes, kTileRows * kBlockK, kTileRows * kBlockK, k_blocks, smem_address(barriers));
    stages.init_barriers(2, 8);
    const u32 columns = ceil_div(n, kTileRows), tiles = units.number * columns;
    Ring ring;

    if (warp < 4) {
        if (warp < 2 && elect_lane()) {
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const u32 unit = tile / columns, row = (tile - unit * columns) * kTileRows, group = units.expert[unit];
                const u32 bytes = min(kTileRows, n_aligned - row) * kBlockK;
                const u8* source = weight + group * weight_stride + static_cast<i64>(row) * kBlockK;
                for (u32 block = 0; block < k_blocks; ++block, ring.advance(stages.number)) {
                    const u32 bar = stages.full + 8 * ring.stage;
                    barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                    if (warp == 0) {
                        barrier_expect(bar, bytes);
                        bulk_copy(stages.weight_tile(ring.stage, 0), source + static_cast<i64>(block) * n_aligned * kBlockK, bytes, bar);
                    } else {
                        barrier_expect(bar, box_rows * kBlockK);
                        tensor_copy(stages.activation_tile(ring.stage, 0), &map_a, 0, group * max_rows + units.chunk[unit] * ROWS, block, bar);
                    }
                }
            }
        } else if (warp == 2) {
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const u32 unit = tile / columns, row = (tile - unit * columns) * kTileRows, group = units.expert[unit], rows = units.rows(unit);
                const float* of_rows = scale_a + group * scale_a_group_stride + units.chunk[unit] * ROWS;
                const float* of_weight = scale_b + group * scale_b_stride + row / 128;
                for (u32 block = 0; block < k_blocks; ++block, ring.advance(stages.number)) {
                    barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);
                    const u32 target = smem_address(stages.block_scales(ring.stage, 0));
#pragma unroll
                    for (u32 i = 0; i < ROWS; i += 32)
                        if (i + lane < rows) copy_4_bytes(target + (i + lane) * 4, of_rows + block * scale_a_block_stride + i + lane);
                    if (lane == 0) copy_4_bytes(target + ROWS * 4, of_weight + static_cast<i64>(block) * scale_b_row);
                    barrier_arrive_after_copies(stages.full + 8 * ring.stage);
                }
            }
        }
        __syncwarp();
        return;
    }

    const u32 first = (warp - 4) / 4 * 64, low = first + warp % 4 * 16 + lane / 4;  // rows of the tile: of this warpgroup; of the lane, and 8 more
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u32 unit = tile / columns, column = (tile - unit * columns) * kTileRows, rows = units.rows(unit);
        float sum[64];
#pragma unroll
        for (u32 i = 0; i < 64; ++i) sum[i] = 0.f;
        for (u32 block = 0; block < k_blocks; ++block, ring.advance(stages.number)) {
            barrier_wait(stages.full + 8 * ring.stage, ring.parity);
            if (first < rows) {
                float partial[64];
                fence_registers(partial);
                wgmma_fence();
                const u64 a = matrix_descriptor(stages.activation_tile(ring.stage, 0) + first * kBlockK);
                const u64 b = matrix_descriptor(stages.weight_tile(ring.stage, 0));
#pragma unroll
                for (u32 i = 0; i < kBlockK / 32; ++i) Wgmma<128>::multiply(partial, a + 2 * i, b + 2 * i, i > 0);
                wgmma_commit();
                const float* scales = stages.block_scales(ring.stage, 0);
                float scale[2] = {scales[low] * scales[ROWS], scales[low + 8] * scales[ROWS]};
                wgmma_wait<0>();
                fence_registers(partial);
                __syncwarp();
                if (lane == 0) barrier_arrive_after(stages.empty + 8 * ring.stage, scale[0] + scale[1]);
#pragma unroll
                for (u32 j = 0; j < 16; ++j) {
                    sum[4 * j] += scale[0] * partial[4 * j];
                    sum[4 * j + 1] += scale[0] * partial[4 * j + 1];
                    sum[4 * j + 2] += scale[1] * partial[4 * j + 2];
                    sum[4 * j + 3] += scale[1] * partial[4 * j + 3];
                }
            } else if (lane == 0) {
                barrier_arrive(stages.empty + 8 * ring.stage);
            }
        }
        const i64 line = (static_cast<i64>(units.expert[unit]) * max_rows + units.chunk[unit] * ROWS + low) * n;
#pragma unroll
        for (u32 j = 0; j < 16; ++j) {
            const u32 at = column + j * 8 + lane % 4 * 2, exist = at < n ? n - at : 0;
            if (low < rows) store_pair(out, line + at, out_type, out_paired, exist, sum[4 * j], sum[4 * j + 1]);
            if (low + 8 < rows) store_pair(out, line + 8ll * n + at, out_type, out_paired, exist, sum[4 * j + 2], sum[4 * j + 3]);
        }
    }
}
