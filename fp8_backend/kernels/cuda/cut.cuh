// How the rows of a group are cut in tiles, to the kernels that list these.
#pragma once
#include "ptx.cuh"

// Tiles of `rows` rows. Each full one takes up to `extra` (less than `rows`) more, where no tile is needed beside them then.
struct Cut {
    u32 rows, extra;

    DEVICE u32 tiles_of(u32 group_rows) const { return group_rows / rows + (group_rows % rows > group_rows / rows * extra); }
    // Rows that full tiles take beyond their own.
    DEVICE u32 spread_of(u32 group_rows) const { return tiles_of(group_rows) == group_rows / rows ? group_rows % rows : 0; }
    // The first row of tile t; of the tile behind the last one: how many rows there are.
    DEVICE u32 start_of(u32 t, u32 group_rows) const { return min(t * rows + min(t * extra, spread_of(group_rows)), group_rows); }
};
