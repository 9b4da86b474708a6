// mma.sync of half precision, and e4m3 codes as such: every code is a half exactly, and so is every product in float32.
#pragma once
#include "ptx.cuh"

// Two codes to two halves.
DEVICE u32 unpack_e4m3(u16 codes) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
    return halves;
}
// d[16 x 8] += a[16 x 16] . b[16 x 8]. Lane l holds of d: columns 2(l%4) + {0, 1} of rows l/4 and l/4 + 8; of a: those rows in turn, columns 2(l%4) + {0, 1},
// then both rows 8 columns on; of b: rows 2(l%4) + {0, 1} of column l/4, then 8 rows on.
DEVICE void multiply_halves(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
