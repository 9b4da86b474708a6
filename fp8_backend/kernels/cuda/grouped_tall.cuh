// The plain grouped GEMM of grouped_sorted.cuh for groups of many rows: tiles of 256 rows x 128 columns, with the loop of gemm.cuh.
//
// Persistent CTAs take tiles in turn. Where the last round has tiles for no more than half of the CTAs, each of these is cut in two, its first 128 rows and
// the others. Warp roles:
//   warpgroup 0     producers. A lane each of warps 0, 1 and 2 fetches, per stage, rows of a (tensor copies of 128 rows), rows of the weight (one
//                   contiguous copy), and scales (bulk copies); the last one says what the tile is.
//   warpgroups 1, 2 math. Warpgroup g owns rows 64 g + (0..63) of each half of the tile; a tile of up to 128 rows has no second half.
// Barriers per stage: full (3 arrivals + bytes), empty (one arrival a math warp). A stage of no rows ends the walk.
//
// 16 rows that lie together in the output, all of the tile's, leave through the copy engine while the next tile is computed; others by their threads.
#include "promotion.cuh"
#include "tiles.cuh"

constexpr u32 kTileRows = 256, kTileColumns = 128, kHalfRows = 128;
constexpr u32 kBytesA = kTileRows * kBlockK, kStageBytes = kBytesA + kTileColumns * kBlockK;
constexpr u32 kScaleRows = kTileRows + 4;  // tiles start at any row, copies of scales at every fourth
constexpr u32 kStageScaleBytes = (kScaleRows + 4) * 4;
constexpr u32 kProducers = 3, kEmptyArrivals = 8 * kArrivalsOfWarp;

// Where a lane finds its operands in stage 0: descriptors' low words, addresses in shared memory, of barriers too.
struct Places {
    u32 a, b, scale_a, scale_b, full, empty;
};

// Sets sum[half] to the sum of k_blocks products, from the stage at which the ring stands; that one has been waited for.
template <u32 kHalves> DEVICE void multiply_tile(float (&sum)[2][64], const Places& at, Ring& ring, u32 k_blocks, u32 lane) {
#pragma unroll
    for (u32 half = 0; half < kHalves; ++half)
#pragma unroll
        for (u32 i = 0; i < 64; ++i) sum[half][i] = 0.f;
    bool full_already = true;
    auto multiply_block = [&](u32 s) {
        if (!full_already) barrier_wait(at.full + 8 * s, ring.parity);
        float scale_b = 0.f;
#pragma unroll
        for (u32 half = 0; half < kHalves; ++half) {
            const u32 a = at.a + s * (kStageBytes / 16) + half * (kHalfRows * kBlockK / 16), b = at.b + s * (kStageBytes / 16);
            float partial[64];
            fence_registers(partial);
            wgmma_fence();
            issue_product<128>(partial, a, b);
            if (half == 0) scale_b = load_shared(at.scale_b + s * kStageScaleBytes);
            const float low = load_shared(at.scale_a + s * kStageScaleBytes + half * kHalfRows * 4) * scale_b;
            const float high = load_shared(at.scale_a + s * kStageScaleBytes + half * kHalfRows * 4 + 32) * scale_b;
            wgmma_wait<0>();
            fence_registers(partial);
            if (half == kHalves - 1) {
                __syncwarp();
                barrier_arrive_after_words(at.empty + 8 * s, low, high, arrives_for_warp(lane));
                ring.stage = s;
                ring.advance(NUM_STAGES);
                full_already = barrier_passed(at.full + 8 * ring.stage, ring.parity);
            }
#pragma unroll
            for (u32 i = 0; i < 64; ++i) sum[half][i] += (i % 4 < 2 ? low : high) * partial[i];
        }
    };
    multiply_in_rounds<kHalves == 2, true, NUM_STAGES>(k_blocks, ring, multiply_block);
}

// map_a: of a, boxes of 128 rows. scale_a: [k_blocks][scale_a_stride], of rows from the tile's first less group * group_rows, in fours; a group's begin
// scale_group_stride behind the last one's. map_out: of out, boxes of 16 rows x 64 columns, if mapped_out. weight: [group][k_blocks]
// [n_aligned][128] packed, scale_b [group][k_blocks][scale_b_stride]. sorted: entries in sorted order, or null if they are so already. out: [entries][n] of
// `type`, a row every out_stride elements.
extern "C" __global__ void __launch_bounds__(384, 1)
grouped_tall(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_out, const float* __restrict__ scale_a, const u8* __restrict__ weight, const float* __restrict__ scale_b,
             void* __restrict__ out, const u32* sorted, const int4* tiles, const u32* num_tiles, i64 out_stride, i64 scale_group_stride, u32 n, u32 n_aligned,
             u32 k_blocks, u32 group_rows, u32 scale_a_stride, u32 scale_b_stride, u32 type, u32 vectorised, u32 mapped_out) {
    extern __shared__ __align__(1024) u8 shared[];
    constexpr u32 kOffsetRoom = NUM_STAGES * kStageBytes, kOffsetScales = kOffsetRoom + kTileRows * kTileColumns * 2, kOffsetInfo = kOffsetScales + NUM_STAGES * kStageScaleBytes;
    constexpr u32 kOffsetFull = kOffsetInfo + NUM_STAGES * 16, kOffsetEmpty = kOffsetFull + NUM_STAGES * 8;
    const u32 base = smem_address(shared), full = base + kOffsetFull, empty = base + kOffsetEmpty;
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        prefetch_map(&map_a);
        for (u32 s = 0; s < NUM_STAGES; ++s) {
            barrier_init(full + 8 * s, kProducers);
            barrier_init(empty + 8 * s, kEmptyArrivals);
        }
        barrier_init_fence();
    }
    __syncthreads();
    launch_next_kernel();
    Ring ring;

    if (warpgroup == 0) {
        give_registers<40>();
        const u32 producer = threadIdx.x / 32;
        if (producer >= kProducers || !elect_lane()) return;
        wait_for_previous_kernel();
        const u32 column_tiles = ceil_div(n, kTileColumns), items = __ldcg(num_tiles) * column_tiles, rest = items % gridDim.x;
        const u32 whole = 2 * rest <= gridDim.x ? items - rest : items, turns = whole + 2 * (items - whole);
        for (u32 round = 0;; ++round) {
            // Not the same place in every round: as many tiles of a band may be there as divide the number of CTAs, and the last of them has few rows.
            const u32 t = round * gridDim.x + (blockIdx.x + round) % gridDim.x;
            if (t >= turns) break;
            const Item item = item_at(t < whole ? t : whole + (t - whole) / 2, tiles, column_tiles);
            const u32 tile_rows = item.tile.z & 0xffff, first = t < whole ? 0 : (t - whole) % 2 * kHalfRows;
            if (tile_rows <= first) continue;
            const u32 group = item.tile.x, row = item.tile.y + first, rows = min(tile_rows - first, t < whole ? kTileRows : kHalfRows);
            const u32 column = item.run * kTileColumns, row_in_scales = row - group * group_rows, first_scale = row_in_scales & ~3u;
            const float* const of_rows = scale_a + group * scale_group_stride + first_scale;
            const u32 rows_b = min(kTileColumns, n_aligned - column), scales = min(kScaleRows, scale_a_stride - first_scale);
            const i64 first_block = static_cast<i64>(group) * k_blocks;
            for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(NUM_STAGES)) {
                const u32 s = ring.stage, bar = full + 8 * s, stage = base + s * kStageBytes;
                barrier_wait(empty + 8 * s, ring.parity ^ 1);
                if (producer == 0) {
                    barrier_expect(bar, ceil_div(rows, kHalfRows) * kHalfRows * kBlockK);
                    tensor_copy(stage, &map_a, 0, row, kb, bar);
                    if (rows > kHalfRows) tensor_copy(stage + kHalfRows * kBlockK, &map_a, 0, row + kHalfRows, kb, bar);
                } else if (producer == 1) {
                    barrier_expect(bar, rows_b * kBlockK);
                    bulk_copy(stage + kBytesA, weight + ((first_block + kb) * n_aligned + column) * kBlockK, rows_b * kBlockK, bar);
                } else {
                    const u32 target = base + kOffsetScales + s * kStageScaleBytes;
                    *reinterpret_cast<int4*>(shared + kOffsetInfo + s * 16) = make_int4(row, rows, item.run, row_in_scales % 4);
                    barrier_expect(bar, (scales + 4) * 4);
                    bulk_copy(target, of_rows + static_cast<i64>(kb) * scale_a_stride, scales * 4, bar);
                    bulk_copy(target + kScaleRows * 4, scale_b + (first_block + kb) * scale_b_stride + (item.run & ~3u), 16, bar);
                }
            }
        }
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        if (producer == 2) *reinterpret_cast<int4*>(shared + kOffsetInfo + ring.stage * 16) = make_int4(0, 0, 0, 0);
        barrier_arrive(full + 8 * ring.stage);
        return;
    }
    take_registers<232>();
    const u32 math = warpgroup - 1, warp = threadIdx.x % 128 / 32, first_row = math * 64 + warp * 16 + lane / 4;
    const u32 element = type == kF32 ? 4 : 2;
    bool waited = false;
    while (true) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        int4 tile = *reinterpret_cast<const int4*>(shared + kOffsetInfo + ring.stage * 16);
        const u32 rows = __shfl_sync(0xffffffffu, tile.y, 0);  // branches on it are the whole warp's
        if (rows == 0) break;
        const u32 scales = base + kOffsetScales;
        // Plus 0, which ptxas cannot know: it moves a value that all lanes share to a uniform register, and waits for that.
        const u32 scale_of_weight = scales + (kScaleRows + tile.z % 4) * 4 + lane * (k_blocks >> 31);
        const Places at{matrix_descriptor_low(base + math * 64 * kBlockK), matrix_descriptor_low(base + kBytesA), scales + (tile.w + first_row) * 4, scale_of_weight,
                        full, empty};
        float sum[2][64];
        if (rows > kHalfRows) multiply_tile<2>(sum, at, ring, k_blocks, lane);
        else multiply_tile<1>(sum, at, ring, k_blocks, lane);
        if (!waited) wait_for_previous_kernel();  // it may still read what this kernel overwrites
        waited = true;
        auto write = [&](float (&slice)[64], u32 row) {  // of the warp's first
            if (row >= rows) return;
            if (mapped_out && row + 16 <= rows) {
#pragma unroll
                for (u32 piece = 0; piece < 2; ++piece) {
                    const u32 target = base + kOffsetRoom + piece * (kTileRows * 128) + row * 128;
                    if (type == kBf16) lay_out<64, true>(slice + piece * 32, target, lane);
                    else lay_out<64, false>(slice + piece * 32, target, lane);
                    fence_async_shared();
                    __syncwarp();
                    if (lane == 0) tensor_store(&map_out, target, tile.z * kTileColumns + piece * 64, tile.x + row);
                }
                return;
            }
            auto place_of = [&](u32 r) {
                const u32 place = tile.x + min(r, rows - 1);
                return static_cast<u8*>(out) + (sorted ? __ldcg(sorted + place) : place) * out_stride * element;
            };
            const u32 low = row + lane / 4;
            u8 *const row_low = place_of(low), *const row_high = place_of(low + 8);
            write_rows<128>(slice, row_low, row_high, tile.z * kTileColumns, n, type, vectorised, low < rows, low + 8 < rows, lane);
        };
        if (mapped_out && lane == 0) bulk_wait_read();  // of the last tile's outputs
        __syncwarp();
        write(sum[0], math * 64 + warp * 16);
        write(sum[1], kHalfRows + math * 64 + warp * 16);
        if (mapped_out && lane == 0) bulk_commit();
    }
    if (mapped_out && lane == 0) bulk_wait();
}
