// Activations to e4m3 in groups of 128 columns with one float32 scale a group (group.cuh), each token's codes written to the places of all its entries in
// sorted order (route.cuh): the rows of an expert then lie side by side, where the copy engine can fetch them.
//
// A warp quantises 4 neighbouring groups of a token, 8 lanes each, and stores them once for each slot: 512 bytes an instruction, whole lines. Warps of
// a token are neighbours, so that the lines of a row meet in L2 before they leave it.
// Scales are written once a token, 16 bytes a warp, and sorted by sort_scales.cuh: stores of 4 bytes from here, each to a sector of its own for every slot,
// took almost half of the time (one H100, 8192 tokens of 7168 columns and 8 slots: 171 of 386 us).
#include "group.cuh"
#include "places.cuh"

constexpr u32 kThreads = 256, kWarpBlocks = 4;
constexpr u32 kLanes = 32 / kWarpBlocks;  // of a group, each with 8 columns of either half

// Codes of 8 columns in the first and 8 in the second half of a group, for 16 that lie side by side: of the first half in even lanes, of the second in odd ones.
DEVICE uint4 side_by_side(uint2 first, uint2 second, bool odd) {
    const uint2 own = odd ? second : first, others = odd ? first : second;
    const u32 x = __shfl_xor_sync(0xffffffffu, others.x, 1), y = __shfl_xor_sync(0xffffffffu, others.y, 1);
    return odd ? make_uint4(x, y, own.x, own.y) : make_uint4(own.x, own.y, x, y);
}

// x: [m, k] with row stride `stride` (elements). places: [m * top_k] rows of codes, or kNoPlace. codes: [rows][k_blocks * 128]; rows that are no
// entry's place stay as they are. token_scale: [m][k_blocks, up to a multiple of 4], all of it written. vectorised: as for quantize.cuh.
extern "C" __global__ void __launch_bounds__(kThreads, 6)
quantize_sorted(const void* x, const u32* places, u8* codes, float* token_scale, i64 stride, u32 m, u32 top_k, u32 k, u32 k_blocks, u32 type, u32 vectorised) {
    const u32 lane = threadIdx.x % 32, group_lane = lane % kLanes, warps_a_token = ceil_div(k_blocks, kWarpBlocks);
    const u32 warp = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, token = warp / warps_a_token;
    const u32 k_block = warp % warps_a_token * kWarpBlocks + lane / kLanes;
    wait_for_previous_kernel();
    launch_next_kernel();  // not before: sort_scales.cuh reads the routing without waiting
    if (token >= m) return;

    const u32* const of_token = places + static_cast<i64>(token) * top_k;
    auto place_of = [&](u32 slot) { return slot < top_k ? __ldcg(of_token + slot) : kNoPlace; };
    u32 place = place_of(group_lane);
    Group half[2];
    const u32 column = k_block * kBlockK + group_lane * 8;
    const i64 offset = static_cast<i64>(token) * stride + column;
    auto valid = [&](u32 h) { return column + h * 64 < k ? min(k - column - h * 64, 8u) : 0; };
    if (type == kF32) {
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
            for (u32 i = 0; i < 8; ++i) half[h].value[i] = i < valid(h) ? static_cast<const float*>(x)[offset + h * 64 + i] : 0.f;
    } else {
        RawGroup raw[2];
#pragma unroll
        for (u32 h = 0; h < 2; ++h) raw[h].load(x, offset + h * 64, valid(h), vectorised);
#pragma unroll
        for (u32 h = 0; h < 2; ++h) half[h].expand(raw[h], type);
    }
    float largest = quad_max(fmaxf(half[0].lane_amax(), half[1].lane_amax()));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 4));
    const uint4 bytes = side_by_side(half[0].codes(largest), half[1].codes(largest), group_lane % 2);
    u8* const target = codes + k_block * kBlockK + group_lane % 2 * 64 + group_lane / 2 * 16;
    const i64 row_bytes = static_cast<i64>(k_blocks) * kBlockK;
    const bool inside = k_block < k_blocks;
    if (group_lane == 0) token_scale[static_cast<i64>(warp) * kWarpBlocks + lane / kLanes] = group_scale(largest);

    // Each lane of a group has the place of another slot.
    for (u32 first = 0; first < top_k; first += kLanes) {
        if (first) place = place_of(first + group_lane);
#pragma unroll
        for (u32 i = 0; i < kLanes; ++i) {
            const u32 row = __shfl_sync(0xffffffffu, place, i);
            if (inside && row != kNoPlace) *reinterpret_cast<uint4*>(target + row * row_bytes) = bytes;
        }
    }
}
