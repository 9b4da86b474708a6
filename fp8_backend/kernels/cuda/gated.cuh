// The epilogue of the experts' first GEMM: silu(gate) * up of rows that lie in wgmma's accumulators, to codes and their scale.
#pragma once
#include "group.cuh"
#include "promotion.cuh"

DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Sets value to silu(gate) * up of a lane's share of one row of kColumns (those at index 4j + 2 * kRowHalf), and returns the quad's largest magnitude.
template <u32 kRowHalf, u32 kColumns>
DEVICE float activate(const float (&gate)[64], const float (&up)[64], float (&value)[kColumns / 4]) {
    float largest = kMinAmax;
#pragma unroll
    for (u32 i = 0; i < kColumns / 4; ++i) {
        const u32 source = i / 2 * 4 + kRowHalf * 2 + i % 2;
        value[i] = silu(gate[source]) * up[source];
        largest = fmaxf(largest, fabsf(value[i]));
    }
    return quad_max(largest);
}

// Writes kColumns codes of a row, of which a quad holds the values as `activate` gives them.
template <u32 kColumns> DEVICE void write_codes(const float (&value)[kColumns / 4], float inverse, u8* codes, bool valid, u32 lane) {
    // Column group j (8 columns) gives this lane 2 codes; even and odd groups are the halves of a word. A lane writes neighbouring columns.
    constexpr u32 kPieces = kColumns / 64;
    u32 words[kPieces][4];
#pragma unroll
    for (u32 g = 0; g < 4; ++g)
#pragma unroll
        for (u32 w = 0; w < kPieces; ++w) {
            const float* v = value + (g * 2 * kPieces + w * 2) * 2;
            words[w][g] = code_word(v[0], v[1], v[2], v[3], inverse);
        }
#pragma unroll
    for (u32 w = 0; w < kPieces; ++w) {
        transpose_quad(words[w], lane);
        const u32* p = words[w];
        const uint4 bytes = make_uint4(__byte_perm(p[0], p[1], 0x5410), __byte_perm(p[2], p[3], 0x5410), __byte_perm(p[0], p[1], 0x7632),
                                       __byte_perm(p[2], p[3], 0x7632));
        if (valid) *reinterpret_cast<uint4*>(codes + lane % 4 * 16 * kPieces + w * 16) = bytes;
    }
}

// A row of 128 columns, all of which one quad holds.
template <u32 kRowHalf>
DEVICE void write_gated(const float (&gate)[64], const float (&up)[64], u8* codes, float* scale, bool valid, u32 lane) {
    float value[32];
    const float largest = activate<kRowHalf, 128>(gate, up, value);
    write_codes<128>(value, group_inverse(largest), codes, valid, lane);
    if (valid && lane % 4 == 0) *scale = group_scale(largest);
}
