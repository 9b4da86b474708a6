// Attention of one new token of each request over the keys and values that a paged cache has of it, as a decode step needs it.
//
// A request's tokens are, for each key head, a row of tiles of 64 tokens. Units of as many tiles are dealt to CTAs: either units of one row each, so that nothing is cut
// that need not be, or all rows cut into as many units as there are CTAs, wherever that is; a launch takes what ends sooner. What a unit has of a row is a piece: a CTA
// computes it for the query heads that share the key head, at most kMostHeads. Its warps take slices of 16 tokens in turn, each with sums of its own, and meet at
// the end of a piece. Where a row has several pieces, the CTA that is the last to end one adds them up, in their order. All is computed in float32 but the weights of
// values, which are rounded to 16 bits.
//
// All but the newest token, which the kernel before this one writes, was there long ago: its tables, keys and values are read before that has ended. Slices of the next
// piece are on their way while this one is multiplied and added up.
//
// Products are of 16 tokens by 8 heads: scores of them, and then sums of 16 elements of values by 8 heads. A lane has 8 neighbours of a head in 16 bytes, of head lane / 4
// and of tokens lane / 4 and lane / 4 + 8 of a slice. Which product of the tensor core gets which pair of them is the same for queries and keys, so their order does
// not matter; weights and values are transposed between lanes, 8 x 8 at a time. A warp has a ring of slices of its own, each with a barrier that counts its bytes:
// whole rows of 16 tokens, as they lie in the cache, because memory is slower with as much asked for in smaller pieces (16 bytes a lane: 3.7 TB/s of 4.4).
#include "group.cuh"

constexpr u32 kHead = 128, kParts = kHead / 32;  // a lane has 8 neighbours of each part
constexpr u32 kWarps = 4, kSlice = 16, kTile = kWarps * kSlice;
constexpr u32 kMostHeads = 8, kType = ELEMENT_TYPE;  // chosen at run time it would have every product issued twice, once for nothing
constexpr u32 kStages = 3, kRowBytes = 2 * kHead * 2, kSliceBytes = kSlice * kRowBytes;  // of a warp: slices, of a token keys and values
constexpr u32 kSumsBytes = kMostHeads * kHead * 4;  // of a warp
constexpr float kSlack = 8.f;  // scores beyond the greatest one so far, as powers of two, below which that stays: float32 and weights of 16 bits have room
constexpr u32 kSizes = 4;  // of units of one row, among which is chosen
constexpr u32 kNear = 4;  // requests whose lengths a lane keeps
constexpr u32 kAdding = 3, kAddedATile = 8;  // to add up takes as long as so many tiles, and one for so many pieces (fitted: 32 x 8 and 32 x 4 heads, 130 to 8000 tokens)
constexpr u32 kHeads = kMostHeads / kWarps, kBatch = 16;  // that a warp adds up, and pieces whose sums it reads at once
constexpr u32 kPartialStride = kHead + 4;  // sums of a head of a piece, then their greatest score and their weight

// What a CTA computes at once: tokens [first, end) of the length that a request has, for a key head. slices: of this warp. parts: pieces of the row, the first one in
// the unit first_unit, each other one in the next.
struct Piece {
    u32 request, head, first, end, length, slices, first_unit, part, parts;
};

// queries: [m][query_heads][head], one token each query_stride. out: likewise. cache: keys and values of a token and a head side by side; token t of request r is row t % block of
// block table[r][t / block]; strides from a block, a row and a head to the next, all multiples of 8 elements. block: a multiple of 16. lengths: [m], tokens of each request
// with the new one; a request of none gets zeros. partial, counters: for pieces, at least 4 * grid + m * key_heads, and m * key_heads, which are zero before and
// after. codes: null, or those of out and their scales, a head a group, as quantize.cuh writes them with tile_rows. scale: of scores, and log2(e).
extern "C" __global__ void __launch_bounds__(kWarps * 32, 2)
attention(const u16* queries, const u16* cache, const u32* table, const u32* lengths, u16* out, float* partial, u32* counters, u8* codes,
          float* code_scales, i64 query_stride, i64 out_stride, i64 block_stride, i64 row_stride, i64 head_stride, i64 table_stride, u32 block, u32 m, u32 query_heads,
          u32 key_heads, u32 tile_rows, float scale) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = query_heads / key_heads, quad = lane % 4, row = lane / 4;
    const u32 of_warp = smem_address(shared) + warp * kStages * kSliceBytes;
    float* const merged = reinterpret_cast<float*>(shared + kWarps * kStages * kSliceBytes);
    float* const greatest = merged + kWarps * kSumsBytes / 4;  // of the heads of each warp
    float* const weights = greatest + kWarps * kMostHeads;
    u64* const barriers = reinterpret_cast<u64*>(weights + kWarps * kMostHeads);
    u32* const is_last = reinterpret_cast<u32*>(barriers + kWarps * kStages);
    const u32 full = smem_address(barriers) + warp * kStages * 8;  // of this warp's stages
    constexpr u32 kOfWarp = kSumsBytes / 4;  // between the sums of two warps
    const float nothing = __uint_as_float(0xff800000u);  // -infinity
    launch_next_kernel();
    if (lane < kStages) {
        barrier_init(full + lane * 8, 1);
        barrier_init_fence();
    }

    // Every warp finds its CTA's work by itself.
    auto add_over_warp = [](u32 value) {
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
        return value;
    };
    u32 near[kNear];  // tokens are three loads away, one behind the other: lengths, blocks, keys
#pragma unroll
    for (u32 i = 0; i < kNear; ++i) near[i] = i * 32 + lane < m ? __ldcg(lengths + i * 32 + lane) : 0;
    auto length_of = [&](u32 r) {  // of one of this lane's requests
        const u32 early = r < 32 ? near[0] : near[1], late = r < 96 ? near[2] : near[3];
        return r < 64 ? early : r < kNear * 32 ? late : __ldcg(lengths + r);
    };
    auto tiles_of = [&](u32 length) { return max(1u, ceil_div(length, kTile)); };
    u32 tiles = 0, longest = 0;
    for (u32 r = lane; r < m; r += 32) {
        const u32 own = tiles_of(length_of(r));
        tiles += own;
        longest = max(longest, own);
    }
    tiles = add_over_warp(tiles) * key_heads;
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, distance));
    // Cut anywhere, all end at once; but what is cut must be added up. Times are in tiles, as many as a CTA has behind each other.
    auto adding = [&](u32 size) { return kAdding + longest / size / kAddedATile; };
    const u32 least = max(1u, static_cast<u32>(sqrtf(static_cast<float>(longest) / kAddedATile) + 0.5f));  // the least sum of a unit and its adding
    const u32 most = max(least, ceil_div(tiles, gridDim.x)), uncut = ceil_div(m * key_heads, gridDim.x) * longest;
    u32 unit_tiles = most, total = tiles, shortest = most + adding(most);
    bool whole = uncut <= shortest;  // whether units are of one row each
    if (whole) {
        unit_tiles = longest;
        total = m * key_heads * longest;  // the last unit of a row counts as if it were full
    }
#pragma unroll 1
    for (u32 i = 1; !whole && i <= kSizes; ++i) {
        const u32 size = max(least, ceil_div(most, i));
        u32 units = 0;
        for (u32 r = lane; r < m; r += 32) units += ceil_div(tiles_of(length_of(r)), size);
        units = add_over_warp(units) * key_heads;
        whole = ceil_div(units, gridDim.x) * size + adding(size) <= shortest;
        if (!whole) continue;
        unit_tiles = size;
        total = units * size;
    }

    // Rows lie one behind the other, request by request. A window of 32 requests goes along: where it begins, and of this lane's request its length, its tiles, and
    // with those of the lanes before.
    u32 window = 0, before = 0, own_length, own, through;
    auto look = [&] {
        const bool exists = window + lane < m;
        own_length = exists ? length_of(window + lane) : 0;
        own = exists ? tiles_of(own_length) : 0;
        if (whole) own = ceil_div(own, unit_tiles) * unit_tiles;
        through = own;
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            const u32 more = __shfl_up_sync(0xffffffffu, through, distance);
            through += lane >= distance ? more : 0;
        }
    };
    look();
    u32 unit = blockIdx.x, at = unit * unit_tiles;
    // The next piece of this CTA, if there is one.
    auto find = [&](Piece& piece) {
        piece.slices = 0;
        if (at >= (unit + 1) * unit_tiles) {
            unit += gridDim.x;
            at = unit * unit_tiles;
        }
        if (at >= total) return false;
        u32 reached;
        while ((reached = __ballot_sync(0xffffffffu, before + through * key_heads > at)) == 0) {
            before += __shfl_sync(0xffffffffu, through, 31) * key_heads;
            window += 32;
            look();
        }
        const u32 found = __ffs(reached) - 1, of_row = __shfl_sync(0xffffffffu, own, found);
        const u32 of_request = at - before - __shfl_sync(0xffffffffu, through - own, found) * key_heads;
        piece.request = window + found;
        piece.length = __shfl_sync(0xffffffffu, own_length, found);
        piece.head = of_request / of_row;
        const u32 within = of_request % of_row, taken = min(of_row - within, (unit + 1) * unit_tiles - at);
        piece.first_unit = (at - within) / unit_tiles;
        piece.part = unit - piece.first_unit;
        piece.parts = (at - within + of_row - 1) / unit_tiles - piece.first_unit + 1;
        at += taken;
        const u32 alike = ceil_div(tiles_of(piece.length), piece.parts);  // units of a row are, rather than one of a tile
        piece.first = min(piece.length, (whole ? piece.part * alike : within) * kTile);
        piece.end = min(piece.length, piece.first + (whole ? alike : taken) * kTile);
        if (piece.end > piece.first + warp * kSlice) piece.slices = ceil_div(piece.end - piece.first - warp * kSlice, kTile);
        return true;
    };
    auto token_of = [&](const Piece& piece, u32 slice) { return piece.first + (slice * kWarps + warp) * kSlice; };
    auto blocks_of = [&](const Piece& piece, u32 slice) {  // lane l's: of the slice l behind this one
        return slice + lane < piece.slices ? __ldcg(table + piece.request * table_stride + token_of(piece, slice + lane) / block) : 0;
    };

    Piece now, next = {};
    if (!find(now)) return;
    u32 blocks = blocks_of(now, 0), next_blocks = 0;
    // Of the ring: where the next slice comes to, where the next one is read, how many of them are asked for or not free. asked: slices of this piece, and of the next one behind them.
    u32 ring_in = 0, ahead = 0, asked = 0;
    Ring ring_out;
    // Of the first token of a slice.
    auto place_in_cache = [&](u32 token, u32 head, u32 slice, u32 own_blocks) {
        const u32 of_block = __shfl_sync(0xffffffffu, own_blocks, slice % 32);
        return cache + of_block * block_stride + token % block * row_stride + head * head_stride;
    };
    // Ask for one slice after the other while the ring has room; of this piece tokens from `known` on are not there yet.
    auto fill = [&](u32 known) {
#pragma unroll 1
        while (ahead < kStages && asked < now.slices + next.slices) {
            const bool is_next = asked >= now.slices;
            const u32 slice = is_next ? asked - now.slices : asked;
            if (!is_next && slice > 0 && slice % 32 == 0) blocks = blocks_of(now, slice);
            const u32 token = is_next ? token_of(next, slice) : token_of(now, slice), until = is_next ? next.end : known;
            const u16* const from = place_in_cache(token, is_next ? next.head : now.head, slice, is_next ? next_blocks : blocks);
            const u32 tokens = min(kSlice, until - min(until, token));
            const u32 target = of_warp + ring_in * kSliceBytes, barrier = full + ring_in * 8;
            if (lane == 0) {
                if (tokens > 0) barrier_expect(barrier, tokens * kRowBytes);
                else barrier_arrive(barrier);
            }
            if (row_stride == 2 * kHead) {
                if (lane == 0 && tokens > 0) bulk_copy(target, from, tokens * kRowBytes, barrier);
            } else if (lane < tokens) {
                bulk_copy(target + lane * kRowBytes, from + lane * row_stride, kRowBytes, barrier);
            }
            if (tokens < kSlice) {  // values of no weight must be numbers all the same
                for (u32 t = tokens + lane / 16; t < kSlice; t += 2) store_shared_quad(target + t * kRowBytes + kHead * 2 + lane % 16 * 16, uint4{0, 0, 0, 0});
                fence_async_shared();  // before the next copy to here
                __syncwarp();
            }
            ring_in = ring_in + 1 == kStages ? 0 : ring_in + 1;
            ++asked;
            ++ahead;
        }
    };
    using Queries = u32[kParts][4];
    auto ask_for_queries = [&](const Piece& piece, Queries& target) {
        if (row >= group) return;
#pragma unroll
        for (u32 part = 0; part < kParts; ++part)
            load_fresh(queries + piece.request * query_stride + (piece.head * group + row) * kHead + part * 32 + quad * 8, target[part]);
    };
    Queries query = {}, next_query = {};

    __syncwarp();  // barriers are there
    fill(min(now.end, now.length - 1));
    bool has_next = find(next);
    next_blocks = blocks_of(next, 0);
    wait_for_previous_kernel();
    // The newest token: in which slice of which warp, and which of its tokens.
    const u32 newest = (now.end - 1 - now.first) / kSlice, t = (now.end - 1 - now.first) % kSlice;
    if (now.end == now.length && now.end > now.first && newest % kWarps == warp && newest / kWarps < kStages) {
        u32 words[4];
        load_fresh(place_in_cache(token_of(now, newest / kWarps), now.head, newest / kWarps, blocks) + t * row_stride + lane * 8, words);
        store_shared_quad(of_warp + newest / kWarps * kSliceBytes + t * kRowBytes + lane * 16, uint4{words[0], words[1], words[2], words[3]});
        fence_async_shared();
        __syncwarp();
    }
    ask_for_queries(now, query);

#pragma unroll 1
    while (true) {
        if (has_next) ask_for_queries(next, next_query);
        // Of heads quad * 2 and quad * 2 + 1; which elements sums are of, the end of a piece says.
        float best[2] = {nothing, nothing}, weight[2] = {}, sum[kParts][2][4] = {};
        u32 read = 0;  // whether a slice has been read whose place is not free yet
        if (ahead == 0) fill(now.end);
#pragma unroll 1
        for (u32 slice = 0; slice < now.slices; ++slice) {
            barrier_wait(full + ring_out.stage * 8, ring_out.parity);
            const u32 own_row = of_warp + ring_out.stage * kSliceBytes + row * kRowBytes + quad * 16;
            uint4 key[2][2];
            auto load_keys = [&](u32 part) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) key[part % 2][half] = load_shared_quad(own_row + half * 8 * kRowBytes + part * 64);
            };
            load_keys(0);
            load_keys(1);
            float score[4], product[2][4] = {};  // two chains of products
#pragma unroll
            for (u32 part = 0; part < kParts; ++part) {
                const uint4 &early = key[part % 2][0], &late = key[part % 2][1];
                const u32 low[4] = {early.x, late.x, early.y, late.y}, high[4] = {early.z, late.z, early.w, late.w};
                multiply_16(product[0], low, query[part][0], query[part][1], kType);
                multiply_16(product[1], high, query[part][2], query[part][3], kType);
                if (part + 2 < kParts) load_keys(part + 2);
            }
            bool greater = false;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                score[i] = token_of(now, slice) + row + i / 2 * 8 < now.end ? (product[0][i] + product[1][i]) * scale : nothing;
                greater |= score[i] > best[i % 2] + kSlack;
            }
            if (__ballot_sync(0xffffffffu, greater)) {
                float kept[2];
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    float most = max(best[i], max(score[i], score[2 + i]));
#pragma unroll
                    for (u32 distance = 4; distance < 32; distance *= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, distance));
                    kept[i] = power_of_two(best[i] - most);  // the first token of a slice exists, so `most` is finite
                    best[i] = most;
                    weight[i] *= kept[i];
                }
#pragma unroll
                for (u32 part = 0; part < kParts; ++part)
#pragma unroll
                    for (u32 i = 0; i < 8; ++i) sum[part][i / 4][i % 4] *= kept[i % 2];
            }
            // Loads of shared memory end in their order: with these scores the values of the slice before have come, and its place is free.
            ahead -= read;
            read = 1;
            fill(now.end);
            ring_out.advance(kStages);
            uint4 value[2][kParts];
#pragma unroll
            for (u32 part = 0; part < kParts; ++part)
#pragma unroll
                for (u32 half = 0; half < 2; ++half) value[half][part] = load_shared_quad(own_row + half * 8 * kRowBytes + kHead * 2 + part * 64);
            u32 rounded[2];  // weights of tokens quad * 2 and the next one, and of those 8 behind, for head `row`
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const float first = power_of_two(score[half * 2] - best[0]), second = power_of_two(score[half * 2 + 1] - best[1]);
                weight[0] += first;
                weight[1] += second;
                rounded[half] = transpose_pairs(pack_elements(first, second, kType));
            }
#pragma unroll
            for (u32 part = 0; part < kParts; ++part) {
                const uint4 &early = value[0][part], &late = value[1][part];
                const u32 low[4] = {transpose_pairs(early.x), transpose_pairs(early.y), transpose_pairs(late.x), transpose_pairs(late.y)};
                const u32 high[4] = {transpose_pairs(early.z), transpose_pairs(early.w), transpose_pairs(late.z), transpose_pairs(late.w)};
                multiply_16(sum[part][0], low, rounded[0], rounded[1], kType);
                multiply_16(sum[part][1], high, rounded[0], rounded[1], kType);
            }
        }

        auto add = [](float4& total, const float4& more, float factor) {
            total = {total.x + more.x * factor, total.y + more.y * factor, total.z + more.z * factor, total.w + more.w * factor};
        };
        auto factor_of = [&](float score, float most) { return score == nothing ? 0.f : power_of_two(score - most); };
        // A lane has four neighbours of a head.
        auto write = [&](u32 h, const float4& total, float of_all) {
            const float factor = of_all > 0.f ? __fdiv_rn(1.f, of_all) : 0.f;
            const u32 of_query = now.head * group + h;
            const uint2 rounded = {pack_elements(total.x * factor, total.y * factor, kType), pack_elements(total.z * factor, total.w * factor, kType)};
            *reinterpret_cast<uint2*>(out + now.request * out_stride + of_query * kHead + lane * 4) = rounded;
            if (codes == nullptr) return;
            const float value[4] = {low_element(rounded.x, kType), high_element(rounded.x, kType), low_element(rounded.y, kType), high_element(rounded.y, kType)};
            float largest = kMinAmax;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(value[i]));
#pragma unroll
            for (u32 distance = 16; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
            *reinterpret_cast<u32*>(codes + code_place(now.request, of_query, lane / 2, query_heads, tile_rows) + lane % 2 * 4) =
                code_word(value[0], value[1], value[2], value[3], group_inverse(largest));
            if (lane == 0) code_scales[static_cast<i64>(of_query) * (ceil_div(m, 4u) * 4) + now.request] = group_scale(largest);
        };
        // Of units of several rows only the first and the last piece may be cut: the last one of a unit is the first of its row.
        auto partial_of = [&](u32 part) {
            const u32 of_part = now.first_unit + part;
            return partial + static_cast<i64>(whole ? of_part : of_part * 2 + (part == 0)) * group * kPartialStride;
        };
        // The warps' sums of each head, by their greatest scores; a warp adds up a head.
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
#pragma unroll
            for (u32 distance = 4; distance < 32; distance *= 2) weight[i] += __shfl_xor_sync(0xffffffffu, weight[i], distance);
            if (row == 0) {
                greatest[warp * kMostHeads + quad * 2 + i] = best[i];
                weights[warp * kMostHeads + quad * 2 + i] = weight[i];
            }
        }
        // Rows of transposed pairs are the elements of a part: two neighbours of 8, of each quad. Pairs of them change places so that no two lanes meet in a bank.
#pragma unroll
        for (u32 part = 0; part < kParts; ++part)
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                const u32 element = part * 32 + row / 2 * 8 + (i / 4 * 2 + i % 4 / 2) * 2 + row % 2;
                merged[warp * kOfWarp + (quad * 2 + i % 2) * kHead + (element ^ quad * 2)] = sum[part][i / 4][i % 4];
            }
        __syncthreads();
        ahead -= read;  // the last values have become sums
        fill(now.end);
        for (u32 h = warp; h < group; h += kWarps) {
            float most = nothing, of_all = 0.f;
            float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (u32 w = 0; w < kWarps; ++w) most = max(most, greatest[w * kMostHeads + h]);
#pragma unroll
            for (u32 w = 0; w < kWarps; ++w) {
                const float factor = factor_of(greatest[w * kMostHeads + h], most);
                of_all += weights[w * kMostHeads + h] * factor;
                const float4 own = *reinterpret_cast<const float4*>(merged + w * kOfWarp + h * kHead + (lane ^ h / 4) * 4);
                const bool turned = h / 2 % 2;
                add(total, {turned ? own.z : own.x, turned ? own.w : own.y, turned ? own.x : own.z, turned ? own.y : own.w}, factor);
            }
            if (now.parts == 1) {
                write(h, total, of_all);
                continue;
            }
            float* const own_partial = partial_of(now.part) + h * kPartialStride;
            *reinterpret_cast<float4*>(own_partial + lane * 4) = total;
            if (lane == 0) *reinterpret_cast<float2*>(own_partial + kHead) = float2{most, of_all};
        }
        __syncthreads();  // sums have been read, and parts are written
        if (now.parts > 1) {
            if (threadIdx.x == 0) {
                u32* const counter = counters + now.request * key_heads + now.head;
                is_last[0] = count_in_turn(counter) == now.parts - 1;
                if (is_last[0]) *counter = 0;  // for the next launch
            }
            __syncthreads();
            if (is_last[0]) {
                // Lane l has greatest score and weight of piece l of a batch, and four neighbours of each head's sums.
                float most[kHeads], of_all[kHeads] = {};
                float4 total[kHeads] = {};
#pragma unroll
                for (u32 i = 0; i < kHeads; ++i) most[i] = nothing;
#pragma unroll 1
                for (u32 c = 0; c < now.parts; c += kBatch) {
                    float4 part[kHeads][kBatch];
                    float2 of_part[kHeads];
#pragma unroll
                    for (u32 i = 0; i < kHeads; ++i) {
                        const u32 h = min(i * kWarps + warp, group - 1), count = min(kBatch, now.parts - c);  // no branch: registers would not do
                        of_part[i] = __ldcg(reinterpret_cast<const float2*>(partial_of(c + min(lane, count - 1)) + h * kPartialStride + kHead));
                        if (lane >= count) of_part[i] = float2{nothing, 0.f};
#pragma unroll
                        for (u32 l = 0; l < kBatch; ++l)
                            part[i][l] = __ldcg(reinterpret_cast<const float4*>(partial_of(c + min(l, count - 1)) + h * kPartialStride) + lane);
                    }
#pragma unroll
                    for (u32 i = 0; i < kHeads; ++i) {
                        const float before = most[i];
                        most[i] = max(before, of_part[i].x);
#pragma unroll
                        for (u32 distance = 16; distance > 0; distance /= 2) most[i] = max(most[i], __shfl_xor_sync(0xffffffffu, most[i], distance));
                        const float kept = factor_of(before, most[i]), factor = factor_of(of_part[i].x, most[i]);
                        of_all[i] *= kept;
                        total[i] = {total[i].x * kept, total[i].y * kept, total[i].z * kept, total[i].w * kept};
#pragma unroll
                        for (u32 l = 0; l < kBatch; ++l) {
                            const float own = __shfl_sync(0xffffffffu, factor, l);
                            of_all[i] += __shfl_sync(0xffffffffu, of_part[i].y, l) * own;
                            add(total[i], part[i][l], own);
                        }
                    }
                }
#pragma unroll
                for (u32 i = 0; i < kHeads; ++i)
                    if (i * kWarps + warp < group) write(i * kWarps + warp, total[i], of_all[i]);
            }
            __syncthreads();  // is_last has been read
        }
        if (!has_next) return;
        asked -= now.slices;
        now = next;
        blocks = next_blocks;
        has_next = find(next);
        next_blocks = blocks_of(next, 0);
#pragma unroll
        for (u32 part = 0; part < kParts; ++part)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) query[part][i] = next_query[part][i];
    }
}
