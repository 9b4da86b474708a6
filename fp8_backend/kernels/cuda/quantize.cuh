// Activations to e4m3 in groups of 128 columns with one float32 scale a group (group.cuh).
//
// 128 threads a CTA: 4 rows x 2 groups, ROWS times, so that it reads 512 bytes of each row and writes 16 contiguous bytes of the MN-major
// scales. No shared memory, no barrier; with ROWS = 1 few registers: it fits a multiprocessor beside two decode CTAs. With ROWS = 2 each
// thread has two loads in flight: 3.8 instead of 2.5 TB/s where rows are many.
#include "group.cuh"

// x: [m, k] with row stride `stride` (elements). codes: [m, k_blocks * 128]; or, with tile_rows > 0, [k_blocks][tile_rows][128] with the 16-byte chunks
// of a row permuted as the 128-byte swizzle does it, rows past m left as they are. scale: [k_blocks][m_aligned].
// vectorised: 16-bit elements, rows start at 16-byte boundaries and k % 8 == 0. early: the kernel behind this one may start as soon as the last of its CTAs
// runs, else when they have ended (quantize.py says when). beside: x was complete before the previous kernel let this one start, so both run at once, and this
// one ends behind that one: who waits for it has waited for both.
// zeros, with ZEROS: words behind the scales that become zero; the kernel behind this one may start as soon as what came before has ended.
extern "C" __global__ void __launch_bounds__(128, ROWS == 1 ? 16 : 12)
quantize(const void* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scale, i64 stride, u32 m, u32 k, u32 k_blocks,
         u32 m_aligned, u32 type, u32 vectorised, u32 tile_rows, u32 early, u32 beside, u32 zeros) {
    const u32 group_in_cta = threadIdx.x / kGroupLanes, lane = threadIdx.x % kGroupLanes;
    const u32 first_row = blockIdx.x * (4 * ROWS) + group_in_cta % 4;
    const u32 k_block = blockIdx.y * 2 + group_in_cta / 4;
    const u32 column = k_block * kBlockK + lane * 8;

    with_rows(type, vectorised, [&](auto rows) {
        if (!ZEROS && early) launch_next_kernel();
        if (!beside) wait_for_previous_kernel();
        if (ZEROS) {
            launch_next_kernel();
            if (blockIdx.x + blockIdx.y == 0)
                for (u32 i = threadIdx.x; i < zeros; i += 128) scale[k_blocks * m_aligned + i] = 0.f;
        }
        Group group[ROWS];
        RawGroup raw[ROWS];
        float largest[ROWS];
        const u32 in_row = k_block < k_blocks && column < k ? min(k - column, 8u) : 0;
        if (rows.type == kF32) {
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                const u32 row = first_row + r * 4, valid = row < m ? in_row : 0;
#pragma unroll
                for (u32 i = 0; i < 8; ++i)
                    group[r].value[i] = i < valid ? static_cast<const float*>(x)[static_cast<i64>(row) * stride + column + i] : 0.f;
            }
        } else {
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                const u32 row = first_row + r * 4;
                raw[r].load(x, static_cast<i64>(row) * stride + column, row < m ? in_row : 0, rows.vectorised);
            }
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) group[r].expand(raw[r], rows.type);
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) largest[r] = group[r].lane_amax();
        reduce_amax(largest);
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            const u32 row = first_row + r * 4;
            if (row >= m || k_block >= k_blocks) continue;
            const i64 place = code_place(row, k_block, lane, k_blocks, tile_rows);
            *reinterpret_cast<uint2*>(codes + place) = group[r].codes(largest[r]);
            if (lane == 0) scale[static_cast<i64>(k_block) * m_aligned + row] = group_scale(largest[r]);
        }
        // One CTA is enough to hold the grid's end up; all of them would hold up those that have no room yet.
        if (beside && blockIdx.x + blockIdx.y == 0) wait_for_previous_kernel();
    });
}
