// Lists the tiles of rows that grouped_tall.cuh walks where every group has a block of max_rows rows, of which the first counts[group] are there.
//
// One CTA of 1024 threads, a thread a group.
#include "scan.cuh"

constexpr u32 kTileRows = 256, kBand = 1024 / kTileRows;  // as in runs.cuh

// tiles: {group, first row, rows | band width << 16, first tile of the band} for each; num_tiles: how many.
extern "C" __global__ void __launch_bounds__(kThreads)
counts(const int* counts, int4* tiles, u32* num_tiles, u32 num_groups, u32 max_rows) {
    __shared__ u32 of_warps[32];
    launch_next_kernel();
    wait_for_previous_kernel();
    const u32 group = threadIdx.x, rows = group < num_groups ? min(static_cast<u32>(max(__ldcg(counts + group), 0)), max_rows) : 0;
    const u32 number = ceil_div(rows, kTileRows), place = over_those_before<true>(number, of_warps);
    for (u32 t = 0; t < number; ++t) {
        const u32 in_band = t % kBand, width = min(number - (t - in_band), kBand);
        tiles[place + t] = make_int4(group, group * max_rows + t * kTileRows, min(rows - t * kTileRows, kTileRows) | width << 16, place + t - in_band);
    }
    if (threadIdx.x == kThreads - 1) *num_tiles = place + number;
}
