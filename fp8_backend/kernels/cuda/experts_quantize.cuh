// Activations of the experts to e4m3 in groups of 128 columns with one float32 scale a group (group.cuh), a half-warp a group.
//
// Differs from quantize.cuh in when the kernel behind it may start: with `early` at once, so that it can stream weights while the kernel before this
// one still runs.
#include "group.cuh"

// x: [rows, k] with contiguous rows of k elements. codes: [rows, k_blocks * 128]. scale: [k_blocks][rows_aligned].
extern "C" __global__ void __launch_bounds__(256)
experts_quantize(const void* x, u8* __restrict__ codes, float* __restrict__ scale, i64 stride, u32 rows, u32 k, u32 k_blocks, u32 rows_aligned,
                 u32 type, u32 vectorised, u32 early) {
    if (early) launch_next_kernel();
    wait_for_previous_kernel();
    launch_next_kernel();
    const u32 index = blockIdx.x * 16 + threadIdx.x / kGroupLanes, lane = threadIdx.x % kGroupLanes;
    const u32 row = index / k_blocks, block = index - row * k_blocks, column = block * kBlockK + lane * 8;
    const bool inside = row < rows;
    const u32 valid = inside && column < k ? min(k - column, 8u) : 0;
    const i64 offset = static_cast<i64>(row) * stride + column;
    Group group;
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
    if (lane == 0) scale[static_cast<i64>(block) * rows_aligned + row] = group_scale(largest[0]);
}
