// Scales of tokens (quantize_sorted.cuh) to the sorted places of their entries (route.cuh), in the order in which grouped_sorted.cuh fetches them.
//
// A thread has a sorted row, looks up whose it is, and fetches 32 bytes of that token's scales from L2; a warp stores 32 rows side by side for each k-block.
// Nothing starts the kernel behind this one early: a CTA of it fills a multiprocessor (quantize.py, _LATE_ELEMENTS).
#include "ptx.cuh"

constexpr u32 kThreads = 256, kThreadBlocks = 8;

// token_scale: [m][token_stride], a multiple of 4, 16-byte aligned. sorted: entries in sorted order, of which the last tile tells how many there are. scale:
// [k_blocks][rows_aligned]; rows behind the last entry stay as they are.
extern "C" __global__ void __launch_bounds__(kThreads)
sort_scales(const float* token_scale, const u32* sorted, const int4* tiles, const u32* num_tiles, float* scale, u32 top_k, u32 k_blocks, u32 token_stride,
            u32 rows_aligned) {
    const u32 row = blockIdx.x * kThreads + threadIdx.x, first_block = blockIdx.y * kThreadBlocks;
    // The routing is older than the kernel before this one, which lets this one start only once it has waited for it.
    const u32 count = __ldcg(num_tiles);
    u32 rows = 0, token = 0;
    if (count > 0) {
        const int4 last = __ldcg(tiles + count - 1);
        rows = last.y + (last.z & 0xffff);
    }
    if (row < rows) token = __ldcg(sorted + row) / top_k;
    wait_for_previous_kernel();
    if (row >= rows) return;

    const float4* const source = reinterpret_cast<const float4*>(token_scale + static_cast<i64>(token) * token_stride + first_block);
    float4 fetched[kThreadBlocks / 4];
#pragma unroll
    for (u32 i = 0; i < kThreadBlocks / 4; ++i)
        if (first_block + i * 4 < k_blocks) fetched[i] = __ldcg(source + i);
    float* const target = scale + static_cast<i64>(first_block) * rows_aligned + row;
#pragma unroll
    for (u32 i = 0; i < kThreadBlocks; ++i) {
        const float4 four = fetched[i / 4];
        const float value = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
        if (first_block + i < k_blocks) target[static_cast<i64>(i) * rows_aligned] = value;
    }
}
