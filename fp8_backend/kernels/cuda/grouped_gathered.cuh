// First GEMM of the experts where these have few rows: out[i] = silu(gate) * up in codes, gate and up = a[source(i)] . w[expert(i)]^T with block scales.
//
// A tile is 128 of the rows sorted by expert (route.cuh) x (128 gate + the 128 up columns that belong to them); the epilogue quantises a group of 128 columns a
// row. Rows are gathered by token, written in sorted order.
//
// Persistent CTAs take tiles by tickets. Warp roles:
//   warpgroup 0     producer. All 128 threads gather rows of a, 16 bytes a copy (cp.async, swizzled here), and their scales; lane 0 of warp 0 fetches
//                   weights, of warp 2 their scales, and it says what the tile is.
//   warpgroups 1, 2 math (promotion.cuh). Wide tiles (more than 64 rows): each owns 64 rows, so that gate and up of an element meet in one
//                   thread. Narrow ones: both own the same 64 rows, each one half of the columns; the up half crosses through `exchange`.
// Barriers per stage: full (128 threads whose copies have landed, 2 lanes + bytes), empty (one arrival a math warp). A stage of no rows ends
// the walk. Per ticket: full (who drew it), empty (a lane of each producer warp). Exchange: read (one arrival a warp of warpgroup 1; not a named
// barrier, whose arrival does not wait for loads under way). Named barriers: 3 exchange written; 5 row table free, row table written.
#include "gated.cuh"
#include "tiles.cuh"

constexpr u32 kTileRows = 128, kBytesA = kTileRows * kBlockK;
constexpr u32 kStageBytes = kBytesA + 2 * kBytesHalf;
constexpr u32 kExchangeBytes = 64 * 128 * 4, kFullArrivals = 128 + 2, kEmptyArrivals = 8 * kArrivalsOfWarp;
constexpr u32 kTickets = 2;

struct StageLayout {
    static constexpr u32 kRows = kStageBytes, kWeight = kStageBytes, kScaleA = kTileRows * 4, kScaleB = 32;
};

// a: codes, a row every a_stride bytes, and scale_a [k_blocks][scale_a_stride]; the row of entry e is e / divisor. sorted: entries in sorted order. weight:
// [group][k_blocks][n_aligned][128] packed, scale_b [group][k_blocks][scale_b_stride]. n: columns of the output, half the rows of the weight. run: neighbouring
// column tiles a ticket covers. early: of how many groups, which are likely to have rows, weights are asked for before the previous kernel has ended. out:
// codes [rows][n].
extern "C" __global__ void __launch_bounds__(384, 1)
grouped_gathered(const u8* a, const float* scale_a, const u8* weight, const float* scale_b, u8* out, float* out_scale, const u32* sorted, const int4* tile_list,
                 const u32* num_row_tiles, u32* ticket, i64 a_stride, u32 divisor, u32 n, u32 n_aligned, u32 k_blocks, u32 scale_a_stride, u32 scale_b_stride,
                 u32 out_scale_stride, u32 run, u32 early) {
    extern __shared__ __align__(1024) u8 shared[];
    constexpr u32 kOffsetExchange = NUM_STAGES * kStageBytes, kOffsetScaleA = kOffsetExchange + kExchangeBytes;
    constexpr u32 kOffsetScaleB = kOffsetScaleA + NUM_STAGES * kTileRows * 4, kOffsetInfo = kOffsetScaleB + NUM_STAGES * 32;
    constexpr u32 kOffsetFull = kOffsetInfo + NUM_STAGES * 16, kOffsetEmpty = kOffsetFull + NUM_STAGES * 8;
    constexpr u32 kOffsetTicketFull = kOffsetEmpty + NUM_STAGES * 8, kOffsetTicket = kOffsetTicketFull + kTickets * 16;
    constexpr u32 kOffsetExchangeRead = kOffsetTicket + kTickets * 16, kOffsetRows = kOffsetExchangeRead + 16;
    const u32 base = smem_address(shared), full = base + kOffsetFull, empty = base + kOffsetEmpty;
    const u32 ticket_full = base + kOffsetTicketFull, ticket_empty = ticket_full + kTickets * 8, tickets = base + kOffsetTicket;
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < NUM_STAGES; ++s) {
            barrier_init(full + 8 * s, kFullArrivals);
            barrier_init(empty + 8 * s, kEmptyArrivals);
        }
        for (u32 i = 0; i < kTickets; ++i) {
            barrier_init(ticket_full + 8 * i, 1);
            barrier_init(ticket_empty + 8 * i, 4 * kArrivalsOfWarp);
        }
        barrier_init(base + kOffsetExchangeRead, 4 * kArrivalsOfWarp);
        barrier_init_fence();
    }
    __syncthreads();
    launch_next_kernel();
    Ring ring;

    if (warpgroup == 0) {
        give_registers<40>();
        const u32 warp = threadIdx.x / 32;
        const u32 column_tiles = n / kHalf, runs = ceil_div(column_tiles, run);
        if (threadIdx.x == 0 && blockIdx.x / runs < early) {  // the first tile of this CTA, had every expert one tile
            const u32 column = blockIdx.x % runs * run;
            for (u32 kb = 0; kb < min(k_blocks, u32(NUM_STAGES)); ++kb)
                for (u32 half = 0; half < 2; ++half) {
                    const i64 row = (static_cast<i64>(blockIdx.x / runs) * k_blocks + kb) * n_aligned + column * kHalf + half * n;
                    prefetch_l2(weight + row * kBlockK, kBytesHalf);
                }
        }
        wait_for_previous_kernel();
        const u32 num_items = __ldcg(num_row_tiles) * runs;
        const u32 chunk = threadIdx.x % 8, first = threadIdx.x / 8;
        const u32 row_chunks = static_cast<u32>(a_stride / 16), target = first * kBlockK + (chunk ^ first % 8) * 16;  // all of its rows have the same row % 8
        u32* row_table = reinterpret_cast<u32*>(shared + kOffsetRows);  // in units of 16 bytes
        Ring at_ticket;
        for (u32 t = blockIdx.x; t < num_items; at_ticket.advance(kTickets)) {
            const u32 ticket_bar = ticket_full + 8 * at_ticket.stage;
            if (threadIdx.x == 0) {
                barrier_wait(ticket_empty + 8 * at_ticket.stage, at_ticket.parity ^ 1);
                *reinterpret_cast<volatile u32*>(shared + kOffsetTicket + 16 * at_ticket.stage) = gridDim.x + atomicAdd(ticket, 1u);
                barrier_arrive(ticket_bar);
            }
            const Item item = item_at(t, tile_list, runs);
            const int4 tile = item.tile;
            const u32 rows = tile.z & 0xffff, first_column = item.run * run, past_column = min(first_column + run, column_tiles);

            // Thread r knows where row r of the tile is, the table tells those that copy it; each copies chunk `chunk` of rows first, first + 16, ...
            u32 source_row = tile.y + threadIdx.x;
            if (threadIdx.x < rows) source_row = __ldcg(sorted + source_row) / divisor;
            __syncwarp();
            named_barrier(5, 128);  // the last tile's rows have been copied
            row_table[threadIdx.x % 16 * 8 + threadIdx.x / 16] = source_row * row_chunks;
            named_barrier(5, 128);
            const float* scale_source = scale_a + source_row;
            for (u32 column_tile = first_column; column_tile < past_column; ++column_tile) {
                const u32 block_0 = column_tile, block_1 = n / kHalf + column_tile;
                const float* scale_b_source = scale_b + static_cast<i64>(tile.x) * k_blocks * scale_b_stride;
                for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(NUM_STAGES)) {
                    const u32 s = ring.stage, bar = full + 8 * s, stage = base + s * kStageBytes;
                    barrier_wait(empty + 8 * s, ring.parity ^ 1);
                    if (lane == 0 && warp == 0) {
                        fetch_weight(weight, tile.x * k_blocks + kb, block_0, block_1, n_aligned, bar, stage + kBytesA);
                    } else if (lane == 0 && warp == 2) {
                        *reinterpret_cast<int4*>(shared + kOffsetInfo + s * 16) = make_int4(tile.y, rows, column_tile, 0);
                        const u32 scales = base + kOffsetScaleB + s * 32;
                        barrier_expect(bar, 32);
                        bulk_copy(scales, scale_b_source + (block_0 & ~3u), 16, bar);
                        bulk_copy(scales + 16, scale_b_source + (block_1 & ~3u), 16, bar);
                        scale_b_source += scale_b_stride;
                    }
                    const uint4* of_rows = reinterpret_cast<const uint4*>(row_table + first * 8);
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        const uint4 four = of_rows[i];
                        const u32 offsets[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                        for (u32 j = 0; j < 4; ++j) {
                            const u32 row = i * 4 + j;  // times 16
                            if (first + 16 * row >= rows) continue;
                            copy_16_async(stage + target + row * 16 * kBlockK, a + static_cast<u64>(offsets[j] + kb * 8 + chunk) * 16);
                        }
                    }
                    if (threadIdx.x < rows) copy_4_async(base + kOffsetScaleA + (s * kTileRows + threadIdx.x) * 4, scale_source);
                    scale_source += scale_a_stride;
                    barrier_arrive_after_copies(bar);
                }
                scale_source -= static_cast<i64>(k_blocks) * scale_a_stride;
            }
            barrier_wait(ticket_bar, at_ticket.parity);
            t = __float_as_uint(load_shared(tickets + 16 * at_ticket.stage));
            __syncwarp();
            barrier_arrive_after_words(ticket_empty + 8 * at_ticket.stage, __uint_as_float(t), 0.f, arrives_for_warp(lane));
        }
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        if (lane == 0 && warp == 2) *reinterpret_cast<int4*>(shared + kOffsetInfo + ring.stage * 16) = make_int4(0, 0, 0, 0);
        __syncwarp();
        barrier_arrive(full + 8 * ring.stage);
        if (lane == 0 && (warp == 0 || warp == 2)) barrier_arrive(full + 8 * ring.stage);
    } else {
        take_registers<232>();
        const u32 math = warpgroup - 1, warp = threadIdx.x % 128 / 32;
        const u32 weights = matrix_descriptor_low(base + kBytesA);
        float* const exchange = reinterpret_cast<float*>(shared + kOffsetExchange) + threadIdx.x % 128;
        const u32 exchange_read = base + kOffsetExchangeRead;
        u32 exchange_parity = 1;  // nothing is there to be read yet

        while (true) {
            barrier_wait(full + 8 * ring.stage, ring.parity);
            const int4 tile = *reinterpret_cast<const int4*>(shared + kOffsetInfo + ring.stage * 16);
            const u32 rows = tile.y;
            if (rows == 0) break;
            const bool narrow = rows <= 64;
            const u32 warp_row = (narrow ? 0 : math * 64) + warp * 16, row_in_tile = warp_row + lane / 4;  // and 8 further down
            const u32 block_0 = tile.z, block_1 = n / kHalf + tile.z;
            float sum[2][64];
            const u32 scales_b = base + kOffsetScaleB, scale_of_1 = scales_b + (4 + block_1 % 4) * 4;
            auto operands_from = [&](u32 half) {
                const u32 of_rows = base + (warp_row + lane % 16) * kBlockK + (lane / 16 ^ lane % 8) * 16;
                const u32 scale_of_0 = half ? scale_of_1 : scales_b + block_0 % 4 * 4;
                return Operands{of_rows, weights + half * (kBytesHalf / 16), base + kOffsetScaleA + row_in_tile * 4, {scale_of_0, scale_of_1},
                                full, empty};
            };
            if (narrow) multiply_blocks<1, StageLayout>(sum, operands_from(math), ring, NUM_STAGES, k_blocks, lane);
            else multiply_blocks<2, StageLayout>(sum, operands_from(0), ring, NUM_STAGES, k_blocks, lane);
            const bool valid_low = row_in_tile < rows, valid_high = row_in_tile + 8 < rows;
            if (narrow) {
                if (math == 1) {
                    barrier_wait(exchange_read, exchange_parity);
                    exchange_parity ^= 1;
#pragma unroll
                    for (u32 i = 0; i < 64; ++i) exchange[i * 128] = sum[0][i];
                    named_barrier_arrive(3, 256);
                    continue;
                }
                named_barrier(3, 256);
#pragma unroll
                for (u32 i = 0; i < 64; ++i) sum[1][i] = load_shared(smem_address(exchange + i * 128));
                __syncwarp();
                if (arrives_for_warp(lane)) barrier_arrive_after(exchange_read, sum[1][63]);
            }
            const i64 row = tile.x + row_in_tile;
            u8* codes = out + row * n + tile.z * kHalf;
            float* scale = out_scale + static_cast<i64>(tile.z) * out_scale_stride + row;
            write_gated<0>(sum[0], sum[1], codes, scale, valid_low, lane);
            write_gated<1>(sum[0], sum[1], codes + 8ll * n, scale + 8, valid_high, lane);
        }
    }
}
