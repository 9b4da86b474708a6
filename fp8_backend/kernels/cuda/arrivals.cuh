// Who waits for whom: when barriers are initialised, and who releases a stage of a ring once its warp has read it, one lane for all, behind __syncwarp().
//
// compute-sanitizer's racecheck counts an arrival for the lane that makes it, and not what others have done before that: for it
// (benchmarks/sanitize.py) all lanes arrive.
#pragma once
#include "ptx.cuh"

// Barriers are initialised: for the threads of this CTA, or for all CTAs of its cluster.
DEVICE void meet(u32 cluster) {
    if (cluster > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
}

#ifdef EVERY_LANE_ARRIVES
constexpr u32 kArrivalsOfWarp = 32;
DEVICE bool arrives_for_warp(u32) { return true; }
#else
constexpr u32 kArrivalsOfWarp = 1;
DEVICE bool arrives_for_warp(u32 lane) { return lane == 0; }
#endif

// The same at the barrier of each of the first kRanks CTAs of the cluster, after two words have been loaded.
template <u32 kRanks> DEVICE void arrive_for_warp_at_ranks(u32 barrier, float first, float second, u32 lane) {
#ifdef EVERY_LANE_ARRIVES
    for (u32 rank = 0; rank < kRanks; ++rank) barrier_arrive_remote_after_words(map_to_rank(barrier, rank), first, second, true);
#else
    barrier_arrive_remote_after_words(map_to_rank(barrier, lane % kRanks), first, second, lane < kRanks);
#endif
}
