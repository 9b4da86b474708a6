// Grouped FP8 GEMM over rows that lie sorted by group: out[i] = a[i] . w[group(i)]^T with block scales. The copy engine fetches all operands.
//
// GATED = 1: first GEMM of the experts. A tile is up to 144 rows x (128 gate + the 128 up columns that belong to them); the epilogue computes
//            silu(gate) * up and quantises it, a group of 128 columns a row.
// GATED = 0: plain tile of as many rows x 256 columns; rows are written to their entry.
// EXTENDED = 0: for few rows, with no extended tiles and the shortest loop: beside the kernels before it, a kernel of more code runs out of room in the
//            instruction cache (4 us a call with 121 KB in all, docs/kernel-notes-moe.md, 2026-11-27).
//
// Tiles (route.cuh, runs.cuh) have one of three forms:
//   wide      65 to 128 rows: each math warpgroup owns 64 rows, and both slices of 128 columns.
//   extended  129 to 144 rows: the last 16 are wgmma's other operand, of 8 columns each, so that a group's few rows past a tile cost a ninth of it and
//             its weights are fetched once. Of these each warpgroup owns 64 columns of both slices.
//   narrow    up to 64 rows: both own all rows; GATED each 64 columns of both slices, else each a slice.
// An element's gate and up always meet in one thread; the largest magnitudes of a row meet in shared memory where two warpgroups have parts of it.
//
// CLUSTER = 2: clusters of two CTAs take tiles together: two of a group's tiles of rows in the same column, whose weights each CTA fetches for both in every other
//            k-block (multicast), or where a band has one left over, that one in two columns, and its rows are shared; scales go the same way. So 34 KiB a
//            k-block and CTA come from L2, not 50. A stage is empty when the math warps of both have read it; rank 0 draws the tickets.
//
// Persistent CTAs take tiles by tickets. Warp roles:
//   warpgroup 0     producers, a lane each: warp 0 weights and tickets; warp 1 rows; warp 2 scales, and it says what the tile is.
//   warpgroups 1, 2 math, with the loop of gemm.cuh.
// Barriers per stage: full (3 arrivals + bytes), empty (one arrival a math warp). A stage of no rows ends the walk. Per ticket: full (who drew it), empty (3
// producers). Named barrier 1: largest magnitudes are written (256 math threads).
#include "gated.cuh"
#include "tiles.cuh"

constexpr u32 kTileRows = 128, kNarrowRows = 64, kExtraRows = 16;
constexpr u32 kBytesRows = (kTileRows + kExtraRows) * kBlockK, kStageBytes = kBytesRows + 2 * kBytesHalf;
constexpr u32 kScaleRows = kTileRows + kExtraRows + 4;  // tiles start at any row, copies of scales at every fourth
constexpr u32 kStageScaleBytes = (kScaleRows + 8) * 4;
constexpr u32 kProducers = 3, kEmptyArrivals = 8 * CLUSTER * kArrivalsOfWarp, kTickets = 2;
constexpr u32 kUnwritten = 1u << 16;  // beside the rows of a tile that is multiplied and not written
constexpr u16 kAllRanks = CLUSTER > 1 ? (1 << CLUSTER) - 1 : 0;
#if GATED
// Of 64 rows from two warpgroups, or of 16 from 8 warps; twice, for the next tile may write while this one is read.
constexpr u32 kLargestFloats = 2 * kNarrowRows;
#endif
constexpr u32 kRoomRow = 20, kRoomBytes = kExtraRows * kRoomRow * 4;  // of a warp: 16 extra rows x 16 columns, and 4 that keep lanes apart

// Where a lane finds its operands in stage 0: descriptors' low words, addresses in shared memory, of barriers too.
struct Places {
    u32 rows, extra, weight;         // the warpgroup's rows; the extra ones; all columns of the first slice, or the warpgroup's
    u32 part;                        // the warpgroup's columns
    u32 scale_a, scale_extra;        // of row lane / 4; of extra row 2 * (lane % 4)
    u32 scale_b[2], full, empty;
};

// Sets sum[slice] to the sum of k_blocks products of 64 rows and kColumns, from the stage at which the ring stands, which has been waited for; and, if kExtra,
// extra[slice] to those of 64 columns and the extra rows.
template <u32 kSlices, u32 kColumns, bool kExtra>
DEVICE void multiply_tile(float (&sum)[2][64], float (&extra)[2][8], const Places& at, Ring& ring, u32 k_blocks, u32 lane) {
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice) {
#pragma unroll
        for (u32 i = 0; i < kColumns / 2; ++i) sum[slice][i] = 0.f;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) extra[slice][i] = 0.f;
    }
    bool full_already = true;
    auto multiply_block = [&](u32 s) {
        if (!full_already) barrier_wait(at.full + 8 * s, ring.parity);
        const u32 offset = s * (kStageBytes / 16), of_scales = s * kStageScaleBytes;
#pragma unroll
        for (u32 slice = 0; slice < kSlices; ++slice) {
            const u32 rows = at.rows + offset, columns = at.weight + offset + slice * (kBytesHalf / 16);
            float partial[kColumns / 2], few[8];  // few: of the extra rows, promoted while the other product is under way
            fence_registers(partial);
            if (kExtra) fence_registers(few);
            wgmma_fence();
            if (kExtra) {
                issue_product<kExtraRows>(few, at.part + offset + slice * (kBytesHalf / 16), at.extra + offset);
            }
            issue_product<kColumns>(partial, rows, columns);
            const float scale_b = load_shared(at.scale_b[slice] + of_scales);
            const float low = load_shared(at.scale_a + of_scales) * scale_b, high = load_shared(at.scale_a + of_scales + 32) * scale_b;
            if (kExtra) {
                float of_rows[4];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) of_rows[i] = load_shared(at.scale_extra + of_scales + (i / 2 * 8 + i % 2) * 4) * scale_b;
                wgmma_wait<1>();
                fence_registers(few);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) extra[slice][i] += of_rows[i / 4 * 2 + i % 2] * few[i];
            }
            wgmma_wait<0>();
            fence_registers(partial);
            if (slice == kSlices - 1) {
                __syncwarp();
                if (CLUSTER > 1) arrive_for_warp_at_ranks<CLUSTER>(at.empty + 8 * s, low, high, lane);
                else barrier_arrive_after_words(at.empty + 8 * s, low, high, arrives_for_warp(lane));
                ring.stage = s;
                ring.advance(NUM_STAGES);
                full_already = barrier_passed(at.full + 8 * ring.stage, ring.parity);
            }
#pragma unroll
            for (u32 i = 0; i < kColumns / 2; ++i) sum[slice][i] += (i % 4 < 2 ? low : high) * partial[i];
        }
    };
    multiply_in_rounds<EXTENDED && kSlices * kColumns == 256 && !kExtra, false, NUM_STAGES>(k_blocks, ring, multiply_block);  // with the extra rows, rounds spill
}

// Writes 8 neighbours of a row, of which those below n exist; vectorised as write_rows has it.
DEVICE void write_eight(const float* value, u8* row, u32 column, u32 n, u32 type, u32 vectorised) {
    if (vectorised) {
        if (column >= n) return;
        *reinterpret_cast<uint4*>(row + column * 2) = make_uint4(pack_elements(value[0], value[1], type), pack_elements(value[2], value[3], type),
                                                                 pack_elements(value[4], value[5], type), pack_elements(value[6], value[7], type));
        return;
    }
#pragma unroll 1
    for (u32 i = 0; i < min(8u, column < n ? n - column : 0); ++i) store_element(row, column + i, type, value[i]);
}

// map_a, map_extra: of a, boxes of 64 and of 16 rows. scale_a: [k_blocks][scale_a_stride], rows 16-byte aligned. weight: [group][k_blocks][n_aligned][128] packed, scale_b
// [group][k_blocks][scale_b_stride]. sorted: entries in sorted order, or null if they are so already. n: columns of the output; GATED: half the rows of
// the weight. run: neighbouring column tiles a ticket covers. early: if not 0, weights are asked for before the previous kernel has ended, of tiles that a kernel
// before that one has listed. out: GATED codes [rows][n], else elements of `type`, a row every out_stride elements.
extern "C" __global__ void __launch_bounds__(384, 1)
grouped_sorted(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_extra, const float* scale_a, const u8* weight, const float* scale_b, void* out,
               float* out_scale, const u32* sorted, const int4* tile_list, const u32* num_row_tiles, u32* ticket, i64 out_stride, u32 n, u32 n_aligned, u32 k_blocks,
               u32 scale_a_stride, u32 scale_b_stride, u32 out_scale_stride, u32 run, u32 early, u32 type, u32 vectorised) {
    extern __shared__ __align__(1024) u8 shared[];
    constexpr u32 kOffsetScales = NUM_STAGES * kStageBytes, kOffsetInfo = kOffsetScales + NUM_STAGES * kStageScaleBytes;
    constexpr u32 kOffsetFull = kOffsetInfo + NUM_STAGES * 16, kOffsetEmpty = kOffsetFull + NUM_STAGES * 8;
    constexpr u32 kOffsetTicketFull = kOffsetEmpty + NUM_STAGES * 8, kOffsetTicket = kOffsetTicketFull + kTickets * 16;
    constexpr u32 kOffsetRoom = kOffsetTicket + kTickets * 16;
#if GATED
    constexpr u32 kOffsetLargest = kOffsetRoom + 8 * kRoomBytes;
#endif
    const u32 base = smem_address(shared), full = base + kOffsetFull, empty = base + kOffsetEmpty;
    const u32 ticket_full = base + kOffsetTicketFull, ticket_empty = ticket_full + kTickets * 8, tickets = base + kOffsetTicket;
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), lane = threadIdx.x % 32, rank = CLUSTER > 1 ? cluster_rank() : 0;

    if (threadIdx.x == 0) {
        prefetch_map(&map_a);
        for (u32 s = 0; s < NUM_STAGES; ++s) {
            barrier_init(full + 8 * s, kProducers);
            barrier_init(empty + 8 * s, kEmptyArrivals);
        }
        for (u32 i = 0; i < kTickets; ++i) {
            barrier_init(ticket_full + 8 * i, 1);
            barrier_init(ticket_empty + 8 * i, kProducers * CLUSTER);
        }
        barrier_init_fence();
    }
    meet(CLUSTER);
    launch_next_kernel();
    Ring ring;

    // producer: 0 weights and tickets, 1 rows, 2 scales and what the tile is. In a cluster there is code for each of them, for want of registers.
    auto produce = [&](u32 producer) {
        const u32 column_tiles = ceil_div(n, GATED ? kHalf : 2 * kHalf), runs = CLUSTER > 1 ? ceil_div(column_tiles, u32(CLUSTER)) : ceil_div(column_tiles, run);
        const u32 first_item = blockIdx.x / CLUSTER, walkers = gridDim.x / CLUSTER;
        auto block_of = [&](u32 column_tile, u32 half) { return GATED ? half * (n / kHalf) + column_tile : 2 * column_tile + half; };
        // What this CTA has of an item: a tile of rows, its first column and the one past its last; with a cluster one, which may lie past the last column of
        // all: then it is multiplied by the last one's weights, and not written. None where both CTAs would have that one.
        int4 tile;
        u32 first_column, past_column;
        bool same_columns = false;
        auto find_item = [&](u32 index) {
            if (CLUSTER > 1) {
                const PairItem item = pair_at(index, tile_list, runs, rank);
                tile = item.tile;
                first_column = item.column;
                same_columns = item.same_columns;
                past_column = first_column + !(same_columns && first_column == column_tiles);
            } else {
                const Item item = item_at(index, tile_list, runs);
                tile = item.tile;
                first_column = item.run * run;
                past_column = min(first_column + run, column_tiles);
            }
        };
        auto fetch_weights = [&](u32 column_tile, u32 kb, u32 s) {
            const u32 column = min(column_tile, column_tiles - 1), bar = full + 8 * s, target = base + s * kStageBytes + kBytesRows;
            if (CLUSTER > 1 && same_columns) fetch_weight<kAllRanks>(weight, tile.x * k_blocks + kb, block_of(column, 0), block_of(column, 1), n_aligned, bar, target, kb % CLUSTER == rank);
            else fetch_weight(weight, tile.x * k_blocks + kb, block_of(column, 0), block_of(column, 1), n_aligned, bar, target);
        };
        // of_both: the two CTAs of a cluster need the same ones.
        auto copy_scales = [&](u32 target, const float* source, u32 bytes, u32 kb, u32 bar, bool of_both) {
            if (CLUSTER == 1 || !of_both) bulk_copy(target, source, bytes, bar);
            else if (kb % CLUSTER == rank) bulk_copy_multicast(target, source, bytes, bar, kAllRanks);
        };
        u32 fetched = 0;  // k-blocks of weights that have been asked for ahead
        if (early && producer == 0 && first_item < __ldcg(num_row_tiles) * runs) {
            find_item(first_item);
            if (first_column < past_column) fetched = min(k_blocks, u32(NUM_STAGES));
            for (u32 s = 0; s < fetched; ++s) fetch_weights(first_column, s, s);
        }
        wait_for_previous_kernel();
        const u32 num_items = __ldcg(num_row_tiles) * runs;
        Ring at_ticket;
        for (u32 t = first_item; t < num_items; at_ticket.advance(kTickets)) {
            const u32 ticket_bar = ticket_full + 8 * at_ticket.stage, slot = tickets + 16 * at_ticket.stage;
            const u32 ticket_read = CLUSTER > 1 ? map_to_rank(ticket_empty + 8 * at_ticket.stage, 0) : ticket_empty + 8 * at_ticket.stage;
            if (CLUSTER > 1 && producer == 0) {
                barrier_expect(ticket_bar, 16);
                if (rank == 0) {
                    barrier_wait(ticket_empty + 8 * at_ticket.stage, at_ticket.parity ^ 1);
                    const float next = __uint_as_float(walkers + atomicAdd(ticket, 1u));
                    for (u32 r = 0; r < CLUSTER; ++r) store_async(map_to_rank(slot, r), {next, next, next, next}, map_to_rank(ticket_bar, r));
                }
            } else if (producer == 0) {
                barrier_wait(ticket_read, at_ticket.parity ^ 1);
                *reinterpret_cast<volatile u32*>(shared + kOffsetTicket + 16 * at_ticket.stage) = walkers + atomicAdd(ticket, 1u);
                barrier_arrive(ticket_bar);
            }
            find_item(t);
            const u32 group = tile.x, row = tile.y, rows = tile.z & 0xffff;
            const u32 first_scale = row & ~3u, scales = min((row % 4 + rows + 3) & ~3u, scale_a_stride - first_scale);
            const bool few = rows <= kExtraRows, extended = EXTENDED && rows > kTileRows;
            auto copy_rows = [&](u32 kb, u32 s) {
                const u32 bar = full + 8 * s, stage = base + s * kStageBytes;
                barrier_expect(bar, (few ? kExtraRows : ceil_div(rows, kNarrowRows) * kNarrowRows - (extended ? kNarrowRows - kExtraRows : 0)) * kBlockK);
                const bool shares = CLUSTER > 1 && !same_columns;
                if (shares && kb % CLUSTER != rank) return;
                auto copy = [&](u32 target, const TensorMap* map, u32 first_row) {
                    if (shares) tensor_copy_multicast(target, map, 0, first_row, kb, bar, kAllRanks);
                    else tensor_copy(target, map, 0, first_row, kb, bar);
                };
                copy(stage, few ? &map_extra : &map_a, row);
                if (rows > kNarrowRows) copy(stage + kNarrowRows * kBlockK, &map_a, row + kNarrowRows);
                if (extended) copy(stage + kTileRows * kBlockK, &map_extra, row + kTileRows);
            };
            for (u32 column_tile = first_column; column_tile < past_column; ++column_tile) {
                const u32 column = min(column_tile, column_tiles - 1), block_0 = block_of(column, 0), block_1 = block_of(column, 1);
                for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(NUM_STAGES)) {
                    const u32 s = ring.stage, bar = full + 8 * s;
                    if (fetched > 0) {  // not waited for: the others may have filled this stage, and the math warps emptied it, a phase ago
                        --fetched;
                        continue;
                    }
                    barrier_wait(empty + 8 * s, ring.parity ^ 1);
                    if (producer == 0) {
                        fetch_weights(column_tile, kb, s);
                    } else if (producer == 1) {
                        copy_rows(kb, s);
                    } else {
                        const u32 target = base + kOffsetScales + s * kStageScaleBytes;
                        const float* const of_weight = scale_b + static_cast<i64>(group * k_blocks + kb) * scale_b_stride;
                        *reinterpret_cast<int4*>(shared + kOffsetInfo + s * 16) = make_int4(row, column_tile < column_tiles ? rows : rows | kUnwritten, column, 0);
                        barrier_expect(bar, (scales + 8) * 4);
                        copy_scales(target, scale_a + static_cast<i64>(kb) * scale_a_stride + first_scale, scales * 4, kb, bar, !same_columns);
                        copy_scales(target + kScaleRows * 4, of_weight + (block_0 & ~3u), 16, kb, bar, same_columns);
                        copy_scales(target + kScaleRows * 4 + 16, of_weight + (block_1 & ~3u), 16, kb, bar, same_columns);
                    }
                }
            }
            barrier_wait(ticket_bar, at_ticket.parity);
            t = __float_as_uint(load_shared(slot));
            if (CLUSTER > 1) barrier_arrive_remote_after_words(ticket_read, __uint_as_float(t), 0.f, 1);
            else barrier_arrive_after_words(ticket_read, __uint_as_float(t), 0.f, 1);
        }
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        if (producer == 2) *reinterpret_cast<int4*>(shared + kOffsetInfo + ring.stage * 16) = make_int4(0, 0, 0, 0);
        barrier_arrive(full + 8 * ring.stage);
        // This CTA is there until nobody arrives at its barriers any more.
        if (CLUSTER > 1 && producer == 0) {
            for (u32 i = 0; i < NUM_STAGES; ++i, ring.advance(NUM_STAGES)) barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            for (u32 i = 0; rank == 0 && i < kTickets; ++i, at_ticket.advance(kTickets)) barrier_wait(ticket_empty + 8 * at_ticket.stage, at_ticket.parity ^ 1);
        }
    };
    if (warpgroup == 0) {
        give_registers<24>();
        const u32 warp = threadIdx.x / 32;
        if (warp >= kProducers || !elect_lane()) return;
        if (CLUSTER == 1) produce(warp);
        else if (warp == 0) produce(0);
        else if (warp == 1) produce(1);
        else produce(2);
        return;
    }
    take_registers<240>();
    const u32 math = warpgroup - 1, warp = threadIdx.x % 128 / 32, first_part = math * 64 + warp * 16;  // the first column of a warp, where a warpgroup has 64
    u8* const room = shared + kOffsetRoom + (math * 4 + warp) * kRoomBytes;
#if GATED
    float* const largest_at = reinterpret_cast<float*>(shared + kOffsetLargest);
    u32 largest_turn = 0;
#endif
    while (true) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        const int4 tile = *reinterpret_cast<const int4*>(shared + kOffsetInfo + ring.stage * 16);
        const u32 said = __shfl_sync(0xffffffffu, tile.y, 0), rows = said & ~kUnwritten;  // branches on it are the whole warp's
        if (rows == 0) break;
        const bool narrow = rows <= kNarrowRows, extended = EXTENDED && rows > kTileRows;
        const u32 row_in_tile = (narrow ? 0 : math * 64) + warp * 16 + lane / 4;  // and 8 further down
        const u32 block_0 = GATED ? tile.z : 2 * tile.z, block_1 = GATED ? n / kHalf + tile.z : block_0 + 1;
        const u32 scales = base + kOffsetScales, scales_b = scales + kScaleRows * 4, rows_at = base + (narrow ? 0 : math * 64 * kBlockK);
        const u32 weights = base + kBytesRows, part = weights + math * 64 * kBlockK, narrow_weights = GATED ? part : weights + math * kBytesHalf;
        const u32 scale_b_0 = scales_b + block_0 % 4 * 4, scale_b_1 = scales_b + (4 + block_1 % 4) * 4;
        const Places at{matrix_descriptor_low(rows_at), matrix_descriptor_low(base + kTileRows * kBlockK), matrix_descriptor_low(narrow ? narrow_weights : weights),
                        matrix_descriptor_low(part), scales + (tile.x % 4 + row_in_tile) * 4, scales + (tile.x % 4 + kTileRows + lane % 4 * 2) * 4,
                        {!GATED && narrow && math == 1 ? scale_b_1 : scale_b_0, scale_b_1}, full, empty};
#if !GATED
        auto entry_of = [&](u32 r) {
            const u32 place = tile.x + min(r, rows - 1);
            return sorted ? __ldcg(sorted + place) : place;
        };
        u32 entry_low, entry_high;
        auto find_entries = [&] {
            entry_low = entry_of(row_in_tile);
            entry_high = entry_of(row_in_tile + 8);
        };
#else
        auto find_entries = [] {};
#endif
        float sum[2][64], extra[2][8];
        if (extended) {
            multiply_tile<2, 128, true>(sum, extra, at, ring, k_blocks, lane);
            find_entries();  // no registers for them before
        } else {
            find_entries();  // on their way while the tile is multiplied
            if (narrow) multiply_tile<GATED ? 2 : 1, GATED ? 64 : 128, false>(sum, extra, at, ring, k_blocks, lane);
            else multiply_tile<2, 128, false>(sum, extra, at, ring, k_blocks, lane);
        }
        const u32 own_rows = CLUSTER > 1 && (said & kUnwritten) ? 0 : rows;
        const bool valid_low = row_in_tile < own_rows, valid_high = row_in_tile + 8 < own_rows;
#if GATED
        const i64 row = tile.x + row_in_tile;
        u8* const codes = static_cast<u8*>(out) + row * n + tile.z * kHalf;
        float* const scale = out_scale + static_cast<i64>(tile.z) * out_scale_stride + row;
        if (!narrow) {
            write_gated<0>(sum[0], sum[1], codes, scale, valid_low, lane);
            write_gated<1>(sum[0], sum[1], codes + 8ll * n, scale + 8, valid_high, lane);
        } else {
            float low[16], high[16];
            float largest_low = activate<0, 64>(sum[0], sum[1], low), largest_high = activate<1, 64>(sum[0], sum[1], high);
            float* const own = largest_at + largest_turn + math * kNarrowRows + row_in_tile;
            const float* const other = largest_at + largest_turn + (1 - math) * kNarrowRows + row_in_tile;
            if (lane % 4 == 0) {
                own[0] = largest_low;
                own[8] = largest_high;
            }
            named_barrier(1, 256);
            largest_low = fmaxf(largest_low, other[0]);
            largest_high = fmaxf(largest_high, other[8]);
            write_codes<64>(low, group_inverse(largest_low), codes + math * 64, valid_low, lane);
            write_codes<64>(high, group_inverse(largest_high), codes + math * 64 + 8ll * n, valid_high, lane);
            if (math == 0 && lane % 4 == 0) {
                if (valid_low) scale[0] = group_scale(largest_low);
                if (valid_high) scale[8] = group_scale(largest_high);
            }
        }
        if (extended) {
            // value[4j + 2h + i]: extra row 8j + 2 (lane % 4) + i, column lane / 4 + 8h of the warp's.
            float largest[4];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) extra[0][i] = silu(extra[0][i]) * extra[1][i];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 at_low = i / 2 * 4 + i % 2;
                largest[i] = fmaxf(kMinAmax, fmaxf(fabsf(extra[0][at_low]), fabsf(extra[0][at_low + 2])));
#pragma unroll
                for (u32 distance = 4; distance < 32; distance *= 2) largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], distance));
                if (lane < 4) largest_at[largest_turn + (math * 4 + warp) * kExtraRows + i / 2 * 8 + lane * 2 + i % 2] = largest[i];
            }
            named_barrier(1, 256);
            float of_row = kMinAmax;  // of extra row lane % 16
#pragma unroll
            for (u32 w = 0; w < 8; ++w) of_row = fmaxf(of_row, largest_at[largest_turn + w * kExtraRows + lane % 16]);
            const float inverse = group_inverse(of_row);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                const u32 extra_row = i / 4 * 8 + lane % 4 * 2 + i % 2;
                const float value = extra[0][i] * __shfl_sync(0xffffffffu, inverse, extra_row);
                room[extra_row * 16 + i % 4 / 2 * 8 + lane / 4] = static_cast<u8>(pack_e4m3(value, value));
            }
            __syncwarp();
            const i64 extra_at = static_cast<i64>(tile.x) + kTileRows + lane;
            if (lane < 16 && kTileRows + lane < own_rows) {
                *reinterpret_cast<uint4*>(static_cast<u8*>(out) + extra_at * n + tile.z * kHalf + first_part) = *reinterpret_cast<const uint4*>(room + lane * 16);
                if (first_part == 0) out_scale[static_cast<i64>(tile.z) * out_scale_stride + extra_at] = group_scale(of_row);
            }
        }
        if (narrow || extended) largest_turn ^= kLargestFloats;
#else
        const u32 element = type == kF32 ? 4 : 2;
        auto row_at = [&](u32 entry) { return static_cast<u8*>(out) + entry * out_stride * element; };
        u8 *const row_low = row_at(entry_low), *const row_high = row_at(entry_high);
        const u32 column = 2 * tile.z * kHalf;
        write_rows<128>(sum[0], row_low, row_high, column + (narrow ? math * kHalf : 0), n, type, vectorised, valid_low, valid_high, lane);
        if (!narrow) write_rows<128>(sum[1], row_low, row_high, column + kHalf, n, type, vectorised, valid_low, valid_high, lane);
        if (extended) {
            const u32 extra_row = lane / 2, first = column + first_part + lane % 2 * 8;
            u8* const target = row_at(entry_of(kTileRows + extra_row));
            float* const turned = reinterpret_cast<float*>(room);
#pragma unroll
            for (u32 slice = 0; slice < 2; ++slice) {
                __syncwarp();
#pragma unroll
                for (u32 i = 0; i < 8; ++i) turned[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kRoomRow + i % 4 / 2 * 8 + lane / 4] = extra[slice][i];
                __syncwarp();
                if (kTileRows + extra_row < own_rows) write_eight(turned + extra_row * kRoomRow + lane % 2 * 8, target, first + slice * kHalf, n, type, vectorised);
            }
        }
#endif
    }
}
