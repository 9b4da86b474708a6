// Linear layer for at most 8 tokens whose time is latency: out[m, n] = x[m, k] . weight[n, k]^T with block scales, quantisation inside.
//
// What decode.cuh waits for behind griddepcontrol.wait (tokens into shared memory, a k-block through wgmma, an exchange between CTAs, the output: 3450 clocks, docs/kernel-notes.md) is paid once a
// linear, half of the time of a small one. Here a CTA owns whole rows of the weight, in groups of 8, so nothing is exchanged but between its warps; weights go to
// registers, kAhead k-blocks a warp of them before the previous kernel has ended; codes become halves, exactly, for mma.sync, with any order of k that both
// operands share, so a lane takes 32 codes of a row that lie in one sector.
//
// 384 threads, no roles: warp w takes k-blocks w, w + 12, ... of each group. Tokens are wgmma's other side, mma's 16 rows. One barrier when the tokens are quantised,
// one when all sums are in shared memory, where they are added in the order of warps.
#include "group.cuh"
#include "mma.cuh"

constexpr u32 kThreads = 384, kWarps = kThreads / 32, kAhead = 6, kHalves = kThreads / kGroupLanes;

// 8 rows x 128 codes: a lane has codes 32(l%4) .. + 31 of row l/4, and the block's scale.
struct Unit {
    u32 words[8];
    float scale;
};

struct Source {
    const u8* weight;
    const float* scale_b;
    i64 block_bytes;
    u32 scale_b_stride, first_row, k_blocks, per_group, count;  // per_group: k-blocks of a group that are this warp's; count: of all its groups

    DEVICE void load(Unit& unit, u32 index, u32 warp, u32 lane) const {
        if (index >= count) return;
        const u32 group = index / per_group, block = warp + (index - group * per_group) * kWarps;
        const u32 row = first_row + group * 8, chunk = lane % 4 * 2 ^ lane / 4;  // as layout.py swizzles them
        const u8* of_row = weight + block * block_bytes + static_cast<i64>(row + lane / 4) * kBlockK;
        u32 halves[2][4];
        load_fresh(of_row + chunk * 16, halves[0]);
        load_fresh(of_row + (chunk ^ 1) * 16, halves[1]);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) unit.words[i] = halves[i / 4][i % 4];
        unit.scale = __ldcg(scale_b + static_cast<i64>(block) * scale_b_stride + row / 128);
    }
};

// groups: of 8 rows of the weight, a CTA. token_halves: from a token to the next in shared memory.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
rows(const void* x, void* __restrict__ out, const u8* __restrict__ weight, const float* __restrict__ scale_b, const void* __restrict__ bias, i64 x_stride,
     i64 out_stride, u32 m, u32 n, u32 k, u32 k_blocks, u32 n_aligned, u32 scale_b_stride, u32 groups, u32 token_halves, u32 x_type, u32 x_vectorised,
     u32 out_type, u32 bias_type) {
    extern __shared__ __align__(1024) u8 shared[];
    // Shared memory: tokens as halves [m][token_halves] | their scales [k_blocks][8] | sums [groups][warps][lane]
    u16* const tokens = reinterpret_cast<u16*>(shared);
    float* const scales = reinterpret_cast<float*>(shared + m * token_halves * 2);
    float2* const sums = reinterpret_cast<float2*>(scales + k_blocks * 8);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = lane / 4;
    const u32 first_group = blockIdx.x * groups, own = min(groups, n_aligned / 8 - first_group);
    const u32 per_group = warp < k_blocks ? (k_blocks - warp + kWarps - 1) / kWarps : 0;
    const Source source{weight, scale_b, static_cast<i64>(n_aligned) * kBlockK, scale_b_stride, first_group * 8, k_blocks, per_group, own * per_group};

    launch_next_kernel();
    Unit unit[kAhead];
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) source.load(unit[i], i, warp, lane);
    wait_for_previous_kernel();

    // A half-warp a group of 128 columns of a token; bounds are the warp's, because both halves shuffle together.
    const u32 in_group = lane % kGroupLanes;
    for (u32 base = warp * 2; base < m * k_blocks; base += kHalves) {
        const u32 index = base + lane / kGroupLanes, block = index / m, of = index - block * m, column = block * kBlockK + in_group * 8;
        const u32 valid = block < k_blocks && column < k ? min(k - column, 8u) : 0;
        RawGroup raw;
        raw.load(x, static_cast<i64>(of) * x_stride + column, valid, x_vectorised);
        Group group;
        group.expand(raw, x_type);
        float largest[1] = {group.lane_amax()};
        reduce_amax(largest);
        const uint2 codes = group.codes(largest[0]);
        if (block >= k_blocks) continue;
        const uint4 halves = make_uint4(unpack_e4m3(static_cast<u16>(codes.x)), unpack_e4m3(static_cast<u16>(codes.x >> 16)),
                                        unpack_e4m3(static_cast<u16>(codes.y)), unpack_e4m3(static_cast<u16>(codes.y >> 16)));
        *reinterpret_cast<uint4*>(tokens + of * token_halves + column) = halves;
        if (in_group == 0) scales[block * 8 + of] = group_scale(largest[0]);
    }
    __syncthreads();

    float low = 0.f, high = 0.f;  // of rows 2(l%4), 2(l%4) + 1 of the group and token l/4
    for (u32 first = 0; first < source.count; first += kAhead) {
#pragma unroll
        for (u32 i = 0; i < kAhead; ++i) {
            const u32 index = first + i;
            if (index >= source.count) break;
            const u32 group = index / per_group, in_turn = index - group * per_group, block = warp + in_turn * kWarps;
            const uint4* of_token = reinterpret_cast<const uint4*>(tokens + token * token_halves + block * kBlockK + lane % 4 * 32);
            float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                uint4 a = make_uint4(0, 0, 0, 0);
                if (token < m) a = of_token[j];
                const u32 word = unit[i].words[2 * j], next = unit[i].words[2 * j + 1];
                multiply_halves(d, a.x, 0, a.y, 0, unpack_e4m3(static_cast<u16>(word)), unpack_e4m3(static_cast<u16>(word >> 16)));
                multiply_halves(d, a.z, 0, a.w, 0, unpack_e4m3(static_cast<u16>(next)), unpack_e4m3(static_cast<u16>(next >> 16)));
            }
            const float scale = token < m ? scales[block * 8 + token] * unit[i].scale : 0.f;
            low += scale * d[0], high += scale * d[1];
            source.load(unit[i], index + kAhead, warp, lane);
            if (in_turn + 1 == per_group) {
                sums[(group * kWarps + warp) * 32 + lane] = {low, high};
                low = high = 0.f;
            }
        }
    }
    __syncthreads();

    const u32 warps = min(k_blocks, kWarps);
    for (u32 i = threadIdx.x; i < own * 32; i += kThreads) {
        const u32 group = i / 32, of = i % 32 / 4, row = (first_group + group) * 8 + i % 4 * 2;
        if (of >= m || row >= n) continue;
        float2 total = {0.f, 0.f};
        for (u32 w = 0; w < warps; ++w) {
            const float2 part = sums[(group * kWarps + w) * 32 + i % 32];
            total = {total.x + part.x, total.y + part.y};
        }
        const i64 at = of * out_stride + row;
        if (bias != nullptr) total.x += load_element(bias, row, bias_type);
        store_element(out, at, out_type, total.x);
        if (row + 1 < n) store_element(out, at + 1, out_type, total.y + (bias != nullptr ? load_element(bias, row + 1, bias_type) : 0.f));
    }
}
