// What wgmma.cuh of the package gives the kernels, on machine.h. A product reads its operands when it is issued or, in other runs, when it is waited for.
#pragma once
#include "elements.cuh"

DEVICE u64 matrix_descriptor(u32 address) { return address >> 4; }
DEVICE u32 matrix_descriptor_low(u32 address) { return address >> 4; }
DEVICE u64 matrix_descriptor_at(u32 low) { return low; }
DEVICE void wgmma_fence() {}
// Products that are not waited for yet lie in groups, the last of which is still open.
DEVICE void wgmma_commit() { emulation::self().products.emplace_back(); }
template <u32 kPending> DEVICE void wgmma_wait() {
    auto& groups = emulation::self().products;
    for (; groups.size() > kPending + 1; groups.pop_front())
        for (auto& product : groups.front()) product();
}
template <u32 kCount> DEVICE void fence_registers(float (&)[kCount]) {}

// Row `row`, byte `byte` of 32, of an operand whose rows of 128 bytes are swizzled, for a product issued at this time.
DEVICE float operand(u64 descriptor, u32 row, u32 byte, u64 issued) {
    const u32 address = swizzle(static_cast<u32>(descriptor) * 16 + row * kBlockK + byte);
    emulation::Cta& of = emulation::cta();
    const u8 code = *emulation::at(of, address, 1);
    const u32 chunk = (address - emulation::kSharedBase) / emulation::kChunk;
    return of.in_flight[chunk] || of.copied_at[chunk] > issued ? std::nanf("") : e4m3_value(code);
}

template <class First> DEVICE void issue_product(float* d, u32 columns, First first, u64 b, u32 accumulate) {
    auto product = [=, issued = emulation::machine->clock] {
        const u32 lane = emulation::lane();
        for (u32 i = 0; i < columns / 2; ++i) {
            const u32 row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float sum = accumulate ? d[i] : 0.f;
            for (u32 k = 0; k < 32; ++k) sum += first(row, k, issued) * operand(b, column, k, issued);
            d[i] = sum;
        }
    };
    if (emulation::machine->early_products) product();
    else emulation::self().products.back().push_back(product);
}

template <u32 kN> struct Wgmma {
    DEVICE static void multiply(float (&d)[kN / 2], u64 a, u64 b, u32 accumulate) {
        const u32 first_row = emulation::warp() % 4 * 16;
        issue_product(d, kN, [=](u32 row, u32 k, u64 issued) { return operand(a, first_row + row, k, issued); }, b, accumulate);
    }
    DEVICE static void multiply(float (&d)[kN / 2], const u32 (&a)[4], u64 b, u32 accumulate) {
        std::array<std::array<u32, 4>, 32> of_lanes;
        std::memcpy(&of_lanes, emulation::exchange(kWholeWarp, a, 16), sizeof(of_lanes));
        auto code = [=](u32 row, u32 k, u64) {
            const u32 word = of_lanes[row % 8 * 4 + k % 16 / 4][k / 16 * 2 + row / 8];
            return e4m3_value(static_cast<u8>(word >> k % 4 * 8));
        };
        issue_product(d, kN, code, b, accumulate);
    }
};

// Lane l brings the address of row l % 8 of matrix l / 8; it holds two neighbours of row l / 4 of each matrix.
DEVICE u32 matrix_place(const u8 (*addresses)[16], u32 matrix) {
    u32 address;
    std::memcpy(&address, addresses[matrix * 8 + emulation::lane() / 4], 4);
    return address + emulation::lane() % 4 * 4;
}
DEVICE void store_matrices(u32 address, const u32 (&words)[4]) {
    const u8(*addresses)[16] = emulation::exchange(kWholeWarp, &address, 4);
    for (u32 i = 0; i < 4; ++i) {
        const u32 place = matrix_place(addresses, i);
        if (emulation::marked(emulation::cta().to_be_stored, place, 4)) emulation::fail("writes over what a bulk store has yet to read");
        std::memcpy(emulation::at(emulation::cta(), place, 4), &words[i], 4);
    }
    __syncwarp();
}
DEVICE void load_matrices(u32 (&words)[4], u32 address) {
    const u8(*addresses)[16] = emulation::exchange(kWholeWarp, &address, 4);
    for (u32 i = 0; i < 4; ++i) std::memcpy(&words[i], emulation::read_at(matrix_place(addresses, i), 4), 4);
    __syncwarp();
}
