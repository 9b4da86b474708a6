// Activations to e4m3 in groups of 128 columns with one float32 scale a group (group.cuh).
//
// 256 threads a CTA: 4 rows x 4 groups, so that it reads 1 KiB of each row and writes 16 contiguous bytes of the MN-major scales.
// No shared memory, no barrier.
#include "group.cuh"

// x: [m, k] with row stride `stride` (elements). codes: [m, k_blocks * 128]. scale: [k_blocks][m_aligned].
// vectorised: 16-bit elements, rows start at 16-byte boundaries and k % 8 == 0.
extern "C" __global__ void __launch_bounds__(256)
quantize(const void* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scale, i64 stride, u32 m, u32 k, u32 k_blocks,
         u32 m_aligned, u32 type, u32 vectorised) {
    const u32 group_in_cta = threadIdx.x / kGroupLanes, lane = threadIdx.x % kGroupLanes;
    const u32 row = blockIdx.x * 4 + group_in_cta % 4;
    const u32 k_block = blockIdx.y * 4 + group_in_cta / 4;
    const u32 column = k_block * kBlockK + lane * 8;
    const bool inside = row < m && k_block < k_blocks;

    wait_for_previous_kernel();
    launch_next_kernel();
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
    *reinterpret_cast<uint2*>(codes + static_cast<i64>(row) * k_blocks * kBlockK + column) = group.codes(largest[0]);
    if (lane == 0) scale[static_cast<i64>(k_block) * m_aligned + row] = group_scale(largest[0]);
}
