// What the first read of a parameter line and the first pass over code cost a kernel, with and without weights on their way to the multiprocessor.
//   nvcc -arch=sm_90a -O3 -o first_touch first_touch.cu && ./first_touch
#include <cstdio>
#include <cstdint>
#include <cuda_runtime.h>
#include <algorithm>
#include <vector>
struct Words { uint32_t w[480]; };  // 30 lines of 64 bytes
__device__ __forceinline__ long long now() { long long t; asm volatile("mov.u64 %0, %%clock64;" : "=l"(t) :: "memory"); return t; }
#define R4(x) x x x x
#define R16(x) R4(x) R4(x) R4(x) R4(x)
#define R64(x) R16(x) R16(x) R16(x) R16(x)
// 512 dependent-free instructions: 8 KB of code.
#define BLOCK asm volatile(R64("mad.lo.u32 %0, %0, %1, %1;\n\tmad.lo.u32 %2, %2, %1, %1;\n\tmad.lo.u32 %3, %3, %1, %1;\n\tmad.lo.u32 %4, %4, %1, %1;\n\t") : "+r"(a), "+r"(k), "+r"(b), "+r"(c), "+r"(d));
__global__ void __launch_bounds__(128, 1) probe(const uint8_t* weights, uint32_t copies, uint32_t passes, long long* out, int* sink, const __grid_constant__ Words p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t bar;
    uint32_t s = (uint32_t)__cvta_generic_to_shared(shared), b0 = (uint32_t)__cvta_generic_to_shared(&bar);
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(b0) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    long long issued = now();
    if (threadIdx.x == 0 && copies) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b0), "r"(copies * 8192) : "memory");
        for (uint32_t i = 0; i < copies; ++i)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                "r"(s + i * 8192), "l"(weights + ((size_t)i * gridDim.x + blockIdx.x) * 8192), "r"(8192), "r"(b0) : "memory");
    }
    __syncthreads();
    long long t[8] = {};
    if (threadIdx.x == 32) {
        long long t0 = now();
        uint32_t v = p.w[(uint32_t)(t0 >> 63) + 64];
        if (v == 77) __trap();
        t[0] = now() - t0;                 // first read of a line
        t0 = now(); v = p.w[(uint32_t)(t0 >> 63) + 72]; if (v == 77) __trap(); t[1] = now() - t0;   // the same line
        t0 = now(); v = p.w[(uint32_t)(t0 >> 63) + 80]; if (v == 77) __trap(); t[2] = now() - t0;   // the next line
        t0 = now(); v = p.w[(uint32_t)(t0 >> 63) + 320]; if (v == 77) __trap(); t[3] = now() - t0;  // a far one
        uint32_t a = v, k = 3, b = 1, c = 2, d = 4;
        _Pragma("unroll 1") for (uint32_t pass = 0; pass < passes; ++pass) { t0 = now(); BLOCK t[5] = now() - t0; if (pass == 0) t[4] = t[5]; }
        if (a == 12345 && b == 9 && c == 8 && d == 7) *sink = a;
        t[6] = now();
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (copies && threadIdx.x == 0) {
        uint32_t done = 0;
        while (!done) asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(b0) : "memory");
        out[blockIdx.x * 8 + 7] = now() - issued;
    }
    if (threadIdx.x == 32) for (int i = 0; i < 7; ++i) out[blockIdx.x * 8 + i] = t[i];
}
__global__ void other(int* sink, uint32_t k) {  // code of 64 KB, to push what is in the instruction cache out
    uint32_t a = threadIdx.x, b = 1, c = 2, d = 4;
    BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK
    BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK BLOCK
    if (a == 12345 && b == 9 && c == 8 && d == 7) *sink = a;
}
int main() {
    size_t bytes = (size_t)4 << 30; uint8_t* w; cudaMalloc(&w, bytes); cudaMemset(w, 0, bytes);
    long long* out; cudaMalloc(&out, 132 * 8 * 8); int* sink; cudaMalloc(&sink, 4);
    cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024);
    Words p = {};
    for (int evict = 0; evict < 2; ++evict)
        for (uint32_t copies : {0u, 8u, 24u}) {
            std::vector<std::vector<long long>> all(8);
            for (int r = 0; r < 40; ++r) {
                if (evict) other<<<132, 128>>>(sink, 3);
                const uint8_t* from = w + (size_t)(r % 100) * 132 * 24 * 8192;
                probe<<<132, 128, 200 * 1024>>>(from, copies, 2, out, sink, p);
                std::vector<long long> h(132 * 8);
                cudaMemcpy(h.data(), out, 132 * 64, cudaMemcpyDeviceToHost);
                if (r > 2) for (int c = 0; c < 132; ++c) for (int i = 0; i < 8; ++i) all[i].push_back(h[c * 8 + i]);
            }
            printf("code pushed out %d, %3u KB on their way:", evict, copies * 8);
            const char* names[] = {"line", "same", "next", "far", "code first", "code again", "", "weights"};
            for (int i : {0, 1, 2, 3, 4, 5, 7}) { std::sort(all[i].begin(), all[i].end()); printf(" %s %lld (%lld)", names[i], all[i][all[i].size() / 2], all[i][all[i].size() * 9 / 10]); }
            printf("\n");
        }
    printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
