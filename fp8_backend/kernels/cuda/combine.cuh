// Sums each token's expert outputs: out[t] = sum over slots, in order, of weight[t, slot] * rows[t * top_k + slot], in float32.
//
// One CTA a token and 2048 columns; a thread owns 8 columns and asks for 8 slots at once. Entries without an expert here are skipped, as
// route.cuh skips them: their rows were never written.
#include "group.cuh"

constexpr u32 kThreads = 256, kSlots = 8;

// weights: [m, top_k], or null for 1. rows: [m * top_k, hidden] and out: [m, hidden] of `type`; hidden % 8 == 0, rows 16-byte aligned.
extern "C" __global__ void __launch_bounds__(kThreads)
combine(const int* ids, const int* map, const float* weights, const u16* rows, u16* out, i64 out_stride, u32 top_k, u32 hidden,
        u32 num_ids, u32 num_groups, u32 type) {
    launch_next_kernel();
    wait_for_previous_kernel();
    const u32 token = blockIdx.x, column = (blockIdx.y * kThreads + threadIdx.x) * 8;
    if (column >= hidden) return;
    float sum[8] = {};
    for (u32 first = 0; first < top_k; first += kSlots) {
        float weight[kSlots];
        u32 words[kSlots][4];
        bool present[kSlots];
#pragma unroll
        for (u32 s = 0; s < kSlots; ++s) {
            present[s] = false;
            weight[s] = 1.f;
            if (first + s >= top_k) continue;
            const u32 entry = token * top_k + first + s;
            int group = __ldcg(ids + entry);
            if (map != nullptr) group = group >= 0 && static_cast<u32>(group) < num_ids ? __ldcg(map + group) : -1;
            present[s] = group >= 0 && static_cast<u32>(group) < num_groups;
            if (weights != nullptr) weight[s] = __ldcg(weights + entry);
        }
#pragma unroll
        for (u32 s = 0; s < kSlots; ++s)
            if (present[s]) load_fresh(rows + static_cast<i64>(token * top_k + first + s) * hidden + column, words[s]);
#pragma unroll
        for (u32 s = 0; s < kSlots; ++s) {
            if (!present[s]) continue;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                sum[2 * i] += weight[s] * (type == kBf16 ? low_bf16(words[s][i]) : low_f16(words[s][i]));
                sum[2 * i + 1] += weight[s] * (type == kBf16 ? high_bf16(words[s][i]) : high_f16(words[s][i]));
            }
        }
    }
    *reinterpret_cast<uint4*>(out + token * out_stride + column) =
        make_uint4(pack_elements(sum[0], sum[1], type), pack_elements(sum[2], sum[3], type), pack_elements(sum[4], sum[5], type),
                   pack_elements(sum[6], sum[7], type));
}
