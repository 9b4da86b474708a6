// Sorts (token, slot) entries by expert and lists the tiles of rows that grouped_gathered.cuh and grouped_sorted.cuh walk; the host learns nothing of it.
//
// One cluster of 1 to 8 CTAs of 1024 threads. Each CTA counts its share of the entries in shared memory; the cluster adds the counts up
// through distributed shared memory, every CTA computes all offsets (thread e: expert e, so at most 1024 experts), and scatters its
// share behind those of the CTAs before it. Order inside an expert is arbitrary: nothing downstream depends on a row's place.
#include "cut.cuh"
#include "places.cuh"

constexpr u32 kThreads = 1024, kTileRows = 128;
constexpr u32 kBand = 16;  // tiles of rows that share a tile of weights before the next one is taken: 16 x 8 tiles fill the GPU

// ids: [entries]. map: [num_ids] or null. sorted: [entries]; positions past the last routed entry are not written. places: [entries], or null; the position
// of each entry in `sorted`, kNoPlace if it is left out.
// tiles: one {expert, first row, rows | band width << 16, first tile of the band} for each 128 rows of an expert and a few more (cut.cuh), in the order of
// rows: the last one ends with the last routed entry. num_tiles: how many.
// tickets: two counters of the GEMMs that follow, set to zero.
// One CTA a multiprocessor is all there is: said, because the compiler otherwise may make room for two with 32 registers a thread, and spill.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
route(const int* ids, const int* map, u32* sorted, u32* places, int4* tiles, u32* num_tiles, u32* tickets, u32 entries, u32 num_ids, u32 num_groups,
      u32 extra_rows) {
    __shared__ u32 counts[kThreads], cursor[kThreads], first_row[kThreads], total_rows[kThreads], first_tile[kThreads];
    __shared__ u64 warp_totals[32];
    const u32 rank = cluster_rank(), size = cluster_size(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 step = size * kThreads;

    counts[threadIdx.x] = 0;
    __syncthreads();
    wait_for_previous_kernel();
    launch_next_kernel();  // not before: quantize.cuh reads x beside this kernel

    // The group of entry i, or -1. Calls for every i of a step are made by whole warps.
    auto group_of = [&](u32 i) {
        if (i >= entries) return -1;
        int group = __ldcg(ids + i);
        if (map != nullptr) group = group >= 0 && static_cast<u32>(group) < num_ids ? __ldcg(map + group) : -1;
        return group >= 0 && static_cast<u32>(group) < num_groups ? group : -1;
    };
    // Adds this warp's entries to their groups' counters, one atomic for each group present; returns each entry's place.
    auto take_places = [&](u32* counters, int group) {
        const u32 peers = __match_any_sync(0xffffffffu, group), leader = __ffs(peers) - 1;
        u32 first = 0;
        if (lane == leader && group >= 0) first = atomicAdd(counters + group, static_cast<u32>(__popc(peers)));
        return __shfl_sync(0xffffffffu, first, leader) + __popc(peers & ((1u << lane) - 1));
    };

    for (u32 base = rank * kThreads + warp * 32; base < entries; base += step) take_places(counts, group_of(base + lane));
    cluster_arrive();
    cluster_wait();

    u32 total = 0, before = 0;
    if (threadIdx.x < num_groups) {
        const u32 address = smem_address(counts + threadIdx.x);
        for (u32 r = 0; r < size; ++r) {
            const u32 count = load_remote(map_to_rank(address, r));
            total += count;
            if (r < rank) before += count;
        }
    }
    cluster_arrive();  // counts of peers are read; waited for at the end, so that none is gone before

    // Exclusive sums of rows (high word) and of tiles (low word) over the experts.
    const Cut cut{kTileRows, extra_rows};
    const u64 own = static_cast<u64>(total) << 32 | cut.tiles_of(total);
    u64 sum = own;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u64 left = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += left;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        u64 totals = warp_totals[lane];
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            const u64 left = __shfl_up_sync(0xffffffffu, totals, distance);
            if (lane >= distance) totals += left;
        }
        warp_totals[lane] = totals;
    }
    __syncthreads();
    if (warp > 0) sum += warp_totals[warp - 1];
    const u64 exclusive = sum - own;
    first_row[threadIdx.x] = static_cast<u32>(exclusive >> 32);
    first_tile[threadIdx.x] = static_cast<u32>(exclusive);
    total_rows[threadIdx.x] = total;
    cursor[threadIdx.x] = first_row[threadIdx.x] + before;
    if (rank == 0 && threadIdx.x == 0) {
        *num_tiles = static_cast<u32>(warp_totals[31]);
        tickets[0] = tickets[1] = 0;
    }
    __syncthreads();

    for (u32 group = rank * 32 + warp; group < num_groups; group += size * 32) {
        const u32 rows = total_rows[group], count = cut.tiles_of(rows);
        for (u32 t = lane; t < count; t += 32) {
            const u32 start = cut.start_of(t, rows), in_tile = cut.start_of(t + 1, rows) - start;
            const u32 band = t / kBand * kBand, width = min(count - band, kBand);
            tiles[first_tile[group] + t] = make_int4(group, first_row[group] + start, in_tile | width << 16, first_tile[group] + band);
        }
    }
    for (u32 base = rank * kThreads + warp * 32; base < entries; base += step) {
        const int group = group_of(base + lane);
        const u32 entry = base + lane, place = take_places(cursor, group);
        if (group >= 0) sorted[place] = entry;
        if (places != nullptr && entry < entries) places[entry] = group >= 0 ? place : kNoPlace;
    }
    cluster_wait();
}
