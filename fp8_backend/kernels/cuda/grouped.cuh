// Grouped FP8 GEMM over rows sorted by expert (route.cuh): out[i] = a[source(i)] . w[expert(i)]^T with block scales.
//
// GATED = 1: first GEMM of the experts. A tile is 128 rows x (128 gate + the 128 up columns that belong to them); the epilogue computes
//            silu(gate) * up and quantises it, a group of 128 columns a row. Rows are gathered by token, written in sorted order.
// GATED = 0: plain tile of 128 rows x 256 columns; rows lie in sorted order, the copy engine fetches them, and they are written to their entry.
//
// Persistent CTAs take tiles by tickets. Warp roles:
//   warpgroup 0     producer. All 128 threads fetch scales of rows; lane 0 of warp 0 fetches weights, of warp 2 their scales, and it says what the
//                   tile is. GATED: all threads gather rows of a, 16 bytes a copy (cp.async, swizzled here); otherwise lane 0 of warp 1 fetches them.
//   warpgroups 1, 2 math (promotion.cuh). Wide tiles (more than 64 rows): each owns 64 rows, so that gate and up of an element meet in one
//                   thread. Narrow ones: both own the same 64 rows, each one half of the columns; the up half crosses through `exchange`.
// Barriers per stage: full (128 threads whose copies have landed, 2 or 3 lanes + bytes), empty (one arrival a math warp). A stage of no rows ends
// the walk. Per ticket: full (who drew it), empty (a lane of each producer warp). Exchange: read (one arrival a warp of warpgroup 1; not a named
// barrier, whose arrival does not wait for loads under way). Named barriers: 3 exchange written; 5 row table free, row table written.
#include "group.cuh"
#include "promotion.cuh"
#include "tiles.cuh"

constexpr u32 kTileRows = 128, kHalf = 128;
constexpr u32 kBytesA = kTileRows * kBlockK, kBytesHalf = kHalf * kBlockK;
constexpr u32 kStageBytes = kBytesA + 2 * kBytesHalf;
constexpr u32 kExchangeBytes = GATED ? 64 * 128 * 4 : 0;
constexpr u32 kFullArrivals = 128 + 2 + !GATED, kEmptyArrivals = 8 * kArrivalsOfWarp;
#if !GATED
constexpr u32 kBoxRows = kTileRows / 2;  // a narrow tile fetches one box of rows, a wide one two
#endif
constexpr u32 kTickets = 2;

DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// silu(gate) * up of one row, which a quad holds (32 columns a lane, those at index 4j + 2 * kRowHalf), to codes and their scale.
template <u32 kRowHalf>
DEVICE void write_gated(const float (&gate)[64], const float (&up)[64], u8* codes, float* scale, bool valid, u32 lane) {
    float value[32];
    float largest = kMinAmax;
#pragma unroll
    for (u32 i = 0; i < 32; ++i) {
        const u32 source = i / 2 * 4 + kRowHalf * 2 + i % 2;
        value[i] = silu(gate[source]) * up[source];
        largest = fmaxf(largest, fabsf(value[i]));
    }
    largest = quad_max(largest);
    const float inverse = group_inverse(largest);
    // Column group j (8 columns) gives this lane 2 codes; even and odd groups are the halves of a word.
    u32 words[2][4];
#pragma unroll
    for (u32 g = 0; g < 4; ++g)
#pragma unroll
        for (u32 w = 0; w < 2; ++w) {
            const float* v = value + (g * 4 + w * 2) * 2;
            words[w][g] = code_word(v[0], v[1], v[2], v[3], inverse);
        }
#pragma unroll
    for (u32 w = 0; w < 2; ++w) {
        transpose_quad(words[w], lane);
        const u32* p = words[w];
        const uint4 bytes = make_uint4(__byte_perm(p[0], p[1], 0x5410), __byte_perm(p[2], p[3], 0x5410), __byte_perm(p[0], p[1], 0x7632),
                                       __byte_perm(p[2], p[3], 0x7632));
        if (valid) *reinterpret_cast<uint4*>(codes + lane % 4 * 32 + w * 16) = bytes;
    }
    if (valid && lane % 4 == 0) *scale = group_scale(largest);
}

// Fetches two blocks of 128 rows of the weight, as far as there are so many, from a k-block counted over all groups.
DEVICE void fetch_weight(const u8* weight, u32 k_block, u32 block_0, u32 block_1, u32 n_aligned, u32 bar, u32 target) {
    auto bytes_of = [&](u32 block) { return block * kHalf < n_aligned ? min(kHalf, n_aligned - block * kHalf) * kBlockK : 0; };
    barrier_expect(bar, bytes_of(block_0) + bytes_of(block_1));
    const u8* const source = weight + static_cast<i64>(k_block) * n_aligned * kBlockK;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 block = half ? block_1 : block_0, bytes = bytes_of(block);
        if (bytes) bulk_copy(target + half * kBytesHalf, source + block * (kHalf * kBlockK), bytes, bar);
    }
}

struct StageLayout {
    static constexpr u32 kRows = kStageBytes, kWeight = kStageBytes, kScaleA = kTileRows * 4, kScaleB = 32;
};

// map_a: of a, for the plain form. a: codes, a row every a_stride bytes, and scale_a [k_blocks][scale_a_stride]; GATED: row of entry e is
// e / divisor. sorted: entries in sorted order, or null if they are so already. weight: [group][k_blocks][n_aligned][128] packed, scale_b [group][k_blocks][scale_b_stride]. n: columns of the output;
// GATED: half the rows of the weight. run: neighbouring column tiles a ticket covers.
// early: what is asked for before the previous kernel has ended. GATED: weights of so many groups, which are likely to have rows; plain: if not 0, weights of
// tiles that a kernel before the previous one has listed. out: GATED codes [rows][n], else elements of `type`, a row every out_stride elements.
extern "C" __global__ void __launch_bounds__(384, 1)
grouped(const __grid_constant__ TensorMap map_a, const u8* a, const float* scale_a, const u8* weight, const float* scale_b, void* out, float* out_scale, const u32* sorted,
        const int4* tile_list, const u32* num_row_tiles, u32* ticket, i64 a_stride, i64 out_stride, u32 divisor, u32 n, u32 n_aligned,
        u32 k_blocks, u32 scale_a_stride, u32 scale_b_stride, u32 out_scale_stride, u32 run, u32 early, u32 type, u32 vectorised) {
    extern __shared__ __align__(1024) u8 shared[];
    constexpr u32 kOffsetExchange = NUM_STAGES * kStageBytes, kOffsetScaleA = kOffsetExchange + kExchangeBytes;
    constexpr u32 kOffsetScaleB = kOffsetScaleA + NUM_STAGES * kTileRows * 4, kOffsetInfo = kOffsetScaleB + NUM_STAGES * 32;
    constexpr u32 kOffsetFull = kOffsetInfo + NUM_STAGES * 16, kOffsetEmpty = kOffsetFull + NUM_STAGES * 8;
    constexpr u32 kOffsetTicketFull = kOffsetEmpty + NUM_STAGES * 8, kOffsetTicket = kOffsetTicketFull + kTickets * 16;
#if GATED
    constexpr u32 kOffsetExchangeRead = kOffsetTicket + kTickets * 16, kOffsetRows = kOffsetExchangeRead + 16;
#endif
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
#if GATED
        barrier_init(base + kOffsetExchangeRead, 4 * kArrivalsOfWarp);
#endif
        barrier_init_fence();
    }
    __syncthreads();
    launch_next_kernel();
    Ring ring;

    if (warpgroup == 0) {
        give_registers<GATED ? 40 : 56>();
        const u32 warp = threadIdx.x / 32;
        const u32 column_tiles = ceil_div(n, GATED ? kHalf : 2 * kHalf), runs = ceil_div(column_tiles, run);
#if GATED
        if (threadIdx.x == 0 && blockIdx.x / runs < early) {  // the first tile of this CTA, had every expert one tile
            const u32 column = blockIdx.x % runs * run;
            for (u32 kb = 0; kb < min(k_blocks, u32(NUM_STAGES)); ++kb)
                for (u32 half = 0; half < 2; ++half) {
                    const i64 row = (static_cast<i64>(blockIdx.x / runs) * k_blocks + kb) * n_aligned + column * kHalf + half * n;
                    prefetch_l2(weight + row * kBlockK, kBytesHalf);
                }
        }
        wait_for_previous_kernel();
#else
        u32 fetched = 0;  // k-blocks of weights that have been asked for ahead
        if (early && threadIdx.x == 0 && blockIdx.x < __ldcg(num_row_tiles) * runs) {
            const Item item = item_at(blockIdx.x, tile_list, runs);
            fetched = min(k_blocks, u32(NUM_STAGES));
            for (u32 s = 0; s < fetched; ++s)
                fetch_weight(weight, item.tile.x * k_blocks + s, 2 * item.run * run, 2 * item.run * run + 1, n_aligned, full + 8 * s, base + s * kStageBytes + kBytesA);
        }
        wait_for_previous_kernel();
#endif
        const u32 num_items = __ldcg(num_row_tiles) * runs;
#if GATED
        const u32 chunk = threadIdx.x % 8, first = threadIdx.x / 8;
        const u32 row_chunks = static_cast<u32>(a_stride / 16), target = first * kBlockK + (chunk ^ first % 8) * 16;  // all of its rows have the same row % 8
        u32* row_table = reinterpret_cast<u32*>(shared + kOffsetRows);  // in units of 16 bytes
#endif
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
#if GATED
            if (threadIdx.x < rows) source_row = __ldcg(sorted + source_row) / divisor;
            __syncwarp();
            named_barrier(5, 128);  // the last tile's rows have been copied
            row_table[threadIdx.x % 16 * 8 + threadIdx.x / 16] = source_row * row_chunks;
            named_barrier(5, 128);
#endif
            const float* scale_source = scale_a + source_row;
            for (u32 column_tile = first_column; column_tile < past_column; ++column_tile) {
                const u32 block_0 = GATED ? column_tile : 2 * column_tile, block_1 = GATED ? n / kHalf + column_tile : block_0 + 1;
                const float* scale_b_source = scale_b + static_cast<i64>(tile.x) * k_blocks * scale_b_stride;
                for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(NUM_STAGES)) {
                    const u32 s = ring.stage, bar = full + 8 * s, stage = base + s * kStageBytes;
                    barrier_wait(empty + 8 * s, ring.parity ^ 1);
                    if (lane == 0 && warp == 0) {
#if !GATED
                        if (fetched > 0) --fetched;
                        else
#endif
                            fetch_weight(weight, tile.x * k_blocks + kb, block_0, block_1, n_aligned, bar, stage + kBytesA);
                    } else if (lane == 0 && warp == 2) {
                        *reinterpret_cast<int4*>(shared + kOffsetInfo + s * 16) = make_int4(tile.y, rows, column_tile, 0);
                        const u32 scales = base + kOffsetScaleB + s * 32;
                        barrier_expect(bar, 32);
                        bulk_copy(scales, scale_b_source + (block_0 & ~3u), 16, bar);
                        bulk_copy(scales + 16, scale_b_source + (block_1 & ~3u), 16, bar);
                        scale_b_source += scale_b_stride;
                    }
#if !GATED
                    if (lane == 0 && warp == 1) {
                        barrier_expect(bar, ceil_div(rows, kBoxRows) * kBoxRows * kBlockK);
                        tensor_copy(stage, &map_a, 0, tile.y, kb, bar);
                        if (rows > kBoxRows) tensor_copy(stage + kBoxRows * kBlockK, &map_a, 0, tile.y + kBoxRows, kb, bar);
                    }
#else
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
#endif
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
        if (lane == 0 && (warp == 0 || warp == 2 || (!GATED && warp == 1))) barrier_arrive(full + 8 * ring.stage);
    } else {
        take_registers<GATED ? 232 : 224>();
        const u32 math = warpgroup - 1, warp = threadIdx.x % 128 / 32;
        const u32 weights = matrix_descriptor_low(base + kBytesA);
#if GATED
        float* const exchange = reinterpret_cast<float*>(shared + kOffsetExchange) + threadIdx.x % 128;
        const u32 exchange_read = base + kOffsetExchangeRead;
        u32 exchange_parity = 1;  // nothing is there to be read yet
#endif

        while (true) {
            barrier_wait(full + 8 * ring.stage, ring.parity);
            const int4 tile = *reinterpret_cast<const int4*>(shared + kOffsetInfo + ring.stage * 16);
            const u32 rows = tile.y;
            if (rows == 0) break;
            const bool narrow = rows <= 64;
            const u32 warp_row = (narrow ? 0 : math * 64) + warp * 16, row_in_tile = warp_row + lane / 4;  // and 8 further down
            const u32 block_0 = GATED ? tile.z : 2 * tile.z, block_1 = GATED ? n / kHalf + tile.z : block_0 + 1;
#if !GATED
            const u32 first_half = narrow ? math : 0;
            u32 entry[2] = {0, 0};
#pragma unroll
            for (u32 half = 0; half < 2; ++half)
                if (row_in_tile + half * 8 < rows) {
                    const u32 place = tile.x + row_in_tile + half * 8;
                    entry[half] = sorted ? __ldcg(sorted + place) : place;
                }
#endif
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
#if GATED
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
            u8* codes = static_cast<u8*>(out) + row * n + tile.z * kHalf;
            float* scale = out_scale + static_cast<i64>(tile.z) * out_scale_stride + row;
            write_gated<0>(sum[0], sum[1], codes, scale, valid_low, lane);
            write_gated<1>(sum[0], sum[1], codes + 8ll * n, scale + 8, valid_high, lane);
#else
            const u32 element = type == kF32 ? 4 : 2;
            u8* row_low = static_cast<u8*>(out) + entry[0] * out_stride * element;
            u8* row_high = static_cast<u8*>(out) + entry[1] * out_stride * element;
            const u32 column = (2 * tile.z + first_half) * kHalf;
            write_row<0>(sum[0], row_low, column, n, type, vectorised, valid_low, lane);
            write_row<1>(sum[0], row_high, column, n, type, vectorised, valid_high, lane);
            if (!narrow) {
                write_row<0>(sum[1], row_low, column + kHalf, n, type, vectorised, valid_low, lane);
                write_row<1>(sum[1], row_high, column + kHalf, n, type, vectorised, valid_high, lane);
            }
#endif
        }
    }
}
