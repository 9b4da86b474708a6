// Sums each token's expert outputs: out[t] = sum over slots, in order, of weight[t, slot] * rows[t * top_k + slot], in float32.
//
// One CTA a token and 2048 columns; a thread owns 8 columns and asks for 8 slots at once. Entries without an expert here are skipped, as
// route.cuh skips them: their rows were never written.
//
// What a token's entries are is asked for at once, too, by loads that no branch depends on: one after the other, eight round trips to L2 would take
// longer than the rows. It is there before the previous kernel has ended, for the routing waited for it before it let others start.
#include "group.cuh"

constexpr u32 kThreads = 256, kSlots = 8;

template <bool kIsBf16> DEVICE void add_rows(float (&sum)[8], const float (&weight)[kSlots], const u32 (&words)[kSlots][4]) {
#pragma unroll
    for (u32 s = 0; s < kSlots; ++s)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            sum[2 * i] += weight[s] * (kIsBf16 ? low_bf16(words[s][i]) : low_f16(words[s][i]));
            sum[2 * i + 1] += weight[s] * (kIsBf16 ? high_bf16(words[s][i]) : high_f16(words[s][i]));
        }
}

// weights: [m, top_k], or null for 1. rows: [m * top_k, hidden] and out: [m, hidden] of `type`; hidden % 8 == 0, rows 16-byte aligned.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
combine(const int* ids, const int* map, const float* weights, const u16* rows, u16* out, i64 out_stride, u32 top_k, u32 hidden,
        u32 num_ids, u32 num_groups, u32 type) {
    launch_next_kernel();
    const u32 token = blockIdx.x, column = (blockIdx.y * kThreads + threadIdx.x) * 8, first_entry = token * top_k;
    float sum[8] = {};
    for (u32 first = 0; first < top_k; first += kSlots) {
        float weight[kSlots];
        int group[kSlots];
#pragma unroll
        for (u32 s = 0; s < kSlots; ++s) group[s] = __ldcg(ids + first_entry + min(first + s, top_k - 1));
#pragma unroll
        for (u32 s = 0; s < kSlots; ++s) weight[s] = weights != nullptr ? __ldcg(weights + first_entry + min(first + s, top_k - 1)) : 1.f;
        if (map != nullptr) {
#pragma unroll
            for (u32 s = 0; s < kSlots; ++s) {
                const bool known = static_cast<u32>(group[s]) < num_ids;
                const int here = __ldcg(map + (known ? group[s] : 0));
                group[s] = known ? here : -1;
            }
        }
        if (first == 0) wait_for_previous_kernel();
        if (column >= hidden) return;
        u32 words[kSlots][4];
#pragma unroll
        for (u32 s = 0; s < kSlots; ++s) {
            const bool present = first + s < top_k && static_cast<u32>(group[s]) < num_groups;
            if (!present) weight[s] = 0.f;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) words[s][i] = 0;
            if (present) load_fresh(rows + static_cast<i64>(first_entry + first + s) * hidden + column, words[s]);
        }
        if (type == kBf16) add_rows<true>(sum, weight, words);
        else add_rows<false>(sum, weight, words);
    }
    *reinterpret_cast<uint4*>(out + token * out_stride + column) =
        make_uint4(pack_elements(sum[0], sum[1], type), pack_elements(sum[2], sum[3], type), pack_elements(sum[4], sum[5], type),
                   pack_elements(sum[6], sum[7], type));
}
