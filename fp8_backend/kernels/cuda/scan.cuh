// What each of 1024 threads needs of those before it.
#pragma once
#include "ptx.cuh"

constexpr u32 kThreads = 1024;

template <bool kSum> DEVICE u32 scan_warp(u32 value) {
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u32 left = __shfl_up_sync(0xffffffffu, value, distance);
        if (threadIdx.x % 32 >= distance) value = kSum ? value + left : max(value, left);
    }
    return value;
}
// The sum, or the largest, of the values of the threads before this one, 0 if there is none. of_warps: 32 words of shared memory.
template <bool kSum> DEVICE u32 over_those_before(u32 own, u32* of_warps) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, inclusive = scan_warp<kSum>(own);
    __syncthreads();  // of_warps has been read
    if (lane == 31) of_warps[warp] = inclusive;
    __syncthreads();
    if (warp == 0) of_warps[lane] = scan_warp<kSum>(of_warps[lane]);
    __syncthreads();
    const u32 left = __shfl_up_sync(0xffffffffu, inclusive, 1), in_warp = lane ? left : 0, in_others = warp ? of_warps[warp - 1] : 0;
    return kSum ? in_warp + in_others : max(in_warp, in_others);
}
