// The Mix-FFN forward in one kernel: LayerNorm, expansion, depth-wise 3x3 convolution with zero padding, GELU,
// contraction, stochastic depth, residual, and the LayerNorm behind; for 32 or 64 channels.
//
// A block makes a tile of 8 x 16 tokens. It normalises the tile and the tokens around it once; what follows goes by 32
// hidden channels at a time, so that hidden tokens, several times as wide as the others, stay in shared memory. A warp
// expands 48 tokens of the tile with its surroundings, on tensor cores; then it convolves 32 tokens of the tile, a
// thread 4 x 4 with two channels, and contracts the same 32, so that between these two it needs no other warp. Sums of
// the contraction stay in registers to the end.
//
// Products have their channels in the order for 16-byte access (mma.cuh).
#include <climits>

#include "gelu.cuh"
#include "layer_norm.cuh"
#include "mma.cuh"

constexpr int BLOCK = 128, WARPS = BLOCK / 32;
// The tile; with the tokens around it, which are called cells; and these as rows of products.
constexpr int TALL = 8, WIDE = 16, ACROSS = WIDE + 2, CELLS = (TALL + 2) * ACROSS, ROWS = 192;
constexpr int EXPANDED = ROWS / WARPS / 16;
// Hidden channels at a time.
constexpr int CHUNK = 32;
// Side of what a thread convolves.
constexpr int PATCH = 4;

// A token's hidden channels of the moment. Without padding, a row fills half of the banks, and the next row the other half.
struct alignas(16) Bare {
    bf16 at[CHUNK];
};

// The row of a cell, such that neither neighbours of one row of 8 nor cells four apart share banks.
__device__ __forceinline__ int row_of(int cell) { return cell ^ (cell >> 2 & 1); }

// What a cell is: below 0 around the tile, OUTSIDE the picture; else a token of the tile, by number in its image.
constexpr int OUTSIDE = -1;

__device__ __forceinline__ int cell_at(int cell, int top, int left, int height, int width) {
    int down = cell / ACROSS, across = cell - down * ACROSS, y = top + down - 1, x = left + across - 1;
    if (cell >= CELLS || unsigned(y) >= unsigned(height) || unsigned(x) >= unsigned(width)) return OUTSIDE;
    bool own = unsigned(down - 1) < unsigned(TALL) && unsigned(across - 1) < unsigned(WIDE);
    return own ? y * width + x : INT_MIN | (y * width + x);
}

// x, kept as it is: else the compiler computes it again at each use.
__device__ __forceinline__ int settled(int x) {
#ifdef __CUDACC__
    asm("" : "+r"(x));
#endif
    return x;
}

// What the kernel reads of the layer, in its order.
struct Layer {
    const float *gamma, *beta;
    const bf16 *expand, *expand_bias;
    const float *mix, *mix_bias;
    const bf16 *contract, *contract_bias;
    const float *next_gamma, *next_beta;
    int hidden;
};

// What it writes; normed and h may be null.
struct Outputs {
    bf16* normed;
    float* stats;
    bf16 *h, *y, *next;
    float* next_stats;
};

// Normalises the cells; x and outputs begin with the image.
template <int C>
__device__ __forceinline__ void normalise(const bf16* x, const float* gamma, const float* beta, const int (&cells)[ROWS],
                                          bf16* out, float* stats, Row<C> (&normed)[ROWS]) {
    constexpr int LANES = C / 8, EACH = BLOCK / LANES, AHEAD = 6;
    int c = threadIdx.x % LANES * 8;
    Pack<8> g = load<8>(gamma + c), b = load<8>(beta + c);
#pragma unroll 1
    for (int first = threadIdx.x / LANES; first < ROWS; first += AHEAD * EACH) {
        int cell[AHEAD];
        Words<8>::type ahead[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            cell[k] = cells[first + k * EACH];
            ahead[k] = {0, 0, 0, 0};
            if (cell[k] != OUTSIDE) ahead[k] = fetch<8>(x + (unsigned(cell[k] & INT_MAX) * C + c));
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            Pack<8> p = widen<8>(ahead[k]);
            float2 own_stats = centre<C>(p.x);
            for (int i = 0; i < 8; i++) p.x[i] = p.x[i] * own_stats.y * g.x[i] + b.x[i];
            uint4 words = words_of(p.x);
            unsigned* to = reinterpret_cast<unsigned*>(&normed[first + k * EACH].at[c / 32 * 32 + c % 32 / 8 * 2]);
            to[0] = words.x;
            to[4] = words.y;
            to[8] = words.z;
            to[12] = words.w;
            if (cell[k] >= 0 && out != nullptr) *reinterpret_cast<uint4*>(out + (unsigned(cell[k]) * C + c)) = words;
            if (cell[k] >= 0 && c == 0) *reinterpret_cast<float2*>(stats + 2 * unsigned(cell[k])) = own_stats;
        }
    }
}

template <int C>
__device__ __forceinline__ void mix_ffn(const bf16* x, const Layer& layer, const DropPath& drop, int height, int width,
                                        const Outputs& out) {
    SHARED(Row<C>, normed, [ROWS]);
    SHARED(Bare, hidden, [CELLS]);
    SHARED(Bare, mixed, [WARPS][32]);
    SHARED(int, cells, [ROWS]);
    constexpr int EIGHTS = C / 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int left = blockIdx.x * WIDE, top = blockIdx.y * TALL, image = blockIdx.z;
    size_t before = size_t(image) * (height * width);  // tokens before the image

    for (int i = threadIdx.x; i < ROWS; i += BLOCK) {
        cells[i] = cell_at(i, top, left, height, width);
        if (cells[i] != OUTSIDE || i >= CELLS) continue;
        // Nobody writes there again.
        for (int c = 0; c < CHUNK; c += 8) *reinterpret_cast<uint4*>(&hidden[row_of(i)].at[c]) = {0, 0, 0, 0};
    }
    __syncthreads();
    normalise<C>(x + before * C, layer.gamma, layer.beta, cells,
                 out.normed == nullptr ? nullptr : out.normed + before * C, out.stats + 2 * before, normed);

    int first_row = warp * EXPANDED * 16;
    int expanded = settled((first_row + row_of(g)) * CHUNK + 8 * t);  // where the lane's part of its first row goes
    bf16* h = out.h == nullptr ? nullptr : out.h + (before * layer.hidden + 8 * t);
    // What the thread convolves: channels 2·pair and 2·pair + 1, and the cell in the corner above it.
    int pair = lane % 16, side = lane / 16;
    int corner = warp / 2 * PATCH * ACROSS + (warp % 2 * 2 + side) * PATCH;
    int own_row = weight_row(g);
    // Of four tokens, 8 of every 32 channels in a lane.
    float sums[2][EIGHTS][4] = {};
    if (layer.contract_bias != nullptr) {
        for (int k = 0; k < C / 32; k++) {
            Pack<8> bias = load<8>(layer.contract_bias + (32 * k + 8 * t));
            for (int i = 0; i < 32; i++) sums[i / 16][4 * k + i % 4][i % 16 / 4] = bias.x[i % 4 * 2 + i % 8 / 4];
        }
    }

    // The expansion's weights and bias, asked for in front of the barrier before their use, if EARLY.
    uint4 weights[4][C / 32], expand_bias = {0, 0, 0, 0};
    auto ask = [&](int first) {
        for (int j = 0; j < 4; j++) {
            for (int k = 0; k < C / 32; k++) {
                weights[j][k] = sixteen(layer.expand + ((first + own_row + 2 * j) * C + 32 * k + 8 * t));
            }
        }
        if (layer.expand_bias != nullptr) expand_bias = sixteen(layer.expand_bias + (first + 8 * t));
    };
    constexpr bool EARLY = C == 32;  // else there are too few registers
    if (EARLY) ask(0);
    __syncthreads();

#pragma unroll 1
    for (int first = 0; first < layer.hidden; first += CHUNK) {
        {
            if (!EARLY) ask(first);
            Pack<8> bias = widen<8>(expand_bias);
#pragma unroll(EARLY ? EXPANDED : 1)
            for (int m = 0; m < EXPANDED; m++) {
                float d[4][4];
#pragma unroll
                for (int k = 0; k < C / 16; k++) {
                    unsigned a[4];
                    operand(normed, first_row + m * 16, k * 16, a);
                    for (int j = 0; j < 4; j++) {
                        float2 two = {bias.x[2 * j], bias.x[2 * j + 1]};
                        if (k == 0) mma(d[j], a, weights[j][0].x, weights[j][0].y, {two.x, two.y, two.x, two.y});
                        else multiply(d[j], a, weights[j][k / 2], k % 2);
                    }
                }
                for (int half = 0; half < 2; half++) {
                    int i = 2 * half, row = first_row + m * 16 + half * 8 + g, cell = cells[row];
                    uint4 words = words_of({d[0][i], d[0][i + 1], d[1][i], d[1][i + 1], d[2][i], d[2][i + 1], d[3][i],
                                            d[3][i + 1]});
                    bf16* to = hidden[0].at + expanded + (m * 16 + half * 8) * CHUNK;
                    if (cell != OUTSIDE) *reinterpret_cast<uint4*>(to) = words;
                    if (cell >= 0 && h != nullptr) {
                        *reinterpret_cast<uint4*>(h + (unsigned(cell) * unsigned(layer.hidden) + first)) = words;
                    }
                }
            }
        }
        float2 taps[9], bias = *reinterpret_cast<const float2*>(layer.mix_bias + (first + 2 * pair));
        for (int i = 0; i < 9; i++) {
            taps[i] = *reinterpret_cast<const float2*>(layer.mix + (i * layer.hidden + first + 2 * pair));
        }
        __syncthreads();
        float2 u[PATCH][PATCH];
#pragma unroll
        for (int y = 0; y < PATCH + 2; y++) {
            float2 row[PATCH + 2];
            for (int i = 0; i < PATCH + 2; i++) {
                // row_of(corner + y·ACROSS + i), as the corner's number is a multiple of 4, and of 8 on one side.
                int at = row_of(y * ACROSS + i);
                at += at % 2 == 0 ? corner + side : corner - side;
                row[i] = widen(*reinterpret_cast<const unsigned*>(&hidden[at].at[2 * pair]));
            }
            for (int i = 0; i < PATCH; i++) {
                for (int line = 0; line < 3; line++) {
                    int to = y - line;
                    if (to < 0 || to >= PATCH) continue;
                    if (line == 0) u[to][i] = bias;
                    for (int j = 0; j < 3; j++) add(u[to][i], row[i + j], taps[3 * line + j]);
                }
            }
            if (y < 2) continue;
            for (int i = 0; i < PATCH; i++) {
                float2 value = u[y - 2][i];
                bf16* to = mixed[warp][(y - 2) * 8 + 2 * i + side].at + (pair % 4 ^ i) * 8 + pair / 4 * 2;
                *reinterpret_cast<unsigned*>(to) = pair_of(gelu(value.x), gelu(value.y));
            }
        }
        // Two lines of both threads of a pair are the 16 rows of a product.
        __syncwarp();
        unsigned a[2][2][4];
        for (int m = 0; m < 2; m++) {
            for (int k = 0; k < 2; k++) {
                int eight = (2 * k + lane / 16) ^ (lane / 2 % 4);
                load_matrices<false>(&mixed[warp][m * 16 + lane % 16].at[eight * 8], a[m][k]);
            }
        }
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            int channel = j / 4 * 32 + own_row + j % 4 * 2;
            uint4 b = sixteen(layer.contract + (channel * layer.hidden + first + 8 * t));
            for (int m = 0; m < 2; m++) {
                for (int k = 0; k < 2; k++) multiply(sums[m][j], a[m][k], b, k);
            }
        }
        if (EARLY) ask(min(first + CHUNK, layer.hidden - CHUNK));
        __syncthreads();
    }

    float factor = drop.factor(image);
    x += before * C;
    bf16 *to = out.y + before * C, *next = out.next + before * C;
    float* next_stats = out.next_stats + 2 * before;
    Pack<8> gamma[C / 32], beta[C / 32];
    for (int k = 0; k < C / 32; k++) {
        gamma[k] = load<8>(layer.next_gamma + (32 * k + 8 * t));
        beta[k] = load<8>(layer.next_beta + (32 * k + 8 * t));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int y = top + warp / 2 * PATCH + i, column = left + warp % 2 * 8 + g % 2 * PATCH + g / 2;
        bool inside = y < height && column < width;
        unsigned token = y * width + column, at = token * C + 8 * t;
        float p[C / 4];
        for (int k = 0; k < C / 32; k++) {
            uint4 words = {0, 0, 0, 0};
            if (inside) words = fetch<8>(x + (at + 32 * k));
            Pack<8> sum = widen<8>(words);
            for (int c = 0; c < 8; c++) sum.x[c] += factor * sums[i / 2][4 * k + c / 2][i % 2 * 2 + c % 2];
            words = words_of(sum.x);
            if (inside) *reinterpret_cast<uint4*>(to + (at + 32 * k)) = words;
            // What is normalised is what is stored.
            sum = widen<8>(words);
            for (int c = 0; c < 8; c++) p[8 * k + c] = sum.x[c];
        }
        float2 stats = centre<C>(p);
        for (int k = 0; k < C / 32; k++) {
            Pack<8> z;
            for (int c = 0; c < 8; c++) z.x[c] = p[8 * k + c] * stats.y * gamma[k].x[c] + beta[k].x[c];
            if (inside) store(next + (at + 32 * k), z);
        }
        if (inside && t == 0) *reinterpret_cast<float2*>(next_stats + 2 * token) = stats;
    }
}

// Tokens are (images, height, width); hidden channels are a multiple of 32; y is not x. `normed` and `stats` are of the
// LayerNorm in front, `next` and `next_stats` of the one behind; stats are (mean, 1/std). Grid: (ceil(width / 16),
// ceil(height / 8), images), of 128 threads. So for both kernels here.
KERNEL(BLOCK, 4) mix_ffn_32(
    const bf16* x /* (tokens, 32) */, const float* gamma /* (32) */, const float* beta /* (32) */,
    const bf16* expand /* (hidden, 32) */, const bf16* expand_bias /* (hidden) or null */,
    const float* mix /* (9, hidden) */, const float* mix_bias /* (hidden) */, const bf16* contract /* (32, hidden) */,
    const bf16* contract_bias /* (32) or null */, unsigned key0, unsigned key1, unsigned site,
    const unsigned* step /* (1) */, u64 first, float rate, const float* next_gamma /* (32) */,
    const float* next_beta /* (32) */, int height, int width, int hidden, bf16* normed /* (tokens, 32) or null */,
    float* stats /* (tokens, 2) */, bf16* h /* (tokens, hidden) or null */, bf16* y /* (tokens, 32) */,
    bf16* next /* (tokens, 32) */, float* next_stats /* (tokens, 2) */) {
    mix_ffn<32>(x,
                {gamma, beta, expand, expand_bias, mix, mix_bias, contract, contract_bias, next_gamma, next_beta, hidden},
                {key0, key1, site, step, first, rate}, height, width, {normed, stats, h, y, next, next_stats});
}

KERNEL(BLOCK, 3) mix_ffn_64(
    const bf16* x /* (tokens, 64) */, const float* gamma /* (64) */, const float* beta /* (64) */,
    const bf16* expand /* (hidden, 64) */, const bf16* expand_bias /* (hidden) or null */,
    const float* mix /* (9, hidden) */, const float* mix_bias /* (hidden) */, const bf16* contract /* (64, hidden) */,
    const bf16* contract_bias /* (64) or null */, unsigned key0, unsigned key1, unsigned site,
    const unsigned* step /* (1) */, u64 first, float rate, const float* next_gamma /* (64) */,
    const float* next_beta /* (64) */, int height, int width, int hidden, bf16* normed /* (tokens, 64) or null */,
    float* stats /* (tokens, 2) */, bf16* h /* (tokens, hidden) or null */, bf16* y /* (tokens, 64) */,
    bf16* next /* (tokens, 64) */, float* next_stats /* (tokens, 2) */) {
    mix_ffn<64>(x,
                {gamma, beta, expand, expand_bias, mix, mix_bias, contract, contract_bias, next_gamma, next_beta, hidden},
                {key0, key1, site, step, first, rate}, height, width, {normed, stats, h, y, next, next_stats});
}
