// Lists the tiles of rows that grouped_sorted.cuh and grouped_tall.cuh walk where rows of a group are neighbours already: tiles of every run of equal ids.
//
// One CTA of 1024 threads. Warps look where runs begin, a word of 32 rows at a time; then each thread owns neighbouring words. What is right for rows in any
// order is fast for few runs: a group whose rows lie in several places has tiles in each of them. Rows whose id is no group are in no tile.
#include "cut.cuh"
#include "scan.cuh"

// Tiles of rows that share a tile of weights before the next one is taken. 4 of 256 rows and all columns of 4096 are a tile each for a GPU's CTAs, so that
// L2 keeps the weights: 4 x 8192 rows, 4096x7168, took 1623 us with 8, 1521 with 4, 1489 with 2; 2 x 16384 1610, 1479, 1530 (one H100).
constexpr u32 kBandRows = 1024;

// Calls begin(row) for each row of the words [first, end) with which a run begins.
template <class Begin> DEVICE void for_each_start(const u32* starts, u32 first, u32 end, Begin begin) {
    for (u32 word = first; word < end; ++word)
        for (u32 bits = starts[word]; bits; bits &= bits - 1) begin(word * 32 + __ffs(bits) - 1);
}

// Rows [from, to) of a run that begins at `start` and ends at `end`.
struct Piece {
    u32 start, from, to, end;
};

// Calls tile(t, piece) for each tile t of a run that begins in the piece, which lies in a group.
template <class Tile> DEVICE void for_each_tile(const Cut& cut, const Piece& piece, Tile tile) {
    const u32 run_rows = piece.end - piece.start, behind = piece.from - piece.start, spread = cut.spread_of(run_rows), count = cut.tiles_of(run_rows);
    // A tile's start is the smaller one of t * (rows + extra) and t * rows + spread.
    u32 t = max(ceil_div(behind, cut.rows + cut.extra), ceil_div(behind - min(behind, spread), cut.rows));
    for (; t < count && piece.start + cut.start_of(t, run_rows) < piece.to; ++t) tile(t, piece);
}

// ids: [rows]. starts: room for ceil(rows / 32) words. tiles: {group, first row, rows | band width << 16, first tile of the band} for each, at most `rows` of
// them; num_tiles: how many. tickets: two counters, set to zero. tile_rows, extra_rows: see Cut.
// One CTA a multiprocessor, as route.cuh says.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
runs(const int* ids, u32* starts, int4* tiles, u32* num_tiles, u32* tickets, u32 rows, u32 num_groups, u32 tile_rows, u32 extra_rows) {
    const Cut cut{tile_rows, extra_rows};
    __shared__ u32 of_warps[32], mirrored[kThreads];
    const u32 lane = threadIdx.x % 32, words = ceil_div(rows, 32u);
    const u32 each = ceil_div(words, kThreads), first = min(threadIdx.x * each, words), end = min(first + each, words);
    launch_next_kernel();
    wait_for_previous_kernel();
    constexpr u32 kAtOnce = 8;
    for (u32 word = threadIdx.x / 32; word < words; word += kAtOnce * (kThreads / 32)) {
        int id[kAtOnce], before[kAtOnce];
#pragma unroll
        for (u32 i = 0; i < kAtOnce; ++i) {
            const u32 row = (word + i * (kThreads / 32)) * 32 + lane;
            id[i] = row < rows ? __ldcg(ids + row) : 0;
            before[i] = row < rows && row > 0 ? __ldcg(ids + row - 1) : 0;
        }
#pragma unroll
        for (u32 i = 0; i < kAtOnce; ++i) {
            const u32 at = word + i * (kThreads / 32), row = at * 32 + lane;
            const u32 bits = __ballot_sync(0xffffffffu, row < rows && (row == 0 || id[i] != before[i]));
            if (lane == 0 && at < words) starts[at] = bits;
        }
    }
    __syncthreads();

    u32 first_start = rows, last_start = 0;
    for_each_start(starts, first, end, [&](u32 row) {
        first_start = min(first_start, row);
        last_start = row;
    });
    const u32 run_before = over_those_before<false>(last_start, of_warps);  // the one that a thread's first rows may belong to
    // Where the next run begins behind a thread's rows is the same question from the other side.
    mirrored[kThreads - 1 - threadIdx.x] = rows - first_start;
    __syncthreads();
    const u32 nearest = over_those_before<false>(mirrored[threadIdx.x], of_warps);
    __syncthreads();
    mirrored[kThreads - 1 - threadIdx.x] = rows - nearest;
    __syncthreads();
    const u32 next_start = mirrored[threadIdx.x];

    u32 count = 0, place = 0;
    auto write = [&](u32 t, const Piece& piece) {
        const u32 run_rows = piece.end - piece.start, start = cut.start_of(t, run_rows), in_tile = cut.start_of(t + 1, run_rows) - start;
        const u32 band = kBandRows / tile_rows, in_band = t % band, width = min(cut.tiles_of(run_rows) - (t - in_band), band);
        tiles[place] = make_int4(ids[piece.start], piece.start + start, in_tile | width << 16, place - in_band);
        ++place;
    };
#pragma unroll 1
    for (u32 pass = 0; pass < 2; ++pass) {
        Piece piece{run_before, first * 32, 0, next_start};
        auto finish = [&](u32 to, u32 run_end) {
            piece.to = to;
            piece.end = run_end;
            if (piece.from == to || static_cast<u32>(ids[piece.from]) >= num_groups) return;
            if (pass == 0) for_each_tile(cut, piece, [&](u32, const Piece&) { ++count; });
            else for_each_tile(cut, piece, write);
        };
        if (first < end) {
            for_each_start(starts, first, end, [&](u32 row) {
                finish(row, row);
                piece.start = piece.from = row;
            });
            finish(min(end * 32, rows), next_start);
        }
        if (pass == 0) place = over_those_before<true>(count, of_warps);
    }
    if (threadIdx.x == kThreads - 1) {
        *num_tiles = place;
        tickets[0] = tickets[1] = 0;
    }
}
