// What ptx.cuh of the package gives the kernels, on machine.h: the same names, the same meaning.
#pragma once
#include "machine.h"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
using std::max;
using std::min;

#define DEVICE inline
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// emulated.py writes it: address, dimensions, strides in bytes, box, bytes of an element, bytes by which rows are swizzled (0, 64 or 128).
struct alignas(64) TensorMap {
    u64 address, dims[3], strides[2];
    u32 box[3], element, swizzled, rank;
    u64 unused[5];
};
static_assert(sizeof(TensorMap) == 128);

constexpr u32 kBlockK = 128;
constexpr u32 kScaleFloats = 8;

template <class T> DEVICE T ceil_div(T a, T b) { return (a + b - 1) / b; }

DEVICE u32 smem_address(const void* pointer) {
    return static_cast<u32>(static_cast<const u8*>(pointer) - emulation::cta().shared) + emulation::kSharedBase;
}

// ---- barriers ----------------------------------------------------------------------------------------------------------

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    emulation::Barrier& made = emulation::cta().barriers[barrier] = {};
    made.expected = arrivals;
    made.pending = static_cast<int>(arrivals);
}
DEVICE void barrier_init_fence() {}
DEVICE void barrier_arrive(u32 barrier) { emulation::barrier_at(emulation::owner_of(barrier), barrier).arrive(1); }
DEVICE void barrier_expect(u32 barrier, u32 bytes) { emulation::barrier_at(emulation::cta(), barrier).arrive(1, bytes); }
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    emulation::Barrier& at = emulation::barrier_at(emulation::cta(), barrier);
    emulation::wait_until([&] { return at.passed(parity); }, "a barrier's phase");
}
DEVICE bool barrier_passed(u32 barrier, u32 parity) { return emulation::barrier_at(emulation::cta(), barrier).passed(parity); }
DEVICE float load_shared(u32 address) {
    float value;
    std::memcpy(&value, emulation::read_at(address, 4), 4);
    return value;
}
DEVICE float2 load_shared_pair(u32 address) { return {load_shared(address), load_shared(address + 4)}; }
DEVICE uint2 load_shared_words(u32 address) {
    uint2 value;
    std::memcpy(&value, emulation::read_at(address, 8), 8);
    return value;
}
DEVICE uint4 load_shared_quad(u32 address) {
    const uint2 low = load_shared_words(address), high = load_shared_words(address + 8);
    return {low.x, low.y, high.x, high.y};
}
DEVICE void store_shared_quad(u32 address, uint4 value) { std::memcpy(emulation::at(emulation::cta(), address, 16), &value, 16); }
DEVICE void store_shared_pair(u32 address, uint2 value) { std::memcpy(emulation::at(emulation::cta(), address, 8), &value, 8); }
DEVICE void barrier_arrive_after(u32 barrier, float) { barrier_arrive(barrier); }
DEVICE void barrier_arrive_after_words(u32 barrier, float, float, u32 arrives) {
    if (arrives) barrier_arrive(barrier);
}
DEVICE void barrier_arrive_remote_after_words(u32 barrier, float first, float second, u32 arrives) { barrier_arrive_after_words(barrier, first, second, arrives); }
DEVICE void named_barrier(u32 id, u32 threads) { emulation::meet(emulation::cta().named[id], threads, "a named barrier"); }
DEVICE void named_barrier_arrive(u32 id, u32 threads) {
    emulation::Meeting& meeting = emulation::cta().named[id];
    if (++meeting.arrived == threads) {
        meeting.arrived = 0;
        ++meeting.generation;
    }
}
DEVICE void fence_async_shared() {}
DEVICE void __syncthreads() { emulation::meet(emulation::cta().whole, emulation::cta().live, "__syncthreads"); }
DEVICE bool __syncthreads_or(bool value) {
    emulation::Cta& cta = emulation::cta();
    cta.any = cta.any || value;
    __syncthreads();
    const bool any = cta.any;
    __syncthreads();
    cta.any = false;
    __syncthreads();
    return any;
}

// ---- clusters and dependent launches -----------------------------------------------------------------------------------

DEVICE u32 cluster_rank() { return emulation::cta().rank; }
DEVICE u32 cluster_size() { return static_cast<u32>(emulation::machine->ctas.size()); }
DEVICE void cluster_arrive() {
    emulation::self().cluster_generation = emulation::machine->cluster.generation;
    if (++emulation::machine->cluster.arrived == emulation::machine->live) {
        emulation::machine->cluster.arrived = 0;
        ++emulation::machine->cluster.generation;
    }
}
DEVICE void cluster_arrive_relaxed() { cluster_arrive(); }
DEVICE void cluster_wait() {
    const u32 before = emulation::self().cluster_generation;
    emulation::wait_until([before] { return emulation::machine->cluster.generation != before; }, "its cluster");
}
DEVICE u32 map_to_rank(u32 address, u32 rank) { return address | (rank + 1) << emulation::kRankShift; }
DEVICE u32 load_remote(u32 address) {
    u32 value;
    std::memcpy(&value, emulation::read_at(address, 4), 4);
    return value;
}
DEVICE void store_async(u32 target, float4 value, u32 barrier) {
    emulation::Cta& of = emulation::owner_of(target);
    emulation::begin_write(of, target, 16);
    emulation::machine->engine.push_back([=, &of] {
        std::memcpy(emulation::at(of, target, 16), &value, 16);
        emulation::end_write(of, target, 16);
        emulation::barrier_at(of, barrier).arrive(0, -16);
    });
}
DEVICE void wait_for_previous_kernel() {}
DEVICE void launch_next_kernel() {}

DEVICE u32 grid_round(const u32* arrivals) { return *arrivals & 0x80000000u; }
DEVICE void meet_grid(u32* arrivals, u32 round, bool first, u32 ctas) {
    *arrivals += first ? 0x80000000u - (ctas - 1) : 1;
    emulation::wait_until([=] { return (*arrivals & 0x80000000u) != round; }, "the other CTAs of the grid");
}

DEVICE void count_one(u32* counter) { ++*counter; }
DEVICE u32 count_in_turn(u32* counter) { return (*counter)++; }
DEVICE void wait_for_count(const u32* counter, u32 count) {
    emulation::wait_until([=] { return *counter >= count; }, "what others count");
}

// ---- copies ------------------------------------------------------------------------------------------------------------

DEVICE void bulk_copy(u32 target, const void* source, u32 bytes, u32 barrier) {
    emulation::Cta& of = emulation::cta();
    if (bytes == 0 || bytes % 16 || target % 16 || reinterpret_cast<uintptr_t>(source) % 16) emulation::fail("bulk copy that is not in units of 16 bytes");
    emulation::begin_write(of, target, bytes);
    emulation::machine->engine.push_back([=, &of] {
        std::memcpy(emulation::at(of, target, bytes), source, bytes);
        emulation::end_write(of, target, bytes);
        emulation::barrier_at(of, barrier).arrive(0, -static_cast<i64>(bytes));
    });
}
DEVICE void bulk_copy_multicast(u32 target, const void* source, u32 bytes, u32 barrier, u16 ranks) {
    if (bytes == 0 || bytes % 16 || target % 16 || reinterpret_cast<uintptr_t>(source) % 16) emulation::fail("bulk copy that is not in units of 16 bytes");
    for (u32 rank = 0; rank < cluster_size(); ++rank) {
        if (!(ranks >> rank & 1)) continue;
        emulation::Cta& of = *emulation::machine->ctas[rank];
        emulation::begin_write(of, target, bytes);
        emulation::machine->engine.push_back([=, &of] {
            std::memcpy(emulation::at(of, target, bytes), source, bytes);
            emulation::end_write(of, target, bytes);
            emulation::barrier_at(of, barrier).arrive(0, -static_cast<i64>(bytes));
        });
    }
}

DEVICE void prefetch_l2(const void* source, u32 bytes) {
    if (bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(source) % 16) emulation::fail("bulk prefetch that is not in units of 16 bytes");
}

// Where the byte for an address lies, swizzled as the engine and wgmma do it, in rows of 128 or 64 bytes.
DEVICE u32 swizzle(u32 address, u32 row_bytes = 128) { return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4; }

// Rows outside of a tensor that copies have filled with zeros: the copy engine is slow at that.
extern "C" {
u32 filled_rows = 0;
}

DEVICE void copy_box(emulation::Cta& of, u32 target, const TensorMap& map, u32 x, u32 y, u32 z) {
    const u32 row_bytes = map.box[0] * map.element;
    for (u32 plane = 0; plane < map.box[2]; ++plane)
        for (u32 row = 0; row < map.box[1]; ++row) {
            filled_rows += y + row >= map.dims[1];
            for (u32 byte = 0; byte < row_bytes; ++byte) {
                const u64 column = x + byte / map.element;
                const bool inside = column < map.dims[0] && y + row < map.dims[1] && z + plane < map.dims[2];
                const u32 place = target + (plane * map.box[1] + row) * row_bytes + byte;
                const u8* source = reinterpret_cast<const u8*>(map.address) + x * map.element + byte + (y + row) * map.strides[0] + (z + plane) * map.strides[1];
                *emulation::at(of, map.swizzled ? swizzle(place, map.swizzled) : place, 1) = inside ? *source : 0;
            }
        }
}
DEVICE void tensor_copy(u32 target, const TensorMap* map, u32 x, u32 y, u32 z, u32 barrier) {
    const TensorMap described = *map;
    const u32 bytes = described.box[0] * described.box[1] * described.box[2] * described.element;
    emulation::Cta& of = emulation::cta();
    emulation::begin_write(of, target, bytes);
    emulation::machine->engine.push_back([=, &of] {
        copy_box(of, target, described, x, y, z);
        emulation::end_write(of, target, bytes);
        emulation::barrier_at(of, barrier).arrive(0, -static_cast<i64>(bytes));
    });
}
DEVICE void tensor_copy_multicast(u32 target, const TensorMap* map, u32 x, u32 y, u32 z, u32 barrier, u16 ranks) {
    const TensorMap described = *map;
    const u32 bytes = described.box[0] * described.box[1] * described.box[2] * described.element;
    for (u32 rank = 0; rank < cluster_size(); ++rank) {
        if (!(ranks >> rank & 1)) continue;
        emulation::Cta& of = *emulation::machine->ctas[rank];
        emulation::begin_write(of, target, bytes);
        emulation::machine->engine.push_back([=, &of] {  // one after the other: it may land here long before it does there
            copy_box(of, target, described, x, y, z);
            emulation::end_write(of, target, bytes);
            emulation::barrier_at(of, barrier).arrive(0, -static_cast<i64>(bytes));
        });
    }
}
DEVICE void tensor_store(const TensorMap* map, u32 source, u32 x, u32 y) {
    emulation::Fiber& fiber = emulation::self();
    emulation::Cta& of = emulation::cta();
    const TensorMap described = *map;
    const u32 row_bytes = described.box[0] * described.element;
    ++fiber.stores;
    emulation::mark(of.to_be_stored, source, row_bytes * described.box[1], 1);
    emulation::machine->engine.push_back([=, &fiber, &of] {
        for (u32 row = 0; row < described.box[1]; ++row)
            for (u32 byte = 0; byte < row_bytes; ++byte) {
                if (x + byte / described.element >= described.dims[0] || y + row >= described.dims[1]) continue;
                const u32 place = source + row * row_bytes + byte;
                reinterpret_cast<u8*>(described.address)[x * described.element + byte + (y + row) * described.strides[0]] =
                    *emulation::at(of, described.swizzled ? swizzle(place, described.swizzled) : place, 1);
            }
        emulation::mark(of.to_be_stored, source, row_bytes * described.box[1], -1);
        --fiber.stores;
    });
}
DEVICE void bulk_commit() {}
DEVICE void bulk_wait() {
    emulation::Fiber& fiber = emulation::self();
    emulation::wait_until([&] { return fiber.stores == 0; }, "its bulk stores");
}
DEVICE void bulk_wait_read() { bulk_wait(); }
DEVICE void prefetch_map(const TensorMap*) {}

DEVICE void copy_async(u32 target, const void* source, u32 bytes) {
    emulation::Cta& of = emulation::cta();
    emulation::begin_write(of, target, bytes);
    emulation::self().copies.push_back([=, &of] {
        std::memcpy(emulation::at(of, target, bytes), source, bytes);
        emulation::end_write(of, target, bytes);
    });
}
DEVICE void copy_16_async(u32 target, const void* source) { copy_async(target, source, 16); }
DEVICE void copy_4_async(u32 target, const void* source) { copy_async(target, source, 4); }
DEVICE void barrier_arrive_after_copies(u32 barrier) {
    emulation::Cta& of = emulation::cta();
    emulation::self().copies.push_back([=, &of] { emulation::barrier_at(of, barrier).arrive(1); });
}
DEVICE void load_fresh(const void* source, u32 (&words)[4]) {
    if (reinterpret_cast<std::uintptr_t>(source) % 16) emulation::fail("reads 16 bytes at an address that is not a multiple of them");
    std::memcpy(words, source, 16);
}
template <class T> DEVICE T __ldcg(const T* source) {
    if (reinterpret_cast<std::uintptr_t>(source) % sizeof(T)) emulation::fail("reads " + std::to_string(sizeof(T)) + " bytes at an address that is not a multiple of them");
    return *source;
}
DEVICE u32 atomicAdd(u32* counter, u32 more) {
    const u32 before = *counter;
    *counter += more;
    return before;
}
DEVICE u32 atomicOr(u32* word, u32 bits) {
    const u32 before = *word;
    *word |= bits;
    return before;
}

// ---- warps -------------------------------------------------------------------------------------------------------------

constexpr u32 kWholeWarp = 0xffffffffu;
DEVICE void __syncwarp(u32 mask = kWholeWarp) { emulation::exchange(mask, "", 0); }
template <class T> DEVICE T shuffle(u32 mask, T value, u32 source) {
    const u8(*words)[16] = emulation::exchange(mask, &value, sizeof(T));
    std::memcpy(&value, words[source], sizeof(T));
    return value;
}
template <class T> DEVICE T __shfl_sync(u32 mask, T value, u32 source) { return shuffle(mask, value, source % 32); }
template <class T> DEVICE T __shfl_xor_sync(u32 mask, T value, u32 distance) { return shuffle(mask, value, emulation::lane() ^ distance); }
template <class T> DEVICE T __shfl_up_sync(u32 mask, T value, u32 distance) {
    return shuffle(mask, value, emulation::lane() >= distance ? emulation::lane() - distance : emulation::lane());
}
template <class T> DEVICE u32 __match_any_sync(u32 mask, T value) {
    const u8(*words)[16] = emulation::exchange(mask, &value, sizeof(T));
    u32 same = 0;
    for (u32 other = 0; other < 32; ++other)
        if (mask >> other & 1 && std::memcmp(words[other], &value, sizeof(T)) == 0) same |= 1u << other;
    return same;
}
DEVICE u32 __ballot_sync(u32 mask, bool value) {
    const u8 mine = value;
    const u8(*words)[16] = emulation::exchange(mask, &mine, 1);
    u32 lanes = 0;
    for (u32 other = 0; other < 32; ++other) lanes |= (mask >> other & words[other][0]) << other;
    return lanes;
}
DEVICE bool elect_lane() { return emulation::lane() == 0; }
template <u32> DEVICE void give_registers() {}
template <u32> DEVICE void take_registers() {}
DEVICE void keep_in_registers(u32&, u32&, u32&, u32&, u32&, u32&) {}

struct Ring {
    u32 stage = 0, parity = 0;
    DEVICE void advance(u32 stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ---- conversions and arithmetic ----------------------------------------------------------------------------------------

template <class To, class From> DEVICE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}
DEVICE u32 __float_as_uint(float value) { return bits_as<u32>(value); }
DEVICE float __uint_as_float(u32 value) { return bits_as<float>(value); }
DEVICE u16 bf16_of(float value) {
    const u32 bits = bits_as<u32>(value);
    if (value != value) return 0x7fff;
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE u32 pack_bf16(float low, float high) { return bf16_of(low) | static_cast<u32>(bf16_of(high)) << 16; }
DEVICE u32 pack_f16(float low, float high) {
    return bits_as<u16>(static_cast<_Float16>(low)) | static_cast<u32>(bits_as<u16>(static_cast<_Float16>(high))) << 16;
}
// e4m3: 4 bits of exponent, bias 7, 3 of mantissa, no infinity.
DEVICE float e4m3_value(u8 code) {
    const u32 exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7f) == 0x7f) return std::nanf("");
    const float value = exponent ? std::ldexp(1.f + mantissa / 8.f, static_cast<int>(exponent) - 7) : std::ldexp(mantissa / 8.f, -6);
    return code & 0x80 ? -value : value;
}
DEVICE u8 e4m3_of(float value) {
    if (value != value) return 0x7f;
    const u8 sign = std::signbit(value) ? 0x80 : 0;
    const float magnitude = std::min(std::fabs(value), 448.f);
    // In units of the last place of its binade; ties to even, as nearbyint rounds.
    const int exponent = magnitude < std::ldexp(1.f, -6) ? -6 : std::ilogb(magnitude);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
    const int code = (exponent + 6) * 8 + units;  // a carry into the next binade comes out right
    return sign | static_cast<u8>(std::min(code, 0x7e));
}
DEVICE u16 pack_e4m3(float low, float high) { return e4m3_of(low) | static_cast<u16>(e4m3_of(high)) << 8; }
DEVICE float low_bf16(u32 pair) { return bits_as<float>(pair << 16); }
DEVICE float high_bf16(u32 pair) { return bits_as<float>(pair & 0xffff0000u); }
DEVICE float low_f16(u32 pair) { return bits_as<_Float16>(static_cast<u16>(pair)); }
DEVICE float high_f16(u32 pair) { return low_f16(pair >> 16); }

template <class Low, class High> DEVICE void multiply_pairs(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high, Low low, High high) {
    u32 rows[32][4], columns[32][2], own[2] = {b_low, b_high};
    const u8(*words)[16] = emulation::exchange(kWholeWarp, a, 16);
    for (u32 of = 0; of < 32; ++of) std::memcpy(rows[of], words[of], 16);
    words = emulation::exchange(kWholeWarp, own, 8);
    for (u32 of = 0; of < 32; ++of) std::memcpy(columns[of], words[of], 8);
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = emulation::lane() / 4, column = emulation::lane() % 4 * 2 + i % 2;
        for (u32 k = 0; k < 16; ++k) {
            const u32 of_row = rows[row * 4 + k % 8 / 2][k / 8 * 2 + i / 2], of_column = columns[column * 4 + k % 8 / 2][k / 8];
            d[i] += k % 2 ? high(of_row) * high(of_column) : low(of_row) * low(of_column);
        }
    }
}
DEVICE void multiply_bf16(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) { multiply_pairs(d, a, b_low, b_high, low_bf16, high_bf16); }
DEVICE void multiply_f16(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) { multiply_pairs(d, a, b_low, b_high, low_f16, high_f16); }

DEVICE u32 transpose_pairs(u32 pair) {
    const u8(*words)[16] = emulation::exchange(kWholeWarp, &pair, 4);
    const u32 row = emulation::lane() / 4, column = emulation::lane() % 4 * 2;  // of the result
    u32 other = 0;
    for (u32 i = 0; i < 2; ++i) {
        u16 element;
        std::memcpy(&element, words[(column + i) * 4 + row / 2] + row % 2 * 2, 2);
        other |= static_cast<u32>(element) << 16 * i;
    }
    return other;
}
DEVICE float power_of_two(float x) { return std::exp2(x); }

// Of each half; sign is that of the product. infinity: its bits, behind which NaN begin.
DEVICE u32 larger_magnitude(u32 a, u32 b, u32 infinity) {
    u32 larger = 0;
    for (u32 shift = 0; shift < 32; shift += 16) {
        const u32 x = a >> shift & 0x7fff, y = b >> shift & 0x7fff, magnitude = x > infinity ? y : y > infinity ? x : max(x, y);
        larger |= (magnitude > infinity ? 0x7fffu : magnitude | ((a ^ b) >> shift & 0x8000)) << shift;
    }
    return larger;
}
DEVICE u32 larger_magnitude_bf16(u32 a, u32 b) { return larger_magnitude(a, b, 0x7f80); }
DEVICE u32 larger_magnitude_f16(u32 a, u32 b) { return larger_magnitude(a, b, 0x7c00); }

DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __fdividef(float a, float b) { return a / b; }
DEVICE float __expf(float x) { return std::exp(x); }
DEVICE u32 __popc(u32 word) { return static_cast<u32>(__builtin_popcount(word)); }
DEVICE int __ffs(u32 word) { return __builtin_ffs(static_cast<int>(word)); }
DEVICE u32 __byte_perm(u32 low, u32 high, u32 selector) {
    const u64 both = low | static_cast<u64>(high) << 32;
    u32 result = 0;
    for (u32 i = 0; i < 4; ++i) result |= static_cast<u32>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
