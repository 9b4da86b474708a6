// Who releases a stage of a ring once its warp has read it: one lane for all, behind __syncwarp().
//
// compute-sanitizer's racecheck counts an arrival for the lane that makes it, and not what others have done before that: for it
// (benchmarks/sanitize.py) all lanes arrive.
#pragma once
#include "ptx.cuh"

#ifdef EVERY_LANE_ARRIVES
constexpr u32 kArrivalsOfWarp = 32;
DEVICE bool arrives_for_warp(u32) { return true; }
#else
constexpr u32 kArrivalsOfWarp = 1;
DEVICE bool arrives_for_warp(u32 lane) { return lane == 0; }
#endif
