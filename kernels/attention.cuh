// Attention of warps that own queries: what the kernels of attention.cu share with those that join it to its products.
#pragma once
#include "mma.cuh"

namespace attention {

constexpr int QUERY_BLOCK = 256;
// With the least blocks that a multiprocessor shall hold at once: at most 128 registers.
#define QUERY_BOUNDS QUERY_BLOCK, 2

// Tiles of 16 rows that a warp owns.
template <int D> constexpr int TILES = 64 / D;
// Keys and values in shared memory at a time.
template <int D> constexpr int WINDOW = 8192 / D;
// Keys per step of the online softmax.
constexpr int CHUNK = 32;
// Probabilities may exceed 1 by this power of two before sums are rescaled: f32 has room, and most steps need none.
constexpr float SLACK = 8.0f;
// So little may a sum of theirs come to that nothing overflows, where their size is not looked at step by step.
constexpr float ROOM = 0x1p64f;
constexpr float LOG2_E = 1.44269504f;
constexpr float LN_2 = 0.693147181f;
// Of scores, where heads have 32 channels: 1 / sqrt(32).
constexpr float SCALE = 0.176776695f;

// This thread's number, asked for anew: what follows from it is not kept in registers through the loops over keys.
__device__ __forceinline__ unsigned own_thread() {
    unsigned thread = threadIdx.x;
#ifdef __CUDACC__
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
#endif
    return thread;
}

// Likewise this block's place along the grid's second side.
__device__ __forceinline__ unsigned own_line() {
    unsigned line = blockIdx.y;
#ifdef __CUDACC__
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(line));
#endif
    return line;
}

// Eight channels of a row of which `left` are left, zero beyond. WIDE: heads are multiples of 8.
template <bool WIDE> __device__ __forceinline__ uint4 eight(const bf16* from /* (left) */, int left) {
    if constexpr (WIDE) {
        return left > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
    } else {
        float x[8];
        for (int i = 0; i < 8; i++) x[i] = i < left ? __bfloat162float(from[i]) : 0.0f;
        return words_of(x);
    }
}

// Adds A·tileᵀ for rows row.. row + 16 of a tile: s's columns from 8·n on.
template <int D, int N, class Line>
__device__ __forceinline__ void add_scores(const unsigned (&a)[TILES<D>][D / 16][4], Line* tile, int row,
                                           float (&s)[TILES<D>][N][4], int n = 0) {
    for (int i = 0; i < D / 16; i++) {
        unsigned b[4];
        across(tile, row, i * 16, b);
        for (int m = 0; m < TILES<D>; m++) {
            mma(s[m][n], a[m][i], b[0], b[1]);
            mma(s[m][n + 1], a[m][i], b[2], b[3]);
        }
    }
}

// Adds P·tile for rows row.. row + 16 of a tile.
template <int D, class Line>
__device__ __forceinline__ void accumulate(const unsigned (&p)[TILES<D>][4], Line* tile, int row,
                                           float (&d)[TILES<D>][D / 8][4]) {
    for (int i = 0; i < D / 16; i++) {
        unsigned b[4];
        along(tile, row, i * 16, b);
        for (int m = 0; m < TILES<D>; m++) {
            mma(d[m][2 * i], p[m], b[0], b[1]);
            mma(d[m][2 * i + 1], p[m], b[2], b[3]);
        }
    }
}

// Two tiles of D, rounded, as an A.
__device__ __forceinline__ void as_operand(const float (&left)[4], const float (&right)[4], unsigned (&a)[4]) {
    a[0] = pair_of(left[0], left[1]);
    a[1] = pair_of(left[2], left[3]);
    a[2] = pair_of(right[0], right[1]);
    a[3] = pair_of(right[2], right[3]);
}

// ---- a warp owns queries
//
// Here channels are in the order for 16-byte access (mma.cuh).

template <int D>
__device__ __forceinline__ void load_ordered(const bf16* from, size_t start, int first, int rows, int channels,
                                             int head, Turned<D>* to) {
    constexpr int LINES = QUERY_BLOCK / (D / 2);
    unsigned thread = own_thread();
    int row = thread / (D / 2), c = thread % (D / 2) * 2;
    int filled = min(WINDOW<D>, (rows - first + CHUNK - 1) / CHUNK * CHUNK), there_are = rows - first;
    const bf16* at = from + (start + size_t(first + row) * channels + c);
    int place = c / 32 * 32 + c % 8 * 4 + c % 32 / 8 * 2;
    bf16* there = reinterpret_cast<bf16*>(turned(to, row, place / 8)) + place % 8;
#pragma unroll 1
    for (; row < filled; row += LINES, at += LINES * channels, there += LINES * D) {
        int left = row < there_are ? head - c : 0;
        if (head % 8 == 0) {
            copy_async<4>(there, at, left > 0 ? 4 : 0);
        } else {
            there[0] = left > 0 ? at[0] : __float2bfloat16_rn(0.0f);
            there[1] = left > 1 ? at[1] : __float2bfloat16_rn(0.0f);
        }
    }
}

// Begins to load keys and values from `first` on, up to a window, for the whole block; zero beyond `rows`, and beyond
// `head`. There after copies_done and a barrier.
template <int D>
__device__ __forceinline__ void load_window(const bf16* k /* (rows, channels) from `start` on */,
                                            const bf16* v /* as k */, size_t start, int first, int rows, int channels,
                                            int head, Turned<D> (&to)[2][WINDOW<D>]) {
    __syncthreads();
    load_ordered<D>(k, start, first, rows, channels, head, to[0]);
    load_ordered<D>(v, start, first, rows, channels, head, to[1]);
}

// Rows first.. first + 16 as A.
template <int D, bool WIDE>
__device__ __forceinline__ void load_a(const bf16* from, size_t start, int first, int rows, int channels, int head,
                                       unsigned (&a)[D / 16][4]) {
    unsigned thread = own_thread();
    for (int half = 0; half < 2; half++) {
        int row = first + thread % 32 / 4 + half * 8;
        for (int n = 0; n < D / 32; n++) {
            int c = n * 32 + thread % 4 * 8;
            uint4 x = eight<WIDE>(from + (start + size_t(row) * channels + c), row < rows ? head - c : 0);
            set_half(a[2 * n], a[2 * n + 1], half, x);
        }
    }
}

template <int D>
__device__ __forceinline__ void load_operand(const bf16* from /* (rows, channels) from `start` on */, size_t start,
                                             int first, int rows, int channels, int head, unsigned (&a)[D / 16][4]) {
    if (head % 8 == 0) load_a<D, true>(from, start, first, rows, channels, head, a);
    else load_a<D, false>(from, start, first, rows, channels, head, a);
    settle(a, blockIdx.z);
}

// Writes 16 bytes at once, to global memory. An assignment leaves that to the compiler, which makes four writes of it
// here.
__device__ __forceinline__ void store_words(bf16* to, const uint4& words) {
#ifdef __CUDACC__
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(to) = words;
#endif
}

// Writes 16 x D accumulators, times `factors` for rows g and g + 8, to rows `first` on.
template <int D>
__device__ __forceinline__ void store_rows(const float (&d)[D / 8][4], const float (&factors)[2], int first, int rows,
                                           int channels, int head, bf16* to, size_t start) {
    unsigned thread = own_thread();
    for (int half = 0; half < 2; half++) {
        int row = first + thread % 32 / 4 + half * 8;
        if (row >= rows) continue;
        for (int n = 0; n < D / 32; n++) {
            int c = n * 32 + thread % 4 * 8, left = head - c;
            bf16* at = to + (start + size_t(row) * channels + c);
            float x[8];
            for (int i = 0; i < 8; i++) x[i] = d[n * 4 + i / 2][half * 2 + i % 2] * factors[half];
            if (head % 8 == 0) {
                if (left > 0) store_words(at, words_of(x));
            } else {
                for (int i = 0; i < 8; i++) {
                    if (i < left) at[i] = __float2bfloat16_rn(x[i]);
                }
            }
        }
    }
}

// What a warp has of its rows, and of g and g + 8 of 16: logarithms are to base 2.
template <int D> struct Softmax {
    float top[TILES<D>][2], sum[TILES<D>][2], out[TILES<D>][D / 8][4];
};

// The attention of a warp's rows to a head's keys. Of these the block has begun to load the first window, if they are
// `fresh`, and `load_from(first)` begins to load another. All warps call it; those without rows are `idle`. `factor`
// makes logarithms to base 2 of scores.
template <int D, class Load>
__device__ __forceinline__ void attend(const unsigned (&a)[TILES<D>][D / 16][4], int keys, bool fresh, bool idle,
                                       float factor, Load load_from, Turned<D> (&rows)[2][WINDOW<D>],
                                       Softmax<D>& softmax) {
    constexpr int M = TILES<D>;
    int t = threadIdx.x % 4 * 2;
    auto& [top, sum, out] = softmax;
    for (int i = 0; i < 2 * M; i++) {
        top[i / 2][i % 2] = -INFINITY;
        sum[i / 2][i % 2] = 0;
    }
    for (int i = 0; i < M * D / 2; i++) out[i / (D / 2)][i % (D / 2) / 4][i % 4] = 0;
#pragma unroll 1
    for (int start = 0; start < keys; start += WINDOW<D>) {
        if (start > 0) load_from(start);
        if (fresh) {
            copies_done();
            __syncthreads();
        }
        if (idle) continue;
        int count = min(WINDOW<D>, keys - start);
        // The first step's largest score is as good as any, as long as nothing overflows by it. If it does, and from
        // the second window on, where there is no going back, every step sees to its own.
        bool careful = start > 0;
#pragma unroll 1
        for (;;) {
            Turned<D>* at = rows[0];
#pragma unroll 1
            for (int chunk = 0; chunk < count; chunk += CHUNK, at += CHUNK) {
                float s[M][CHUNK / 8][4] = {};
                for (int n = 0; n < CHUNK / 16; n++) add_scores<D>(a, at, n * 16, s, 2 * n);
                if (chunk + CHUNK > count) {
                    for (int n = 0; n < CHUNK / 8; n++) {
                        for (int i = 0; i < 4 * M; i++) {
                            if (chunk + n * 8 + t + i % 2 >= count) s[i / 4][n][i % 4] = -INFINITY;
                        }
                    }
                }
                if (careful || chunk == 0) {
                    float largest[M][2];
                    int rises = 0;
                    for (int m = 0; m < M; m++) {
                        for (int half = 0; half < 2; half++) {
                            float most = -INFINITY;
                            for (int n = 0; n < CHUNK / 8; n++) {
                                most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                            }
                            largest[m][half] = most * factor;
                            rises |= largest[m][half] > top[m][half] + SLACK;
                        }
                    }
                    if (__any_sync(ALL_LANES, rises)) {
                        for (int m = 0; m < M; m++) {
                            for (int half = 0; half < 2; half++) {
                                float most = fmaxf(top[m][half], largest[m][half]);
                                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                                float shrink = power_of_two(top[m][half] - most);
                                top[m][half] = most;
                                sum[m][half] *= shrink;
                                for (int n = 0; n < D / 8; n++) {
                                    out[m][n][2 * half] *= shrink;
                                    out[m][n][2 * half + 1] *= shrink;
                                }
                            }
                        }
                    }
                }
                for (int n = 0; n < CHUNK / 8; n++) {
                    for (int m = 0; m < M; m++) {
                        for (int i = 0; i < 4; i++) {
                            s[m][n][i] = power_of_two(s[m][n][i] * factor - top[m][i / 2]);
                            sum[m][i / 2] += s[m][n][i];
                        }
                    }
                }
                for (int n = 0; n < CHUNK / 16; n++) {
                    unsigned p[M][4];
                    for (int m = 0; m < M; m++) as_operand(s[m][2 * n], s[m][2 * n + 1], p[m]);
                    accumulate<D>(p, at, WINDOW<D> + n * 16, out);
                }
            }
            bool over = false;
            for (int i = 0; i < 2 * M; i++) over |= !(sum[i / 2][i % 2] <= ROOM);
            if (careful || !__any_sync(ALL_LANES, over)) break;
            careful = true;
            for (int i = 0; i < 2 * M; i++) {
                top[i / 2][i % 2] = -INFINITY;
                sum[i / 2][i % 2] = 0;
            }
            for (int i = 0; i < M * D / 2; i++) out[i / (D / 2)][i % (D / 2) / 4][i % 4] = 0;
        }
    }
}

// The end of it for 16 rows, `first` on: what their sums are to be multiplied by; the logarithms of the denominators go
// to `lse`, if it is not null.
__device__ __forceinline__ void end_softmax(const float (&top)[2], const float (&sum)[2], int first, int rows,
                                            float* lse /* (rows) */, float (&shares)[2]) {
    int lane = threadIdx.x % 32;
    for (int half = 0; half < 2; half++) {
        float total = group_sum(sum[half], 4);
        shares[half] = __fdividef(1.0f, total);
        int row = first + lane / 4 + half * 8;
        if (lane % 4 == 0 && row < rows && lse != nullptr) lse[row] = top[half] * LN_2 + __logf(total);
    }
}

}  // namespace attention
