// Where the sums of a GEMM's tile go: to memory, or, where a cluster shares the k-blocks of a tile, first to the CTA that owns their columns.
#pragma once
#include "wgmma.cuh"

struct Output {
    void* data;
    const void* bias;
    i64 stride;
    u32 m, n, type, bias_type;

    // Adds the bias to a slice of 64 rows and 2 * kCount columns of accumulators as wgmma leaves them.
    template <u32 kCount> DEVICE void add_bias(float (&sum)[kCount], u32 column, u32 lane) const {
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) {
            const u32 c = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (c < n) sum[i] += load_element(bias, c, bias_type);
        }
    }

    // Writes a slice; row = first row of this warp's 16.
    template <u32 kCount> DEVICE void write(const float (&sum)[kCount], u32 row, u32 column, u32 lane) const {
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) {
            const u32 r = row + lane / 4 + i / 2 % 2 * 8, c = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (r < m && c < n) store_element(data, r * stride + c, type, sum[i]);
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
};

// Barriers are initialised: for the threads of this CTA, or for all CTAs of its cluster, whose sums they will count.
DEVICE void meet(u32 split) {
    if (split > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
}

// What a group of 8 columns and 64 rows a math warpgroup takes in the exchange: 4 sums a thread.
template <u32 kWarpgroups> constexpr u32 kExchangedBytes = kWarpgroups * 128 * 16;

// Sends the sums of this thread to the CTAs of the cluster, each of which owns as many groups, counted by its barrier `exchanged`. room: of all groups;
// slot: where in a group this thread's sums lie.
template <u32 kWarpgroups, u32 kSlices, u32 kCount>
DEVICE void send_sums(const float (&sum)[kSlices][kCount], u32 room, u32 exchanged, u32 split, u32 rank, u32 slot) {
    const u32 owned = kSlices * (kCount / 4) / split;
    u32 owner = 0, place = 0;
#pragma unroll
    for (u32 g = 0; g < kSlices * (kCount / 4); ++g) {
        const float* group = &sum[g / (kCount / 4)][g % (kCount / 4) * 4];
        const u32 target = room + (rank * owned + place) * kExchangedBytes<kWarpgroups> + slot;
        store_async(map_to_rank(target, owner), {group[0], group[1], group[2], group[3]}, map_to_rank(exchanged, owner));
        if (++place == owned) {
            ++owner;
            place = 0;
        }
    }
}

// This thread's sums of a group among those that the CTA owns, which have arrived: added in the order of ranks.
template <u32 kWarpgroups> DEVICE float4 received_sum(const u8* room, u32 group, u32 owned, u32 split, u32 slot) {
    float4 total = {0.f, 0.f, 0.f, 0.f};
    for (u32 r = 0; r < split; ++r) {
        const float4 part = *reinterpret_cast<const float4*>(room + (r * owned + group) * kExchangedBytes<kWarpgroups> + slot);
        total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
    }
    return total;
}
