// Scaled dot-product attention on tensor cores, forward and backward, for heads of up to 64 channels.
//
// Scores never leave the registers: softmax is taken online (Dao et al., "FlashAttention", 2022), so any number of keys
// works, and a rounded score fragment is at once an operand of the next product. Forward: a warp owns queries, and
// walks over keys and values in shared memory, all of a head's at once if they are few, for as many tiles of queries
// as the block takes. Backward, probabilities are recomputed from the logarithm of their denominator. Where the keys of
// a head fit a block, scores and their gradients are made once: warps own keys, walk over queries, and hand the scores'
// gradients to others that make the queries' from them. Elsewhere, twice: the gradient of the queries as the
// forward pass goes, and those of keys and values by warps that own keys, while the block walks over a slice of the
// queries, the next tile of which is copied meanwhile. Slices are added in order, without atomics. Warps own 32 rows of
// a narrow head, 16 of a wide one: shared memory could not feed the tensor cores with fewer.
#include "attention.cuh"
#include "mma.cuh"

constexpr int KEY_BLOCK = 128;
// At most 168 registers.
#define KEY_BOUNDS KEY_BLOCK, 3
// Queries in shared memory at a time, beside the next ones.
constexpr int STEP = 64;

template <int D>
__device__ __forceinline__ void forward(const bf16* q, const bf16* k, const bf16* v, int heads, int head, int queries,
                                        int keys, int span, float scale, bf16* o, float* lse) {
    SHARED(Turned<D>, rows, [2][WINDOW<D>]);  // keys, values
    constexpr int M = TILES<D>;
    int image = blockIdx.y / heads, h = blockIdx.y % heads, channels = heads * head;
    size_t query_start = size_t(image) * queries * channels + h * head;
    size_t key_start = size_t(image) * keys * channels + h * head;
    int begin = blockIdx.x * span, end = min(queries, begin + span);
    auto load_from = [&](int start) { load_window<D>(k, v, key_start, start, keys, channels, head, rows); };

#pragma unroll 1
    for (int tile = begin; tile < end; tile += QUERY_BLOCK / 2 * M) {
        int first = tile + threadIdx.x / 32 * 16 * M;
        bool fresh = tile == begin || keys > WINDOW<D>;
        if (fresh) load_from(0);
        unsigned a[M][D / 16][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_operand<D>(q, query_start, first + 16 * m, end, channels, head, a[m]);
        Softmax<D> softmax;
        attend<D>(a, keys, fresh, first >= end, scale * LOG2_E, load_from, rows, softmax);
        if (first >= end) continue;
#pragma unroll
        for (int m = 0; m < M; m++) {
            float shares[2];
            end_softmax(softmax.top[m], softmax.sum[m], first + m * 16, end, lse + size_t(blockIdx.y) * queries, shares);
            store_rows<D>(softmax.out[m], shares, first + m * 16, end, channels, head, o, query_start);
        }
    }
}

// For heads of 32 channels, and of any number up to 64. Grid: (ceil(queries / span), images·heads), blocks of
// QUERY_BLOCK; `span` is a multiple of what a block takes at a time, QUERY_BLOCK / 2·TILES.
KERNEL(QUERY_BOUNDS) attention_32(const bf16* q /* (images, queries, heads·head) */,
                                  const bf16* k /* (images, keys, heads·head) */, const bf16* v /* as k */, int heads,
                                  int queries, int keys, int span, bf16* o /* as q */,
                                  float* lse /* (images, heads, queries) */) {
    forward<32>(q, k, v, heads, 32, queries, keys, span, SCALE, o, lse);
}

KERNEL(QUERY_BOUNDS) attention_64(const bf16* q, const bf16* k, const bf16* v, int heads, int head, int queries,
                                  int keys, int span, float scale, bf16* o, float* lse) {
    forward<64>(q, k, v, heads, head, queries, keys, span, scale, o, lse);
}

// The gradient of a score is ds = p·(dp - delta), where p = exp(s·scale - lse) and delta = Σ o·do.
template <int D>
__device__ __forceinline__ void query_gradient(const bf16* q, const bf16* k, const bf16* v, const bf16* o,
                                               const bf16* d_o, const float* lse, int heads, int head, int queries,
                                               int keys, int span, float scale, bf16* dq, float* terms) {
    SHARED(Turned<D>, rows, [2][WINDOW<D>]);  // keys, values
    constexpr int M = TILES<D>;
    int image = blockIdx.y / heads, h = blockIdx.y % heads, channels = heads * head;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4 * 2;
    size_t query_start = size_t(image) * queries * channels + h * head;
    size_t key_start = size_t(image) * keys * channels + h * head;
    int begin = blockIdx.x * span, end = min(queries, begin + span);
    float factor = scale * LOG2_E;

#pragma unroll 1
    for (int tile = begin; tile < end; tile += QUERY_BLOCK / 2 * M) {
        int first = tile + warp * 16 * M;
        bool fresh = tile == begin || keys > WINDOW<D>;
        if (fresh) load_window<D>(k, v, key_start, 0, keys, channels, head, rows);
        unsigned qa[M][D / 16][4], da[M][D / 16][4];
        // -lse to base 2 and -delta, of rows g and g + 8.
        float less[M][2], minus[M][2], out[M][D / 8][4] = {};
#pragma unroll
        for (int m = 0; m < M; m++) {
            unsigned oa[D / 16][4];
            load_operand<D>(q, query_start, first + 16 * m, end, channels, head, qa[m]);
            load_operand<D>(d_o, query_start, first + 16 * m, end, channels, head, da[m]);
            load_operand<D>(o, query_start, first + 16 * m, end, channels, head, oa);
            for (int half = 0; half < 2; half++) {
                float delta = 0;
                for (int i = 0; i < D / 16; i++) {
                    delta += dot(oa[i][half], da[m][i][half]) + dot(oa[i][half + 2], da[m][i][half + 2]);
                }
                minus[m][half] = -group_sum(delta, 4);
                int row = first + m * 16 + g + half * 8;
                size_t at = size_t(blockIdx.y) * queries + row;
                less[m][half] = row < end ? -LOG2_E * lse[at] : 0.0f;
                if (t == 0 && row < end) {
                    reinterpret_cast<float2*>(terms)[at] = float2{less[m][half], minus[m][half]};
                }
            }
        }
#pragma unroll 1
        for (int start = 0; start < keys; start += WINDOW<D>) {
            if (start > 0) load_window<D>(k, v, key_start, start, keys, channels, head, rows);
            if (fresh) {
                copies_done();
                __syncthreads();
            }
            if (first >= end) continue;
            int count = min(WINDOW<D>, keys - start);
            Turned<D>* at = rows[0];
#pragma unroll 1
            for (int chunk = 0; chunk < count; chunk += 16, at += 16) {
                float s[M][2][4] = {}, ds[M][2][4];
                for (int m = 0; m < M; m++) {
                    for (int i = 0; i < 8; i++) ds[m][i / 4][i % 4] = minus[m][i / 2 % 2];
                }
                add_scores<D>(qa, at, 0, s);
                add_scores<D>(da, at, WINDOW<D>, ds);
                unsigned a[M][4];
                for (int m = 0; m < M; m++) {
                    for (int i = 0; i < 8; i++) {
                        ds[m][i / 4][i % 4] *= power_of_two(s[m][i / 4][i % 4] * factor + less[m][i / 2 % 2]);
                    }
                    as_operand(ds[m][0], ds[m][1], a[m]);
                }
                if (chunk + 16 > count) {
                    // Past the last key, where p may be infinite.
                    for (int i = 0; i < 4 * M; i++) {
                        int key = chunk + i % 4 / 2 * 8 + t;
                        a[i / 4][i % 4] &= key + 1 < count ? ~0u : key < count ? 0xffffu : 0u;
                    }
                }
                accumulate<D>(a, at, 0, out);
            }
        }
        if (first >= end) continue;
        float factors[2] = {scale, scale};
#pragma unroll
        for (int m = 0; m < M; m++) {
            store_rows<D>(out[m], factors, first + m * 16, end, channels, head, dq, query_start);
        }
    }
}

// Grid as of attention_32. `terms` receives what the gradients of keys need: -lse to base 2 and -delta.
KERNEL(QUERY_BOUNDS) attention_backward_queries_32(const bf16* q /* (images, queries, heads·head) */,
                                                   const bf16* k /* (images, keys, heads·head) */,
                                                   const bf16* v /* as k */, const bf16* o /* as q */,
                                                   const bf16* d_o /* as q */,
                                                   const float* lse /* (images, heads, queries) */, int heads,
                                                   int queries, int keys, int span, bf16* dq /* as q */,
                                                   float* terms /* (images, heads, queries, 2): lse, delta */) {
    query_gradient<32>(q, k, v, o, d_o, lse, heads, 32, queries, keys, span, SCALE, dq, terms);
}

KERNEL(QUERY_BOUNDS) attention_backward_queries_64(const bf16* q, const bf16* k, const bf16* v, const bf16* o,
                                                   const bf16* d_o, const float* lse, int heads, int head, int queries,
                                                   int keys, int span, float scale, bf16* dq, float* terms) {
    query_gradient<64>(q, k, v, o, d_o, lse, heads, head, queries, keys, span, scale, dq, terms);
}

// ---- a warp owns keys

// Begins to copy rows first.. first + COUNT of one head, zero beyond `rows` and beyond `head`.
template <int COUNT, int D>
__device__ __forceinline__ void copy_rows(const bf16* from /* (rows, channels), at the head's first channel */,
                                          int first, int rows, int channels, int head, Row<D>* to) {
    for (int i = threadIdx.x; i < COUNT * D / 8; i += KEY_BLOCK) {
        int row = i / (D / 8), c = i % (D / 8) * 8, width = first + row < rows ? head : 0;
        const bf16* at = from + size_t(first + row) * channels + c;
        if (head % 8 == 0) {
            copy_async<16>(&to[row].at[c], at, c < width ? 16 : 0);
        } else {
            *reinterpret_cast<uint4*>(&to[row].at[c]) = eight<false>(at, width - c);
        }
    }
}

template <int D>
__device__ __forceinline__ void key_gradient(const bf16* q, const bf16* k, const bf16* v, const bf16* d_o,
                                             const float* terms, int images, int heads, int head, int queries, int keys,
                                             int slice, float scale, float* partial) {
    // Two buffers each; first of all, the block's keys and values.
    SHARED(Row<D>, rows, [2][2 * STEP]);  // queries, their gradients
    // Of two queries each; the second terms twice, as a product takes them.
    SHARED(float2, less, [STEP]);
    SHARED(float4, minus, [STEP]);
    constexpr int M = TILES<D>;
    int image = blockIdx.y / heads, h = blockIdx.y % heads, channels = heads * head;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4 * 2;
    constexpr int OWN = KEY_BLOCK / 2 * M;
    static_assert(OWN <= 2 * STEP, "the block's keys fit where its queries come");
    int own = threadIdx.x / 32 * 16 * M, first = blockIdx.x * OWN + own;
    size_t query_start = size_t(image) * queries * channels + h * head;
    size_t key_start = size_t(image) * keys * channels + h * head;
    const float* own_terms = terms + size_t(blockIdx.y) * queries * 2;
    int begin = blockIdx.z * slice, end = min(queries, begin + slice);
    float factor = scale * LOG2_E;

    auto copy = [&](int start, int buffer) {
        copy_rows<STEP>(q + query_start, start, end, channels, head, rows[0] + buffer);
        copy_rows<STEP>(d_o + query_start, start, end, channels, head, rows[1] + buffer);
        if (threadIdx.x < STEP) {
            int query = start + threadIdx.x, bytes = query < end ? 4 : 0, i = (buffer + threadIdx.x) / 2;
            const float* from = own_terms + query * 2;
            copy_async<4>(&less[i].x + threadIdx.x % 2, from, bytes);
            copy_async<4>(&minus[i].x + threadIdx.x % 2, from + 1, bytes);
            copy_async<4>(&minus[i].z + threadIdx.x % 2, from + 1, bytes);
        }
    };
    unsigned ka[M][D / 16][4], va[M][D / 16][4];
    copy_rows<OWN>(k + key_start, blockIdx.x * OWN, keys, channels, head, rows[0]);
    copy_rows<OWN>(v + key_start, blockIdx.x * OWN, keys, channels, head, rows[1]);
    copies_done();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; m++) {
        for (int i = 0; i < D / 16; i++) {
            operand(rows[0], own + 16 * m, i * 16, ka[m][i]);
            operand(rows[1], own + 16 * m, i * 16, va[m][i]);
        }
    }
    __syncthreads();
    copy(begin, 0);
    // Transposed scores: rows are keys, columns queries.
    float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
    for (int start = begin, buffer = 0; start < end; start += STEP, buffer ^= STEP) {
        copies_done();
        __syncthreads();
        if (start + STEP < end) copy(start + STEP, buffer ^ STEP);
        if (first >= keys) continue;
        const Row<D>* at = rows[0] + buffer;
        int pair = buffer / 2 + lane % 4;
#pragma unroll 1
        for (int chunk = 0; chunk < min(STEP, end - start); chunk += 16, at += 16, pair += 8) {
            float s[M][2][4] = {}, ds[M][2][4];
            for (int n = 0; n < 2; n++) {
                float4 x = minus[pair + n * 4];
                for (int m = 0; m < M; m++) {
                    ds[m][n][0] = x.x;
                    ds[m][n][1] = x.y;
                    ds[m][n][2] = x.z;
                    ds[m][n][3] = x.w;
                }
            }
            add_scores<D>(ka, at, 0, s);
            add_scores<D>(va, at, 2 * STEP, ds);
            // Queries past the end are zero in both tiles, so what stands in their columns does not count.
            unsigned p[M][4], dp[M][4];
            float2 base[2] = {less[pair], less[pair + 4]};
            for (int m = 0; m < M; m++) {
                for (int i = 0; i < 8; i++) {
                    float& x = s[m][i / 4][i % 4];
                    x = power_of_two(x * factor + (i % 2 ? base[i / 4].y : base[i / 4].x));
                    ds[m][i / 4][i % 4] *= x;
                }
                as_operand(s[m][0], s[m][1], p[m]);
                as_operand(ds[m][0], ds[m][1], dp[m]);
            }
            accumulate<D>(p, at, 2 * STEP, dv);
            accumulate<D>(dp, at, 0, dk);
        }
    }
    size_t n = size_t(images) * keys * channels;
    partial += blockIdx.z * 2 * n + key_start;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < D / 4; i++) {
            int row = first + m * 16 + g + i % 2 * 8, c = i / 2 * 8 + t;
            if (row >= keys || c >= head) continue;
            float* at = partial + size_t(row) * channels + c;
            const float *key = dk[m][i / 2] + i % 2 * 2, *value = dv[m][i / 2] + i % 2 * 2;
            if (head % 8 == 0) {
                *reinterpret_cast<float2*>(at) = float2{scale * key[0], scale * key[1]};
                *reinterpret_cast<float2*>(at + n) = float2{value[0], value[1]};
            } else {
                for (int j = 0; j < 2 && c + j < head; j++) {
                    at[j] = scale * key[j];
                    at[n + j] = value[j];
                }
            }
        }
    }
}

// Grid: (ceil(keys / (KEY_BLOCK / 2·TILES)), images·heads, ceil(queries / slice)), blocks of KEY_BLOCK.
KERNEL(KEY_BOUNDS) attention_backward_keys_32(const bf16* q /* (images, queries, heads·head) */,
                                              const bf16* k /* (images, keys, heads·head) */, const bf16* v /* as k */,
                                              const bf16* d_o /* as q */,
                                              const float* terms /* (images, heads, queries, 2) */, int images,
                                              int heads, int queries, int keys, int slice,
                                              float* partial /* (slices, 2, images, keys, heads·head): dK, dV */) {
    key_gradient<32>(q, k, v, d_o, terms, images, heads, 32, queries, keys, slice, SCALE, partial);
}

KERNEL(KEY_BOUNDS) attention_backward_keys_64(const bf16* q, const bf16* k, const bf16* v, const bf16* d_o,
                                              const float* terms, int images, int heads, int head, int queries,
                                              int keys, int slice, float scale, float* partial) {
    key_gradient<64>(q, k, v, d_o, terms, images, heads, head, queries, keys, slice, scale, partial);
}

// ---- some warps own keys, the others queries
//
// All gradients at once, for heads of 32 channels and up to MOST_KEYS keys. Each key-owning warp keeps its keys, its
// values and their gradients in registers while the block walks over its queries, and leaves the scores' gradients in
// shared memory, rounded, as the product with the keys takes them anyhow. A step later that product is taken by
// the warps that own queries, which keep the keys as operands and bring the next queries meanwhile. Two buffers of
// everything: one barrier per step.

constexpr int MOST_KEYS = 256;
// Warps that own 32 keys each, and all threads.
constexpr int KEY_WARPS = MOST_KEYS / 32;
constexpr int ALL_BLOCK = (KEY_WARPS + 4) * 32;
// At most 168 registers.
#define ALL_BOUNDS ALL_BLOCK, 1
// Queries per step.
constexpr int STRIDE = 32;
// Numbers from a row of a tile to the next.
constexpr int ROW = sizeof(Row<32>) / sizeof(bf16);

// All threads of a block whose warps have parted.
__device__ __forceinline__ void meet() {
#ifdef __CUDACC__
    asm volatile("barrier.sync.aligned 1, %0;" ::"n"(ALL_BLOCK) : "memory");
#else
    __syncthreads();
#endif
}

// What the warps of a block share of a step.
struct Step {
    // Keys' rows of queries' columns. First of all, keys in one step's, values in the other's.
    Turned<32> ds[MOST_KEYS];
    Row<32> q[STRIDE], d_o[STRIDE];
    // -lse to base 2; -delta, of two queries twice, as a product takes it.
    alignas(16) float less[STRIDE];
    alignas(16) float minus[2 * STRIDE];
};

// The gradients of a warp's keys and values, over `steps` steps.
__device__ __forceinline__ void own_keys(Step (&shared)[2], int steps, int keys, float (&dk)[2][4][4],
                                         float (&dv)[2][4][4]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, own = threadIdx.x / 32 * 32;
    constexpr float factor = SCALE * LOG2_E;
    unsigned ka[2][2][4], va[2][2][4];
    for (int m = 0; m < 2; m++) {
        for (int i = 0; i < 2; i++) {
            int row = own + m * 16 + lane % 16, part = i * 2 + lane / 16;
            load_matrices<false>(reinterpret_cast<bf16*>(turned(shared[0].ds, row, part)), ka[m][i]);
            load_matrices<false>(reinterpret_cast<bf16*>(turned(shared[1].ds, row, part)), va[m][i]);
        }
    }
    // In numbers from a tile's first: what this lane names of an operand across, and along.
    unsigned across_at = opaque((lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 8);
    unsigned along_at = opaque(lane % 16 * ROW + lane / 16 * 8);
    // In words from the first row: where this lane leaves the scores' gradients of its first row. Rows eight apart turn
    // alike.
    unsigned to = (own + g) * 16 + g / 2 * 4 + t;
#pragma unroll 1
    for (int step = steps; step > 0; step--) {
        meet();
        if (own >= keys) continue;
        Step& now = shared[step % 2];
#pragma unroll
        for (int n = 0; n < STRIDE / 16; n++) {
            float s[2][2][4] = {}, ds[2][2][4];
            for (int i = 0; i < 2; i++) {
                float4 x = reinterpret_cast<const float4*>(now.minus)[n * 8 + i * 4 + t];
                for (int m = 0; m < 2; m++) {
                    ds[m][i][0] = x.x;
                    ds[m][i][1] = x.y;
                    ds[m][i][2] = x.z;
                    ds[m][i][3] = x.w;
                }
            }
            for (int i = 0; i < 4; i++) {
                unsigned b[4];
                load_matrices<false>((i < 2 ? now.q : now.d_o)[n * 16].at + across_at + i % 2 * 16, b);
                for (int m = 0; m < 2; m++) {
                    for (int j = 0; j < 2; j++) {
                        // Not an array chosen by a condition: g++ 12 under UndefinedBehaviorSanitizer makes a copy of it.
                        if (i < 2) mma(s[m][j], ka[m][i % 2], b[2 * j], b[2 * j + 1]);
                        else mma(ds[m][j], va[m][i % 2], b[2 * j], b[2 * j + 1]);
                    }
                }
            }
            // Queries past the end are zero in both tiles, so what stands in their columns does not count.
            unsigned p[2][4], dp[2][4];
            const float2* less = reinterpret_cast<const float2*>(now.less) + n * 8 + t;
            float2 base[2] = {less[0], less[4]};
            for (int m = 0; m < 2; m++) {
                for (int i = 0; i < 8; i++) {
                    float& x = s[m][i / 4][i % 4];
                    x = power_of_two(x * factor + (i % 2 ? base[i / 4].y : base[i / 4].x));
                    ds[m][i / 4][i % 4] *= x;
                }
                as_operand(s[m][0], s[m][1], p[m]);
                as_operand(ds[m][0], ds[m][1], dp[m]);
            }
            if (own + 32 > keys) {
                // Past the last key, where p may be infinite.
                for (int i = 0; i < 8; i++) {
                    if (own + i / 4 * 16 + i % 2 * 8 + g >= keys) dp[i / 4][i % 4] = 0;
                }
            }
            for (int i = 0; i < 8; i++) {
                unsigned* at = reinterpret_cast<unsigned*>(now.ds) + (to ^ (n * 2 + i / 2 % 2) * 4);
                at[(i / 4 * 16 + i % 2 * 8) * 16] = dp[i / 4][i % 4];
            }
            for (int i = 0; i < 4; i++) {
                unsigned b[4];
                load_matrices<true>((i < 2 ? now.d_o : now.q)[n * 16].at + along_at + i % 2 * 16, b);
                for (int m = 0; m < 2; m++) {
                    for (int j = 0; j < 2; j++) {
                        if (i < 2) mma(dv[m][i % 2 * 2 + j], p[m], b[2 * j], b[2 * j + 1]);
                        else mma(dk[m][i % 2 * 2 + j], dp[m], b[2 * j], b[2 * j + 1]);
                    }
                }
            }
        }
    }
    meet();
}

// The gradients of the block's queries begin.. end: each of four warps takes 16 queries of a step and 16 channels.
// Tensors begin at the head's first channel and the image's first row.
__device__ __forceinline__ void own_queries(Step (&shared)[2], const bf16* q, const bf16* o, const float* deltas,
                                            const bf16* d_o, const float* lse, int begin, int end, int steps, int keys,
                                            int channels, bf16* dq) {
    int thread = threadIdx.x - KEY_WARPS * 32, lane = thread % 32, warp = thread / 32;
    unsigned kb[MOST_KEYS / 16][4];
#pragma unroll
    for (int i = 0; i < MOST_KEYS / 16; i++) {
        uint4* at = turned(shared[0].ds, i * 16 + lane % 16, warp / 2 * 2 + lane / 16);
        load_matrices<true>(reinterpret_cast<bf16*>(at), kb[i]);
    }
    // What this thread brings of a step's tokens: eight channels of a row.
    int line = thread / 4, part = thread % 4;
    uint4 out;
    float less, delta;
    auto begin_step = [&](int first, int buffer) {
        int row = first + line, bytes = row < end ? 16 : 0;
        size_t at = size_t(row) * channels + part * 8;
        copy_async<16>(&shared[buffer].q[line].at[part * 8], q + at, bytes);
        copy_async<16>(&shared[buffer].d_o[line].at[part * 8], d_o + at, bytes);
        if (o) out = row < end ? *reinterpret_cast<const uint4*>(o + at) : uint4{0, 0, 0, 0};
        else delta = row < end ? deltas[row] : 0.0f;
        if (row + STRIDE < end) {
            // A step is hardly longer than memory takes: the next one's come as far as the cache.
            at += size_t(STRIDE) * channels;
            prefetch(q + at);
            prefetch(d_o + at);
            if (o) prefetch(o + at);
        }
        less = row < end ? -LOG2_E * lse[row] : 0.0f;
    };
    auto end_step = [&](int buffer) {
        copies_done();
        if (o) {
            uint4 d = *reinterpret_cast<const uint4*>(&shared[buffer].d_o[line].at[part * 8]);
            delta = group_sum(dot(out.x, d.x) + dot(out.y, d.y) + dot(out.z, d.z) + dot(out.w, d.w), 4);
        }
        if (part == 0) {
            shared[buffer].less[line] = less;
            shared[buffer].minus[line / 2 * 4 + line % 2] = -delta;
            shared[buffer].minus[line / 2 * 4 + 2 + line % 2] = -delta;
        }
    };
    int buffer = steps % 2;
    begin_step(begin, buffer);
    end_step(buffer);
    // A step more than there are: each time, the gradients of the step before.
#pragma unroll 1
    for (int first = begin; first < end + STRIDE; first += STRIDE, buffer ^= 1) {
        meet();
        bool more = first + STRIDE < end;
        if (more) begin_step(first + STRIDE, buffer ^ 1);
        if (first > begin) {
            float d[2][2][4] = {};
            // Transposed as read: rows of an A are queries, and lie along the tile's rows.
            int row = lane / 16 * 8 + lane % 8, half = warp % 2 * 2 + lane / 8 % 2;
#pragma unroll
            for (int i = 0; i < MOST_KEYS / 16; i++) {
                if (i / 2 * 32 >= keys) break;
                unsigned a[4];
                load_matrices<true>(reinterpret_cast<bf16*>(turned(shared[buffer ^ 1].ds, i * 16 + row, half)), a);
                mma(d[i % 2][0], a, kb[i][0], kb[i][1]);
                mma(d[i % 2][1], a, kb[i][2], kb[i][3]);
            }
            for (int half = 0; half < 2; half++) {
                // Neighbouring lanes swap, so that each has four channels in a row.
                unsigned pairs[2];
                for (int n = 0; n < 2; n++) {
                    const float *x = d[0][n] + half * 2, *y = d[1][n] + half * 2;
                    pairs[n] = pair_of((x[0] + y[0]) * SCALE, (x[1] + y[1]) * SCALE);
                }
                unsigned other = __shfl_xor_sync(ALL_LANES, lane % 2 ? pairs[0] : pairs[1], 1);
                int query = first - STRIDE + warp % 2 * 16 + half * 8 + lane / 4;
                if (query < end) {
                    int channel = warp / 2 * 16 + lane % 2 * 8 + lane % 4 / 2 * 4;
                    uint2 four = lane % 2 ? uint2{other, pairs[1]} : uint2{pairs[0], other};
                    *reinterpret_cast<uint2*>(dq + size_t(query) * channels + channel) = four;
                }
            }
        }
        if (more) end_step(buffer ^ 1);
    }
}

// Heads of 32 channels, up to MOST_KEYS keys. Grid: (slices, images·heads), blocks of ALL_BLOCK; `slice` is a multiple
// of STRIDE. Of several slices, `partial` receives dK and dV; a single one leaves them in dk and dv.
KERNEL(ALL_BOUNDS) attention_backward_32(const bf16* q /* (images, queries, heads·32) */,
                                         const bf16* k /* (images, keys, heads·32) */, const bf16* v /* as k */,
                                         const bf16* o /* as q; or null */,
                                         const float* deltas /* (images, heads, queries): Σ o·do, if o is null */,
                                         const bf16* d_o /* as q */, const float* lse /* (images, heads, queries) */,
                                         int images, int heads, int queries, int keys, int slice, bf16* dq /* as q */,
                                         float* partial /* (slices, 2, images, keys, heads·32): dK, dV; or null */,
                                         bf16* dk /* as k */, bf16* dv /* as k */) {
    SHARED(Step, shared, [2]);
    int image = blockIdx.y / heads, channels = heads * 32, h = blockIdx.y % heads * 32;
    size_t query_start = size_t(image) * queries * channels + h, key_start = size_t(image) * keys * channels + h;
    int begin = blockIdx.x * slice, end = min(queries, begin + slice), steps = (end - begin + STRIDE - 1) / STRIDE;

    for (int i = threadIdx.x; i < MOST_KEYS * 4; i += ALL_BLOCK) {
        int row = i / 4, part = i % 4, bytes = row < keys ? 16 : 0;
        size_t at = key_start + size_t(row) * channels + part * 8;
        copy_async<16>(turned(shared[0].ds, row, part), k + at, bytes);
        copy_async<16>(turned(shared[1].ds, row, part), v + at, bytes);
    }
    copies_done();
    __syncthreads();
    if (threadIdx.x >= KEY_WARPS * 32) {
        size_t row = size_t(blockIdx.y) * queries;
        own_queries(shared, q + query_start, o ? o + query_start : nullptr, o ? nullptr : deltas + row, d_o + query_start, lse + row, begin,
                    end, steps, keys, channels, dq + query_start);
        return;
    }
    // Transposed scores: rows are keys, columns queries.
    float d_key[2][4][4] = {}, d_value[2][4][4] = {};
    own_keys(shared, steps, keys, d_key, d_value);
    int thread = own_thread(), lane = thread % 32;
    size_t n = size_t(images) * keys * channels;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int row = thread / 32 * 32 + lane / 4 + m * 16 + i % 2 * 8, c = i / 2 * 8 + lane % 4 * 2;
            if (row >= keys) continue;
            size_t at = key_start + size_t(row) * channels + c;
            const float *key = d_key[m][i / 2] + i % 2 * 2, *value = d_value[m][i / 2] + i % 2 * 2;
            float2 pair = {SCALE * key[0], SCALE * key[1]};
            if (partial) {
                float* to = partial + blockIdx.x * 2 * n + at;
                *reinterpret_cast<float2*>(to) = pair;
                *reinterpret_cast<float2*>(to + n) = float2{value[0], value[1]};
            } else {
                *reinterpret_cast<unsigned*>(dk + at) = pair_of(pair.x, pair.y);
                *reinterpret_cast<unsigned*>(dv + at) = pair_of(value[0], value[1]);
            }
        }
    }
}

template <int V>
__device__ __forceinline__ void join(const float* partial, int slices, u64 n, bf16* dk, bf16* dv) {
    size_t i = thread_number() * V;
    if (i >= n) return;
    Pack<V> sums[2] = {};
    for (int s = 0; s < 2 * slices; s += 2) {
        Pack<V> k = load<V>(partial + s * n + i), v = load<V>(partial + (s + 1) * n + i);
        for (int j = 0; j < V; j++) {
            sums[0].x[j] += k.x[j];
            sums[1].x[j] += v.x[j];
        }
    }
    store<V>(dk + i, sums[0]);
    store<V>(dv + i, sums[1]);
}

// The slices of dK and dV in order. Threads: n / V.
KERNEL(THREADS) attention_backward_join(const float* partial /* (slices, 2, n) */, int slices, u64 n,
                                        bf16* dk /* (n) */, bf16* dv /* (n) */) {
    BY_WIDTH(n, join, partial, slices, n, dk, dv);
}
