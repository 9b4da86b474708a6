// Hopper instructions as functions: barriers, bulk copies, clusters, wgmma, conversions. No header outside this folder.
// Meaning of each: PTX ISA, chapters "mbarrier", "cp.async.bulk", "wgmma", "griddepcontrol".
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE __device__ __forceinline__

// A CUtensorMap as the driver encodes it; passed by value as a __grid_constant__ parameter.
struct __align__(64) TensorMap {
    u64 words[16];
};

constexpr u32 kBlockK = 128;           // one scale block of k: 128 codes, 128 bytes, one row of the 128-byte swizzle
constexpr u32 kScaleFloats = 8;        // weight scales fetched a stage: two aligned runs of 4, so that any 5 neighbours are among them

template <class T>
DEVICE T ceil_div(T a, T b) { return (a + b - 1) / b; }

DEVICE u32 smem_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// ---- barriers ----------------------------------------------------------------------------------------------------------

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Not .acquire.cluster: that invalidates L1 at every wait (CCTL.IVALL), and with it the weight scales.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    u32 done = 0;
    while (!done)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
}
// Whether the phase is over, without waiting. Nothing orders later loads behind the answer but a branch on it (measured: a load of what the
// phase delivers, issued behind the question, read what was there before although the answer was yes).
DEVICE bool barrier_passed(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}
// Shared-memory loads that stay where and in the order they are written. They complete in that order.
DEVICE float load_shared(u32 address) {
    float value;
    asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}
DEVICE float2 load_shared_pair(u32 address) {
    float2 value;
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
    return value;
}
DEVICE uint2 load_shared_words(u32 address) {
    uint2 value;
    asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
    return value;
}
DEVICE uint4 load_shared_quad(u32 address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
    return value;
}
DEVICE void store_shared_quad(u32 address, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
}
DEVICE void store_shared_pair(u32 address, uint2 value) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}
// Arrives once `seen` has been loaded, whatever it is: an arrival does not wait for loads under way (measured: with two CTAs on a
// multiprocessor, data was overwritten between the load's issue and its execution). Both branches arrive; the predicate waits.
DEVICE void barrier_arrive_after(u32 barrier, float seen) {
    asm volatile(
        "{ .reg .pred p; setp.num.f32 p, %1, %1; @p mbarrier.arrive.shared::cta.b64 _, [%0]; @!p mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(
            barrier),
        "f"(seen) : "memory");
}
// The same for two values and the lanes that are to arrive, by one arrival: no two values of which one is a product of scales have the bits
// that are compared in common, a NaN's.
DEVICE void barrier_arrive_after_words(u32 barrier, float first, float second, u32 arrives) {
    asm volatile(
        "{ .reg .pred p, q; .reg .b32 both; and.b32 both, %1, %2; setp.ne.u32 q, %3, 0; setp.ne.and.u32 p, both, 0xfff0dead, q;"
        " @p mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(barrier),
        "r"(__float_as_uint(first)), "r"(__float_as_uint(second)), "r"(arrives) : "memory");
}
// The same, at a barrier of any CTA of the cluster (map_to_rank). Not .release.cluster: that compiles to MEMBAR.ALL.GPU (measured: half the speed), and what is
// released are reads that have been waited for.
DEVICE void barrier_arrive_remote_after_words(u32 barrier, float first, float second, u32 arrives) {
    asm volatile(
        "{ .reg .pred p, q; .reg .b32 both; and.b32 both, %1, %2; setp.ne.u32 q, %3, 0; setp.ne.and.u32 p, both, 0xfff0dead, q;"
        " @p mbarrier.arrive.shared::cluster.b64 _, [%0]; }" ::"r"(barrier),
        "r"(__float_as_uint(first)), "r"(__float_as_uint(second)), "r"(arrives) : "memory");
}
DEVICE void named_barrier(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Orders what was written before; does not wait for loads under way, as no arrival does.
DEVICE void named_barrier_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Ordinary writes to shared memory become visible to wgmma and to bulk copies.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- clusters and dependent launches -----------------------------------------------------------------------------------

DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE u32 cluster_size() {
    u32 size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// Says that this CTA runs, and nothing about memory.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE u32 map_to_rank(u32 address, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}
DEVICE u32 load_remote(u32 address) {
    u32 value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
// Writes 16 bytes into a peer's shared memory and counts them on its barrier.
DEVICE void store_async(u32 target, float4 value, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier) : "memory");
}
// Everything the previous kernel in the stream wrote is visible after this.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void launch_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// One thread of each CTA of a grid whose CTAs all run at once: meet_grid returns when all are there, and has what each of them wrote before. `arrivals` starts at
// zero and may be used again: every meeting changes its highest bit, grid_round before it, and leaves the others as they were.
DEVICE u32 grid_round(const u32* arrivals) {
    u32 now;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
    return now & 0x80000000u;
}
DEVICE void meet_grid(u32* arrivals, u32 round, bool first, u32 ctas) {
    u32 now;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(arrivals), "r"(first ? 0x80000000u - (ctas - 1) : 1u) : "memory");
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
    while ((now & 0x80000000u) == round);
}

// count_one: what this thread has written, and what it has seen of others (__syncwarp), is there for whoever waits for a counter that has counted it.
DEVICE void count_one(u32* counter) {
    asm volatile("fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
DEVICE void wait_for_count(const u32* counter, u32 count) {
    u32 now;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    while (now < count);
}

// The same, and returns what the counter was: whoever counts last has what all others had written before they did.
DEVICE u32 count_in_turn(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// ---- copies ------------------------------------------------------------------------------------------------------------

DEVICE void bulk_copy(u32 target, const void* source, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
        "l"(source), "r"(bytes), "r"(barrier) : "memory");
}
// Into the shared memory of several CTAs of the cluster, as tensor_copy_multicast.
DEVICE void bulk_copy_multicast(u32 target, const void* source, u32 bytes, u32 barrier, u16 ranks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(target),
        "l"(source), "r"(bytes), "r"(barrier), "h"(ranks) : "memory");
}
DEVICE void prefetch_l2(const void* source, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}
DEVICE void tensor_copy(u32 target, const TensorMap* map, u32 x, u32 y, u32 z, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(target),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier) : "memory");
}
// The same into the shared memory of several CTAs of the cluster, those whose ranks are bits of `ranks`: at the same offset, and on the barrier at the same offset.
DEVICE void tensor_copy_multicast(u32 target, const TensorMap* map, u32 x, u32 y, u32 z, u32 barrier, u16 ranks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(target),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(ranks) : "memory");
}
// Writes a box to global memory, what lies outside of the tensor left out; what this thread has issued ends together, at its bulk_commit.
DEVICE void tensor_store(const TensorMap* map, u32 source, u32 x, u32 y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(source), "r"(x), "r"(y)
                 : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }  // the sources may be written again
DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Copies that need no registers to wait in, by ordinary threads; the barrier counts this thread once those it has issued are complete.
DEVICE void copy_16_async(u32 target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
DEVICE void copy_4_async(u32 target, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}
DEVICE void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Loads 16 bytes from L2, past L1: this CTA may have been there before the previous kernel wrote them, and L1 with it.
DEVICE void load_fresh(const void* source, u32 (&words)[4]) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(source) : "memory");
}

// ---- warps -------------------------------------------------------------------------------------------------------------

DEVICE bool elect_lane() {
    u32 elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0;
}
// Makes the compiler hold values in registers instead of computing them again.
DEVICE void keep_in_registers(u32& a, u32& b, u32& c, u32& d, u32& e, u32& f) {
    asm volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f));
}
template <u32 kRegisters> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <u32 kRegisters> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

// Where a walk around a ring of stages stands; parity is that of the barrier phase it waits for.
struct Ring {
    u32 stage = 0, parity = 0;
    DEVICE void advance(u32 stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ---- products of 16 bits ----------------------------------------------------------------------------------------------

#define MULTIPLY_16(name, type)                                                                                                            \
    DEVICE void name(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {                                                            \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." #type "." #type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high)); \
    }
MULTIPLY_16(multiply_bf16, bf16)
MULTIPLY_16(multiply_f16, f16)
#undef MULTIPLY_16
// Of 8 x 8 elements, a pair of a row each lane, four lanes a row: the pair of the same lane after rows and columns have changed places.
DEVICE u32 transpose_pairs(u32 pair) {
    u32 other;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
    return other;
}

// ---- conversions -------------------------------------------------------------------------------------------------------

DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE u32 pack_f16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE u16 pack_e4m3(float low, float high) {  // saturates at 448; NaN stays NaN
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE float power_of_two(float x) {  // of -infinity: 0
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float low_f16(u32 pair) {
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(pair));
    return value;
}
DEVICE float high_f16(u32 pair) { return low_f16(pair >> 16); }
// The larger magnitude of each of two pairs, of whatever sign; NaN only where both are.
DEVICE u32 larger_magnitude_bf16(u32 a, u32 b) {
    u32 larger;
    asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}
DEVICE u32 larger_magnitude_f16(u32 a, u32 b) {
    u32 larger;
    asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}
