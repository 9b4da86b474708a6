// silu(gate) * up of the rows that each group holds, quantised in groups of 128 columns (group.cuh), between two masked GEMMs.
//
// 256 threads a CTA: 4 rows x 4 groups of columns, a half-warp each. CTAs of one group of rows stride over those it holds, whose number is
// read on the device. No shared memory, no barrier.
#include "group.cuh"

DEVICE float silu_mul(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }

// hidden: [groups, max_m, 2 * k_blocks * 128] of 16 bits, gate first. codes: [groups, max_m, k_blocks * 128].
// scale: [groups][k_blocks][m_aligned]. masked_m: rows of each group.
extern "C" __global__ void __launch_bounds__(256)
activation(const void* __restrict__ hidden, u8* __restrict__ codes, float* __restrict__ scale, const int* __restrict__ masked_m, u32 max_m,
           u32 k_blocks, u32 m_aligned, u32 type) {
    const u32 group_in_cta = threadIdx.x / kGroupLanes, lane = threadIdx.x % kGroupLanes;
    const u32 k_block = blockIdx.y * 4 + group_in_cta / 4, group = blockIdx.z, k = k_blocks * kBlockK;
    const u32 column = k_block * kBlockK + lane * 8;

    wait_for_previous_kernel();
    launch_next_kernel();
    const u32 rows = min(static_cast<u32>(max(masked_m[group], 0)), max_m);
    for (u32 first = blockIdx.x * 4; first < rows; first += gridDim.x * 4) {
        const u32 row = first + group_in_cta % 4;
        const bool inside = row < rows && k_block < k_blocks;
        const i64 row_of_all = static_cast<i64>(group) * max_m + row;
        RawGroup raw_gate, raw_up;
        raw_gate.load(hidden, row_of_all * 2 * k + column, inside ? 8 : 0, 1);
        raw_up.load(hidden, row_of_all * 2 * k + k + column, inside ? 8 : 0, 1);
        Group gate, up;
        gate.expand(raw_gate, type);
        up.expand(raw_up, type);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) gate.value[i] = silu_mul(gate.value[i], up.value[i]);
        float largest[1] = {gate.lane_amax()};
        reduce_amax(largest);
        if (!inside) continue;
        *reinterpret_cast<uint2*>(codes + row_of_all * k + column) = gate.codes(largest[0]);
        if (lane == 0) scale[(static_cast<i64>(group) * k_blocks + k_block) * m_aligned + row] = group_scale(largest[0]);
    }
}
