// wgmma m64nNk32, e4m3 x e4m3 -> f32, both operands K-major in 128-byte-swizzled shared memory, one struct per N.
// Accumulators: warp w of the warpgroup holds rows 16w..16w+15; lane l, group j of 8 columns: d[4j], d[4j+1] = row l/4, columns
// 8j + 2(l%4) + {0, 1}; d[4j+2], d[4j+3] = the same columns of row l/4 + 8.
#pragma once
#include "elements.cuh"

// Shared-memory descriptor of a tile that starts at a multiple of 1024 bytes: 1024 bytes between groups of 8 rows, swizzle 128B.
// Adding 2 to it advances 32 codes of k.
constexpr u64 kMatrixDescriptor = (1ull << 62) | (64ull << 32) | (1ull << 16);  // of address 0
DEVICE u64 matrix_descriptor(u32 address) { return kMatrixDescriptor | ((address & 0x3ffff) >> 4); }
// The same in two halves: the low one is linear in the address, and the high one a constant, so that both can stay in uniform registers.
DEVICE u32 matrix_descriptor_low(u32 address) { return u32(kMatrixDescriptor) | address >> 4; }
DEVICE u64 matrix_descriptor_at(u32 low) {
    u64 descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(u32(kMatrixDescriptor >> 32)));
    return descriptor;
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 kPending> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }
// Tells the compiler that the accumulators change under an asynchronous wgmma.
template <u32 kCount> DEVICE void fence_registers(float (&d)[kCount]) {
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Stores four 8x8 matrices of 16-bit elements, laid out over the warp as accumulators are; lane l gives the address of row l % 8 of
// matrix l / 8.
DEVICE void store_matrices(u32 address, const u32 (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3]) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements, or 16 rows of 32 codes: lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&words)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory");
}

// The accumulators d[0] .. d[count - 1], which are operands %0 .. %count-1: their names in the text of asm, and themselves.
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_80 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_96 NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VALUES_FROM(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VALUES_4 VALUES_FROM(0)
#define VALUES_8 VALUES_4, VALUES_FROM(4)
#define VALUES_16 VALUES_8, VALUES_FROM(8), VALUES_FROM(12)
#define VALUES_24 VALUES_16, VALUES_FROM(16), VALUES_FROM(20)
#define VALUES_32 VALUES_24, VALUES_FROM(24), VALUES_FROM(28)
#define VALUES_48 VALUES_32, VALUES_FROM(32), VALUES_FROM(36), VALUES_FROM(40), VALUES_FROM(44)
#define VALUES_64 VALUES_48, VALUES_FROM(48), VALUES_FROM(52), VALUES_FROM(56), VALUES_FROM(60)
#define VALUES_80 VALUES_64, VALUES_FROM(64), VALUES_FROM(68), VALUES_FROM(72), VALUES_FROM(76)
#define VALUES_96 VALUES_80, VALUES_FROM(80), VALUES_FROM(84), VALUES_FROM(88), VALUES_FROM(92)
// Wgmma<n>::multiply(d, a, b, accumulate); its operands behind the accumulators by number: a's names, b, accumulate.
#define MULTIPLY(n, count, a_names, b_name, accumulate_name, ...)                                                                               \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, " accumulate_name ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" NAMES_##count \
                 "}, " a_names ", " b_name ", p, 1, 1; }"                                                                                        \
                 : VALUES_##count : __VA_ARGS__, "l"(b), "r"(accumulate))
// a in registers: of 16 rows x 32 codes a warp, words 0 and 1 hold codes 4(l%4)..+3 of rows l/4 and l/4 + 8, words 2 and 3 those 16 codes on.
#define WGMMA(n, count, name_0, name_1, name_2, name_3, name_4, name_5)                                                                        \
    template <> struct Wgmma<n> {                                                                                                              \
        DEVICE static void multiply(float (&d)[count], u64 a, u64 b, u32 accumulate) { MULTIPLY(n, count, name_0, name_1, name_2, "l"(a)); }   \
        DEVICE static void multiply(float (&d)[count], const u32 (&a)[4], u64 b, u32 accumulate) {                                             \
            MULTIPLY(n, count, "{" name_0 ", " name_1 ", " name_2 ", " name_3 "}", name_4, name_5, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])); \
        }                                                                                                                                      \
    };

template <u32 kN> struct Wgmma;

WGMMA(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
WGMMA(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
WGMMA(48, 24, "%24", "%25", "%26", "%27", "%28", "%29")
WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA(160, 80, "%80", "%81", "%82", "%83", "%84", "%85")
WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")

#undef WGMMA
#undef MULTIPLY
