// RMSNorm of every query's and key's head and its rotary embedding, behind the linear that gives them, and keys and values into the cache: one kernel
// where a compiled model has three.
//
// What does not come from the linear is complete by contract, and read before that has ended.
//
// A warp takes a head of a token; a lane holds neighbours of its first half and those that are rotated with them, half a head further on. All is
// computed in float32 and rounded once. No shared memory and few registers: a CTA starts beside those of the linear, whose rows it waits for.
#include "elements.cuh"

constexpr u32 kWarps = 8, kPairs = 2;  // pairs a lane, in each half: heads of up to 256 elements

// rows: [m] of 16-bit elements, one every `stride`: query heads, key heads, whatever. positions: [m]. query_weight, key_weight: [head]. cosines: a row of
// head elements for each position, cosines first. queries: [m][query_heads][head], keys: [m][key_heads][head]. head: a multiple of 4; all 4-byte aligned.
// slots: [num_slots] or null; where in the caches the keys of the first tokens go, and the values, key_heads of them behind the key heads; below 0:
// nowhere. Slot s is row s % block of block s / block, and the strides of both caches are from a block, a row and a head to the next.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
norm_rope(const u16* rows, const i64* positions, const u16* query_weight, const u16* key_weight, const u16* cosines, u16* queries, u16* keys, u16* key_cache,
          u16* value_cache, const i64* slots, i64 stride, i64 block_stride, i64 row_stride, i64 head_stride, u32 block, u32 num_slots, u32 m,
          u32 query_heads, u32 key_heads, u32 head, u32 type, float epsilon) {
    const u32 lane = threadIdx.x % 32, index = blockIdx.x * kWarps + threadIdx.x / 32, rotated = query_heads + key_heads;
    const u32 heads = rotated + (slots ? key_heads : 0), token = index / heads, which = index % heads, half = head / 2;
    const bool is_query = which < query_heads, is_value = which >= rotated;
    auto pair_at = [](const u16* elements) { return __ldcg(reinterpret_cast<const u32*>(elements)); };  // past L1: this CTA may be older than they

    launch_next_kernel();
    // Two loads one behind the other, from memory where the layers' weights have gone through L2 since: on their way while the linear still runs.
    const u32 known = min(token, m - 1);
    const u16* const angle = cosines + __ldcg(positions + known) * head;
    const i64 slot = !is_query && token < num_slots ? __ldcg(slots + token) : -1;
    const u16* const weight = is_query ? query_weight : key_weight;
    u32 weights[kPairs][2] = {}, values[kPairs][2] = {}, angles[kPairs][2] = {};
#pragma unroll
    for (u32 i = 0; i < kPairs; ++i) {
        const u32 at = i * 64 + lane * 2;
        if (at >= half) continue;
        weights[i][0] = pair_at(weight + at);
        weights[i][1] = pair_at(weight + half + at);
        angles[i][0] = pair_at(angle + at);
        angles[i][1] = pair_at(angle + half + at);
    }
    if (token >= m) return;
    // Where all goes is known before the linear has ended, too.
    const u16* const source = rows + token * stride + which * head;
    u16* cached = nullptr;
    if (slot >= 0) {
        const u32 of_cache = which - (is_value ? rotated : query_heads), place = static_cast<u32>(slot);
        u16* const cache = is_value ? value_cache : key_cache;
        cached = cache + place / block * block_stride + place % block * row_stride + of_cache * head_stride;
    }
    u16* const target = is_query ? queries + static_cast<i64>(token * query_heads + which) * head
                                 : keys + static_cast<i64>(token * key_heads + which - query_heads) * head;
    if (is_value) {
        wait_for_previous_kernel();
        for (u32 at = lane * 2; at < (cached ? head : 0); at += 64) *reinterpret_cast<u32*>(cached + at) = pair_at(source + at);
        return;
    }
    with_rows(type, 1, [&](auto elements) {
        auto low = [&](u32 pair) { return low_element(pair, elements.type); };
        auto high = [&](u32 pair) { return high_element(pair, elements.type); };
        wait_for_previous_kernel();
#pragma unroll
        for (u32 i = 0; i < kPairs; ++i) {
            const u32 at = i * 64 + lane * 2;
            if (at >= half) continue;
            values[i][0] = pair_at(source + at);
            values[i][1] = pair_at(source + half + at);
        }
        float sum = 0.f;
#pragma unroll
        for (u32 i = 0; i < kPairs; ++i)
#pragma unroll
            for (u32 side = 0; side < 2; ++side) sum += low(values[i][side]) * low(values[i][side]) + high(values[i][side]) * high(values[i][side]);
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        const float factor = __fdiv_rn(1.f, sqrtf(sum / head + epsilon));

#pragma unroll
        for (u32 i = 0; i < kPairs; ++i) {
            const u32 at = i * 64 + lane * 2;
            if (at >= half) continue;
            const float first[2] = {low(values[i][0]) * factor * low(weights[i][0]), high(values[i][0]) * factor * high(weights[i][0])};
            const float second[2] = {low(values[i][1]) * factor * low(weights[i][1]), high(values[i][1]) * factor * high(weights[i][1])};
            const float cosine[2] = {low(angles[i][0]), high(angles[i][0])}, sine[2] = {low(angles[i][1]), high(angles[i][1])};
            const u32 less = pack_elements(first[0] * cosine[0] - second[0] * sine[0], first[1] * cosine[1] - second[1] * sine[1], elements.type);
            const u32 more = pack_elements(second[0] * cosine[0] + first[0] * sine[0], second[1] * cosine[1] + first[1] * sine[1], elements.type);
            *reinterpret_cast<u32*>(target + at) = less;
            *reinterpret_cast<u32*>(target + half + at) = more;
            if (cached == nullptr) continue;
            *reinterpret_cast<u32*>(cached + at) = less;
            *reinterpret_cast<u32*>(cached + half + at) = more;
        }
    });
}
