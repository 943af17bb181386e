// Compiles CUDA kernels for the CPU, so that they run under test on machines without a GPU.
//
// The threads of a block are fibers on one thread of the operating system; a fiber runs until it reaches a barrier, a
// shuffle or its end, and the scheduler then takes the next one of its warp. A warp goes on until it reaches a barrier of the
// block, and then the next one does: in ascending or descending order, or in random order by turns of random length. Equal
// results in all orders are the test for missing barriers. Blocks run one after another.
//
// Stricter than a GPU, on purpose: every thread of a block must reach the same barrier (by source line), every lane of
// a warp the same warp operation; shared memory starts as NaNs in every block, each array in an allocation of its own,
// where AddressSanitizer sees overruns; what is copied to it past the registers is NaNs until the copying thread has waited for
// it. A violation ends the launch with a message.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
typedef uint3 dim3;

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

namespace host {

enum class Order { forward, reverse, random };

// The kinds of kernel parameters, as a launch states them.
enum class Kind : uint8_t { pointer, i32, u32, u64, f32 };

template <class T> constexpr Kind kind_of() {
    if constexpr (std::is_pointer_v<T>) return Kind::pointer;
    else if constexpr (std::is_same_v<T, int>) return Kind::i32;
    else if constexpr (std::is_same_v<T, unsigned>) return Kind::u32;
    else if constexpr (std::is_same_v<T, unsigned long long>) return Kind::u64;
    else {
        static_assert(std::is_same_v<T, float>, "kernel parameters are pointers, int, unsigned, unsigned long long, float");
        return Kind::f32;
    }
}

struct Launch {
    dim3 grid, block;
    size_t shared;
    Order order;
    uint64_t seed;
};

// Runs `body` for every thread of the grid; returns an empty string or what went wrong.
std::string run(const Launch& launch, void (*body)(void*), void* argument);

// Barrier of the block.
void block_barrier(int line);

// Meeting of the 32 lanes of a warp: each brings `in`; the last one calls `join` with all that were brought and a place
// per lane for the results, and each leaves with its own in `out`.
typedef void (*Join)(const void* const* in, void* const* out);
void warp_meeting(int line, const void* in, void* out, Join join);

// A copy of `bytes` bytes, and zeros up to `size`, that copies_wait_but performs: of what is there by then, or, but in ascending
// order of threads, of what is there now.
void copy_begin(void* to, const void* from, int bytes, int size);
// Ends a group of this thread's copies.
void copies_end_group();
// Performs this thread's copies, but for those of the last `groups` groups and behind them.
void copies_wait_but(size_t groups);

// Ends the launch with a message.
void fail(std::string message);

// Shared memory of this block that belongs to a declaration, poisoned when the block first asks for it.
void* shared(const void* site, size_t bytes);

// Dynamic shared memory of this block.
void* dynamic_shared();

template <class... P, size_t... I>
std::string run_with(void (*kernel)(P...), const Launch& launch, const void* const* values, std::index_sequence<I...>) {
    std::tuple<void (*)(P...), std::tuple<P...>> bound(kernel, {*static_cast<const P*>(values[I])...});
    auto body = [](void* p) {
        auto& [function, arguments] = *static_cast<decltype(bound)*>(p);
        std::apply(function, arguments);
    };
    return run(launch, body, &bound);
}

constexpr unsigned first(unsigned threads, int = 0) { return threads; }

// Runs `kernel`, of at most `bound` threads, with the arguments that `values` point to, if there are as many, of the declared
// kinds.
template <class... P>
std::string call(void (*kernel)(P...), unsigned bound, const Launch& launch, const Kind* kinds, const void* const* values,
                 size_t count) {
    constexpr Kind declared[] = {kind_of<P>()...};
    if (count != sizeof...(P)) {
        return "takes " + std::to_string(sizeof...(P)) + " arguments, is given " + std::to_string(count);
    }
    for (size_t i = 0; i < count; i++) {
        if (kinds[i] != declared[i]) return "argument " + std::to_string(i) + " is of another type";
    }
    unsigned threads = launch.block.x * launch.block.y * launch.block.z;
    if (threads > bound) return "a block of " + std::to_string(threads) + " threads; it is compiled for " + std::to_string(bound);
    return run_with(kernel, launch, values, std::index_sequence_for<P...>{});
}

template <class To, class From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// A value and the lane it is wanted from.
template <class T> struct Wanted {
    T value;
    int from;
};

template <class T> T shuffle(T value, int from, int line) {
    Wanted<T> in{value, from};
    T out;
    warp_meeting(line, &in, &out, [](const void* const* in, void* const* out) {
        auto wanted = [&](int lane) { return static_cast<const Wanted<T>*>(in[lane]); };
        for (int lane = 0; lane < 32; lane++) *static_cast<T*>(out[lane]) = wanted(wanted(lane)->from & 31)->value;
    });
    return out;
}

inline int any(int predicate, int line) {
    int out;
    warp_meeting(line, &predicate, &out, [](const void* const* in, void* const* out) {
        int any = 0;
        for (int lane = 0; lane < 32; lane++) any |= *static_cast<const int*>(in[lane]) != 0;
        for (int lane = 0; lane < 32; lane++) *static_cast<int*>(out[lane]) = any;
    });
    return out;
}

// m16n8k16 on bf16 pairs with the fragment layouts of the PTX manual.
struct Fragments {
    float d[4];
    unsigned a[4], b[2];
};

inline float half_of(unsigned pair, int which) {
    return bits<float>(which ? pair & 0xffff0000u : pair << 16);
}

inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line) {
    Fragments in{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    warp_meeting(line, &in, &d, [](const void* const* in, void* const* out) {
        auto lane = [&](int l) { return static_cast<const Fragments*>(in[l]); };
        float a[16][16], b[16][8];
        for (int l = 0; l < 32; l++) {
            int group = l / 4, pair = l % 4 * 2;
            for (int i = 0; i < 8; i++) {
                a[group + i / 2 % 2 * 8][pair + i / 4 * 8 + i % 2] = half_of(lane(l)->a[i / 2], i % 2);
            }
            for (int i = 0; i < 4; i++) b[pair + i / 2 * 8 + i % 2][group] = half_of(lane(l)->b[i / 2], i % 2);
        }
        for (int l = 0; l < 32; l++) {
            int group = l / 4, pair = l % 4 * 2;
            for (int i = 0; i < 4; i++) {
                float sum = lane(l)->d[i];
                for (int k = 0; k < 16; k++) sum += a[group + i / 2 * 8][k] * b[k][pair + i % 2];
                static_cast<float*>(out[l])[i] = sum;
            }
        }
    });
}

// Four 8 x 8 matrices of 16-bit numbers, whose rows the lanes name, as ldmatrix distributes them.
template <bool TRANSPOSED> void load_matrices(const void* row, unsigned (&x)[4], int line) {
    if (bits<uintptr_t>(row) % 16 != 0) fail("a row of a matrix is not aligned to 16 bytes");
    warp_meeting(line, row, &x, [](const void* const* in, void* const* out) {
        auto at = [&](int matrix, int i, int j) {
            if (TRANSPOSED) std::swap(i, j);
            return unsigned(static_cast<const uint16_t*>(in[matrix * 8 + i])[j]);
        };
        for (int l = 0; l < 32; l++) {
            int group = l / 4, pair = l % 4 * 2;
            for (int m = 0; m < 4; m++) {
                static_cast<unsigned*>(out[l])[m] = at(m, group, pair) | at(m, group, pair + 1) << 16;
            }
        }
    });
}

// An 8 x 8 matrix of 16-bit numbers, distributed like those of load_matrices, transposed.
inline unsigned transpose(unsigned x, int line) {
    unsigned y;
    warp_meeting(line, &x, &y, [](const void* const* in, void* const* out) {
        auto at = [&](int i, int j) { return *static_cast<const unsigned*>(in[i * 4 + j / 2]) >> j % 2 * 16 & 0xffff; };
        for (int l = 0; l < 32; l++) {
            int group = l / 4, pair = l % 4 * 2;
            *static_cast<unsigned*>(out[l]) = at(pair, group) | at(pair + 1, group) << 16;
        }
    });
    return y;
}

inline int lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

}  // namespace host

// A shared array of the block; each declaration has its own.
#define SHARED(type, name, dimensions)     \
    static const char name##_site = 0;     \
    auto& name = *static_cast<type(*) dimensions>(host::shared(&name##_site, sizeof(type dimensions)))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(host::dynamic_shared())

// What the kernels use of CUDA. Warp operations take part with all 32 lanes.
#define HOST_LINE int line = __builtin_LINE()
inline void __syncthreads(HOST_LINE) { host::block_barrier(line); }
template <class T> T __shfl_xor_sync(unsigned, T value, int with, HOST_LINE) {
    return host::shuffle(value, host::lane() ^ with, line);
}
template <class T> T __shfl_sync(unsigned, T value, int from, HOST_LINE) { return host::shuffle(value, from, line); }
template <class T> T __shfl_up_sync(unsigned, T value, int by, HOST_LINE) {
    return host::shuffle(value, host::lane() < by ? host::lane() : host::lane() - by, line);
}
template <class T> T __shfl_down_sync(unsigned, T value, int by, HOST_LINE) {
    return host::shuffle(value, host::lane() + by > 31 ? host::lane() : host::lane() + by, line);
}
inline void __syncwarp(HOST_LINE) { host::any(0, line); }
inline int __any_sync(unsigned, int predicate, HOST_LINE) { return host::any(predicate, line); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
    return std::exchange(*to, *to + value);
}
inline float __uint_as_float(unsigned x) { return host::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return host::bits<unsigned>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
