// Activations to e4m3 in groups of 128 columns with one float32 scale a group (group.cuh).
//
// 128 threads a CTA: 4 rows x 2 groups, so that it reads 512 bytes of each row and writes 16 contiguous bytes of the MN-major scales.
// No shared memory, no barrier, few registers: it fits a multiprocessor beside two decode CTAs.
#include "group.cuh"

// x: [m, k] with row stride `stride` (elements). codes: [m, k_blocks * 128]; or, with tile_rows > 0, [k_blocks][tile_rows][128] with the 16-byte chunks
// of a row permuted as the 128-byte swizzle does it, rows past m left as they are. scale: [k_blocks][m_aligned].
// vectorised: 16-bit elements, rows start at 16-byte boundaries and k % 8 == 0.
extern "C" __global__ void __launch_bounds__(128, 16)
quantize(const void* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scale, i64 stride, u32 m, u32 k, u32 k_blocks,
         u32 m_aligned, u32 type, u32 vectorised, u32 tile_rows) {
    const u32 group_in_cta = threadIdx.x / kGroupLanes, lane = threadIdx.x % kGroupLanes;
    const u32 row = blockIdx.x * 4 + group_in_cta % 4;
    const u32 k_block = blockIdx.y * 2 + group_in_cta / 4;
    const u32 column = k_block * kBlockK + lane * 8;
    const bool inside = row < m && k_block < k_blocks;

    launch_next_kernel();
    wait_for_previous_kernel();
    Group group;
    const u32 valid = inside && column < k ? min(k - column, 8u) : 0;
    const i64 offset = static_cast<i64>(row) * stride + column;
    if (type == kF32) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) group.value[i] = i < valid ? static_cast<const float*>(x)[offset + i] : 0.f;
    } else {
        RawGroup raw;
        raw.load(x, offset, valid, vectorised);
        group.expand(raw, type);
    }
    float largest[1] = {group.lane_amax()};
    reduce_amax(largest);
    if (!inside) return;
    const i64 place = tile_rows ? static_cast<i64>(k_block * tile_rows + row) * kBlockK + ((lane / 2) ^ (row % 8)) * 16 + lane % 2 * 8
                                : static_cast<i64>(row) * k_blocks * kBlockK + column;
    *reinterpret_cast<uint2*>(codes + place) = group.codes(largest[0]);
    if (lane == 0) scale[static_cast<i64>(k_block) * m_aligned + row] = group_scale(largest[0]);
}
