// The tensor core by itself: what gemm.cuh does with a tile of 256 x 128, k-block by k-block, with operands that stay in shared memory. Two math
// warpgroups own 64 rows of each half of the tile; nothing is fetched and nothing written.
//
// PROMOTE = 1: a k-block's products are scaled into sums in registers, as block scales want it. 0: the tensor core adds up, and is never waited for to the end.
// TURNS = 1: a warpgroup issues a product behind that of the other, so that one promotes while the other multiplies; left to themselves they fall into step.
#include "wgmma.cuh"

constexpr u32 kRows = 256, kColumns = 128, kStages = 4, kStageBytes = (kRows + kColumns) * kBlockK;

// codes: what all stages hold. out: a float for each thread of the grid.
extern "C" __global__ void __launch_bounds__(256, 1) tensor_core(const uint4* codes, float* out, float scale, u32 k_blocks) {
    extern __shared__ __align__(1024) u8 shared[];
    for (u32 i = threadIdx.x; i < kStages * kStageBytes / 16; i += 256) reinterpret_cast<uint4*>(shared)[i] = codes[i];
    fence_async_shared();
    __syncthreads();
    const u32 math = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const u32 rows = matrix_descriptor_low(smem_address(shared) + math * 64 * kBlockK), columns = matrix_descriptor_low(smem_address(shared) + kRows * kBlockK);
    float sum[2][64];
#pragma unroll
    for (u32 i = 0; i < 64; ++i) sum[0][i] = sum[1][i] = 0.f;
    if (TURNS && math == 1) named_barrier_arrive(1, 256);  // the first turn is that of warpgroup 0, which waits at barrier 1
    for (u32 block = 0; block < k_blocks; ++block) {
        const u32 stage = block % kStages * (kStageBytes / 16);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 a = rows + stage + half * (kRows / 2 * kBlockK / 16), b = columns + stage;
            if (TURNS) named_barrier(1 + math, 256);
#if PROMOTE
            float partial[64];
            fence_registers(partial);
#else
            float(&partial)[64] = sum[half];
#endif
            wgmma_fence();
#pragma unroll
            for (u32 i = 0; i < kBlockK / 32; ++i)
                Wgmma<kColumns>::multiply(partial, matrix_descriptor_at(a + 2 * i), matrix_descriptor_at(b + 2 * i), !PROMOTE || i > 0);
            wgmma_commit();
            if (TURNS) named_barrier_arrive(2 - math, 256);
#if PROMOTE
            wgmma_wait<0>();
            fence_registers(partial);
#pragma unroll
            for (u32 i = 0; i < 64; ++i) sum[half][i] += scale * partial[i];
#else
            wgmma_wait<1>();
#endif
        }
    }
    wgmma_wait<0>();
    float all = 0.f;
#pragma unroll
    for (u32 i = 0; i < 64; ++i) all += sum[0][i] + sum[1][i];
    out[blockIdx.x * 256 + threadIdx.x] = all * scale;
}
