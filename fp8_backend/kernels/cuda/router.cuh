// A linear layer of few columns that is not quantised, for at most 64 rows: out[m, n] = x[m, k] . weight[n, k]^T, all of 16 bits, sums in float32.
//
// It takes longer to start than to run, so it starts while the kernel before it runs, and brings its weights into registers meanwhile: they are complete by
// contract. A cluster of 8 CTAs has 8 columns and shares k, in chunks of 32; so do the 8 warps of a CTA. The same order of sums for any m.
//
// A lane holds 8 neighbours of a chunk in 16 bytes, of rows lane / 4 and lane / 4 + 8 and of column lane / 4; the tensor core wants pairs 8 apart. Which
// product gets which of them is the same for rows and columns, so the sums are those of the chunk.
// Barrier: exchanged (1 arrival + bytes) in the CTA of rank 0, which adds what the ranks send, in their order.
#include "elements.cuh"

constexpr u32 kRanks = 8, kWarps = 8, kColumns = 8, kChunk = 32, kMostRows = 64, kAhead = 4;
constexpr u32 kParts = kMostRows * kColumns / 4, kOfWarps = kWarps * kParts, kOfRanks = kRanks * kParts;  // parts: 4 neighbouring sums each

// x: rows of x_stride elements. weight: [n][k], k % 8 == 0, n % 8 == 0; both 16-byte aligned. out: [m][n].
extern "C" __global__ void __launch_bounds__(kWarps * 32)
router(const u16* __restrict__ x, const u16* __restrict__ weight, u16* __restrict__ out, i64 x_stride, u32 m, u32 n, u32 k, u32 type) {
    __shared__ float4 of_warps[kOfWarps];
    __shared__ float4 of_ranks[kOfRanks];
    __shared__ u64 exchanged_barrier[1];
    const u32 rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x / kRanks;
    const u32 chunks = ceil_div(k, kChunk), first = chunks * rank / kRanks + warp, end = chunks * (rank + 1) / kRanks;
    const u32 exchanged = smem_address(exchanged_barrier), parts = m * 2, tiles = ceil_div(m, 16u);
    if (threadIdx.x == 0 && rank == 0) {
        barrier_init(exchanged, 1);
        barrier_init_fence();
        barrier_expect(exchanged, kRanks * parts * 16);
    }
    __syncthreads();
    cluster_arrive_relaxed();  // waited for before the first access to rank 0's shared memory
    launch_next_kernel();

    auto load = [&](const u16* row, u32 chunk, bool exists, u32 (&words)[4]) {
        const u32 column = chunk * kChunk + lane % 4 * 8;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) words[i] = 0;
        if (exists && column < k) load_fresh(row + column, words);
    };
    const u16* const own_weight = weight + static_cast<i64>(tile * kColumns + lane / 4) * k;
    u32 ahead[kAhead][4];
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) load(own_weight, first + i * kWarps, first + i * kWarps < end, ahead[i]);
    wait_for_previous_kernel();

    float sum[kMostRows / 16][4] = {};
    auto multiply_chunk = [&](u32 chunk, const u32 (&columns)[4]) {
#pragma unroll
        for (u32 t = 0; t < kMostRows / 16; ++t) {
            if (t >= tiles) continue;
            const u32 row = t * 16 + lane / 4;
            u32 low[4], high[4];
            load(x + row * x_stride, chunk, row < m, low);
            load(x + (row + 8) * x_stride, chunk, row + 8 < m, high);
#pragma unroll
            for (u32 i = 0; i < 4; i += 2) {
                const u32 rows[4] = {low[i], high[i], low[i + 1], high[i + 1]};
                multiply_16(sum[t], rows, columns[i], columns[i + 1], type);
            }
        }
    };
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i)
        if (first + i * kWarps < end) multiply_chunk(first + i * kWarps, ahead[i]);
    for (u32 chunk = first + kAhead * kWarps; chunk < end; chunk += kWarps) {
        u32 columns[4];
        load(own_weight, chunk, true, columns);
        multiply_chunk(chunk, columns);
    }
    // Of a row 8 sums, two parts; a lane has two neighbours of rows lane / 4 and 8 further down.
    float2* const own = reinterpret_cast<float2*>(of_warps + warp * kParts);
#pragma unroll
    for (u32 t = 0; t < kMostRows / 16; ++t) {
        if (t >= tiles) continue;
        const u32 row = t * 16 + lane / 4;
        own[row * 4 + lane % 4] = {sum[t][0], sum[t][1]};
        own[(row + 8) * 4 + lane % 4] = {sum[t][2], sum[t][3]};
    }
    __syncthreads();
    cluster_wait();
    auto add = [](float4& total, const float4& more) { total = {total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w}; };
    const u32 part = threadIdx.x;
    if (part < parts) {
        float4 total = of_warps[part];
        for (u32 w = 1; w < kWarps; ++w) add(total, of_warps[w * kParts + part]);
        store_async(map_to_rank(smem_address(of_ranks + rank * kParts + part), 0), total, map_to_rank(exchanged, 0));
    }
    if (rank != 0) return;
    barrier_wait(exchanged, 0);
    if (part >= parts) return;
    float4 total = of_ranks[part];
    for (u32 r = 1; r < kRanks; ++r) add(total, of_ranks[r * kParts + part]);
    *reinterpret_cast<uint2*>(out + static_cast<i64>(part / 2) * n + tile * kColumns + part % 2 * 4) =
        uint2{pack_elements(total.x, total.y, type), pack_elements(total.z, total.w, type)};
}
