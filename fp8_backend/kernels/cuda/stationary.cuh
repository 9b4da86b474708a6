// What GEMMs share whose weights stay in shared memory for a run of tiles: where everything lies, and the products of a tile.
//
// A CTA takes runs: tiles of 64 rows below each other in the same 128 columns. A run's weights come to a ring of k-blocks once, each with its scales; those of
// the next run follow where there is room, and else as a warpgroup's last tile of the run lets k-blocks go. Math warpgroups take tiles in turn, so that the end of
// one lies under the products of the others; each has a ring of stages of its own for rows and their scales.
//
// Barriers per stage: full (1 arrival + bytes), empty (one arrival per warp of its warpgroup). Per k-block of weights: full (1 arrival + bytes), empty (one arrival
// per math warp). A warpgroup without a tile in a run waits for its weights all the same: a phase is told by its parity, so none may be missed.
#pragma once
#include "arrivals.cuh"
#include "tiles.cuh"

constexpr u32 kRows = 64, kColumns = 128, kWarpgroups = MATH_WARPGROUPS;
constexpr u32 kBytesA = kRows * kBlockK, kBytesB = kColumns * kBlockK;
constexpr u32 kStageScaleBytes = (kRows + 4) * 4;  // tiles may start at any row, copies of scales at every fourth
constexpr u32 kBlockScaleBytes = kScaleFloats * 4;
constexpr u32 kMaxStages = 8;
constexpr u32 kStageOfAll = kWarpgroups * (kBytesA + kStageScaleBytes + 2 * 8), kSlot = kBytesB + kBlockScaleBytes + 2 * 8;

// How many stages a warpgroup has, k-blocks of weights there are room for, and where all lies.
struct Room {
    u32 num_stages, num_slots;
    u32 weights, outputs, rows, scales_a, scales_b, full, empty, weights_full, weights_empty;
};
// output_bytes: of outputs on their way, a warpgroup.
DEVICE Room room_at(u32 base, u32 k_blocks, u32 output_bytes) {
    Room room;
    const u32 bytes = SHARED_BYTES - kWarpgroups * output_bytes;
    room.num_slots = min(2 * k_blocks, (bytes - LEAST_STAGES * kStageOfAll) / kSlot);
    room.num_stages = min(kMaxStages, (bytes - room.num_slots * kSlot) / kStageOfAll);
    const u32 all_stages = kWarpgroups * room.num_stages;
    room.weights = base;
    room.outputs = room.weights + room.num_slots * kBytesB;
    room.rows = room.outputs + kWarpgroups * output_bytes;
    room.scales_a = room.rows + all_stages * kBytesA;
    room.scales_b = room.scales_a + all_stages * kStageScaleBytes;
    room.full = room.scales_b + room.num_slots * kBlockScaleBytes;
    room.empty = room.full + all_stages * 8;
    room.weights_full = room.empty + all_stages * 8;
    room.weights_empty = room.weights_full + room.num_slots * 8;
    return room;
}
// By one thread.
DEVICE void initialise_barriers(const Room& room) {
    for (u32 s = 0; s < kWarpgroups * room.num_stages; ++s) {
        barrier_init(room.full + 8 * s, 1);
        barrier_init(room.empty + 8 * s, 4 * kArrivalsOfWarp);
    }
    for (u32 slot = 0; slot < room.num_slots; ++slot) {
        barrier_init(room.weights_full + 8 * slot, 1);
        barrier_init(room.weights_empty + 8 * slot, kWarpgroups * 4 * kArrivalsOfWarp);
    }
    barrier_init_fence();
}

// Fetches the k-blocks of a run's weights, rows_b of 128 columns each, and their scales. weights, scales: of the first k-block; packed.
DEVICE void fetch_run(const Room& room, Ring& slots, const u8* weights, const float* scales, u32 rows_b, u32 k_blocks, u32 n_aligned, u32 scale_b_stride) {
    for (u32 kb = 0; kb < k_blocks; ++kb, slots.advance(room.num_slots)) {
        const u32 slot = slots.stage, bar = room.weights_full + 8 * slot;
        barrier_wait(room.weights_empty + 8 * slot, slots.parity ^ 1);
        barrier_expect(bar, rows_b * kBlockK + kBlockScaleBytes);
        bulk_copy(room.weights + slot * kBytesB, weights + static_cast<i64>(kb) * n_aligned * kBlockK, rows_b * kBlockK, bar);
        bulk_copy(room.scales_b + slot * kBlockScaleBytes, scales + static_cast<i64>(kb) * scale_b_stride, kBlockScaleBytes, bar);
    }
}

// Lets the weights of a run go in which the warpgroup has no tile.
DEVICE void pass_run(const Room& room, Ring& slots, u32 k_blocks, u32 lane) {
    for (u32 kb = 0; kb < k_blocks; ++kb, slots.advance(room.num_slots)) {
        barrier_wait(room.weights_full + 8 * slots.stage, slots.parity);
        __syncwarp();
        if (arrives_for_warp(lane)) barrier_arrive(room.weights_empty + 8 * slots.stage);
    }
}

// Where a lane of a warpgroup finds its operands in stage and slot 0.
struct Places {
    u32 rows, weights;             // descriptors' low words
    u32 row_scales, block_scales;  // of row lane / 4; of the columns
    u32 full, empty;
};
DEVICE Places places_of(const Room& room, u32 warpgroup, u32 warp, u32 lane) {
    const u32 first = warpgroup * room.num_stages;
    // From a shuffle, for ptxas would compute it anew in every block.
    const u32 row_scales = __shfl_sync(0xffffffffu, room.scales_a + first * kStageScaleBytes + (warp * 16 + lane / 4) * 4, lane);
    return {matrix_descriptor_low(room.rows + first * kBytesA), matrix_descriptor_low(room.weights), row_scales, room.scales_b, room.full + 8 * first, room.empty + 8 * first};
}

// Sets sum to the products of a tile. fresh: the run's weights have not been waited for. last: the warpgroup has no tile of the run behind this one. slots:
// where the run's weights begin; moves past them. row_offset, block_offset: in bytes, of the tile's scales among those that were fetched.
// Of two warpgroups, the product of the next k-block is issued before the last one is waited for; three have no registers for that.
DEVICE void multiply_tile(float (&sum)[kColumns / 2], const Room& room, const Places& at, Ring& ring, Ring& slots, u32 k_blocks, u32 row_offset, u32 block_offset,
                          bool fresh, bool last, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < kColumns / 2; ++i) sum[i] = 0.f;
    // The product of the rings' stages, under way.
    auto issue = [&](float (&partial)[kColumns / 2]) {
        barrier_wait(at.full + 8 * ring.stage, ring.parity);
        if (fresh) barrier_wait(room.weights_full + 8 * slots.stage, slots.parity);
        const u32 rows = at.rows + ring.stage * (kBytesA / 16), weights = at.weights + slots.stage * (kBytesB / 16);
        fence_registers(partial);
        wgmma_fence();
        issue_product<kColumns>(partial, rows, weights);
    };
    auto finish = [&](float (&partial)[kColumns / 2], float (&following)[kColumns / 2], bool more) {
        const u32 s = ring.stage, slot = slots.stage;
        const float of_block = load_shared(at.block_scales + block_offset + slot * kBlockScaleBytes);
        const float low = load_shared(at.row_scales + row_offset + s * kStageScaleBytes) * of_block;
        const float high = load_shared(at.row_scales + row_offset + s * kStageScaleBytes + 32) * of_block;
        ring.advance(room.num_stages);
        slots.advance(room.num_slots);
        if (more) {
            issue(following);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        fence_registers(partial);
        __syncwarp();
        barrier_arrive_after_words(at.empty + 8 * s, low, high, arrives_for_warp(lane));
        if (last) barrier_arrive_after_words(room.weights_empty + 8 * slot, low, high, arrives_for_warp(lane));
#pragma unroll
        for (u32 i = 0; i < kColumns / 2; ++i) sum[i] += (i % 4 < 2 ? low : high) * partial[i];
    };
    if constexpr (kWarpgroups == 2) {
        float even[kColumns / 2], odd[kColumns / 2];
        u32 remaining = k_blocks;
        issue(even);
        for (; remaining > 2; remaining -= 2) {
            finish(even, odd, true);
            finish(odd, even, true);
        }
        if (remaining == 2) {
            finish(even, odd, true);
            finish(odd, even, false);
        } else {
            finish(even, odd, false);
        }
    } else {
        for (u32 kb = 0; kb < k_blocks; ++kb) {
            float partial[kColumns / 2];
            issue(partial);
            finish(partial, partial, false);
        }
    }
}

DEVICE void give_registers_to_math() {
    if (kWarpgroups == 2) give_registers<40>();
    else give_registers<32>();
}
DEVICE void take_registers_for_math() {
    if (kWarpgroups == 2) take_registers<232>();
    else take_registers<160>();
}
