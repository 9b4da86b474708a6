// Attention of one new token of each request over the keys and values that a paged cache has of it, as a decode step needs it.
//
// A request's tokens are cut into chunks so that all CTAs have work: a CTA takes a chunk for one key head and the query heads that share it, at most 8 * kHalves.
// Its warps take slices of 16 tokens in turn, each with sums of its own, and meet at the end of a chunk. Where a request has several chunks, the CTA that is the last
// to end one adds them up, in their order. All is computed in float32 but the weights of values, which are rounded to 16 bits.
//
// All but the newest token, which the kernel before this one writes, was there long ago: its tables, keys and values are read before that has ended. With kJoined
// that is the linear that gives queries, keys and values: what norm_rope.cuh does with them is done here, by the warps that need it, and one of them writes the
// newest token to the cache.
//
// A lane has 8 neighbours of a head in 16 bytes: of query heads lane / 4 and lane / 4 + 8 and of token lane / 4 of half a slice. Which product of the tensor core
// gets which pair of them is the same for queries and keys, so their order does not matter. Values are transposed between lanes, 8 x 8 at a time. A warp copies
// slices to a ring of its own in shared memory, in the order in which lanes read them, without barriers.
#include "group.cuh"

constexpr u32 kHead = 128, kParts = kHead / 32;  // a lane has 8 neighbours of each part
constexpr u32 kWarps = 4, kSlice = 16, kTile = kWarps * kSlice;
constexpr bool kJoined = JOINED;
constexpr u32 kHalves = GROUP_HALVES, kMostHeads = 8 * kHalves;
constexpr u32 kStages = 3, kLanesBytes = 32 * 16, kSliceBytes = 2 * 2 * kParts * kLanesBytes;  // of a warp: slices, each of keys and values
constexpr u32 kSizes = 4;  // of chunks, among which is chosen
constexpr u32 kMerged = kWarps * kMostHeads;
static_assert(kMostHeads * kHead * 4 <= kStages * kSliceBytes);  // a warp's sums, where its slices were
// A quarter of a head, as a lane of a quad has it: 8 neighbours of each part.
struct Quarter {
    u32 words[kParts][4];

    DEVICE void load(const u16* quarter) {
#pragma unroll
        for (u32 part = 0; part < kParts; ++part) load_fresh(quarter + part * 32, words[part]);
    }
    // RMSNorm of the head and its rotation, as norm_rope.cuh: the cosines are in the first two parts of angles, the sines in the others. By whole warps.
    DEVICE void normalise_and_rotate(const Quarter& weight, const Quarter& angles, float epsilon, u32 type) {
        auto low = [&](u32 pair) { return type == kBf16 ? low_bf16(pair) : low_f16(pair); };
        auto high = [&](u32 pair) { return type == kBf16 ? high_bf16(pair) : high_f16(pair); };
        float sum = 0.f;
#pragma unroll
        for (u32 part = 0; part < kParts; ++part)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) sum += low(words[part][i]) * low(words[part][i]) + high(words[part][i]) * high(words[part][i]);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float factor = __fdiv_rn(1.f, sqrtf(sum / kHead + epsilon));
#pragma unroll
        for (u32 part = 0; part < kParts / 2; ++part)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                u32 &first = words[part][i], &second = words[part + kParts / 2][i];
                const u32 of_first = weight.words[part][i], of_second = weight.words[part + kParts / 2][i];
                const u32 cosines = angles.words[part][i], sines = angles.words[part + kParts / 2][i];
                const float a[2] = {low(first) * factor * low(of_first), high(first) * factor * high(of_first)};
                const float b[2] = {low(second) * factor * low(of_second), high(second) * factor * high(of_second)};
                first = pack_elements(a[0] * low(cosines) - b[0] * low(sines), a[1] * high(cosines) - b[1] * high(sines), type);
                second = pack_elements(b[0] * low(cosines) + a[0] * low(sines), b[1] * high(cosines) + a[1] * high(sines), type);
            }
    }
};

constexpr u32 kPartialStride = kHead + 4;  // sums of a head of a chunk, then their greatest score and their weight

// queries: [m][query_heads][head], one token each query_stride; with kJoined raw, key_heads of raw keys and as many of values behind them in the same row. out:
// likewise. keys, values: of the cache; token t of request r is row t % block of block table[r][t / block]; strides from a block, a row and a head to the next, all
// multiples of 8 elements. block: a multiple of 16. lengths: [m], tokens of each request with the new one; a request of none gets zeros. partial, counters: for
// chunks, at least 4 * grid + m * key_heads, and m * key_heads, which are zero before and after. codes: null, or those of out and their scales, a head a group, as
// quantize.cuh writes them with tile_rows. least_tiles: tiles of 64 tokens below which nothing is cut. scale: of scores, and log2(e).
// With kJoined all is bfloat16, and positions: [m]. slots: [m], where in the cache the newest tokens go, as in norm_rope.cuh; below 0: nowhere. query_weight, key_weight: [head]. cosines: a row of head elements for each position, cosines first.
extern "C" __global__ void __launch_bounds__(kWarps * 32, 2)
attention(const u16* queries, u16* keys, u16* values, const u32* table, const u32* lengths, u16* out, float* partial, u32* counters, u8* codes, float* code_scales,
          const i64* positions, const i64* slots, const u16* query_weight, const u16* key_weight, const u16* cosines, i64 query_stride, i64 out_stride, i64 block_stride, i64 row_stride, i64 head_stride, i64 table_stride, u32 block, u32 m, u32 query_heads, u32 key_heads, u32 least_tiles,
          u32 any_type, u32 tile_rows, float scale, float epsilon) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ float greatest[kMerged], weights[kMerged];
    __shared__ u32 is_last[1];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = query_heads / key_heads, quad = lane % 4, row = lane / 4;
    const u32 of_warp = smem_address(shared) + warp * kStages * kSliceBytes;
    float4* const merged = reinterpret_cast<float4*>(shared);
    constexpr u32 kOfWarp = kStages * kSliceBytes / 16;  // between the sums of two warps
    const u32 type = kJoined ? u32(kBf16) : any_type;  // half of the code
    const float nothing = __uint_as_float(0xff800000u);  // -infinity
    launch_next_kernel();

    // Every warp finds its CTA's work by itself. Chunks are as long as makes the rounds of all CTAs shortest: the smaller, the less idle is the last one.
    auto add_over_warp = [](u32 value) {
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
        return value;
    };
    const u32 first_length = lane < m ? __ldcg(lengths + lane) : 0;  // tokens are three loads away, one behind the other
    auto length_of = [&](u32 r) { return r < 32 ? first_length : __ldcg(lengths + r); };  // of this lane's requests
    u32 tiles = 0;
    for (u32 r = lane; r < m; r += 32) tiles += ceil_div(length_of(r), kTile);
    tiles = add_over_warp(tiles) * key_heads;
    u32 chunk_tiles = max(least_tiles, ceil_div(tiles, gridDim.x));
    const u32 most_tiles = chunk_tiles;
    u32 shortest = 0xffffffffu;
#pragma unroll 1
    for (u32 i = 1; i <= (most_tiles > least_tiles ? kSizes : 0); ++i) {
        const u32 size = max(least_tiles, ceil_div(most_tiles, i));
        u32 chunks = 0;
        for (u32 r = lane; r < m; r += 32) chunks += ceil_div(ceil_div(length_of(r), kTile), size);
        const u32 rounds = ceil_div(add_over_warp(chunks) * key_heads, gridDim.x);
        if (rounds * size >= shortest) continue;
        shortest = rounds * size;
        chunk_tiles = size;
    }

    bool waits = true;
    for (u32 item = blockIdx.x;; item += gridDim.x) {
        // The request whose chunk this is: chunks of a key head are numbered through all requests.
        const u32 head = item % key_heads, wanted = item / key_heads;
        u32 request = 0, before = 0, length = 0, chunks = 0;
        for (;; request += 32) {
            if (request >= m) return;
            const u32 own_length = request + lane < m ? length_of(request + lane) : 0;
            const u32 own = request + lane < m ? max(1u, ceil_div(ceil_div(own_length, kTile), chunk_tiles)) : 0;
            u32 through = own;
#pragma unroll
            for (u32 distance = 1; distance < 32; distance *= 2) {
                const u32 more = __shfl_up_sync(0xffffffffu, through, distance);
                through += lane >= distance ? more : 0;
            }
            const u32 reached = __ballot_sync(0xffffffffu, before + through > wanted);
            if (reached == 0) {
                before += __shfl_sync(0xffffffffu, through, 31);
                continue;
            }
            const u32 found = __ffs(reached) - 1;
            before += __shfl_sync(0xffffffffu, through - own, found);
            chunks = __shfl_sync(0xffffffffu, own, found);
            length = __shfl_sync(0xffffffffu, own_length, found);
            request += found;
            break;
        }
        const u32 own_tiles = ceil_div(ceil_div(length, kTile), chunks);  // chunks of a request are alike
        const u32 first = min(length, (wanted - before) * own_tiles * kTile), end = min(length, first + own_tiles * kTile);
        const u32 slices = end > first + warp * kSlice ? ceil_div(end - first - warp * kSlice, kTile) : 0;  // of this warp
        const u32* const blocks = table + request * table_stride;
        u32 own_blocks = 0;  // lane l's: of slice l of 32

        // Where the 16 bytes of a half of a slice's keys lie that lane 0 reads, those of the next lane behind them, and behind all of these the values.
        auto place_of = [&](u32 slice, u32 half, u32 part) { return of_warp + slice % kStages * kSliceBytes + (half * kParts + part) * 2 * kLanesBytes; };
        // Half a warp has a token: two lines of keys and two of values. from: of the slice's first token.
        auto copy_token = [&](u32 slice, u32 t, i64 from, bool exists) {
            const u32 target = place_of(slice, t / 8, lane % 16 / 4) + (t % 8 * 4 + lane % 4) * 16;
            if (exists) {
                copy_16_async(target, keys + from + t * row_stride);
                copy_16_async(target + kLanesBytes, values + from + t * row_stride);
            } else {
                store_shared_quad(target, uint4{0, 0, 0, 0});
                store_shared_quad(target + kLanesBytes, uint4{0, 0, 0, 0});
            }
        };
        auto place_of_slice = [&](u32 slice) {
            const u32 token = first + (slice * kWarps + warp) * kSlice, of_block = __shfl_sync(0xffffffffu, own_blocks, slice % 32);
            return of_block * block_stride + token % block * row_stride + head * head_stride + lane % 16 * 8;
        };
        // One slice behind the other; tokens from `known` on are zeros.
        auto load = [&](u32 slice, u32 known) {
            if (slice >= slices) return;
            if (slice % 32 == 0 && slice + lane < slices) own_blocks = __ldcg(blocks + (first + ((slice + lane) * kWarps + warp) * kSlice) / block);
            const i64 from = place_of_slice(slice);
#pragma unroll 2
            for (u32 t = lane / 16; t < kSlice; t += 2) {
                copy_token(slice, t, from, first + (slice * kWarps + warp) * kSlice + t < known);
            }
        };
        // Where the newest token is: in which slice of which warp, and which of its tokens.
        const u32 newest = (end - 1 - first) / kSlice, newest_slice = newest / kWarps, t = (end - 1 - first) % kSlice;
        const bool has_newest = end == length && end > first && newest % kWarps == warp;
        const u32 known = kJoined || waits ? min(end, length - 1) : end;
#pragma unroll 1
        for (u32 i = 0; i < kStages; ++i) {
            load(i, known);
            commit_copies();
        }
        Quarter angles, of_queries, of_keys;
        i64 slot = -1;
        if (kJoined) {
            slot = __ldcg(slots + request);
            angles.load(cosines + __ldcg(positions + request) * kHead + quad * 8);
            of_queries.load(query_weight + quad * 8);
            of_keys.load(key_weight + quad * 8);
        }
        if (waits) wait_for_previous_kernel();
        if (!kJoined && waits) {
            if (has_newest && newest_slice < kStages) {
                const i64 from = place_of_slice(newest_slice);
                if (t % 2 == lane / 16) copy_token(newest_slice, t, from, true);
            }
            commit_copies();
        }
        Quarter query[kHalves] = {}, newest_key, newest_value;
        const u16* const own_row = queries + request * query_stride + quad * 8;
#pragma unroll
        for (u32 h = 0; h < kHalves; ++h)
            if (row + h * 8 < group) query[h].load(own_row + (head * group + row + h * 8) * kHead);
        if (kJoined) {
            if (has_newest) {
                newest_key.load(own_row + (query_heads + head) * kHead);
                newest_value.load(own_row + (query_heads + key_heads + head) * kHead);
                newest_key.normalise_and_rotate(of_keys, angles, epsilon, type);
            }
#pragma unroll
            for (u32 h = 0; h < kHalves; ++h) query[h].normalise_and_rotate(of_queries, angles, epsilon, type);
        }
        if (!kJoined && waits) wait_for_copies<0>();
        waits = false;

        float best[kHalves], weight[kHalves] = {}, sum[kHalves][kParts][8] = {};
#pragma unroll
        for (u32 h = 0; h < kHalves; ++h) best[h] = nothing;
        auto attend = [&](u32 slice) {
            float score[2][4] = {};
#pragma unroll
            for (u32 part = 0; part < kParts; ++part)
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const uint4 columns = load_shared_quad(place_of(slice, half, part) + lane * 16);
                    const u32 low[4] = {query[0].words[part][0], kHalves == 2 ? query[kHalves - 1].words[part][0] : 0, query[0].words[part][1], kHalves == 2 ? query[kHalves - 1].words[part][1] : 0};
                    const u32 high[4] = {query[0].words[part][2], kHalves == 2 ? query[kHalves - 1].words[part][2] : 0, query[0].words[part][3], kHalves == 2 ? query[kHalves - 1].words[part][3] : 0};
                    multiply_16(score[half], low, columns.x, columns.y, type);
                    multiply_16(score[half], high, columns.z, columns.w, type);
                }
            u32 rounded[2][2] = {};  // weights of this slice's values: half of the slice, half of the heads
#pragma unroll
            for (u32 h = 0; h < kHalves; ++h) {
                float most = best[h];
#pragma unroll
                for (u32 half = 0; half < 2; ++half)
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        float& own = score[half][h * 2 + i];
                        own = first + (slice * kWarps + warp) * kSlice + half * 8 + quad * 2 + i < end ? own * scale : nothing;
                        most = max(most, own);
                    }
                most = max(most, __shfl_xor_sync(0xffffffffu, most, 1));
                most = max(most, __shfl_xor_sync(0xffffffffu, most, 2));
                const float kept = power_of_two(best[h] - most);  // the first token of a slice exists, so `most` is finite
                best[h] = most;
                weight[h] *= kept;
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const float low = power_of_two(score[half][h * 2] - most), high = power_of_two(score[half][h * 2 + 1] - most);
                    weight[h] += low + high;
                    rounded[half][h] = pack_elements(low, high, type);
                }
#pragma unroll
                for (u32 part = 0; part < kParts; ++part)
#pragma unroll
                    for (u32 i = 0; i < 8; ++i) sum[h][part][i] *= kept;
            }
            const u32 rows[4] = {rounded[0][0], rounded[0][1], rounded[1][0], rounded[1][1]};
#pragma unroll
            for (u32 part = 0; part < kParts; ++part) {
                const uint4 first_half = load_shared_quad(place_of(slice, 0, part) + kLanesBytes + lane * 16);
                const uint4 second_half = load_shared_quad(place_of(slice, 1, part) + kLanesBytes + lane * 16);
                const u32 early[4] = {first_half.x, first_half.y, first_half.z, first_half.w}, late[4] = {second_half.x, second_half.y, second_half.z, second_half.w};
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    float product[4] = {sum[0][part][i * 2], sum[0][part][i * 2 + 1], 0.f, 0.f};
                    if (kHalves == 2) {
                        product[2] = sum[kHalves - 1][part][i * 2];
                        product[3] = sum[kHalves - 1][part][i * 2 + 1];
                    }
                    multiply_16(product, rows, transpose_pairs(early[i]), transpose_pairs(late[i]), type);
#pragma unroll
                    for (u32 h = 0; h < kHalves; ++h) {
                        sum[h][part][i * 2] = product[h * 2];
                        sum[h][part][i * 2 + 1] = product[h * 2 + 1];
                    }
                }
            }
        };
        for (u32 slice = 0; slice < slices; ++slice) {
            wait_for_copies<kStages - 1>();
            __syncwarp();  // all lanes' copies are there
            if (kJoined && has_newest && slice == newest_slice) {
                const u32 place = static_cast<u32>(slot);
                const i64 to = place / block * block_stride + place % block * row_stride + head * head_stride + quad * 8;
                if (row == t % 8) {
#pragma unroll
                    for (u32 part = 0; part < kParts; ++part) {
                        const u32(&k)[4] = newest_key.words[part], (&v)[4] = newest_value.words[part];
                        const uint4 key = {k[0], k[1], k[2], k[3]}, value = {v[0], v[1], v[2], v[3]};
                        store_shared_quad(place_of(slice, t / 8, part) + lane * 16, key);
                        store_shared_quad(place_of(slice, t / 8, part) + kLanesBytes + lane * 16, value);
                        if (slot < 0) continue;
                        *reinterpret_cast<uint4*>(keys + to + part * 32) = key;
                        *reinterpret_cast<uint4*>(values + to + part * 32) = value;
                    }
                }
                __syncwarp();
            }
            attend(slice);
            __syncwarp();  // and have been read
            load(slice + kStages, kJoined ? known : end);
            commit_copies();
        }

        // The warps' sums of each head, by their greatest scores.
#pragma unroll
        for (u32 h = 0; h < kHalves; ++h) {
            weight[h] += __shfl_xor_sync(0xffffffffu, weight[h], 1);
            weight[h] += __shfl_xor_sync(0xffffffffu, weight[h], 2);
            const u32 own = warp * kMostHeads + h * 8 + row;
            if (quad == 0) {
                greatest[own] = best[h];
                weights[own] = weight[h];
            }
#pragma unroll
            for (u32 part = 0; part < kParts; ++part)
#pragma unroll
                for (u32 i = 0; i < 8; i += 4)
                    merged[warp * kOfWarp + ((h * 8 + row) * kHead + part * 32 + quad * 8 + i) / 4] = {sum[h][part][i], sum[h][part][i + 1], sum[h][part][i + 2], sum[h][part][i + 3]};
        }
        __syncthreads();
        // A warp adds up a head, a lane four neighbours of it.
        auto add = [](float4& total, const float4& more, float factor) {
            total = {total.x + more.x * factor, total.y + more.y * factor, total.z + more.z * factor, total.w + more.w * factor};
        };
        auto factor_of = [&](float score, float most) { return score == nothing ? 0.f : power_of_two(score - most); };
        auto write = [&](u32 h, const float4& total, float of_all) {
            const float factor = of_all > 0.f ? __fdiv_rn(1.f, of_all) : 0.f;
            const u32 of_query = head * group + h;
            const uint2 rounded = {pack_elements(total.x * factor, total.y * factor, type), pack_elements(total.z * factor, total.w * factor, type)};
            *reinterpret_cast<uint2*>(out + request * out_stride + of_query * kHead + lane * 4) = rounded;
            if (codes == nullptr) return;
            auto low = [&](u32 pair) { return type == kBf16 ? low_bf16(pair) : low_f16(pair); };
            auto high = [&](u32 pair) { return type == kBf16 ? high_bf16(pair) : high_f16(pair); };
            const float value[4] = {low(rounded.x), high(rounded.x), low(rounded.y), high(rounded.y)};
            float largest = kMinAmax;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(value[i]));
#pragma unroll
            for (u32 distance = 16; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
            *reinterpret_cast<u32*>(codes + code_place(request, of_query, lane / 2, query_heads, tile_rows) + lane % 2 * 4) =
                code_word(value[0], value[1], value[2], value[3], group_inverse(largest));
            if (lane == 0) code_scales[static_cast<i64>(of_query) * (ceil_div(m, 4u) * 4) + request] = group_scale(largest);
        };
        float* const own_partial = partial + static_cast<i64>(item) * group * kPartialStride;
        for (u32 h = warp; h < group; h += kWarps) {
            float most = nothing, of_all = 0.f;
            float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (u32 w = 0; w < kWarps; ++w) most = max(most, greatest[w * kMostHeads + h]);
#pragma unroll
            for (u32 w = 0; w < kWarps; ++w) {
                const float factor = factor_of(greatest[w * kMostHeads + h], most);
                of_all += weights[w * kMostHeads + h] * factor;
                add(total, merged[w * kOfWarp + h * (kHead / 4) + lane], factor);
            }
            if (chunks == 1) {
                write(h, total, of_all);
                continue;
            }
            *reinterpret_cast<float4*>(own_partial + h * kPartialStride + lane * 4) = total;
            if (lane == 0) *reinterpret_cast<float2*>(own_partial + h * kPartialStride + kHead) = float2{most, of_all};
        }
        __syncthreads();  // sums have been read, and parts are written
        if (chunks == 1) continue;
        if (threadIdx.x == 0) {
            u32* const counter = counters + request * key_heads + head;
            is_last[0] = count_in_turn(counter) == chunks - 1;
            if (is_last[0]) *counter = 0;  // for the next launch
        }
        __syncthreads();
        if (!is_last[0]) continue;
        const float* const parts = partial + static_cast<i64>(before * key_heads + head) * group * kPartialStride;
        const i64 stride = static_cast<i64>(key_heads) * group * kPartialStride;  // from a chunk to the next
        for (u32 h = warp; h < group; h += kWarps) {
            float most = nothing, of_all = 0.f;
            float4 total = {0.f, 0.f, 0.f, 0.f};
            for (u32 c = lane; c < chunks; c += 32) most = max(most, __ldcg(parts + c * stride + h * kPartialStride + kHead));
#pragma unroll
            for (u32 distance = 16; distance > 0; distance /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, distance));
#pragma unroll 4
            for (u32 c = 0; c < chunks; ++c) {
                const float* const part = parts + c * stride + h * kPartialStride;
                const float2 of_part = __ldcg(reinterpret_cast<const float2*>(part + kHead));
                const float factor = power_of_two(of_part.x - most);
                of_all += of_part.y * factor;
                add(total, __ldcg(reinterpret_cast<const float4*>(part + lane * 4)), factor);
            }
            write(h, total, of_all);
        }
    }
}
