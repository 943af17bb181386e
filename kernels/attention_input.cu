// The way back in front of attention: from the gradients of queries and of reduced tokens, before their LayerNorm, through both
// products and the LayerNorm to that of the stream. The gradient of the LayerNorm's output is nowhere in memory, and no patches
// are: the windows of the sequence reduction are as far apart as they are wide, so that a token lies in one window, at one of
// its taps, and the gradient of its normalised channels is dq · query + dreduced · tap, where dreduced is its window's and `tap`
// the weights there. A warp takes tokens that lie at the same tap of 16 windows, so that all products are 16 rows with a square
// weight. Channels are in the order for 16-byte access (mma.cuh).
//
// A block has KEYS windows and all their tokens; its warps take turns by taps, each with the tap's weights in its own part of
// shared memory. With few channels, they also sum the gradients of Q's weight and bias on tensor cores, from the gradients and
// the normalised tokens that are in their registers, turned: products sum over tokens there.
#include "common.cuh"
#include "mma.cuh"
#include "windows.cuh"

constexpr int KEYS = 64, TILE = 16;
// Sums per channel: gamma's gradient, beta's, and that of a bias in front.
constexpr int KINDS = 3;
// With the least blocks that a multiprocessor shall hold at once.
#define BOUNDS_32 256, 2
#define BOUNDS_ALL_32 128, 3
#define BOUNDS_64 128, 2

// Eight channels of eight tokens in each lane, in the order for 16-byte access, as operands that hold pairs of tokens.
__device__ __forceinline__ void turn(const uint4& row, unsigned (&pairs)[4]) {
    pairs[0] = transpose(row.x);
    pairs[1] = transpose(row.y);
    pairs[2] = transpose(row.z);
    pairs[3] = transpose(row.w);
}

// SUMS: of the parameters' gradients, too.
template <int C, int WALKERS, bool SUMS>
__device__ __forceinline__ void walk(const bf16* __restrict__ dq, const bf16* __restrict__ dreduced,
                                     const bf16* __restrict__ query, const bf16* __restrict__ reduction,
                                     const bf16* __restrict__ x, const float* __restrict__ stats,
                                     const float* __restrict__ gamma, const float* __restrict__ beta, int keys,
                                     int height, int width, int side, const DropPath& drop, bf16* __restrict__ dx,
                                     bf16* __restrict__ scaled, float* __restrict__ partial,
                                     float* __restrict__ query_partial) {
    constexpr int BLOCK = 32 * WALKERS;
    constexpr bool QUERIES = SUMS && C == 32;
    SHARED(Square<C>, squares, [WALKERS + 1]);
    // Of each window: its first token, or -1, and the factor of its image.
    SHARED(int, origins, [KEYS]);
    SHARED(float, factors, [KEYS]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int first = blockIdx.x * KEYS, taps = side * side;
    squares[WALKERS].copy(query, C, threadIdx.x, BLOCK);
    for (int i = threadIdx.x; i < KEYS; i += BLOCK) {
        int key = first + i, image = key / (width / side * (height / side));
        origins[i] = origin_of(key, keys, width, side);
        factors[i] = key < keys ? drop.factor(image) : 1.0f;
    }
    copies_done();
    __syncthreads();

    float sums[SUMS ? KINDS : 1][C / 4] = {};
    // Of Q's weight, 16 outputs by 8 inputs; of its bias, in both columns of a lane.
    float weight_sums[QUERIES ? 2 : 1][4][4] = {}, bias_sums[QUERIES ? 2 : 1][4] = {};
    for (int tap = warp; tap < taps; tap += WALKERS) {
        __syncwarp();
        squares[warp].copy(reduction + size_t(tap) * C, size_t(taps) * C, lane, 32);
        copies_done();
        __syncwarp();
        int beyond = tap / side * width + tap % side;
#pragma unroll 1
        for (int tile = 0; tile < KEYS && first + tile < keys; tile += TILE) {
            float dn[C / 8][4] = {};
            unsigned queries[C / 16][4], windows[C / 16][4];
            bool exists[2];
            size_t rows[2];
            uint4 tokens[2][C / 32], before[2][C / 32];
            float2 measured[2];
            for (int half = 0; half < 2; half++) {
                int key = tile + half * 8 + g, origin = origins[key];
                exists[half] = origin >= 0;
                rows[half] = exists[half] ? size_t(origin + beyond) : 0;
                load_half<C>(dq + rows[half] * C, exists[half], half, queries);
                load_half<C>(dreduced + size_t(first + key) * C, exists[half], half, windows);
                measured[half] = {0.0f, 0.0f};
                if (exists[half]) measured[half] = *reinterpret_cast<const float2*>(stats + 2 * rows[half]);
                for (int n = 0; n < C / 32; n++) {
                    tokens[half][n] = before[half][n] = {0, 0, 0, 0};
                    size_t at = rows[half] * C + n * 32 + t * 8;
                    if (exists[half]) tokens[half][n] = sixteen(x + at);
                    if (exists[half]) before[half][n] = sixteen(dx + at);
                }
            }
            if constexpr (QUERIES) {
                // Where there is no token, dq is zero.
                unsigned dy[2][4], normed[2][4];
                Pack<8> slope = load<8>(gamma + t * 8), offset = load<8>(beta + t * 8);
                for (int half = 0; half < 2; half++) {
                    Pack<8> token = widen<8>(tokens[half][0]);
                    float mean = measured[half].x, scale = measured[half].y;
                    for (int i = 0; i < 8; i++) token.x[i] = (token.x[i] - mean) * scale * slope.x[i] + offset.x[i];
                    turn(words_of(token.x), normed[half]);
                    turn({queries[0][half], queries[0][half + 2], queries[1][half], queries[1][half + 2]}, dy[half]);
                }
                for (int m = 0; m < 2; m++) {
                    unsigned a[4] = {dy[0][2 * m], dy[0][2 * m + 1], dy[1][2 * m], dy[1][2 * m + 1]};
                    for (int n = 0; n < 4; n++) mma(weight_sums[m][n], a, normed[0][n], normed[1][n]);
                    mma(bias_sums[m], a, ONES, ONES);
                }
            }
            squares[WALKERS].multiply(queries, dn);
            squares[warp].multiply(windows, dn);
            for (int half = 0; half < 2; half++) {
                auto gradient = [&](int n, int i) -> float& { return dn[4 * n + i / 2][2 * half + i % 2]; };
                float plain = 0, along = 0, mean = measured[half].x, scale = measured[half].y;
                for (int n = 0; n < C / 32; n++) {
                    Pack<8> token = widen<8>(tokens[half][n]), slope = load<8>(gamma + n * 32 + t * 8);
                    for (int i = 0; i < 8; i++) {
                        float& d = gradient(n, i);
                        float normalised = (token.x[i] - mean) * scale;
                        if constexpr (SUMS) {
                            sums[0][8 * n + i] += d * normalised;
                            sums[1][8 * n + i] += d;
                        }
                        d *= slope.x[i];
                        plain += d;
                        along += d * normalised;
                    }
                }
                plain = group_sum(plain, 4) / C;
                along = group_sum(along, 4) / C;
                float factor = factors[tile + half * 8 + g];
                for (int n = 0; n < C / 32; n++) {
                    Pack<8> token = widen<8>(tokens[half][n]), old = widen<8>(before[half][n]);
                    for (int i = 0; i < 8; i++) {
                        float normalised = (token.x[i] - mean) * scale;
                        old.x[i] += (gradient(n, i) - plain - normalised * along) * scale;
                    }
                    size_t at = rows[half] * C + n * 32 + t * 8;
                    if (exists[half]) store(dx + at, old);
                    for (int i = 0; i < 8; i++) {
                        old.x[i] *= factor;
                        if constexpr (SUMS) sums[2][8 * n + i] += old.x[i];
                    }
                    if (exists[half] && scaled != nullptr) store(scaled + at, old);
                }
            }
        }
    }
    if constexpr (SUMS) {
        float(*tile)[C] = reinterpret_cast<float(*)[C]>(squares);
#pragma unroll
        for (int k = 0; k < KINDS; k++) {
            __syncthreads();
            for (int i = 0; i < C / 4; i++) {
                for (int other = 4; other < 32; other *= 2) sums[k][i] += __shfl_xor_sync(ALL_LANES, sums[k][i], other);
                if (g == 0) tile[warp][i / 8 * 32 + t * 8 + i % 8] = sums[k][i];
            }
            __syncthreads();
            for (int c = threadIdx.x; c < C; c += BLOCK) {
                float total = 0;
                for (int w = 0; w < WALKERS; w++) total += tile[w][c];
                partial[(size_t(blockIdx.x) * KINDS + k) * C + c] = total;
            }
        }
    }
    if constexpr (QUERIES) {
        // The warps' sums, one warp after the other.
        float* total = reinterpret_cast<float*>(squares);
        static_assert((C * C + C) * sizeof(float) <= sizeof(squares), "sums fit where weights were");
        for (int w = 0; w < WALKERS; w++) {
            __syncthreads();
            for (int i = 0; w == warp && i < 4; i++) {
                // Rows and columns of the products' tiles are channels by pairs.
                int row = g / 2 * 8 + 2 * i + g % 2;
                const float(&own)[4][4] = weight_sums[i / 2];
                for (int n = 0; n < 4; n++) {
                    float2* to = reinterpret_cast<float2*>(total + row * C + t * 8 + 2 * n);
                    float2 sum = {own[n][i % 2 * 2], own[n][i % 2 * 2 + 1]};
                    if (w > 0) add(sum, *to, {1.0f, 1.0f});
                    *to = sum;
                }
                float* to = total + C * C + row;
                if (t == 0) *to = bias_sums[i / 2][i % 2 * 2] + (w > 0 ? *to : 0.0f);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < C * C + C; i += BLOCK) query_partial[size_t(blockIdx.x) * (C * C + C) + i] = total[i];
    }
}

// dx += LayerNorm's gradient towards x; `scaled` receives dx times its image's factor, with which it counts for the bias in front. Windows are as in reduce_tokens
// (convolution.cu).
// Grid: ceil(keys / KEYS), blocks of 256 threads for 32 channels without sums, else of 128.
KERNEL(BOUNDS_32) attention_input_backward_32(
    const bf16* dq /* (images, height, width, 32) */, const bf16* dreduced /* (keys, 32) */,
    const bf16* query /* (32, 32) */, const bf16* reduction /* (32, side², 32) */, const bf16* x /* as dq */,
    const float* stats /* (tokens, 2): mean, 1/std */, const float* gamma /* (32) */, int keys, int height, int width,
    int side, unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
    bf16* dx /* as dq */, bf16* scaled /* as dq, or null */) {
    walk<32, 8, false>(dq, dreduced, query, reduction, x, stats, gamma, nullptr, keys, height, width, side,
                       {key0, key1, site, step, first, rate}, dx, scaled, nullptr, nullptr);
}

KERNEL(BOUNDS_64) attention_input_backward_64(
    const bf16* dq /* (images, height, width, 64) */, const bf16* dreduced /* (keys, 64) */,
    const bf16* query /* (64, 64) */, const bf16* reduction /* (64, side², 64) */, const bf16* x /* as dq */,
    const float* stats /* (tokens, 2): mean, 1/std */, const float* gamma /* (64) */, int keys, int height, int width,
    int side, unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
    bf16* dx /* as dq */, bf16* scaled /* as dq, or null */) {
    walk<64, 4, false>(dq, dreduced, query, reduction, x, stats, gamma, nullptr, keys, height, width, side,
                       {key0, key1, site, step, first, rate}, dx, scaled, nullptr, nullptr);
}

// The same with the parameters' gradients; with 32 channels, Q's too.
KERNEL(BOUNDS_ALL_32) attention_input_backward_all_32(
    const bf16* dq /* (images, height, width, 32) */, const bf16* dreduced /* (keys, 32) */,
    const bf16* query /* (32, 32) */, const bf16* reduction /* (32, side², 32) */, const bf16* x /* as dq */,
    const float* stats /* (tokens, 2): mean, 1/std */, const float* gamma /* (32) */, const float* beta /* (32) */,
    int keys, int height, int width, int side, unsigned key0, unsigned key1, unsigned site,
    const unsigned* step /* (1) */, u64 first, float rate, bf16* dx /* as dq */, bf16* scaled /* as dq, or null */,
    float* partial /* (blocks, 3, 32): gamma's, beta's, a bias's in front */,
    float* query_partial /* (blocks, 32·32 + 32): of Q's weight and bias */) {
    walk<32, 4, true>(dq, dreduced, query, reduction, x, stats, gamma, beta, keys, height, width, side,
                      {key0, key1, site, step, first, rate}, dx, scaled, partial, query_partial);
}

KERNEL(BOUNDS_64) attention_input_backward_all_64(
    const bf16* dq /* (images, height, width, 64) */, const bf16* dreduced /* (keys, 64) */,
    const bf16* query /* (64, 64) */, const bf16* reduction /* (64, side², 64) */, const bf16* x /* as dq */,
    const float* stats /* (tokens, 2): mean, 1/std */, const float* gamma /* (64) */, int keys, int height, int width,
    int side, unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
    bf16* dx /* as dq */, bf16* scaled /* as dq, or null */,
    float* partial /* (blocks, 3, 64): gamma's, beta's, a bias's in front */) {
    walk<64, 4, true>(dq, dreduced, query, reduction, x, stats, gamma, nullptr, keys, height, width, side,
                      {key0, key1, site, step, first, rate}, dx, scaled, partial, nullptr);
}
