// Where the sums of a GEMM's tile go: to memory, or, where a cluster shares the k-blocks of a tile, first to the CTA that owns their columns.
#pragma once
#include "wgmma.cuh"

struct Output {
    void* data;
    const void* bias;
    i64 stride;
    u32 m, n, type, bias_type;

    // Adds the bias to a slice of 64 rows and 2 * kCount columns of accumulators as wgmma leaves them. In a loop, a group of 8 columns at a time, behind which
    // all turn by one: registers have no index at run time, and code that few need is to be short (promotion.cuh).
    template <u32 kCount> DEVICE void add_bias(float (&sum)[kCount], u32 column, u32 lane) const {
        const u32 past = column + 2 * kCount;
#pragma unroll 1
        for (u32 c = column + lane % 4 * 2; c < past; c += 8) {
            float first[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) first[i] = c + i % 2 < n ? sum[i] + load_element(bias, c + i % 2, bias_type) : sum[i];
#pragma unroll
            for (u32 i = 4; i < kCount; ++i) sum[i - 4] = sum[i];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) sum[kCount - 4 + i] = first[i];
        }
    }

    // Writes a slice by element; row = first row of this warp's 16. The accumulators are lost, as in write_rows (promotion.cuh).
    template <u32 kCount> DEVICE void write(float (&sum)[kCount], u32 row, u32 column, u32 lane) const {
        const u32 low = row + lane / 4, past = min(column + 2 * kCount, n);
#pragma unroll 1
        for (u32 c = column + lane % 4 * 2; c < past; c += 8) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                if (low + i / 2 * 8 < m && c + i % 2 < n) store_element(data, (low + i / 2 * 8) * stride + c + i % 2, type, sum[i]);
#pragma unroll
            for (u32 i = 4; i < kCount; ++i) sum[i - 4] = sum[i];
        }
    }

    // Writes two neighbours of a row; paired: they are 4-byte aligned 16-bit elements.
    DEVICE void write_pair(float first, float second, u32 row, u32 column, bool paired) const {
        if (row >= m || column >= n) return;
        const i64 at = row * stride + column;
        if (bias != nullptr) first += load_element(bias, column, bias_type);
        if (bias != nullptr && column + 1 < n) second += load_element(bias, column + 1, bias_type);
        if (paired && column + 1 < n) {
            *reinterpret_cast<u32*>(static_cast<u16*>(data) + at) = pack_elements(first, second, type);
            return;
        }
        store_element(data, at, type, first);
        if (column + 1 < n) store_element(data, at + 1, type, second);
    }

    // Writes 8 rows x 16 columns of a warp: of row `row` (lane / 4 of them) x and y lie at columns 2 * (lane % 4) and the next one, z and w 8 columns on.
    // aligned: rows of 16-bit elements are 8-byte aligned. Then one store of the warp writes all 32 bytes of a row: half of these at a time, 0.1 to
    // 0.4 us longer (docs/kernel-notes.md, 2026-11-27).
    DEVICE void write_sixteen(float4 v, u32 row, u32 column, u32 lane, bool aligned) const {
        const u32 own = column + lane % 4 * 2;
        if (!aligned || column + 16 > n) {
            write_pair(v.x, v.y, row, own, aligned);
            write_pair(v.z, v.w, row, own + 8, aligned);
            return;
        }
        if (bias != nullptr) {
            v.x += load_element(bias, own, bias_type), v.y += load_element(bias, own + 1, bias_type);
            v.z += load_element(bias, own + 8, bias_type), v.w += load_element(bias, own + 9, bias_type);
        }
        // Lane q of four writes columns 4q to 4q + 3, which lanes 2q % 4 and the next one hold, in their first pair or their second.
        const u32 first = pack_elements(v.x, v.y, type), second = pack_elements(v.z, v.w, type), from = (lane & ~3u) + lane * 2 % 4;
        const u32 low_first = __shfl_sync(0xffffffffu, first, from), low_second = __shfl_sync(0xffffffffu, second, from);
        const u32 high_first = __shfl_sync(0xffffffffu, first, from + 1), high_second = __shfl_sync(0xffffffffu, second, from + 1);
        const bool takes_first = lane % 4 < 2;
        if (row < m)
            *reinterpret_cast<uint2*>(static_cast<u16*>(data) + row * stride + column + lane % 4 * 4) =
                uint2{takes_first ? low_first : low_second, takes_first ? high_first : high_second};
    }
};

// The exchange is in shares: 16 columns of the first or the second 8 of every 16 rows, so 4 sums a thread of a math warpgroup. That many bytes of all of them:
template <u32 kWarpgroups> constexpr u32 kExchangedBytes = kWarpgroups * 128 * 16;

struct Share {
    u32 slice, row, column;  // its slice of 64 rows; the first of its rows in each 16; the first of its 16 columns
};
// Shares of a slice of 8 * kGroups columns come first columns first.
template <u32 kGroups> DEVICE Share share_at(u32 index) { return {index / kGroups, index % 2 * 8, index % kGroups / 2 * 16}; }

// Sends the sums of this thread to the CTAs of the cluster, each of which owns as many shares, counted by its barrier `exchanged`. room: of all shares;
// slot: where in a share this thread's sums lie.
template <u32 kWarpgroups, u32 kSlices, u32 kCount>
DEVICE void send_sums(const float (&sum)[kSlices][kCount], u32 room, u32 exchanged, u32 split, u32 rank, u32 slot) {
    const u32 owned = kSlices * (kCount / 4) / split;
    u32 owner = 0, place = 0;
#pragma unroll
    for (u32 i = 0; i < kSlices * (kCount / 4); ++i) {
        const Share share = share_at<kCount / 4>(i);
        const float* first = &sum[share.slice][share.column / 2 + share.row / 4];
        const u32 target = room + (rank * owned + place) * kExchangedBytes<kWarpgroups> + slot;
        store_async(map_to_rank(target, owner), {first[0], first[1], first[4], first[5]}, map_to_rank(exchanged, owner));
        if (++place == owned) {
            ++owner;
            place = 0;
        }
    }
}

// This thread's sums of a share among those that the CTA owns, which have arrived: added in the order of ranks.
template <u32 kWarpgroups> DEVICE float4 received_sum(const u8* room, u32 share, u32 owned, u32 split, u32 slot) {
    float4 total = {0.f, 0.f, 0.f, 0.f};
    for (u32 r = 0; r < split; ++r) {
        const float4 part = *reinterpret_cast<const float4*>(room + (r * owned + share) * kExchangedBytes<kWarpgroups> + slot);
        total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
    }
    return total;
}
