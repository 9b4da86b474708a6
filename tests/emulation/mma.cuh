// What mma.cuh of the trials gives a kernel, on machine.h.
#pragma once
#include "ptx.cuh"

DEVICE u32 unpack_e4m3(u16 codes) { return pack_f16(e4m3_value(static_cast<u8>(codes)), e4m3_value(static_cast<u8>(codes >> 8))); }
DEVICE void multiply_halves(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 mine_a[4] = {a0, a1, a2, a3}, mine_b[2] = {b0, b1};
    std::array<std::array<u32, 4>, 32> a, b;
    std::memcpy(&a, emulation::exchange(kWholeWarp, mine_a, 16), sizeof(a));
    std::memcpy(&b, emulation::exchange(kWholeWarp, mine_b, 8), sizeof(b));
    const u32 lane = emulation::lane();
    for (u32 i = 0; i < 4; ++i)
        for (u32 quad = 0; quad < 4; ++quad)
            for (u32 half = 0; half < 2; ++half) {
                const u32 left = a[lane / 4 * 4 + quad][i / 2 + half * 2], right = b[(lane % 4 * 2 + i % 2) * 4 + quad][half];
                d[i] += low_f16(left) * low_f16(right) + high_f16(left) * high_f16(right);
            }
}
