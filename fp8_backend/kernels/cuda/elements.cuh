// Elements of activations and outputs. The emulated machine of the tests, which has another ptx.cuh, runs this very text.
#pragma once
#include "ptx.cuh"

// Element types of activations and outputs, chosen at run time, which halves the number of kernels.
enum ElementType : u32 { kBf16 = 0, kF16 = 1, kF32 = 2 };

// What rows are made of: elements of a type, vectorised if they can be read 16 bytes at a time.
struct AnyRows {
    u32 type, vectorised;
};
struct CommonRows {
    static constexpr u32 type = kBf16, vectorised = 1;
};
// Calls body(rows). What nearly every call has is code of its own, chosen before the kernel waits for the previous one: behind the wait a branch costs more than its
// instructions, taken or not, and addresses wait for it (docs/kernel-notes.md, 2026-11-29).
template <class Body> DEVICE void with_rows(u32 type, u32 vectorised, const Body& body) {
    if ((type | (vectorised ^ 1)) == 0) body(CommonRows{});
    else body(AnyRows{type, vectorised});
}

// Of a pair of 16 bits each.
DEVICE float low_element(u32 pair, u32 type) { return type == kBf16 ? low_bf16(pair) : low_f16(pair); }
DEVICE float high_element(u32 pair, u32 type) { return type == kBf16 ? high_bf16(pair) : high_f16(pair); }
DEVICE float load_element(const void* base, i64 index, u32 type) {
    if (type == kF32) return static_cast<const float*>(base)[index];
    return low_element(static_cast<const u16*>(base)[index], type);
}
DEVICE void store_element(void* base, i64 index, u32 type, float value) {
    if (type == kF32) static_cast<float*>(base)[index] = value;
    else static_cast<u16*>(base)[index] = static_cast<u16>(type == kBf16 ? pack_bf16(value, 0.f) : pack_f16(value, 0.f));
}
// d += a . b of 16 rows, 8 columns and 16 elements of k, over a warp: lane l has pairs l % 4 and l % 4 + 4 of rows l / 4 and l / 4 + 8 in a[0], a[2] and a[1],
// a[3], of column l / 4 in b, and sums of columns 2 * (l % 4) and the next one of both rows in d.
DEVICE void multiply_16(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high, u32 type) {
    if (type == kBf16) multiply_bf16(d, a, b_low, b_high);
    else multiply_f16(d, a, b_low, b_high);
}
DEVICE u32 pack_elements(float low, float high, u32 type) { return type == kBf16 ? pack_bf16(low, high) : pack_f16(low, high); }
