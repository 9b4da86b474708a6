// silu(gate) * up, rounded to the elements' type, to e4m3 in groups of 128 columns (group.cuh): one kernel where there were two.
//
// As quantize.cuh with one row a thread, but that it loads two groups for each one it writes.
#include "group.cuh"

DEVICE float silu_mul(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }

// x: [m, 2 * k] of 16 bits with row stride `stride` (elements), gate first. codes, scale, tile_rows, early: as of quantize.cuh.
// vectorised: rows start at 16-byte boundaries and k % 8 == 0.
extern "C" __global__ void __launch_bounds__(128, 16)
silu_mul_quantize(const void* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scale, i64 stride, u32 m, u32 k, u32 k_blocks,
                  u32 m_aligned, u32 type, u32 vectorised, u32 tile_rows, u32 early) {
    const u32 group_in_cta = threadIdx.x / kGroupLanes, lane = threadIdx.x % kGroupLanes;
    const u32 row = blockIdx.x * 4 + group_in_cta % 4, k_block = blockIdx.y * 2 + group_in_cta / 4, column = k_block * kBlockK + lane * 8;
    const bool inside = row < m && k_block < k_blocks;
    const u32 valid = inside && column < k ? min(k - column, 8u) : 0;

    with_rows(type, vectorised, [&](auto rows) {
        if (early) launch_next_kernel();
        wait_for_previous_kernel();
        RawGroup raw_gate, raw_up;
        raw_gate.load(x, static_cast<i64>(row) * stride + column, valid, rows.vectorised);
        raw_up.load(x, static_cast<i64>(row) * stride + k + column, valid, rows.vectorised);
        Group product, up;
        product.expand(raw_gate, rows.type);
        up.expand(raw_up, rows.type);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) product.value[i] = silu_mul(product.value[i], up.value[i]);
        product.expand(product.packed(rows.type), rows.type);
        float largest[1] = {product.lane_amax()};
        reduce_amax(largest);
        if (!inside) return;
        *reinterpret_cast<uint2*>(codes + code_place(row, k_block, lane, k_blocks, tile_rows)) = product.codes(largest[0]);
        if (lane == 0) scale[static_cast<i64>(k_block) * m_aligned + row] = group_scale(largest[0]);
    });
}
