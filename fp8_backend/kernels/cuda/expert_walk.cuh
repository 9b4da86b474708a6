// An equal run of the weights of all experts hit for each CTA: the same bytes whatever the routing.
#pragma once
#include "expert_units.cuh"

struct Tile {
    u32 unit, expert, rows, row, groups;  // rows: of activations; row: first of the weight; groups: of 8 rows of it
};

// A CTA's run of row groups, cut into tiles: every role walks it by itself.
struct Walk {
    const Units& units;
    u32 unit_groups, tile_groups, next, end;

    DEVICE Walk(const Units& units_, u32 unit_groups_, u32 tile_groups_, u32 run)
        : units(units_), unit_groups(unit_groups_), tile_groups(tile_groups_), next(blockIdx.x * run),
          end(min(blockIdx.x * run + run, units_.number * unit_groups_)) {}
    DEVICE bool advance(Tile& tile) {
        if (next >= end) return false;
        tile.unit = next / unit_groups;
        const u32 first = next - tile.unit * unit_groups, left = min(unit_groups - first, end - next);
        tile.groups = ceil_div(left, ceil_div(left, tile_groups));
        tile.row = first * 8;
        tile.expert = units.expert[tile.unit];
        tile.rows = units.rows(tile.unit);
        next += tile.groups;
        return true;
    }
};
