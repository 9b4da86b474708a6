// One quantisation group: 128 neighbouring columns of a row, held by 16 lanes of 8 elements each.
// scale = amax / 448, code = e4m3(x * (448 / amax)), both divisions in float32; reference.per_token_group_quant is the same bit for bit.
#pragma once
#include "elements.cuh"

constexpr float kFp8Max = 448.f;    // largest finite e4m3
constexpr float kMinAmax = 1e-30f;  // keeps 448 / amax finite; reference.MIN_AMAX
constexpr u32 kGroupLanes = 16;

// What a code is multiplied by, or what a value is multiplied by to become one.
DEVICE float group_factor(float largest, bool of_values) { return __fdiv_rn(of_values ? kFp8Max : largest, of_values ? largest : kFp8Max); }
DEVICE float group_scale(float largest) { return group_factor(largest, false); }
DEVICE float group_inverse(float largest) { return group_factor(largest, true); }

// Of the four lanes of a quad.
DEVICE float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Codes of four neighbours.
DEVICE u32 code_word(float a, float b, float c, float d, float inverse) {
    return pack_e4m3(a * inverse, b * inverse) | static_cast<u32>(pack_e4m3(c * inverse, d * inverse)) << 16;
}

// 8 elements of 16 bits as they lie in memory; kept raw so that many loads can be in flight.
struct RawGroup {
    u32 words[4];

    // Loads x[offset .. offset + 8) as far as `valid` elements reach; the rest are zeros. vectorised: offset is 16-byte aligned, valid is 0 or 8.
    DEVICE void load(const void* x, i64 offset, u32 valid, u32 vectorised) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) words[i] = 0;
        if (valid == 0) return;
        const u16* source = static_cast<const u16*>(x) + offset;
        if (vectorised) {
            load_fresh(source, words);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                if (i < valid) words[i / 2] |= static_cast<u32>(source[i]) << (i % 2 * 16);
        }
    }

    // Stores them to x[offset .. offset + valid); as `load` otherwise.
    DEVICE void store(void* x, i64 offset, u32 valid, u32 vectorised) const {
        if (valid == 0) return;
        u16* target = static_cast<u16*>(x) + offset;
        if (vectorised) {
            *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                if (i < valid) target[i] = static_cast<u16>(words[i / 2] >> (i % 2 * 16));
        }
    }
};

struct Group {
    float value[8];

    DEVICE void expand(const RawGroup& raw, u32 type) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            value[2 * i] = low_element(raw.words[i], type);
            value[2 * i + 1] = high_element(raw.words[i], type);
        }
    }

    // Rounded to 16 bits.
    DEVICE RawGroup packed(u32 type) const {
        RawGroup raw;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) raw.words[i] = pack_elements(value[2 * i], value[2 * i + 1], type);
        return raw;
    }

    // Largest magnitude among this lane's elements. NaN does not count: its code shows it.
    DEVICE float lane_amax() const {
        float largest = kMinAmax;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(value[i]));
        return largest;
    }

    DEVICE uint2 codes(float largest) const {
        const float inverse = group_inverse(largest);
        return make_uint2(code_word(value[0], value[1], value[2], value[3], inverse), code_word(value[4], value[5], value[6], value[7], inverse));
    }
};

// Largest magnitude of each of kCount groups, from those of the lanes; every lane of the warp must call it. The groups' chains of shuffles
// run side by side.
template <u32 kCount> DEVICE void reduce_amax(float (&largest)[kCount]) {
#pragma unroll
    for (u32 distance = kGroupLanes / 2; distance > 0; distance /= 2)
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], distance));
}

// Where the codes of a lane belong: in rows of k_blocks * 128, or, with tile_rows > 0, in swizzled tiles [k_blocks][tile_rows][128] (quantize.cuh).
DEVICE i64 code_place(u32 row, u32 k_block, u32 lane, u32 k_blocks, u32 tile_rows) {
    const u32 group = tile_rows ? k_block * tile_rows + row : row * k_blocks + k_block;
    return static_cast<i64>(group) * kBlockK + ((lane / 2) ^ (tile_rows ? row % 8 : 0)) * 16 + lane % 2 * 8;
}
