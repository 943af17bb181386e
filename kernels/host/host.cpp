// The scheduler behind cuda_host.h.
#include "cuda_host.h"

#include <algorithm>
#include <deque>
#include <sys/mman.h>
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace host {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr size_t GUARD = 4096;
// The most a block may have on sm_90; sm_80 has 163 KiB, sm_86 and sm_89 99 KiB.
constexpr size_t LARGEST_SHARED = 227 << 10;

enum class State : uint8_t { ready, at_barrier, at_meeting, ended };

struct Copy {
    void* to;
    const void* from;
    int bytes, size;
    // What it took when it was begun, as hardware may; in ascending order of threads it takes it as late as that may.
    bool taken;
    unsigned char early[16];
};

// Copies that a thread has begun; how many of them each group that it has ended and not waited for takes in.
struct Copies {
    std::vector<Copy> begun;
    std::vector<size_t> groups;
};

struct Warp {
    uint32_t arrived = 0;
    int line = 0;
    const void* in[32];
    void* out[32];
};

// A stack with a guard page below it. Switching by hand takes nanoseconds; swapcontext, elsewhere, a system call.
struct Fiber {
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    ~Fiber() {
        if (memory) munmap(memory, STACK + GUARD);
    }

    char* memory = nullptr;
    void* stack_pointer = nullptr;
    ucontext_t context;
};

struct Block {
    std::deque<Fiber> fibers;  // kept from launch to launch
    std::vector<State> states;
    std::vector<Copies> copies;
    std::vector<unsigned> order;  // of the warps
    bool takes_early;             // whether copies take what is there when they begin
    std::vector<Warp> warps;
    std::vector<std::pair<const void*, std::vector<unsigned char>>> arrays;
    std::vector<unsigned char> dynamic;
    unsigned threads = 0, ended = 0, waiting = 0, current = 0;
    int barrier_line = 0;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    std::string error;
    Fiber scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    uint64_t random = 1;
};

thread_local Block block;

void fiber_main();

#if defined(__x86_64__)
// Saves the registers a called function must keep, and continues where `to` was saved.
__attribute__((naked, noinline)) void switch_stack(void** /*from*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

void prepare(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    // A fiber never returns from its frames, and leaves their red zones behind.
    __asan_unpoison_memory_region(fiber.memory + GUARD, STACK);
#endif
#if defined(__x86_64__)
    // The first switch pops six registers and returns into fiber_main with the alignment of a call.
    void** top = reinterpret_cast<void**>(fiber.memory + GUARD + STACK) - 2;
    *top = reinterpret_cast<void*>(&fiber_main);
    top[1] = nullptr;
    fiber.stack_pointer = std::fill_n(top - 6, 6, nullptr) - 6;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.memory + GUARD;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#endif
}

// Out of line, so that no thread-local address is kept across the switch.
__attribute__((noinline)) void switch_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    bool back = &to == &block.scheduler;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, back ? block.scheduler_stack : to.memory + GUARD,
                                   back ? block.scheduler_size : STACK);
#endif
#if defined(__x86_64__)
    switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void set_thread(unsigned t) {
    block.current = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

void to_scheduler() { switch_to(block.fibers[block.current], block.scheduler); }

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_size);
#endif
    block.body(block.argument);
    block.states[block.current] = State::ended;
    block.ended++;
    to_scheduler();
}

uint64_t random_number() {
    block.random ^= block.random << 13;
    block.random ^= block.random >> 7;
    block.random ^= block.random << 17;
    return block.random;
}

void shuffle_order() {
    for (size_t i = block.order.size(); i-- > 1;) std::swap(block.order[i], block.order[random_number() % (i + 1)]);
}

// Runs each lane of a warp that can run to where it must wait; whether there was one.
bool advance(unsigned warp, Order order) {
    bool moved = false;
    unsigned turned = order == Order::random ? random_number() % 32 : 0;
    for (unsigned i = 0; i < 32; i++) {
        unsigned t = warp * 32 + (order == Order::reverse ? 31 - i : (i + turned) % 32);
        if (block.states[t] != State::ready) continue;
        moved = true;
        set_thread(t);
        switch_to(block.scheduler, block.fibers[t]);
        if (!block.error.empty()) return false;
    }
    return moved;
}

void run_block(Order order) {
    block.ended = block.waiting = 0;
    block.arrays.clear();
    std::fill(block.dynamic.begin(), block.dynamic.end(), 0xff);
    std::fill(block.states.begin(), block.states.end(), State::ready);
    for (Warp& warp : block.warps) warp.arrived = 0;
    for (unsigned t = 0; t < block.threads; t++) prepare(block.fibers[t]);
    for (Copies& copies : block.copies) {
        copies.begun.clear();
        copies.groups.clear();
    }
    while (block.ended < block.threads) {
        bool moved = false;
        if (order == Order::random) shuffle_order();
        for (unsigned warp : block.order) {
            uint64_t turns = order == Order::random ? 1 + random_number() % 40 : ~0ull;
            for (; turns > 0 && advance(warp, order); turns--) moved = true;
            if (!block.error.empty()) return;
        }
        if (!moved) {
            auto count = [](State state) {
                return std::to_string(std::count(block.states.begin(), block.states.end(), state));
            };
            block.error = "deadlock: " + count(State::at_barrier) + " threads at __syncthreads, " +
                          count(State::at_meeting) + " at warp operations, " + count(State::ended) + " ended";
            return;
        }
    }
}

std::string check(const Launch& launch, unsigned threads) {
    dim3 g = launch.grid;
    if (threads == 0 || threads % 32 != 0) {
        return "a block of " + std::to_string(threads) + " threads; a multiple of 32 is possible";
    }
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535) {
        return "a grid of " + std::to_string(g.x) + " x " + std::to_string(g.y) + " x " + std::to_string(g.z);
    }
    if (launch.shared > LARGEST_SHARED) return std::to_string(launch.shared) + " bytes of dynamic shared memory";
    return {};
}

}  // namespace

// The scheduler drops the other fibers where they stand.
void fail(std::string message) {
    if (block.error.empty()) block.error = std::move(message);
    to_scheduler();
}

void block_barrier(int line) {
    if (block.waiting == 0) block.barrier_line = line;
    if (block.barrier_line != line) {
        fail("__syncthreads at lines " + std::to_string(block.barrier_line) + " and " + std::to_string(line) + " at once");
    }
    if (block.ended > 0) {
        fail("__syncthreads at line " + std::to_string(line) + " after part of the block has ended");
    }
    if (++block.waiting == block.threads) {
        block.waiting = 0;
        for (State& state : block.states) state = State::ready;
        return;
    }
    unsigned t = block.current;
    block.states[t] = State::at_barrier;
    to_scheduler();
}

void warp_meeting(int line, const void* in, void* out, Join join) {
    unsigned t = block.current, lane = t % 32, first = t - lane;
    Warp& warp = block.warps[t / 32];
    if (warp.arrived == 0) warp.line = line;
    if (warp.line != line) {
        fail("lanes of a warp at lines " + std::to_string(warp.line) + " and " + std::to_string(line) + " at once");
    }
    warp.arrived |= 1u << lane;
    warp.in[lane] = in;
    warp.out[lane] = out;
    if (warp.arrived == ~0u) {
        warp.arrived = 0;
        join(warp.in, warp.out);
        for (unsigned i = 0; i < 32; i++) block.states[first + i] = State::ready;
        return;
    }
    block.states[t] = State::at_meeting;
    to_scheduler();
}

void copy_begin(void* to, const void* from, int bytes, int size) {
    if (uintptr_t(to) % unsigned(size) != 0 || (bytes > 0 && uintptr_t(from) % unsigned(size) != 0)) {
        fail("a copy of " + std::to_string(size) + " bytes at an address that is no multiple of that");
    }
    std::memset(to, 0xff, size_t(size));
    Copy copy = {to, from, bytes, size, block.takes_early, {}};
    if (copy.taken) std::memcpy(copy.early, from, size_t(bytes));
    block.copies[block.current].begun.push_back(copy);
}

void copies_end_group() {
    Copies& copies = block.copies[block.current];
    copies.groups.push_back(copies.begun.size());
}

void copies_wait_but(size_t groups) {
    Copies& copies = block.copies[block.current];
    if (copies.groups.size() <= groups) return;
    auto kept = copies.groups.end() - long(groups);
    size_t done = kept[-1];
    for (size_t i = 0; i < done; i++) {
        const Copy& copy = copies.begun[i];
        std::memset(copy.to, 0, size_t(copy.size));
        std::memcpy(copy.to, copy.taken ? copy.early : copy.from, size_t(copy.bytes));
    }
    copies.begun.erase(copies.begun.begin(), copies.begun.begin() + long(done));
    copies.groups.erase(copies.groups.begin(), kept);
    for (size_t& end : copies.groups) end -= done;
}

void* shared(const void* site, size_t bytes) {
    for (auto& [key, array] : block.arrays) {
        if (key == site) return array.data();
    }
    block.arrays.emplace_back(site, std::vector<unsigned char>(bytes, 0xff));
    return block.arrays.back().second.data();
}

void* dynamic_shared() { return block.dynamic.data(); }

std::string run(const Launch& launch, void (*body)(void*), void* argument) {
    dim3 b = launch.block, g = launch.grid;
    unsigned threads = b.x * b.y * b.z;
    if (std::string problem = check(launch, threads); !problem.empty()) return problem;
    while (block.fibers.size() < threads) {
        void* memory = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE) != 0) return "no memory for a stack";
        block.fibers.emplace_back().memory = static_cast<char*>(memory);
    }
    block.threads = threads;
    block.states.resize(threads);
    block.copies.resize(threads);
    block.warps.assign(threads / 32, Warp{});
    block.dynamic.assign(launch.shared, 0xff);
    block.body = body;
    block.argument = argument;
    block.error.clear();
    block.random = launch.seed * 0x9E3779B97F4A7C15ull | 1;
    unsigned warps = threads / 32;
    block.order.resize(warps);
    block.takes_early = launch.order != Order::forward;
    for (unsigned i = 0; i < warps; i++) block.order[i] = launch.order == Order::reverse ? warps - 1 - i : i;
    blockDim = b;
    gridDim = g;
    uint64_t blocks = uint64_t(g.x) * g.y * g.z;
    for (uint64_t i = 0; i < blocks && block.error.empty(); i++) {
        uint64_t at = launch.order == Order::reverse ? blocks - 1 - i : i;
        blockIdx = {unsigned(at % g.x), unsigned(at / g.x % g.y), unsigned(at / (uint64_t(g.x) * g.y))};
        run_block(launch.order);
    }
    return block.error;
}

}  // namespace host
