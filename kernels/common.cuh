// What all kernels share: 16-byte access to bf16, reductions in a fixed order, random numbers by counter.
//
// Conventions. Activations are bf16 and are widened to f32 the moment they are read; parameters, statistics and partial
// sums are f32. Tensors are row-major with channels last. The comment after a pointer is its shape. A function
// `name<V>` handles V consecutive channels per thread: 8 (one 16-byte access) where channels are a multiple of 8,
// else 1; the launch counts threads accordingly.
#pragma once
#include <cuda_bf16.h>

#ifdef __CUDACC__
#define SHARED(type, name, dimensions) __shared__ type name dimensions
#endif

// A kernel that is launched with blocks of at most `threads`.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)

// Calls `function` at the width that `channels` allow.
#define BY_WIDTH(channels, function, ...) \
    ((channels) % 8 == 0 ? function<8>(__VA_ARGS__) : function<1>(__VA_ARGS__))

typedef __nv_bfloat16 bf16;
typedef unsigned long long u64;

constexpr unsigned ALL_LANES = 0xffffffffu;
// Threads of a block, where nothing else is said.
constexpr int THREADS = 256;

// ---- access

template <int V> struct Pack {
    float x[V];
};

__device__ __forceinline__ unsigned pair_of(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<unsigned&>(pair);
}

// The two numbers of such a pair.
__device__ __forceinline__ float2 widen(unsigned pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// V numbers as they lie in memory: what a thread that reads ahead holds, at half the registers of a Pack.
template <int V> struct Words {
    typedef bf16 type;
};
template <> struct Words<4> {
    typedef uint2 type;
};
template <> struct Words<8> {
    typedef uint4 type;
};

template <int V> __device__ __forceinline__ typename Words<V>::type fetch(const bf16* from) {
    return *reinterpret_cast<const typename Words<V>::type*>(from);
}

template <int V> __device__ __forceinline__ Pack<V> widen(const typename Words<V>::type& raw) {
    Pack<V> p;
    if constexpr (V == 1) {
        p.x[0] = __bfloat162float(raw);
    } else {
        unsigned words[V / 2];
        words[0] = raw.x;
        words[1] = raw.y;
        if constexpr (V == 8) {
            words[2] = raw.z;
            words[3] = raw.w;
        }
        for (int i = 0; i < V / 2; i++) {
            p.x[2 * i] = __uint_as_float(words[i] << 16);
            p.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
    return p;
}

template <int V> __device__ __forceinline__ Pack<V> load(const bf16* from) { return widen<V>(fetch<V>(from)); }

template <int V> __device__ __forceinline__ Pack<V> load(const float* from) {
    Pack<V> p;
    if constexpr (V % 4 == 0) {
        for (int i = 0; i < V / 4; i++) {
            float4 four = reinterpret_cast<const float4*>(from)[i];
            p.x[4 * i] = four.x;
            p.x[4 * i + 1] = four.y;
            p.x[4 * i + 2] = four.z;
            p.x[4 * i + 3] = four.w;
        }
    } else {
        for (int i = 0; i < V; i++) p.x[i] = from[i];
    }
    return p;
}

template <int V> __device__ __forceinline__ void store(bf16* to, const Pack<V>& p) {
    if constexpr (V == 8) {
        uint4 raw = {pair_of(p.x[0], p.x[1]), pair_of(p.x[2], p.x[3]), pair_of(p.x[4], p.x[5]), pair_of(p.x[6], p.x[7])};
        *reinterpret_cast<uint4*>(to) = raw;
    } else if constexpr (V == 4) {
        uint2 raw = {pair_of(p.x[0], p.x[1]), pair_of(p.x[2], p.x[3])};
        *reinterpret_cast<uint2*>(to) = raw;
    } else {
        for (int i = 0; i < V; i++) to[i] = __float2bfloat16_rn(p.x[i]);
    }
}

// x, of which the compiler no longer knows where it comes from: it is held in a register rather than made anew wherever it is wanted,
// or, made of what a thread is by itself, makes anew what would else be held.
__device__ __forceinline__ unsigned opaque(unsigned x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// Number of this thread in a one-dimensional grid.
__device__ __forceinline__ size_t thread_number() { return size_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// ---- arithmetic

// sum += a·b
__device__ __forceinline__ void add(float2& sum, float2 a, float2 b) {
    sum.x += a.x * b.x;
    sum.y += a.y * b.y;
}

// Product of two pairs.
__device__ __forceinline__ float dot(unsigned a, unsigned b) {
    return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
           __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}

// 2^x to a unit or two in the last place, in one instruction; what would be subnormal is 0.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// ---- reductions

// Sum over `lanes` neighbouring lanes, a power of two; every one of them receives it.
__device__ __forceinline__ float group_sum(float x, int lanes) {
    for (int other = lanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(ALL_LANES, x, other);
    return x;
}

// Sum over a block of THREADS threads; every thread receives it. Ends with a barrier to come before the next call.
__device__ __forceinline__ float block_sum(float x) {
    SHARED(float, sums, [THREADS / 32]);
    x = group_sum(x, 32);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < THREADS / 32; i++) total += sums[i];
    __syncthreads();
    return total;
}

// Channels that a block of column_partials takes: in packs of V, side by side up to a warp.
template <int V> __device__ __forceinline__ int column_span(int channels) { return min(channels / V, 32) * V; }

// The end of column_partials: a block's threads' sums, of `lines` lines of `columns` packs each, to the slab's.
template <int V, int K>
__device__ __forceinline__ void store_partials(const Pack<V> (&sums)[K], int channels,
                                               float* partial /* (slabs, K, channels) */) {
    SHARED(float, tile, [THREADS * V]);
    int span = column_span<V>(channels), columns = span / V, lines = THREADS / columns;
    int column = threadIdx.x % columns, line = threadIdx.x / columns;
    for (int k = 0; k < K; k++) {
        if (line < lines) {
            for (int i = 0; i < V; i++) tile[line * span + column * V + i] = sums[k].x[i];
        }
        __syncthreads();
        int c = blockIdx.x * span + threadIdx.x;
        if (int(threadIdx.x) < span && c < channels) {
            float total = 0;
            for (int l = 0; l < lines; l++) total += tile[l * span + threadIdx.x];
            partial[(size_t(blockIdx.y) * K + k) * channels + c] = total;
        }
        __syncthreads();
    }
}

// Sums of `term` over rows, per channel, K at a time, by slabs of `slab` rows: grid (ceil(channels / column_span),
// slabs), blocks of THREADS. term(row, channel, terms) fills terms[K] for V channels from `channel` on; each row and
// channel is asked for once. What the slabs leave in `partial` is added up, in order, by sum_partials.
template <int V, int K, class Term>
__device__ __forceinline__ void column_partials(Term term, int rows, int channels, int slab,
                                                float* partial /* (slabs, K, channels) */) {
    int span = column_span<V>(channels), columns = span / V, lines = THREADS / columns;
    int column = threadIdx.x % columns, line = threadIdx.x / columns;
    int channel = blockIdx.x * span + column * V;
    int end = min(rows, (int(blockIdx.y) + 1) * slab);
    Pack<V> sums[K] = {};
    if (channel < channels && line < lines) {
#pragma unroll(K < 4 ? 2 : 1)  // more would take too many registers
        for (int row = blockIdx.y * slab + line; row < end; row += lines) {
            Pack<V> terms[K];
            term(row, channel, terms);
            for (int k = 0; k < K; k++) {
                for (int i = 0; i < V; i++) sums[k].x[i] += terms[k].x[i];
            }
        }
    }
    store_partials(sums, channels, partial);
}

// ---- random numbers

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, 2011), as src/random.rs has it.
struct Dropout {
    unsigned key0, key1, site, step;
    u64 first;   // counter of the first element
    float rate;  // 0: everything is kept
    // A word's upper 24 bits are a number in [0, 1); what draws less than `rate` is dropped, which is what draws less
    // than this.
    unsigned threshold;

    // The step changes from launch to launch of a graph, so it is read from memory; nobody reads it at rate 0.
    __device__ __forceinline__ Dropout(unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */,
                                       u64 first, float rate)
        : key0(key0), key1(key1), site(site), step(rate == 0.0f ? 0 : *step), first(first), rate(rate),
          threshold(unsigned(ceilf(rate * 16777216.0f)) << 8) {}

    __device__ __forceinline__ uint4 block(u64 counter) const {
        uint4 c = {unsigned(counter), unsigned(counter >> 32), site, step};
        unsigned k0 = key0, k1 = key1;
        for (int round = 0; round < 10; round++) {
            unsigned top0 = __umulhi(c.x, 0xD2511F53u), low0 = c.x * 0xD2511F53u;
            unsigned top1 = __umulhi(c.z, 0xCD9E8D57u), low1 = c.z * 0xCD9E8D57u;
            c = {top1 ^ c.y ^ k0, low1, top0 ^ c.w ^ k1, low0};
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return c;
    }

    // Whether the element that drew `word` is kept.
    __device__ __forceinline__ bool keeps(unsigned word) const { return word >= threshold; }

    // What elements starts[i].. starts[i] + V drew; the starts are multiples of V. Nothing is drawn at rate 0, and
    // everything kept. N at once share the keys of the rounds.
    template <int V, int N> __device__ __forceinline__ void words(const u64 (&starts)[N], unsigned (&to)[N][V]) const {
        for (int n = 0; n < N; n++) {
            for (int i = 0; i < V; i++) to[n][i] = 0;
        }
        if (rate == 0.0f) return;
        if constexpr (V % 4 == 0) {
            // The same for all threads.
            unsigned beyond = unsigned(first % 4);
            unsigned all[N][V + 4];
            auto draw = [&](int n, int i) {
                uint4 four = block(first / 4 + starts[n] / 4 + i / 4);
                all[n][i] = four.x;
                all[n][i + 1] = four.y;
                all[n][i + 2] = four.z;
                all[n][i + 3] = four.w;
            };
            for (int n = 0; n < N; n++) {
                for (int i = 0; i < V; i += 4) draw(n, i);
            }
            if (beyond != 0) {
                for (int n = 0; n < N; n++) {
                    draw(n, V);
                    for (int i = 0; i < V + 3; i++) all[n][i] = beyond & 1 ? all[n][i + 1] : all[n][i];
                    for (int i = 0; i < V; i++) all[n][i] = beyond & 2 ? all[n][i + 2] : all[n][i];
                }
            }
            for (int n = 0; n < N; n++) {
                for (int i = 0; i < V; i++) to[n][i] = all[n][i];
            }
        } else {
            static_assert(V == 1, "elements come by fours or one by one");
            for (int n = 0; n < N; n++) {
                u64 at = first + starts[n];
                unsigned beyond = unsigned(at % 4);
                uint4 four = block(at / 4);
                to[n][0] = beyond == 0 ? four.x : beyond == 1 ? four.y : beyond == 2 ? four.z : four.w;
            }
        }
    }

    // The factors of elements start.. start + V.
    template <int V> __device__ __forceinline__ Pack<V> factors(u64 start) const {
        Pack<V> p;
        unsigned drawn[1][V];
        words<V, 1>({start}, drawn);
        for (int i = 0; i < V; i++) p.x[i] = keeps(drawn[0][i]) ? 1.0f / (1.0f - rate) : 0.0f;
        return p;
    }
};

// The arguments of a Dropout with a factor per image: that reads memory, and its numbers are of no use before the end of a
// kernel.
struct DropPath {
    unsigned key0, key1, site;
    const unsigned* step;
    u64 first;
    float rate;

    __device__ __forceinline__ float factor(int image) const {
        return Dropout(key0, key1, site, step, first, rate).factors<1>(image).x[0];
    }
};
