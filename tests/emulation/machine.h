// A multiprocessor cluster in plain C++, as far as the kernels of this package see it: every thread of the CTAs of a cluster is a fiber, and the
// copy engine, barriers, shuffles and wgmma are what fibers wait for. ptx.cuh and wgmma.cuh beside this file put the device code on top.
//
// One run is one interleaving, drawn from a seed: which fiber goes on, which warp is late, when a copy lands, whether all land late, whether a product
// reads its operands early. What no interleaving may do is an error: to read shared memory that a copy is still writing, or to end before that, to reach
// a CTA that has ended, to wait for what nobody brings.
// A product may read rows that nobody needs; of what is being written, or was written between its issue and its end, it gets NaN. Orders that only
// hardware knows (a load that overtakes a barrier's answer) are not here.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulation {

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;

struct Dim3 {
    u32 x = 1, y = 1, z = 1;
};

constexpr u32 kStackBytes = 96 * 1024, kChunk = 4, kRankShift = 24;
constexpr u32 kStaticBytes = 48 * 1024;
constexpr u32 kSharedBase = 1024;  // what the system takes of a CTA's shared memory lies before it

struct Barrier {
    u32 expected = 0, phase = 0;
    int pending = 0;
    long long bytes = 0;

    void settle() {
        while (pending == 0 && bytes == 0 && expected) {
            ++phase;
            pending = static_cast<int>(expected);
        }
    }
    void arrive(u32 count, long long more_bytes = 0) {
        pending -= static_cast<int>(count);
        bytes += more_bytes;
        if (pending < 0) throw std::runtime_error("more arrivals at a barrier than it expects");
        settle();
    }
    bool passed(u32 parity) const { return (phase & 1) != parity; }
};

// Where fibers meet: whoever comes last lets all go on.
struct Meeting {
    u32 arrived = 0, generation = 0;
};

struct WarpMeeting {
    u32 arrived = 0, generation = 0;
    u8 words[2][32][16];  // what each lane brings, by parity of the generation
};

struct Cta {
    u32 rank = 0, live = 0;
    Dim3 index;
    std::vector<u8> memory;
    u8* shared = nullptr;
    // Of each chunk of 4 bytes: copies on their way to it, bulk stores that have yet to read it, when the last copy to it was issued.
    std::vector<u32> in_flight, to_be_stored;
    std::vector<u64> copied_at;
    std::unordered_map<u32, Barrier> barriers;
    std::unordered_map<u32, Meeting> named;
    Meeting whole;
    bool any = false;  // of __syncthreads_or
    std::unordered_map<u64, WarpMeeting> warps;  // by warp and mask
    std::vector<u32> exited;                     // lanes of each warp that have ended
};

using Operation = std::function<void()>;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<u8[]> stack;
    Cta* cta = nullptr;
    Dim3 thread;
    bool done = false;
    const std::function<bool()>* ready = nullptr;
    const char* waits_for = "";
    u32 cluster_generation = 0;
    std::deque<Operation> copies;  // asynchronous copies of ordinary threads, and the arrivals behind them, in order
    u32 stores = 0;                // bulk stores that have not ended
    std::deque<std::vector<Operation>> products = std::deque<std::vector<Operation>>(1);  // issued and not yet waited for, in groups; the last is open
};

struct Machine {
    std::mt19937 random;
    std::vector<std::unique_ptr<Cta>> ctas;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Operation> engine;  // bulk copies, in any order
    Meeting cluster;
    u32 live = 0;
    ucontext_t scheduler;
    Fiber* current = nullptr;
    std::function<void()> body;
    std::string error;
    bool early_products = false, late_copies = false;
    u64 clock = 0;
    std::unordered_map<int, u32> static_arrays;  // where each lies
    u32 static_bytes = 0;
};

inline Machine* machine = nullptr;

inline std::string who(const Fiber& fiber) {
    return "thread " + std::to_string(fiber.thread.x) + " of CTA " + std::to_string(fiber.cta->index.x) + "." + std::to_string(fiber.cta->index.y);
}
[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(who(*machine->current) + ": " + message); }

inline Fiber& self() { return *machine->current; }
inline Cta& cta() { return *machine->current->cta; }
inline u32 lane() { return self().thread.x % 32; }
inline u32 warp() { return self().thread.x / 32; }

// ---- fibers ------------------------------------------------------------------------------------------------------------

inline void wait_until(const std::function<bool()>& ready, const char* waits_for) {
    Fiber& fiber = self();
    if (ready() && machine->random() % 4) return;
    fiber.ready = &ready;
    fiber.waits_for = waits_for;
    swapcontext(&fiber.context, &machine->scheduler);
    fiber.ready = nullptr;
}

inline void meet(Meeting& meeting, u32 expected, const char* what) {
    const u32 generation = meeting.generation;
    if (++meeting.arrived == expected) {
        meeting.arrived = 0;
        ++meeting.generation;
    }
    wait_until([&] { return meeting.generation != generation; }, what);
}

// Every lane of the mask brings `size` bytes, unless it has ended; returns where they all lie.
inline const u8 (*exchange(u32 mask, const void* bytes, u32 size))[16] {
    WarpMeeting& meeting = cta().warps[u64(warp()) << 32 | mask];
    if (!(mask >> lane() & 1)) fail("takes part in a warp's operation whose mask leaves it out");
    const u32 generation = meeting.generation;
    u8(*words)[16] = meeting.words[generation % 2];
    std::memcpy(words[lane()], bytes, size);
    meeting.arrived |= 1u << lane();
    Cta& of = cta();
    const u32 of_warp = warp();
    wait_until(
        [&, generation] {
            if (meeting.generation == generation && ((meeting.arrived | of.exited[of_warp]) & mask) == mask) {
                meeting.arrived = 0;
                ++meeting.generation;
            }
            return meeting.generation != generation;
        },
        "the other lanes of its warp");
    return words;
}

inline void fiber_main() {
    Fiber& fiber = self();
    try {
        machine->body();
        if (fiber.products.size() > 1 || !fiber.products.back().empty()) fail("ends with products it has not waited for");
    } catch (const std::exception& error) {
        if (machine->error.empty()) machine->error = error.what();
    }
    fiber.done = true;
    --machine->live;
    Cta& of = *fiber.cta;
    --of.live;
    of.exited[fiber.thread.x / 32] |= 1u << fiber.thread.x % 32;
    if (!of.live && machine->error.empty() && std::any_of(of.in_flight.begin(), of.in_flight.end(), [](u32 count) { return count != 0; }))
        machine->error = who(fiber) + ": ends while a copy is still writing shared memory";
    if (of.live && of.whole.arrived == of.live) {
        of.whole.arrived = 0;
        ++of.whole.generation;
    }
    if (machine->live && machine->cluster.arrived == machine->live) {
        machine->cluster.arrived = 0;
        ++machine->cluster.generation;
    }
    swapcontext(&fiber.context, &machine->scheduler);
}

// ---- memory ------------------------------------------------------------------------------------------------------------

inline Cta& owner_of(u32 address) {
    const u32 rank = address >> kRankShift;
    Cta& of = rank ? *machine->ctas.at(rank - 1) : cta();
    if (!of.live) fail("reaches the shared memory of a CTA that has ended");
    return of;
}
inline u32 offset_of(u32 address) { return address & ((1u << kRankShift) - 1); }
inline u8* at(Cta& of, u32 address, u32 size) {
    const u32 offset = offset_of(address);
    if (offset < kSharedBase || offset - kSharedBase + size > of.memory.size() - 1024) fail("shared memory out of bounds, at " + std::to_string(offset));
    return of.shared + (offset - kSharedBase);
}
inline void mark(std::vector<u32>& chunks, u32 address, u32 size, int change) {
    const u32 first = (offset_of(address) - kSharedBase) / kChunk, last = (offset_of(address) - kSharedBase + size - 1) / kChunk;
    for (u32 i = first; i <= last; ++i) chunks[i] += change;
}
inline bool marked(const std::vector<u32>& chunks, u32 address, u32 size) {
    const u32 first = (offset_of(address) - kSharedBase) / kChunk, last = (offset_of(address) - kSharedBase + size - 1) / kChunk;
    return std::any_of(chunks.begin() + first, chunks.begin() + last + 1, [](u32 count) { return count != 0; });
}
inline u8* read_at(u32 address, u32 size) {
    Cta& of = owner_of(address);
    u8* data = at(of, address, size);
    if (marked(of.in_flight, address, size)) fail("reads shared memory that a copy is still writing, at " + std::to_string(offset_of(address)));
    return data;
}

// A copy into shared memory: marks its target until it lands.
inline void begin_write(Cta& of, u32 address, u32 size) {
    at(of, address, size);
    if (marked(of.in_flight, address, size)) fail("copies over what another copy is writing, at " + std::to_string(offset_of(address)));
    mark(of.in_flight, address, size, 1);
    const u32 first = offset_of(address) - kSharedBase;
    ++machine->clock;
    for (u32 i = first / kChunk; i <= (first + size - 1) / kChunk; ++i) of.copied_at[i] = machine->clock;
}
inline void end_write(Cta& of, u32 address, u32 size) { mark(of.in_flight, address, size, -1); }

// An array that a kernel declares __shared__, at the same place in every CTA, behind the memory that the launch asked for.
template <class T, u32 kCount, int kNumber> auto& static_shared() {
    auto& placed = machine->static_arrays;
    if (!placed.count(kNumber)) {
        placed[kNumber] = machine->static_bytes;
        machine->static_bytes += (sizeof(T) * kCount + 15) / 16 * 16;
        if (machine->static_bytes > kStaticBytes) fail("declares more shared arrays than are emulated");
    }
    Cta& of = cta();
    return *reinterpret_cast<T(*)[kCount]>(of.shared + (of.memory.size() - 1024 - kStaticBytes) + placed[kNumber]);
}

inline Barrier& barrier_at(Cta& of, u32 address) {
    auto found = of.barriers.find(offset_of(address));
    if (found == of.barriers.end()) fail("uses a barrier that is not initialised, at " + std::to_string(offset_of(address)));
    return found->second;
}

// ---- a run -------------------------------------------------------------------------------------------------------------

inline Dim3 thread_index, block_index, block_size, grid_size;

inline bool step_engine() {
    bool moved = false;
    auto& engine = machine->engine;
    for (u32 tries = machine->random() % 4; tries > 0 && !engine.empty(); --tries) {
        std::swap(engine[machine->random() % engine.size()], engine.back());
        const Operation operation = std::move(engine.back());
        engine.pop_back();
        operation();
        moved = true;
    }
    return moved;
}

inline void run_fibers(const std::vector<Fiber*>& order) {
    // In half of the runs one warp goes on only when nothing else moves: hardware may keep one back for long, and what the others have done meanwhile must
    // not be what it then waits for.
    const Fiber* const late = machine->random() % 2 ? order[machine->random() % order.size()] : nullptr;
    auto is_late = [&](const Fiber& fiber) { return late && fiber.cta == late->cta && fiber.thread.x / 32 == late->thread.x / 32; };
    u32 idle = 0;
    while (machine->live && machine->error.empty()) {
        bool moved = false;
        const u32 start = machine->random() % order.size();
        for (u32 i = 0; i < order.size() && machine->error.empty(); ++i) {
            Fiber& fiber = *order[(start + i) % order.size()];
            machine->current = &fiber;
            if (!fiber.copies.empty() && machine->random() % 2) {
                const Operation operation = std::move(fiber.copies.front());
                fiber.copies.pop_front();
                operation();
                moved = true;
            }
            if (fiber.done || (idle == 0 && is_late(fiber)) || (fiber.ready && !(*fiber.ready)())) continue;
            thread_index = fiber.thread;
            block_index = fiber.cta->index;
            swapcontext(&machine->scheduler, &fiber.context);
            moved = true;
        }
        if (!moved || !machine->late_copies) moved = step_engine() || moved;
        idle = moved ? 0 : idle + 1;
        if (idle > 64 && machine->engine.empty()) {
            machine->error = "nothing moves any more";
            std::string before;
            for (const Fiber* fiber : order) {  // one thread for each thing that is waited for
                if (fiber->done || fiber->waits_for == before) continue;
                before = fiber->waits_for;
                machine->error += "; " + who(*fiber) + " waits for " + before;
            }
        }
    }
}

inline void run_cluster(u32 seed, Dim3 first, u32 cluster, u32 threads, u32 shared_bytes) {
    machine->random.seed(seed);
    const u32 drawn = machine->random();
    machine->early_products = drawn % 2;
    machine->late_copies = drawn / 2 % 4 == 0;
    machine->ctas.clear();
    machine->fibers.clear();
    machine->engine.clear();
    machine->cluster = {};
    machine->live = cluster * threads;
    for (u32 rank = 0; rank < cluster; ++rank) {
        auto of = std::make_unique<Cta>();
        of->rank = rank;
        of->live = threads;
        of->index = {first.x + rank, first.y, first.z};
        of->memory.assign((shared_bytes + 15) / 16 * 16 + kStaticBytes + 1024, 0xff);  // NaN, whatever the type
        of->shared = of->memory.data() + (1024 - reinterpret_cast<uintptr_t>(of->memory.data()) % 1024) % 1024;
        of->in_flight.assign(of->memory.size() / kChunk, 0);
        of->to_be_stored.assign(of->memory.size() / kChunk, 0);
        of->copied_at.assign(of->memory.size() / kChunk, 0);
        of->exited.assign((threads + 31) / 32, 0);
        for (u32 t = 0; t < threads; ++t) {
            auto fiber = std::make_unique<Fiber>();
            fiber->cta = of.get();
            fiber->thread = {t, 0, 0};
            fiber->stack = std::make_unique_for_overwrite<u8[]>(kStackBytes);
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.get();
            fiber->context.uc_stack.ss_size = kStackBytes;
            makecontext(&fiber->context, fiber_main, 0);
            machine->fibers.push_back(std::move(fiber));
        }
        machine->ctas.push_back(std::move(of));
    }
    std::vector<Fiber*> order;
    for (auto& fiber : machine->fibers) order.push_back(fiber.get());
    try {
        run_fibers(order);
        while (!machine->engine.empty() && machine->error.empty()) step_engine();
    } catch (const std::exception& error) {  // of a copy or of a condition, outside of any fiber
        if (machine->error.empty()) machine->error = error.what();
    }
}
template <class... Arguments, std::size_t... kIndex>
void call(void (*kernel)(Arguments...), void** parameters, std::index_sequence<kIndex...>) {
    kernel(*static_cast<std::remove_const_t<std::remove_reference_t<Arguments>>*>(parameters[kIndex])...);
}

// Runs a grid, cluster after cluster; returns what went wrong, or an empty string.
template <class... Arguments>
const char* run(void (*kernel)(Arguments...), void** parameters, u32 seed, Dim3 grid, u32 threads, u32 shared_bytes, u32 cluster) {
    static std::string error;
    Machine here;
    machine = &here;
    here.body = [=] { call(kernel, parameters, std::index_sequence_for<Arguments...>()); };
    block_size = {threads, 1, 1};
    grid_size = grid;
    for (u32 z = 0; z < grid.z; ++z)
        for (u32 y = 0; y < grid.y; ++y)
            for (u32 x = 0; x < grid.x && here.error.empty(); x += cluster) run_cluster(seed++, {x, y, z}, cluster, threads, shared_bytes);
    machine = nullptr;
    error = here.error;
    return error.c_str();
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size
