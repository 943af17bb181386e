// The queries' side of attention in one kernel, for one or two heads of 32 channels: product of the normalised tokens,
// attention, output product, stochastic depth, residual.
//
// As in attention.cu, but that a warp makes the queries that it owns, and multiplies what they find where it stands: each
// product leaves a lane what the next one reads of it (mma.cuh), so that nothing between the tokens and the stream has to go
// through memory. Two heads take turns, since a block has room for the keys of one; what is found with the first waits in
// shared memory.
#include "attention.cuh"

using namespace attention;

constexpr int M = TILES<32>;
// Queries of a warp, and of a block at a time.
constexpr int OWN = 16 * M, TILE = QUERY_BLOCK / 32 * OWN;

// A warp's rows, of C channels, as A.
template <int C> using Operand = unsigned[M][C / 16][4];

// D = A·Wᵀ + bias for 32 columns of W's, `first` on.
template <int C>
__device__ __forceinline__ void product(const Operand<C>& a, const bf16* w /* (C, C) */, const bf16* bias /* (C) or null */,
                                        int first, float (&d)[M][4][4]) {
    unsigned lane = own_thread() % 32, t = lane % 4;
    uint4 words = {0, 0, 0, 0};
    if (bias != nullptr) words = sixteen(bias + (first + 8 * t));
    Pack<8> b = widen<8>(words);
    for (int m = 0; m < M; m++) {
        for (int i = 0; i < 16; i++) d[m][i / 4][i % 4] = b.x[i / 4 * 2 + i % 2];
    }
    const bf16* at = w + ((first + weight_row(lane / 4)) * C + 8 * t);
    for (int j = 0; j < 4; j++) {
        for (int k = 0; k < C / 32; k++) {
            uint4 part = sixteen(at + (2 * j * C + 32 * k));
            for (int m = 0; m < M; m++) {
                for (int half = 0; half < 2; half++) multiply(d[m][j], a[m][2 * k + half], part, half);
            }
        }
    }
}

// Writes 32 channels of 16 rows, `first` on.
__device__ __forceinline__ void store_operand(const unsigned (&a)[2][4], int first, int rows, int channels, bf16* to) {
    unsigned lane = own_thread() % 32;
    for (int half = 0; half < 2; half++) {
        int row = first + lane / 4 + half * 8;
        uint4 words = {a[0][half], a[0][half + 2], a[1][half], a[1][half + 2]};
        if (row < rows) store_words(to + (size_t(row) * channels + lane % 4 * 8), words);
    }
}

// y = x + factor·(A·Wᵀ + bias) for a warp's rows, `first` on.
template <int C>
__device__ __forceinline__ void join_rows(const bf16* x, const Operand<C>& a, const bf16* w, const bf16* bias,
                                          float factor, int first, int rows, bf16* y) {
    unsigned lane = own_thread() % 32;
#pragma unroll
    for (int c = 0; c < C; c += 32) {
        uint4 before[2 * M];
        for (int i = 0; i < 2 * M; i++) {
            int row = first + 8 * i + lane / 4;
            before[i] = {0, 0, 0, 0};
            if (row < rows) before[i] = sixteen(x + (size_t(row) * C + c + lane % 4 * 8));
        }
        float d[M][4][4];
        product<C>(a, w, bias, c, d);
        for (int i = 0; i < 2 * M; i++) {
            int row = first + 8 * i + lane / 4;
            Pack<8> sum = widen<8>(before[i]);
            for (int n = 0; n < 8; n++) sum.x[n] += factor * d[i / 2][n / 2][i % 2 * 2 + n % 2];
            if (row < rows) store_words(y + (size_t(row) * C + c + lane % 4 * 8), words_of(sum.x));
        }
    }
}

// What the kernel reads of the layer.
struct Weights {
    const bf16 *query, *query_bias, *output, *output_bias;
};

template <int HEADS>
__device__ __forceinline__ void branch(const bf16* x, const bf16* normed, const bf16* k, const bf16* v,
                                       const Weights& weights, const DropPath& drop, int queries, int keys, int span,
                                       bf16* y, bf16* q, bf16* o, float* lse) {
    SHARED(Turned<32>, rows, [2][WINDOW<32>]);  // keys, values
    SHARED(uint4, found, [2 * M][QUERY_BLOCK]);  // with the first of two heads
    constexpr int C = 32 * HEADS;
    int begin = blockIdx.x * span, end = min(queries, begin + span);
    // Asked for anew, as there is no register to keep it in.
    auto image_start = [&](int tokens) { return size_t(own_line()) * tokens * C; };

#pragma unroll 1
    for (int tile = begin; tile < end; tile += TILE) {
        auto first = [&](int m) { return tile + int(own_thread() / 32) * OWN + m * 16; };
        Operand<32> own;
#pragma unroll 1
        for (int h = 0; h < HEADS; h++) {
            auto load_from = [&](int start) {
                load_window<32>(k, v, image_start(keys) + h * 32, start, keys, C, 32, rows);
            };
            bool fresh = HEADS > 1 || tile == begin || keys > WINDOW<32>;
            if (fresh) load_from(0);
            {
                Operand<C> tokens;
                float d[M][4][4];
                for (int m = 0; m < M; m++) {
                    load_a<C, true>(normed, image_start(queries), first(m), end, C, C, tokens[m]);
                }
                product<C>(tokens, weights.query, weights.query_bias, h * 32, d);
                for (int m = 0; m < M; m++) {
                    for (int i = 0; i < 2; i++) as_operand(d[m][2 * i], d[m][2 * i + 1], own[m][i]);
                    if (q != nullptr) store_operand(own[m], first(m), end, C, q + (image_start(queries) + h * 32));
                    settle(own[m], blockIdx.z);
                }
            }
            Softmax<32> softmax;
            attend<32>(own, keys, fresh, first(0) >= end, SCALE * LOG2_E, load_from, rows, softmax);
            for (int m = 0; m < M; m++) {
                float* logarithms = lse == nullptr ? nullptr : lse + size_t(own_line() * HEADS + h) * queries;
                float shares[2];
                end_softmax(softmax.top[m], softmax.sum[m], first(m), end, logarithms, shares);
                for (int i = 0; i < 16; i++) softmax.out[m][i / 4][i % 4] *= shares[i / 2 % 2];
                for (int i = 0; i < 2; i++) {
                    as_operand(softmax.out[m][2 * i], softmax.out[m][2 * i + 1], own[m][i]);
                }
                if (o != nullptr) store_operand(own[m], first(m), end, C, o + (image_start(queries) + h * 32));
            }
            if (h == HEADS - 1) break;
            // The registers are full while the keys of the second go by.
            for (int i = 0; i < 2 * M; i++) {
                const unsigned* part = own[i / 2][i % 2];
                found[i][threadIdx.x] = {part[0], part[1], part[2], part[3]};
            }
        }
        Operand<C> all;
        for (int i = 0; i < 2 * M; i++) {
            if (HEADS > 1) {
                uint4 part = found[i][threadIdx.x];
                unsigned* to = all[i / 2][i % 2];
                to[0] = part.x;
                to[1] = part.y;
                to[2] = part.z;
                to[3] = part.w;
            }
            for (int j = 0; j < 4; j++) all[i / 2][2 * HEADS - 2 + i % 2][j] = own[i / 2][i % 2][j];
        }
        size_t start = image_start(queries);
        float factor = drop.factor(own_line());
        join_rows<C>(x + start, all, weights.output, weights.output_bias, factor, first(0), end, y + start);
    }
}

// y is not x; q, o and lse are for the way back. Grid: (ceil(queries / span), images), blocks of QUERY_BLOCK; `span` is a
// multiple of TILE. So for both.
KERNEL(QUERY_BOUNDS) attention_branch_32(
    const bf16* x /* (images, queries, 32) */, const bf16* normed /* as x */, const bf16* k /* (images, keys, 32) */,
    const bf16* v /* as k */, const bf16* query /* (32, 32) */, const bf16* query_bias /* (32) or null */,
    const bf16* output /* (32, 32) */, const bf16* output_bias /* (32) or null */, unsigned key0, unsigned key1,
    unsigned site, const unsigned* step /* (1) */, u64 first, float rate, int queries, int keys, int span,
    bf16* y /* as x */, bf16* q /* as x, or null */, bf16* o /* as x, or null */,
    float* lse /* (images, queries) or null */) {
    branch<1>(x, normed, k, v, {query, query_bias, output, output_bias}, {key0, key1, site, step, first, rate}, queries,
              keys, span, y, q, o, lse);
}

KERNEL(QUERY_BOUNDS) attention_branch_64(
    const bf16* x /* (images, queries, 64) */, const bf16* normed /* as x */, const bf16* k /* (images, keys, 64) */,
    const bf16* v /* as k */, const bf16* query /* (64, 64) */, const bf16* query_bias /* (64) or null */,
    const bf16* output /* (64, 64) */, const bf16* output_bias /* (64) or null */, unsigned key0, unsigned key1,
    unsigned site, const unsigned* step /* (1) */, u64 first, float rate, int queries, int keys, int span,
    bf16* y /* as x */, bf16* q /* as x, or null */, bf16* o /* as x, or null */,
    float* lse /* (images, 2, queries) or null */) {
    branch<2>(x, normed, k, v, {query, query_bias, output, output_bias}, {key0, key1, site, step, first, rate}, queries,
              keys, span, y, q, o, lse);
}

// The branch's end.
template <int C>
__device__ __forceinline__ void join(const bf16* x, const bf16* o, const bf16* output, const bf16* output_bias,
                                     const DropPath& drop, int queries, bf16* y) {
    int first = blockIdx.x * TILE + threadIdx.x / 32 * OWN;
    size_t start = size_t(blockIdx.y) * queries * C;
    Operand<C> a;
    for (int m = 0; m < M; m++) load_a<C, true>(o, start, first + 16 * m, queries, C, C, a[m]);
    join_rows<C>(x + start, a, output, output_bias, drop.factor(blockIdx.y), first, queries, y + start);
}

// The same y, from o. Grid: (ceil(queries / TILE), images), blocks of QUERY_BLOCK. So for both.
KERNEL(QUERY_BOUNDS) attention_join_32(const bf16* x /* (images, queries, 32) */, const bf16* o /* as x */,
                                       const bf16* output /* (32, 32) */, const bf16* output_bias /* (32) or null */,
                                       unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */,
                                       u64 first, float rate, int queries, bf16* y /* as x */) {
    join<32>(x, o, output, output_bias, {key0, key1, site, step, first, rate}, queries, y);
}

KERNEL(QUERY_BOUNDS) attention_join_64(const bf16* x /* (images, queries, 64) */, const bf16* o /* as x */,
                                       const bf16* output /* (64, 64) */, const bf16* output_bias /* (64) or null */,
                                       unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */,
                                       u64 first, float rate, int queries, bf16* y /* as x */) {
    join<64>(x, o, output, output_bias, {key0, key1, site, step, first, rate}, queries, y);
}
