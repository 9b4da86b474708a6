// RMSNorm of rows, with or without a residual added first, to e4m3 in groups of 128 columns (group.cuh): one kernel where there were two.
//
// One CTA a row, a thread 8 neighbouring columns of each of CHUNKS parts of it: what a row is multiplied by depends on its sum of squares, so
// it is read once and waits in registers. How a row is cut depends on k alone, so that its bits do not depend on the rows beside it.
// What is rounded to the elements' type, and where, is as vLLM defines its rms_norm and fused_add_rms_norm: the new residual after the sum, the row
// after the factor and again after the weight. The sum of squares is that of the unrounded sums.
#include "group.cuh"

// The sum of one value a thread, in a fixed order: the same bits in every thread and every run. Warps are whole.
DEVICE float sum_of_cta(float value, float* of_warps) {
    const u32 lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    if (lane == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = lane < warps ? of_warps[lane] : 0.f;
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// x: [m, k] of 16 bits with row stride x_stride (elements). residual: likewise, or null. norm_weight: [k]. summed: [m, k], x + residual; written only with a
// residual. normed: [m, k], or null if nobody wants the rows themselves. codes, scale, tile_rows, early: as of quantize.cuh. A CTA for each row.
// vectorised: rows of all of these start at 16-byte boundaries and k % 8 == 0.
extern "C" __global__ void __launch_bounds__(1024, CHUNKS == 1 ? 2 : 1)
rms_norm_quantize(const void* __restrict__ x, const void* __restrict__ residual, const void* __restrict__ norm_weight, void* __restrict__ summed,
                  void* __restrict__ normed, u8* __restrict__ codes, float* __restrict__ scale, i64 x_stride, i64 residual_stride, u32 k,
                  u32 k_blocks, u32 m_aligned, u32 type, u32 vectorised, u32 tile_rows, u32 early, float epsilon) {
    __shared__ float of_warps[32];
    const u32 row = blockIdx.x, lane = threadIdx.x % kGroupLanes;
    u32 column[CHUNKS], valid[CHUNKS];
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c) {
        column[c] = (c * blockDim.x + threadIdx.x) * 8;
        valid[c] = column[c] < k ? min(k - column[c], 8u) : 0;
    }
    with_rows(type, vectorised, [&](auto rows) {
        if (early) launch_next_kernel();
        // Since the last layer they have left L2, and are on their way from memory while the previous kernel still runs.
        RawGroup raw[CHUNKS], raw_residual[CHUNKS], raw_weight[CHUNKS];
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) raw_weight[c].load(norm_weight, column[c], valid[c], rows.vectorised);
        wait_for_previous_kernel();

#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) {
            raw[c].load(x, row * x_stride + column[c], valid[c], rows.vectorised);
            raw_residual[c].load(residual, row * residual_stride + column[c], residual == nullptr ? 0 : valid[c], rows.vectorised);
        }
        Group group[CHUNKS];
        float squares = 0.f;
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) {
            group[c].expand(raw[c], rows.type);
            if (residual != nullptr) {
                Group added;
                added.expand(raw_residual[c], rows.type);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) group[c].value[i] += added.value[i];
                group[c].packed(rows.type).store(summed, static_cast<i64>(row) * k + column[c], valid[c], rows.vectorised);
            }
#pragma unroll
            for (u32 i = 0; i < 8; ++i) squares += group[c].value[i] * group[c].value[i];
        }
        const float mean = __fdiv_rn(sum_of_cta(squares, of_warps), static_cast<float>(k));
        const float factor = __fdiv_rn(1.f, sqrtf(mean + epsilon));
        float largest[CHUNKS];
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) {
            Group weight;
            weight.expand(raw_weight[c], rows.type);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) group[c].value[i] *= factor;
            group[c].expand(group[c].packed(rows.type), rows.type);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) group[c].value[i] *= weight.value[i];
            const RawGroup rounded = group[c].packed(rows.type);
            if (normed != nullptr) rounded.store(normed, static_cast<i64>(row) * k + column[c], valid[c], rows.vectorised);
            group[c].expand(rounded, rows.type);
            largest[c] = group[c].lane_amax();
        }
        reduce_amax(largest);
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) {
            const u32 k_block = column[c] / kBlockK;
            if (k_block >= k_blocks) continue;
            *reinterpret_cast<uint2*>(codes + code_place(row, k_block, lane, k_blocks, tile_rows)) = group[c].codes(largest[c]);
            if (lane == 0) scale[static_cast<i64>(k_block) * m_aligned + row] = group_scale(largest[c]);
        }
    });
}
