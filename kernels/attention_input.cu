// In front of attention: tokens to reduced tokens, and the way back from the gradients of queries and of reduced tokens to that of
// the residual stream. The windows of the sequence reduction are as far apart as they are wide, so that a token lies in one
// window, at one of its taps: no patches are gathered. Channels are in the order for 16-byte access (mma.cuh).
#include "common.cuh"
#include "mma.cuh"

constexpr int TILE = 16;

// Half `half` of an operand's rows: a lane's channels of its row.
template <int C>
__device__ __forceinline__ void load_half(const bf16* row, bool exists, int half, unsigned (&a)[C / 16][4]) {
    for (int n = 0; n < C / 32; n++) {
        uint4 x = {0, 0, 0, 0};
        if (exists) x = sixteen(row + n * 32 + threadIdx.x % 4 * 8);
        set_half(a[2 * n], a[2 * n + 1], half, x);
    }
}

// The first token of window `key`; -1 past the last one.
__device__ __forceinline__ int origin_of(int key, int keys, int width, int side) {
    int across = width / side, line = key / across;
    return key < keys ? (line * width + key % across) * side : -1;
}

// ---- the sequence reduction
//
// A block has REDUCED windows; its warps take turns by taps, and what they have summed is added up at the end, and normalised.
constexpr int WARPS = 8, TILES = 2, REDUCED = TILE * TILES;
constexpr float EPSILON = 1e-5f;

template <int C>
__device__ __forceinline__ void reduce(const bf16* tokens, const bf16* weight, const bf16* bias, const float* gamma,
                                       const float* beta, int keys, int width, int side, bf16* raw, bf16* y,
                                       float* stats) {
    // A tile's sums by warp. The padding takes neighbouring rows to different banks.
    SHARED(float4, sums, [WARPS][TILE][C / 4 + 1]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int first = blockIdx.x * REDUCED, taps = side * side, origins[TILES][2];
    for (int i = 0; i < 2 * TILES; i++) origins[i / 2][i % 2] = origin_of(first + i * 8 + g, keys, width, side);
    float d[TILES][C / 8][4] = {};
#pragma unroll 1
    for (int tap = warp; tap < taps; tap += WARPS) {
        int beyond = tap / side * width + tap % side;
#pragma unroll 1  // more would take too many registers
        for (int s = 0; s < C / 32; s++) {
            unsigned a[TILES][2][4];
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) {
                int origin = origins[i / 2][i % 2];
                const bf16* row = tokens + size_t(max(origin, 0) + beyond) * C + s * 32;
                load_half<32>(row, origin >= 0, i % 2, a[i / 2]);
            }
            const bf16* row = weight + (weight_row(g) * taps + tap) * C + s * 32 + t * 8;
#pragma unroll
            for (int n = 0; n < C / 8; n++) {
                uint4 b = sixteen(row + (n / 4 * 32 + n % 4 * 2) * (taps * C));
                for (int i = 0; i < 2 * TILES; i++) multiply(d[i / 2][n], a[i / 2][i % 2], b, i % 2);
            }
        }
    }
    constexpr int LANES = C / 4;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        __syncthreads();
        for (int half = 0; half < 2; half++) {
            for (int n = 0; n < C / 8; n += 2) {
                float4 four = {d[m][n][2 * half], d[m][n][2 * half + 1], d[m][n + 1][2 * half], d[m][n + 1][2 * half + 1]};
                sums[warp][g + 8 * half][n / 4 * 8 + t * 2 + n % 4 / 2] = four;
            }
        }
        __syncthreads();
        // Whole warps, as LANES is a power of two.
        int line = threadIdx.x / LANES, part = threadIdx.x % LANES, key = first + m * TILE + line;
        if (line >= TILE) continue;
        Pack<4> p = {};
        if (bias != nullptr) p = load<4>(bias + part * 4);
        for (int w = 0; w < WARPS; w++) {
            float4 four = sums[w][line][part];
            p.x[0] += four.x;
            p.x[1] += four.y;
            p.x[2] += four.z;
            p.x[3] += four.w;
        }
        float sum = 0, square = 0;
        for (int i = 0; i < 4; i++) {
            // What is normalised is what is stored.
            p.x[i] = __bfloat162float(__float2bfloat16_rn(p.x[i]));
            sum += p.x[i];
        }
        size_t at = size_t(key) * C + part * 4;
        if (key < keys) store(raw + at, p);
        float mean = group_sum(sum, LANES) / C;
        for (int i = 0; i < 4; i++) {
            p.x[i] -= mean;
            square += p.x[i] * p.x[i];
        }
        float scale = rsqrtf(group_sum(square, LANES) / C + EPSILON);
        Pack<4> slope = load<4>(gamma + part * 4), offset = load<4>(beta + part * 4);
        for (int i = 0; i < 4; i++) p.x[i] = p.x[i] * scale * slope.x[i] + offset.x[i];
        if (key >= keys) continue;
        store(y + at, p);
        if (part == 0) *reinterpret_cast<float2*>(stats + 2 * size_t(key)) = {mean, scale};
    }
}

// raw = the strided convolution of tokens, y its LayerNorm. Windows are `side` x `side` tokens, and height and width multiples
// of that. Grid: ceil(keys / REDUCED), blocks of THREADS. So for both.
KERNEL(THREADS, 2) reduce_tokens_32(const bf16* tokens /* (images, height, width, 32) */,
                                    const bf16* weight /* (32, side², 32) */, const bf16* bias /* (32) or null */,
                                    const float* gamma /* (32) */, const float* beta /* (32) */, int keys, int width,
                                    int side, bf16* raw /* (keys, 32) */, bf16* y /* (keys, 32) */,
                                    float* stats /* (keys, 2): mean, 1/std */) {
    reduce<32>(tokens, weight, bias, gamma, beta, keys, width, side, raw, y, stats);
}

KERNEL(THREADS, 2) reduce_tokens_64(const bf16* tokens /* (images, height, width, 64) */,
                                    const bf16* weight /* (64, side², 64) */, const bf16* bias /* (64) or null */,
                                    const float* gamma /* (64) */, const float* beta /* (64) */, int keys, int width,
                                    int side, bf16* raw /* (keys, 64) */, bf16* y /* (keys, 64) */,
                                    float* stats /* (keys, 2): mean, 1/std */) {
    reduce<64>(tokens, weight, bias, gamma, beta, keys, width, side, raw, y, stats);
}

// ---- the way back
//
// From the gradients of queries and of reduced tokens, before their LayerNorm, through both products and the LayerNorm to that of
// the stream. The gradient of the LayerNorm's output is nowhere in memory: of a token's normalised channels it is
// dq · query + dreduced · tap, where dreduced is its window's and `tap` the weights there. A warp takes tokens that lie at the
// same tap of 16 windows, so that all products are 16 rows with a square weight.
//
// A block has KEYS windows and all their tokens; its warps take turns by taps, each with the tap's weights in its own part of
// shared memory.
constexpr int KEYS = 64;
// Sums per channel: gamma's gradient, beta's, and that of a bias in front.
constexpr int KINDS = 3;
// With the least blocks that a multiprocessor shall hold at once.
#define BOUNDS_32 256, 2
#define BOUNDS_64 128, 2

// SUMS: of the parameters' gradients, too.
template <int C, bool SUMS>
__device__ __forceinline__ void walk(const bf16* __restrict__ dq, const bf16* __restrict__ dreduced,
                                     const bf16* __restrict__ query, const bf16* __restrict__ reduction,
                                     const bf16* __restrict__ x, const float* __restrict__ stats,
                                     const float* __restrict__ gamma, int keys, int height, int width, int side,
                                     const DropPath& drop, bf16* __restrict__ dx, bf16* __restrict__ scaled,
                                     float* __restrict__ partial) {
    constexpr int WALKERS = 256 / C, BLOCK = 32 * WALKERS;
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
        factors[i] = scaled != nullptr && key < keys ? drop.factor(image) : 1.0f;
    }
    copies_done();
    __syncthreads();

    float sums[SUMS ? KINDS : 1][C / 4] = {};
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
}

// dx += LayerNorm's gradient towards x; `scaled` receives dx times its image's factor. Windows are as in reduce_tokens.
// Grid: ceil(keys / KEYS), blocks of 256 threads for 32 channels, of 128 for 64.
KERNEL(BOUNDS_32) attention_input_backward_32(
    const bf16* dq /* (images, height, width, 32) */, const bf16* dreduced /* (keys, 32) */,
    const bf16* query /* (32, 32) */, const bf16* reduction /* (32, side², 32) */, const bf16* x /* as dq */,
    const float* stats /* (tokens, 2): mean, 1/std */, const float* gamma /* (32) */, int keys, int height, int width,
    int side, unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
    bf16* dx /* as dq */, bf16* scaled /* as dq, or null */) {
    walk<32, false>(dq, dreduced, query, reduction, x, stats, gamma, keys, height, width, side,
                    {key0, key1, site, step, first, rate}, dx, scaled, nullptr);
}

KERNEL(BOUNDS_64) attention_input_backward_64(
    const bf16* dq /* (images, height, width, 64) */, const bf16* dreduced /* (keys, 64) */,
    const bf16* query /* (64, 64) */, const bf16* reduction /* (64, side², 64) */, const bf16* x /* as dq */,
    const float* stats /* (tokens, 2): mean, 1/std */, const float* gamma /* (64) */, int keys, int height, int width,
    int side, unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
    bf16* dx /* as dq */, bf16* scaled /* as dq, or null */) {
    walk<64, false>(dq, dreduced, query, reduction, x, stats, gamma, keys, height, width, side,
                    {key0, key1, site, step, first, rate}, dx, scaled, nullptr);
}

// The same with the parameters' gradients.
KERNEL(BOUNDS_32) attention_input_backward_all_32(
    const bf16* dq /* (images, height, width, 32) */, const bf16* dreduced /* (keys, 32) */,
    const bf16* query /* (32, 32) */, const bf16* reduction /* (32, side², 32) */, const bf16* x /* as dq */,
    const float* stats /* (tokens, 2): mean, 1/std */, const float* gamma /* (32) */, int keys, int height, int width,
    int side, unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
    bf16* dx /* as dq */, bf16* scaled /* as dq, or null */,
    float* partial /* (blocks, 3, 32): gamma's, beta's, a bias's in front */) {
    walk<32, true>(dq, dreduced, query, reduction, x, stats, gamma, keys, height, width, side,
                   {key0, key1, site, step, first, rate}, dx, scaled, partial);
}

KERNEL(BOUNDS_64) attention_input_backward_all_64(
    const bf16* dq /* (images, height, width, 64) */, const bf16* dreduced /* (keys, 64) */,
    const bf16* query /* (64, 64) */, const bf16* reduction /* (64, side², 64) */, const bf16* x /* as dq */,
    const float* stats /* (tokens, 2): mean, 1/std */, const float* gamma /* (64) */, int keys, int height, int width,
    int side, unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
    bf16* dx /* as dq */, bf16* scaled /* as dq, or null */,
    float* partial /* (blocks, 3, 64): gamma's, beta's, a bias's in front */) {
    walk<64, true>(dq, dreduced, query, reduction, x, stats, gamma, keys, height, width, side,
                   {key0, key1, site, step, first, rate}, dx, scaled, partial);
}
