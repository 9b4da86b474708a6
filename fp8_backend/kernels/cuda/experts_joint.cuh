// Both GEMMs of experts that have few rows, in one launch that also sorts the rows: h = silu(gate) * up in codes, gate and up = x . w13[expert]^T, then
// rows = h . w2[expert]^T, a row for each entry.
//
// As launches of their own, memory rests until the rows are sorted, and again between the two, and a GEMM whose tiles are a few more than the GPU has multiprocessors
// ends with most of them idle (docs/kernel-notes-moe-decode.md, 2026-11-28). Here every CTA sorts the rows for itself, while they are quantised, and the weights of
// the second GEMM follow those of the first without a pause.
//
// A tile is up to 64 of the rows sorted by expert x 256 rows of its weight: of w13 128 gate and the 128 up rows that belong to them, of w2 neighbours. CTAs draw
// tiles by tickets, all of the first GEMM before those of the second. A tile of the second waits until `counters` has all parts of its rows of h. With CUTS, tiles of
// the first GEMM beyond the last whole round of CTAs are cut in k, so that all CTAs have a part of them: the first cuts leave their sums in memory, and the last one
// waits for these. Who is waited for has drawn before, and in the end waits for nobody, so it does not matter how many CTAs run at once.
//
// Warp roles:
//   warpgroup 0     producers. Warp 0, one lane: tickets, weights, their scales, and what the tile is; it runs ahead of the others as far as stages are empty.
//                   Warps 1, 2: rows, 16 bytes a copy (cp.async, swizzled here); warp 3: their scales.
//   warpgroups 1, 2 math: both own all rows, each 64 of the gate and of the up rows, or of both halves of w2's.
// Barriers per stage: full (96 threads whose copies have landed, 2 arrivals of warp 0 + bytes), empty (one arrival a math warp). A stage of no rows ends the walk. Per
// ticket: full (who drew it), empty (an arrival each of warps 1 to 3). Named barrier 1: largest magnitudes are written (256 math threads).
#include "gated.cuh"
#include "tiles.cuh"

constexpr u32 kThreads = 384, kTileRows = 64, kBytesRows = kTileRows * kBlockK, kStageBytes = kBytesRows + 2 * kBytesHalf;
constexpr u32 kMaxEntries = 1024;
constexpr u32 kLargest = 4 * kTileRows;  // magnitudes, of each warpgroup, and twice: the next tile may write while this one is read
constexpr u32 kFullArrivals = 3 * 32 + 2, kEmptyArrivals = 8 * kArrivalsOfWarp, kTickets = 4;
constexpr u32 kOffsetScaleA = NUM_STAGES * kStageBytes, kOffsetScaleB = kOffsetScaleA + NUM_STAGES * kTileRows * 4, kOffsetInfo = kOffsetScaleB + NUM_STAGES * 32;
constexpr u32 kOffsetFull = kOffsetInfo + NUM_STAGES * 16, kOffsetEmpty = kOffsetFull + NUM_STAGES * 8, kOffsetTicketFull = kOffsetEmpty + NUM_STAGES * 8;
constexpr u32 kOffsetTicketEmpty = kOffsetTicketFull + kTickets * 8, kOffsetTicket = kOffsetTicketEmpty + kTickets * 8;

// A weight and the rows that it multiplies: what differs between the GEMMs.
struct Side {
    const u8* codes;  // rows of k_blocks * 128
    const float* scale;
    const u8* weight;
    const float* scale_b;
    u32 k_blocks, n_aligned, scale_stride, scale_b_stride;
};

// What a ticket stands for: a tile of rows, which column of tiles of the weight, and which of how many cuts of k, with its k-blocks.
struct Part {
    u32 tile, column, cut, cuts, begin, end;
    bool is_first;  // of the first GEMM
};

// Rows sorted by expert, in tiles.
struct Tiles {
    u32 group[kMaxEntries], rows[kMaxEntries];  // rows: the first one and, << 16, how many
    u16 sorted[kMaxEntries];                    // entries; those of one expert in their own order, so that all CTAs have the same one
    u32 of_warps[kThreads / 32], count;
};

// Sets `tiles` to the entries' order; by the whole CTA. words: 32 * num_groups words of shared memory at most, which copies may overwrite afterwards.
DEVICE void sort_entries(Tiles& tiles, u32* words, const int* ids, const int* map, u32 entries, u32 num_ids, u32 num_groups) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, rounds = ceil_div(entries, 32u);
    for (u32 i = threadIdx.x; i < rounds * num_groups; i += kThreads) words[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < entries; i += kThreads) {
        int group = __ldcg(ids + i);
        if (map != nullptr) group = group >= 0 && static_cast<u32>(group) < num_ids ? __ldcg(map + group) : -1;
        if (group >= 0 && static_cast<u32>(group) < num_groups) atomicOr(words + i / 32 * num_groups + group, 1u << i % 32);
    }
    __syncthreads();
    // A thread has neighbouring groups; sums of rows in the high half, of tiles in the low one.
    const u32 share = ceil_div(num_groups, kThreads), first = min(threadIdx.x * share, num_groups), past = min(first + share, num_groups);
    auto rows_of = [&](u32 group) {
        u32 rows = 0;
        for (u32 r = 0; r < rounds; ++r) rows += __popc(words[r * num_groups + group]);
        return rows;
    };
    u32 own = 0;
    for (u32 group = first; group < past; ++group) {
        const u32 rows = rows_of(group);
        own += rows << 16 | ceil_div(rows, kTileRows);
    }
    u32 sum = own;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u32 left = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += left;
    }
    if (lane == 31) tiles.of_warps[warp] = sum;
    __syncthreads();
    u32 before = sum - own, all = 0;
    for (u32 w = 0; w < kThreads / 32; ++w) {
        if (w < warp) before += tiles.of_warps[w];
        all += tiles.of_warps[w];
    }
    if (threadIdx.x == 0) tiles.count = all & 0xffff;
    u32 row = before >> 16, tile = before & 0xffff;
    for (u32 group = first; group < past; ++group) {
        const u32 rows = rows_of(group);
        for (u32 start = 0; start < rows; start += kTileRows, ++tile) {
            tiles.group[tile] = group;
            tiles.rows[tile] = row + start | min(kTileRows, rows - start) << 16;
        }
        for (u32 r = 0; r < rounds; ++r)
            for (u32 bits = words[r * num_groups + group]; bits; bits &= bits - 1) tiles.sorted[row++] = static_cast<u16>(r * 32 + __ffs(bits) - 1);
    }
    fence_async_shared();
    __syncthreads();
}

// Sets sum[half] to the sum of k_blocks products of all rows and the warpgroup's 64 columns of each half, from the stage at which the ring stands, which has been
// waited for. rows, weight, scale_a, scale_b: of stage 0, as in promotion.cuh.
DEVICE void multiply_tile(float (&sum)[2][64], u32 rows, u32 weight, u32 scale_a, const u32 (&scale_b)[2], u32 full, u32 empty, Ring& ring, u32 k_blocks, u32 lane) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half)
#pragma unroll
        for (u32 i = 0; i < 32; ++i) sum[half][i] = 0.f;
    for (u32 block = 0; block < k_blocks; ++block) {
        if (block > 0) barrier_wait(full + 8 * ring.stage, ring.parity);
        const u32 s = ring.stage;
        u32 a[kBlockK / 32][4];
#pragma unroll
        for (u32 i = 0; i < kBlockK / 32; ++i) load_matrices(a[i], rows + s * kStageBytes ^ 32 * i);
        float partial[2][32];
        fence_registers(partial[0]);
        fence_registers(partial[1]);
        wgmma_fence();
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
#pragma unroll
            for (u32 i = 0; i < kBlockK / 32; ++i)
                Wgmma<64>::multiply(partial[half], a[i], matrix_descriptor_at(weight + s * (kStageBytes / 16) + half * (kBytesHalf / 16) + 2 * i), i > 0);
        wgmma_commit();
        const float low = load_shared(scale_a + s * kTileRows * 4), high = load_shared(scale_a + s * kTileRows * 4 + 32);
        const float of_first = load_shared(scale_b[0] + s * 32), of_second = load_shared(scale_b[1] + s * 32);
        const float scales[2][2] = {{low * of_first, high * of_first}, {low * of_second, high * of_second}};
        wgmma_wait<0>();
        fence_registers(partial[0]);
        fence_registers(partial[1]);
        __syncwarp();  // all lanes have read the stage's scales
        barrier_arrive_after_words(empty + 8 * s, scales[0][1], scales[1][1], arrives_for_warp(lane));
        ring.advance(NUM_STAGES);
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
#pragma unroll
            for (u32 i = 0; i < 32; ++i) sum[half][i] += scales[half][i % 4 / 2] * partial[half][i];
    }
}

// x: codes, a row every k_blocks * 128 bytes, and scale_x [k_blocks][scale_x_stride]; the row of entry e is e / divisor. w13: [group][k_blocks][2 * intermediate][128]
// packed, scale_13 [group][k_blocks][scale_13_stride]; w2: [group][intermediate / 128][n_aligned][128], scale_2 alike. h: [rows][intermediate] codes in sorted order,
// scale_h [intermediate / 128][scale_h_stride]. rows: [entries][hidden] 16-bit elements of `type`, hidden % 8 == 0, 16-byte aligned. ids, map, num_ids: as in
// route.cuh, complete before the previous kernel let this one start. entries: at most kMaxEntries. most_cuts: of a tile, 1 if none may be cut. sums:
// [most_cuts - 1][rows][2 * intermediate] of all cuts but the last. counters: zero when the previous kernel has ended; a ticket; how many parts of each tile's rows of h
// are there; of each cut tile, how many parts of its sums.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
experts_joint(const u8* x, const float* scale_x, const u8* w13, const float* scale_13, const u8* w2, const float* scale_2, u8* h, float* scale_h, u8* rows,
              float* sums, const int* ids, const int* map, u32* counters, u32 entries, u32 num_ids, u32 num_groups, u32 divisor, u32 k_blocks, u32 intermediate, u32 hidden,
              u32 n_aligned, u32 scale_x_stride, u32 scale_13_stride, u32 scale_h_stride, u32 scale_2_stride, u32 most_cuts, u32 type) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ Tiles tiles_of_cta[1];
    __shared__ float largest_of_rows[kLargest];
    Tiles& tiles = tiles_of_cta[0];
    const u32 base = smem_address(shared), full = base + kOffsetFull, empty = base + kOffsetEmpty;
    const u32 ticket_full = base + kOffsetTicketFull, ticket_empty = base + kOffsetTicketEmpty, tickets = base + kOffsetTicket;
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < NUM_STAGES; ++s) {
            barrier_init(full + 8 * s, kFullArrivals);
            barrier_init(empty + 8 * s, kEmptyArrivals);
        }
        for (u32 i = 0; i < kTickets; ++i) {
            barrier_init(ticket_full + 8 * i, 1);
            barrier_init(ticket_empty + 8 * i, 3 * kArrivalsOfWarp);
        }
        barrier_init_fence();
    }
    launch_next_kernel();
    sort_entries(tiles, reinterpret_cast<u32*>(shared), ids, map, entries, num_ids, num_groups);
    const u32 first_columns = intermediate / kHalf, second_columns = ceil_div(hidden, 2 * kHalf);
    const u32 first_tiles = tiles.count * first_columns, cut_tiles = CUTS ? first_tiles % gridDim.x : 0, whole = first_tiles - cut_tiles;
    const u32 cuts = CUTS && cut_tiles ? min(most_cuts, max(gridDim.x / cut_tiles, 1u)) : 1;
    const u32 first_items = whole + cut_tiles * cuts, items = first_items + tiles.count * second_columns;
    auto item_of = [&](u32 ticket) {
        if (ticket >= first_items) {
            const u32 index = ticket - first_items;
            return Part{index / second_columns, index % second_columns, 0, 1, 0, first_columns, false};
        }
        if (!CUTS) return Part{ticket / first_columns, ticket % first_columns, 0, 1, 0, k_blocks, true};
        const u32 of = ticket < whole ? 1 : cuts, beyond = ticket - whole, cut = ticket < whole ? 0 : beyond % cuts;
        const u32 index = ticket < whole ? ticket : whole + beyond / cuts;
        return Part{index / first_columns, index % first_columns, cut, of, cut * k_blocks / of, (cut + 1) * k_blocks / of, true};
    };
    Ring ring;

    if (warpgroup == 0) {
        give_registers<56>();
        const Side first{x, scale_x, w13, scale_13, k_blocks, 2 * intermediate, scale_x_stride, scale_13_stride};
        const Side second{h, scale_h, w2, scale_2, first_columns, n_aligned, scale_h_stride, scale_2_stride};
        Ring at_ticket;
        wait_for_previous_kernel();
        if (warp == 0) {
            if (lane > 0) return;
            u32 t = atomicAdd(counters, 1u);
            while (true) {
                barrier_wait(ticket_empty + 8 * at_ticket.stage, at_ticket.parity ^ 1);
                *reinterpret_cast<volatile u32*>(shared + kOffsetTicket + 16 * at_ticket.stage) = t;
                barrier_arrive(ticket_full + 8 * at_ticket.stage);
                at_ticket.advance(kTickets);
                if (t >= items) break;
                const u32 next = atomicAdd(counters, 1u);  // on its way while this tile is fetched
                const Part part = item_of(t);
                const Side side = part.is_first ? first : second;
                const u32 block_0 = part.is_first ? part.column : 2 * part.column, block_1 = part.is_first ? first_columns + part.column : block_0 + 1;
                const u32 k_block = tiles.group[part.tile] * side.k_blocks, rows_of_tile = tiles.rows[part.tile];
                const int4 info = make_int4(rows_of_tile & 0xffff, rows_of_tile >> 16, part.column | part.cut << 16 | part.cuts << 24, part.is_first ? part.tile : ~part.tile);
                const float* of_weight = side.scale_b + static_cast<i64>(k_block + part.begin) * side.scale_b_stride;
                for (u32 kb = part.begin; kb < part.end; ++kb, ring.advance(NUM_STAGES)) {
                    const u32 s = ring.stage, bar = full + 8 * s, scales = base + kOffsetScaleB + s * 32;
                    barrier_wait(empty + 8 * s, ring.parity ^ 1);
                    *reinterpret_cast<int4*>(shared + kOffsetInfo + s * 16) = info;
                    fetch_weight(side.weight, k_block + kb, block_0, block_1, side.n_aligned, bar, base + s * kStageBytes + kBytesRows);
                    barrier_expect(bar, 32);
                    bulk_copy(scales, of_weight + (block_0 & ~3u), 16, bar);
                    bulk_copy(scales + 16, of_weight + (block_1 & ~3u), 16, bar);
                    of_weight += side.scale_b_stride;
                }
                t = next;
            }
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            *reinterpret_cast<int4*>(shared + kOffsetInfo + ring.stage * 16) = make_int4(0, 0, 0, 0);
            barrier_arrive(full + 8 * ring.stage);
            barrier_arrive(full + 8 * ring.stage);
            return;
        }
        const u32 thread = threadIdx.x - 32, chunk = thread % 8, first_row = thread / 8;  // of the 64 that copy rows: first_row, first_row + 8, ...
        const u32 target = first_row * kBlockK + (chunk ^ first_row % 8) * 16;
        while (true) {
            barrier_wait(ticket_full + 8 * at_ticket.stage, at_ticket.parity);
            const u32 t = __float_as_uint(load_shared(tickets + 16 * at_ticket.stage));
            __syncwarp();
            barrier_arrive_after_words(ticket_empty + 8 * at_ticket.stage, __uint_as_float(t), 0.f, arrives_for_warp(lane));
            at_ticket.advance(kTickets);
            if (t >= items) break;
            const Part part = item_of(t);
            const Side side = part.is_first ? first : second;
            const u32 start = tiles.rows[part.tile] & 0xffff, count = tiles.rows[part.tile] >> 16;
            auto source_of = [&](u32 row) { return part.is_first ? tiles.sorted[start + min(row, count - 1)] / divisor : start + row; };
            if (!part.is_first) {
                if (lane == 0) wait_for_count(counters + 1 + part.tile, 2 * ceil_div(count, 16u) * first_columns);
                __syncwarp();
            }
            if (warp == 3) {
                const float* of_rows[2];
#pragma unroll
                for (u32 i = 0; i < 2; ++i) of_rows[i] = side.scale + source_of(i * 32 + lane);
                for (u32 kb = part.begin; kb < part.end; ++kb, ring.advance(NUM_STAGES)) {
                    barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        const u32 row = i * 32 + lane;
                        if (row < count) copy_4_async(base + kOffsetScaleA + (ring.stage * kTileRows + row) * 4, of_rows[i] + static_cast<i64>(kb) * side.scale_stride);
                    }
                    barrier_arrive_after_copies(full + 8 * ring.stage);
                }
                continue;
            }
            u32 offsets[kTileRows / 8];  // in units of 16 bytes
#pragma unroll
            for (u32 i = 0; i < kTileRows / 8; ++i) offsets[i] = source_of(first_row + 8 * i) * (side.k_blocks * 8) + chunk;
            for (u32 kb = part.begin; kb < part.end; ++kb, ring.advance(NUM_STAGES)) {
                const u32 stage = base + ring.stage * kStageBytes;
                barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
#pragma unroll
                for (u32 i = 0; i < kTileRows / 8; ++i)
                    if (first_row + 8 * i < count) copy_16_async(stage + target + i * 8 * kBlockK, side.codes + static_cast<u64>(offsets[i] + kb * 8) * 16);
                barrier_arrive_after_copies(full + 8 * ring.stage);
            }
        }
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        barrier_arrive(full + 8 * ring.stage);
        return;
    }
    take_registers<216>();
    const u32 math = warpgroup - 1, row_in_tile = warp * 16 + lane / 4;  // and 8 further down
    const u32 rows_at = base + (warp * 16 + lane % 16) * kBlockK + (lane / 16 ^ lane % 8) * 16;
    const u32 weight = matrix_descriptor_low(base + kBytesRows + math * 64 * kBlockK), scale_a = base + kOffsetScaleA + row_in_tile * 4;
    u32 largest_turn = 0;
    while (true) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        const int4 tile = *reinterpret_cast<const int4*>(shared + kOffsetInfo + ring.stage * 16);
        const u32 count = __shfl_sync(0xffffffffu, static_cast<u32>(tile.y), 0);
        if (count == 0) break;
        const bool is_first = __shfl_sync(0xffffffffu, tile.w, 0) >= 0;
        const u32 column = tile.z & 0xffff, cut = tile.z >> 16 & 0xff, of_cuts = static_cast<u32>(tile.z) >> 24;
        const u32 block_0 = is_first ? column : 2 * column, block_1 = is_first ? first_columns + column : block_0 + 1;
        const u32 scale_b[2] = {base + kOffsetScaleB + block_0 % 4 * 4, base + kOffsetScaleB + (4 + block_1 % 4) * 4};
        const u32 blocks = !is_first ? first_columns : CUTS ? (cut + 1) * k_blocks / of_cuts - cut * k_blocks / of_cuts : k_blocks;
        float sum[2][64];  // the first half of each is used
        multiply_tile(sum, rows_at, weight, scale_a, scale_b, full, empty, ring, blocks, lane);
        const bool valid_low = row_in_tile < count, valid_high = row_in_tile + 8 < count;
        if (!is_first) {
            auto row_of = [&](u32 r) { return rows + static_cast<i64>(tiles.sorted[tile.x + min(r, count - 1)]) * hidden * 2; };
            u8 *const low = row_of(row_in_tile), *const high = row_of(row_in_tile + 8);
            const u32 first_column = column * 2 * kHalf + math * 64;
            write_rows<64>(sum[0], low, high, first_column, hidden, type, true, valid_low, valid_high, lane);
            write_rows<64>(sum[1], low, high, first_column + kHalf, hidden, type, true, valid_low, valid_high, lane);
            continue;
        }
        const i64 row = tile.x + row_in_tile;
        if (CUTS && of_cuts > 1) {
            u32* const counter = counters + 1 + entries + tile.w * first_columns + column - whole;
            float* const of_row = sums + row * 2 * intermediate + column * kHalf + math * 64 + lane % 4 * 2;
            auto place_of = [&](u32 of_cut, u32 half, u32 i) {
                return of_row + (static_cast<i64>(of_cut) * entries * 2 + i % 4 / 2 * 16 + half) * intermediate + i / 4 * 8;
            };
            if (cut + 1 < of_cuts) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half)
#pragma unroll
                    for (u32 i = 0; i < 32; i += 2)
                        if (i % 4 ? valid_high : valid_low) *reinterpret_cast<float2*>(place_of(cut, half, i)) = {sum[half][i], sum[half][i + 1]};
                __syncwarp();
                if (warp * 16 < count && lane == 0) count_one(counter);
                continue;
            }
            if (warp * 16 < count && lane == 0) wait_for_count(counter, cut * 2 * ceil_div(count, 16u));
            __syncwarp();
#pragma unroll 1
            for (u32 other = 0; other < cut; ++other)
#pragma unroll
                for (u32 half = 0; half < 2; ++half)
#pragma unroll
                    for (u32 i = 0; i < 32; i += 2) {
                        if (!(i % 4 ? valid_high : valid_low)) continue;
                        const float2 more = __ldcg(reinterpret_cast<const float2*>(place_of(other, half, i)));
                        sum[half][i] += more.x;
                        sum[half][i + 1] += more.y;
                    }
        }
        float low[16], high[16];
        float largest_low = activate<0, 64>(sum[0], sum[1], low), largest_high = activate<1, 64>(sum[0], sum[1], high);
        float* const own = largest_of_rows + largest_turn + math * kTileRows + row_in_tile;
        const float* const other = largest_of_rows + largest_turn + (1 - math) * kTileRows + row_in_tile;
        if (lane % 4 == 0) {
            own[0] = largest_low;
            own[8] = largest_high;
        }
        named_barrier(1, 256);
        largest_turn ^= 2 * kTileRows;
        largest_low = fmaxf(largest_low, other[0]);
        largest_high = fmaxf(largest_high, other[8]);
        u8* const codes = h + row * intermediate + column * kHalf + math * 64;
        write_codes<64>(low, group_inverse(largest_low), codes, valid_low, lane);
        write_codes<64>(high, group_inverse(largest_high), codes + 8ll * intermediate, valid_high, lane);
        if (math == 0 && lane % 4 == 0) {
            float* const scale = scale_h + static_cast<i64>(column) * scale_h_stride + row;
            if (valid_low) scale[0] = group_scale(largest_low);
            if (valid_high) scale[8] = group_scale(largest_high);
        }
        __syncwarp();
        if (warp * 16 < count && lane == 0) count_one(counters + 1 + tile.w);
    }
}
