// The plain grouped GEMM of grouped_sorted.cuh for few k-blocks, where the end of a tile takes as long as its products: the second GEMM of narrow experts. Its
// weights stay (stationary.cuh); the sums and their order are the same, and so are the bits.
//
// A run is a band of a group's rows (route.cuh) in 128 columns. A CTA has neighbouring runs, those of a band beside each other: its rows come from L2, each weight
// once from memory. Rows leave one by one, to their entries, through the copy engine.
//
// Warp roles:
//   warpgroup 0      producers. A lane each of the first warps fetches rows and their scales for one math warpgroup, a lane of the warp behind them weights.
//   warpgroups 1..W  math.
#include "group.cuh"
#include "stationary.cuh"

constexpr u32 kOutputRow = kColumns * 2 + 16;  // bytes; 16 keep the rows of a store apart
constexpr u32 kOutputBytes = kRows * kOutputRow;

// The runs of a CTA, in turn: as many items (a tile of rows that was listed, in 128 columns) as every other has, those of a run with its first one.
struct Walk {
    const int4* tiles;
    u32 num_tiles, columns, past;  // columns: of tiles; past: the item that no run begins at or behind
    u32 first_tile, width;         // of the band
    u32 group, row, rows, column;  // column: of tiles

    DEVICE Walk(const int4* list, u32 count, u32 num_columns) : tiles(list), num_tiles(count), columns(num_columns) {
        const u64 items = static_cast<u64>(count) * num_columns;
        const u32 first = items * blockIdx.x / gridDim.x;
        past = items * (blockIdx.x + 1) / gridDim.x;
        first_tile = count;
        if (first >= past) return;
        load(static_cast<u32>(__ldcg(list + first / num_columns).w));
        column = ceil_div(first - first_tile * num_columns, width);
        if (column == num_columns) next_band();
    }
    DEVICE bool there() const { return first_tile < num_tiles && first_tile * columns + column * width < past; }
    DEVICE void next() {
        if (++column == columns) next_band();
    }
    DEVICE u32 count() const { return ceil_div(rows, kRows); }

private:
    DEVICE void next_band() {
        column = 0;
        if (first_tile + width < num_tiles) load(first_tile + width);
        else first_tile = num_tiles;
    }
    DEVICE void load(u32 tile) {
        const int4 head = __ldcg(tiles + tile);
        first_tile = tile;
        width = static_cast<u32>(head.z) >> 16;
        const int4 tail = __ldcg(tiles + tile + width - 1);
        group = head.x;
        row = head.y;
        rows = tail.y + (tail.z & 0xffff) - head.y;
    }
};

// As grouped_sorted.cuh has them; what that one alone needs has no name. n % 8 == 0, out: elements of 16 bits in rows that are 16-byte aligned.
extern "C" __global__ void __launch_bounds__(128 * (1 + kWarpgroups), 1)
grouped_stationary(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap, const float* scale_a, const u8* weight, const float* scale_b, u16* out,
                   float*, const u32* sorted, const int4* tile_list, const u32* num_row_tiles, u32*, i64 out_stride, u32 n, u32 n_aligned, u32 k_blocks,
                   u32 scale_a_stride, u32 scale_b_stride, u32, u32, u32 early, u32 type, u32) {
    extern __shared__ __align__(1024) u8 shared[];
    const Room room = room_at(smem_address(shared), k_blocks, kOutputBytes);
    const u32 warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), columns = ceil_div(n, kColumns);

    if (threadIdx.x == 0) {
        prefetch_map(&map_a);
        initialise_barriers(room);
    }
    __syncthreads();
    launch_next_kernel();

    if (warpgroup == 0) {
        give_registers_to_math();
        const u32 producer = threadIdx.x / 32;
        if (producer < kWarpgroups && elect_lane()) {
            wait_for_previous_kernel();
            const u32 first_stage = producer * room.num_stages;
            u32 next = producer;  // of this run's tiles; those of the runs before count
            Ring ring;
            for (Walk walk(tile_list, __ldcg(num_row_tiles), columns); walk.there(); next -= walk.count(), walk.next())
                for (; next < walk.count(); next += kWarpgroups) {
                    const u32 row = walk.row + next * kRows, rows = min(kRows, walk.rows - next * kRows), first_scale = row & ~3u;
                    const u32 scale_bytes = min((row % 4 + rows + 3) & ~3u, scale_a_stride - first_scale) * 4;
                    for (u32 kb = 0; kb < k_blocks; ++kb, ring.advance(room.num_stages)) {
                        const u32 s = first_stage + ring.stage, bar = room.full + 8 * s;
                        barrier_wait(room.empty + 8 * s, ring.parity ^ 1);
                        barrier_expect(bar, kBytesA + scale_bytes);
                        tensor_copy(room.rows + s * kBytesA, &map_a, 0, row, kb, bar);
                        bulk_copy(room.scales_a + s * kStageScaleBytes, scale_a + static_cast<i64>(kb) * scale_a_stride + first_scale, scale_bytes, bar);
                    }
                }
        } else if (producer == kWarpgroups && elect_lane()) {
            if (!early) wait_for_previous_kernel();
            Ring slots;
            for (Walk walk(tile_list, __ldcg(num_row_tiles), columns); walk.there(); walk.next()) {
                const u32 column = walk.column * kColumns, first_block = walk.group * k_blocks;
                const u8* const weights = weight + (static_cast<i64>(first_block) * n_aligned + column) * kBlockK;
                const float* const scales = scale_b + static_cast<i64>(first_block) * scale_b_stride + first_scale_of(column, scale_b_stride);
                fetch_run(room, slots, weights, scales, min(kColumns, n_aligned - column), k_blocks, n_aligned, scale_b_stride);
            }
        }
        return;
    }
    take_registers_for_math();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const Places at = places_of(room, warpgroup - 1, warp, lane);
    const u32 own_outputs = room.outputs + (warpgroup - 1) * kOutputBytes + warp * 16 * kOutputRow, own_row = warp * 16 + lane % 16;
    u32 next = warpgroup - 1;  // of this run's tiles
    Ring ring, slots;
    wait_for_previous_kernel();
    for (Walk walk(tile_list, __ldcg(num_row_tiles), columns); walk.there(); walk.next()) {
        const u32 count = walk.count(), column = walk.column * kColumns;
        const u32 block_offset = (walk.column - first_scale_of(column, scale_b_stride)) * 4;
        const Ring of_run = slots;
        if (next >= count) pass_run(room, slots, k_blocks, lane);
        for (bool fresh = true; next < count; next += kWarpgroups, fresh = false) {
            const u32 row = walk.row + next * kRows, rows = min(kRows, walk.rows - next * kRows);
            const u32 place = row + min(own_row, rows - 1), entry = sorted ? __ldcg(sorted + place) : place;  // on its way while the tile is multiplied
            float sum[kColumns / 2];
            slots = of_run;
            multiply_tile(sum, room, at, ring, slots, k_blocks, row % 4 * 4, block_offset, fresh, next + kWarpgroups >= count, lane);
            bulk_wait_read();  // of this lane's last row
            __syncwarp();
            if (type == kBf16) lay_out_rows<kColumns, kOutputRow, true>(sum, own_outputs, lane);
            else lay_out_rows<kColumns, kOutputRow, false>(sum, own_outputs, lane);
            fence_async_shared();
            __syncwarp();
            if (lane < 16 && own_row < rows) bulk_store(out + entry * out_stride + column, own_outputs + lane * kOutputRow, min(kColumns, n - column) * 2);
            bulk_commit();
        }
        next -= count;
    }
    bulk_wait();
}
