// What the GEMMs share about tiles: which one is next in a list that the device has made, their weights' scales, and outputs on their way to the copy engine.
#pragma once
#include "wgmma.cuh"

// A tile {group, first row, rows | ...} of the list, and which of its runs of columns.
struct Item {
    int4 tile;
    u32 run;
};
// Items of a band of rows lie one after the other, rows fastest, so that a tile of weights is fetched once. tiles: as route.cuh lists them.
DEVICE Item item_at(u32 index, const int4* tiles, u32 runs) {
    const int4 band = __ldcg(tiles + index / runs);
    const u32 width = static_cast<u32>(band.z) >> 16, local = index - band.w * runs;
    return {__ldcg(tiles + band.w + local % width), local / width};
}

// What a cluster of two CTAs takes: two tiles of a band in the same column, or the last tile of a band that has an odd number of them in two neighbouring
// columns. per_tile: items a tile counts, half of the columns, rounded up.
struct PairItem {
    int4 tile;
    u32 column;
    bool same_columns;  // the two CTAs multiply by the same weights, else the same rows
};
DEVICE PairItem pair_at(u32 index, const int4* tiles, u32 per_tile, u32 rank) {
    const int4 band = __ldcg(tiles + index / per_tile);
    const u32 width = static_cast<u32>(band.z) >> 16, pairs = width / 2, local = index - band.w * per_tile, paired = pairs * per_tile * 2;
    if (local < paired) return {__ldcg(tiles + band.w + local % pairs * 2 + rank), local / pairs, true};
    return {__ldcg(tiles + band.w + width - 1), (local - paired) * 2 + rank, false};
}

// Fetches two blocks of 128 rows of a grouped weight, as far as there are so many, from a k-block counted over all groups. kRanks: 0, or to which CTAs of the
// cluster, where `fetches`; the bytes are expected in any case.
constexpr u32 kHalf = 128, kBytesHalf = kHalf * kBlockK;
template <u16 kRanks = 0>
DEVICE void fetch_weight(const u8* weight, u32 k_block, u32 block_0, u32 block_1, u32 n_aligned, u32 bar, u32 target, bool fetches = true) {
    auto bytes_of = [&](u32 block) { return block * kHalf < n_aligned ? min(kHalf, n_aligned - block * kHalf) * kBlockK : 0; };
    barrier_expect(bar, bytes_of(block_0) + bytes_of(block_1));
    const u8* const source = weight + static_cast<i64>(k_block) * n_aligned * kBlockK;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 block = half ? block_1 : block_0, bytes = bytes_of(block);
        if (!bytes || !fetches) continue;
        if (kRanks) bulk_copy_multicast(target + half * kBytesHalf, source + block * (kHalf * kBlockK), bytes, bar, kRanks);
        else bulk_copy(target + half * kBytesHalf, source + block * (kHalf * kBlockK), bytes, bar);
    }
}

// Calls multiply_block(stage), which advances the ring, for all k-blocks of a tile. kRounds: in rounds of all stages, whose addresses are constants then; what
// comes before and after them to make them whole is written out (kPeeled), or called in a loop, for less code.
template <bool kRounds, bool kPeeled, u32 kStages, class Block> DEVICE void multiply_in_rounds(u32 k_blocks, Ring& ring, Block&& multiply_block) {
    u32 remaining = k_blocks;
    if (kRounds && kPeeled) {
#pragma unroll
        for (u32 s = 1; s < kStages; ++s)
            if (s == ring.stage && remaining > 0) {
                multiply_block(s);
                --remaining;
            }
        for (; remaining >= kStages; remaining -= kStages)
#pragma unroll
            for (u32 s = 0; s < kStages; ++s) multiply_block(s);
#pragma unroll
        for (u32 s = 0; s + 1 < kStages; ++s)
            if (remaining > 0) {
                multiply_block(s);
                --remaining;
            }
    }
    while (remaining > 0) {
        if (kRounds && !kPeeled && ring.stage == 0 && remaining >= kStages) {
#pragma unroll
            for (u32 s = 0; s < kStages; ++s) multiply_block(s);
            remaining -= kStages;
        } else {
            multiply_block(ring.stage);
            --remaining;
        }
    }
}

// The product of a k-block, under way: 64 rows of one operand and kN of the other, by their descriptors' low words.
template <u32 kN> DEVICE void issue_product(float (&partial)[kN / 2], u32 rows, u32 columns) {
#pragma unroll
    for (u32 i = 0; i < kBlockK / 32; ++i) Wgmma<kN>::multiply(partial, matrix_descriptor_at(rows + 2 * i), matrix_descriptor_at(columns + 2 * i), i > 0);
    wgmma_commit();
}

// Where the 8 weight scales fetched for a tile start in a row of scales; tiles past the last column stay inside the row.
DEVICE u32 first_scale_of(u32 first_column, u32 scale_b_stride) { return min(first_column / 128 & ~3u, scale_b_stride - kScaleFloats); }

// Lays 16 rows x kColumns (64 or 32) columns of a warp's accumulators into rows of 128 or 64 bytes, swizzled as the copy engine expects. The target
// is a multiple of 1024 bytes away from a swizzle period.
template <u32 kColumns, bool kIsBf16> DEVICE void lay_out(const float* sum, u32 target, u32 lane) {
    const u32 row = lane % 16, row_address = target + row * kColumns * 2, swizzle = kColumns == 64 ? row % 8 : row / 2 % 4;
#pragma unroll
    for (u32 q = 0; q < kColumns / 16; ++q) {  // 16 columns: two groups of 8
        u32 words[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const float low = sum[q * 8 + i * 2], high = sum[q * 8 + i * 2 + 1];
            words[i] = kIsBf16 ? pack_bf16(low, high) : pack_f16(low, high);
        }
        store_matrices(row_address + ((q * 2 + lane / 16) ^ swizzle) * 16, words);
    }
}

// Sends this warp's 16 rows of each slice of 64 to memory by the copy engine, kStored columns of all at a time: through `room`, which has kTall rows for these and
// is free. first_row: the warp's in the tile, which begins at column x and row y. What is sent ends together.
template <u32 kStored, u32 kTall, u32 kSlices, u32 kCount>
DEVICE void store_slices(const TensorMap* map, const float (&sum)[kSlices][kCount], u32 room, u32 first_row, u32 x, u32 y, u32 type, u32 lane) {
#pragma unroll
    for (u32 j = 0; j < 2 * kCount / kStored; ++j) {
        constexpr u32 kRowBytes = kStored * 2;
        const u32 target = room + (j * kTall + first_row) * kRowBytes;
#pragma unroll
        for (u32 slice = 0; slice < kSlices; ++slice) {
            const float* columns = sum[slice] + j * (kStored / 2);
            if (type == kBf16) lay_out<kStored, true>(columns, target + slice * 64 * kRowBytes, lane);
            else lay_out<kStored, false>(columns, target + slice * 64 * kRowBytes, lane);
        }
        fence_async_shared();
        __syncwarp();
        if (lane == 0)
#pragma unroll
            for (u32 slice = 0; slice < kSlices; ++slice) tensor_store(map, target + slice * 64 * kRowBytes, x + j * kStored, y + first_row + slice * 64);
    }
    if (lane == 0) bulk_commit();
}
