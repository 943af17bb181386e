// Scaled dot-product attention on tensor cores, forward and backward, for heads of up to 64 channels.
//
// A block of four warps takes 64 queries (or, for dK and dV, 64 keys) of one head and walks over the other side in tiles
// of 64 through shared memory. Scores stay in registers: softmax is taken online (Dao et al., "FlashAttention", 2022),
// so any number of keys works, and a rounded score fragment is at once an operand of the next product. The backward
// pass recomputes probabilities from their logarithm of the denominator; dK and dV are summed over slices of the
// queries by separate blocks, then in order, without atomics.
#include "mma.cuh"

constexpr int TILE = 64;
constexpr int BLOCK = 128;
// Keeps 16-byte alignment and takes neighbouring rows to different banks.
constexpr int PAD = 8;

// Rows first.. first + TILE of one head, zero beyond `rows` and beyond `head`: to[row][channel].
template <int D>
__device__ void load_tile(const bf16* from /* (rows, channels), at the head's first channel */, int first, int rows,
                          int channels, int head, bf16 (*to)[D + PAD]) {
    if (head % 8 == 0) {
        for (int i = threadIdx.x; i < TILE * D / 8; i += BLOCK) {
            int row = i / (D / 8), c = i % (D / 8) * 8;
            uint4 v = {0, 0, 0, 0};
            if (first + row < rows && c < head) {
                v = *reinterpret_cast<const uint4*>(from + size_t(first + row) * channels + c);
            }
            *reinterpret_cast<uint4*>(&to[row][c]) = v;
        }
    } else {
        for (int i = threadIdx.x; i < TILE * D; i += BLOCK) {
            int row = i / D, c = i % D;
            bool inside = first + row < rows && c < head;
            to[row][c] = inside ? from[size_t(first + row) * channels + c] : __float2bfloat16_rn(0.0f);
        }
    }
}

// The same, transposed: to[channel][row].
template <int D>
__device__ void load_transposed(const bf16* from, int first, int rows, int channels, int head, bf16 (*to)[TILE + PAD]) {
    for (int i = threadIdx.x; i < TILE * D; i += BLOCK) {
        int row = i / D, c = i % D;
        bool inside = first + row < rows && c < head;
        to[c][row] = inside ? from[size_t(first + row) * channels + c] : __float2bfloat16_rn(0.0f);
    }
}

// Writes a warp's 16 x D accumulators, times `factors` for rows g and g + 8, to rows `first` + 16·warp on.
template <int D>
__device__ void store_rows(const float (&d)[D / 8][4], const float (&factors)[2], int first, int rows, int channels,
                           int head, bf16* to) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
    for (int n = 0; n < D / 8; n++) {
        for (int i = 0; i < 4; i++) {
            int row = first + threadIdx.x / 32 * 16 + g + i / 2 * 8, c = n * 8 + t + i % 2;
            if (row < rows && c < head) {
                to[size_t(row) * channels + c] = __float2bfloat16_rn(d[n][i] * factors[i / 2]);
            }
        }
    }
}

// Probabilities, rounded, as an A over columns 16·k.. 16·k + 16.
__device__ __forceinline__ void as_operand(const float (&p)[TILE / 8][4], int k, unsigned (&a)[4]) {
    a[0] = pair_of(p[2 * k][0], p[2 * k][1]);
    a[1] = pair_of(p[2 * k][2], p[2 * k][3]);
    a[2] = pair_of(p[2 * k + 1][0], p[2 * k + 1][1]);
    a[3] = pair_of(p[2 * k + 1][2], p[2 * k + 1][3]);
}

// s = A·tileᵀ: 16 x TILE scores of a warp.
template <int D>
__device__ __forceinline__ void scores(const unsigned (&a)[D / 16][4], const bf16 (*tile)[D + PAD],
                                       float (&s)[TILE / 8][4]) {
    for (int n = 0; n < TILE / 8; n++) {
        for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
        for (int k = 0; k < D / 16; k++) mma_tile(s[n], a[k], tile, n * 8, k * 16);
    }
}

// d += p·tile, with the tile transposed: tile[channel][row].
template <int D>
__device__ __forceinline__ void accumulate(const float (&p)[TILE / 8][4], const bf16 (*tile)[TILE + PAD],
                                           float (&d)[D / 8][4]) {
    for (int k = 0; k < TILE / 16; k++) {
        unsigned a[4];
        as_operand(p, k, a);
        for (int n = 0; n < D / 8; n++) mma_tile(d[n], a, tile, n * 8, k * 16);
    }
}

template <int D>
__device__ void forward(const bf16* q, const bf16* k, const bf16* v, int heads, int head, int queries, int keys,
                        float scale, bf16* o, float* lse) {
    SHARED(bf16, rows, [TILE][D + PAD]);
    SHARED(bf16, values, [D][TILE + PAD]);
    int image = blockIdx.y / heads, h = blockIdx.y % heads, channels = heads * head, first = blockIdx.x * TILE;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4 * 2;
    size_t query_start = size_t(image) * queries * channels + h * head;
    size_t key_start = size_t(image) * keys * channels + h * head;

    load_tile<D>(q + query_start, first, queries, channels, head, rows);
    __syncthreads();
    unsigned qa[D / 16][4];
    for (int i = 0; i < D / 16; i++) fragment(rows, warp * 16, i * 16, qa[i]);

    // Rows g and g + 8 of the warp's 16.
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, out[D / 8][4] = {}, s[TILE / 8][4];
    for (int start = 0; start < keys; start += TILE) {
        __syncthreads();
        load_tile<D>(k + key_start, start, keys, channels, head, rows);
        load_transposed<D>(v + key_start, start, keys, channels, head, values);
        __syncthreads();
        scores<D>(qa, rows, s);
        for (int half = 0; half < 2; half++) {
            float largest = -INFINITY;
            for (int n = 0; n < TILE / 8; n++) {
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[n][i] = start + n * 8 + t + i % 2 < keys ? s[n][i] * scale : -INFINITY;
                    largest = s[n][i] > largest ? s[n][i] : largest;
                }
            }
            for (int other = 1; other < 4; other *= 2) {
                float theirs = __shfl_xor_sync(ALL_LANES, largest, other);
                largest = theirs > largest ? theirs : largest;
            }
            largest = largest > most[half] ? largest : most[half];
            float factor = __expf(most[half] - largest);
            most[half] = largest;
            sum[half] *= factor;
            for (int n = 0; n < D / 8; n++) {
                for (int i = 2 * half; i < 2 * half + 2; i++) out[n][i] *= factor;
            }
            for (int n = 0; n < TILE / 8; n++) {
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[n][i] = __expf(s[n][i] - largest);
                    sum[half] += s[n][i];
                }
            }
        }
        accumulate<D>(s, values, out);
    }
    float shares[2];
    for (int half = 0; half < 2; half++) {
        float total = group_sum(sum[half], 4);
        shares[half] = 1.0f / total;
        int row = first + warp * 16 + g + half * 8;
        if (t == 0 && row < queries) lse[size_t(blockIdx.y) * queries + row] = most[half] + __logf(total);
    }
    store_rows<D>(out, shares, first, queries, channels, head, o + query_start);
}

// For heads of up to 32 and of up to 64 channels. Grid: (ceil(queries / TILE), images·heads), blocks of BLOCK.
KERNEL(BLOCK) attention_32(const bf16* q /* (images, queries, heads·head) */,
                           const bf16* k /* (images, keys, heads·head) */, const bf16* v /* as k */, int heads,
                           int head, int queries, int keys, float scale, bf16* o /* as q */,
                           float* lse /* (images, heads, queries) */) {
    forward<32>(q, k, v, heads, head, queries, keys, scale, o, lse);
}

KERNEL(BLOCK) attention_64(const bf16* q, const bf16* k, const bf16* v, int heads, int head, int queries, int keys,
                           float scale, bf16* o, float* lse) {
    forward<64>(q, k, v, heads, head, queries, keys, scale, o, lse);
}

// delta = Σ o·do per query and head. Threads: images·queries·heads.
KERNEL(THREADS) attention_delta(const bf16* o /* (images·queries, heads·head) */, const bf16* d_o /* as o */, int images,
                                int heads, int head, int queries, float* delta /* (images, heads, queries) */) {
    size_t i = thread_number();
    if (i >= size_t(images) * queries * heads) return;
    int h = int(i % heads);
    size_t token = i / heads;
    const bf16 *a = o + i * head, *b = d_o + i * head;
    float sum = 0;
    for (int c = 0; c < head; c++) sum += __bfloat162float(a[c]) * __bfloat162float(b[c]);
    delta[(token / queries * heads + h) * queries + token % queries] = sum;
}

// ds = p·(dp - delta), p = exp(s·scale - lse). dP arrives in ds; p stays in s.
__device__ __forceinline__ void through_softmax(float& s, float& ds, float scale, float lse, float delta) {
    s = __expf(s * scale - lse);
    ds = s * (ds - delta);
}

template <int D>
__device__ void query_gradient(const bf16* q, const bf16* k, const bf16* v, const bf16* d_o, const float* lse,
                               const float* delta, int heads, int head, int queries, int keys, float scale, bf16* dq) {
    SHARED(bf16, rows, [TILE][D + PAD]);
    SHARED(bf16, more_rows, [TILE][D + PAD]);
    SHARED(bf16, across, [D][TILE + PAD]);
    int image = blockIdx.y / heads, h = blockIdx.y % heads, channels = heads * head, first = blockIdx.x * TILE;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4 * 2;
    size_t query_start = size_t(image) * queries * channels + h * head;
    size_t key_start = size_t(image) * keys * channels + h * head;

    load_tile<D>(q + query_start, first, queries, channels, head, rows);
    load_tile<D>(d_o + query_start, first, queries, channels, head, more_rows);
    __syncthreads();
    unsigned qa[D / 16][4], da[D / 16][4];
    for (int i = 0; i < D / 16; i++) {
        fragment(rows, warp * 16, i * 16, qa[i]);
        fragment(more_rows, warp * 16, i * 16, da[i]);
    }
    float own_lse[2], own_delta[2];
    for (int half = 0; half < 2; half++) {
        int row = first + warp * 16 + g + half * 8;
        own_lse[half] = row < queries ? lse[size_t(blockIdx.y) * queries + row] : 0.0f;
        own_delta[half] = row < queries ? delta[size_t(blockIdx.y) * queries + row] : 0.0f;
    }
    float out[D / 8][4] = {}, s[TILE / 8][4], ds[TILE / 8][4];
    for (int start = 0; start < keys; start += TILE) {
        __syncthreads();
        load_tile<D>(k + key_start, start, keys, channels, head, rows);
        load_tile<D>(v + key_start, start, keys, channels, head, more_rows);
        load_transposed<D>(k + key_start, start, keys, channels, head, across);
        __syncthreads();
        scores<D>(qa, rows, s);
        scores<D>(da, more_rows, ds);
        for (int n = 0; n < TILE / 8; n++) {
            for (int i = 0; i < 4; i++) {
                through_softmax(s[n][i], ds[n][i], scale, own_lse[i / 2], own_delta[i / 2]);
                if (start + n * 8 + t + i % 2 >= keys) ds[n][i] = 0.0f;
            }
        }
        accumulate<D>(ds, across, out);
    }
    float factors[2] = {scale, scale};
    store_rows<D>(out, factors, first, queries, channels, head, dq + query_start);
}

// Grid: (ceil(queries / TILE), images·heads), blocks of BLOCK.
KERNEL(BLOCK) attention_backward_queries_32(const bf16* q /* (images, queries, heads·head) */,
                                            const bf16* k /* (images, keys, heads·head) */, const bf16* v /* as k */,
                                            const bf16* d_o /* as q */, const float* lse /* (images, heads, queries) */,
                                            const float* delta /* as lse */, int heads, int head, int queries, int keys,
                                            float scale, bf16* dq /* as q */) {
    query_gradient<32>(q, k, v, d_o, lse, delta, heads, head, queries, keys, scale, dq);
}

KERNEL(BLOCK) attention_backward_queries_64(const bf16* q, const bf16* k, const bf16* v, const bf16* d_o,
                                            const float* lse, const float* delta, int heads, int head, int queries,
                                            int keys, float scale, bf16* dq) {
    query_gradient<64>(q, k, v, d_o, lse, delta, heads, head, queries, keys, scale, dq);
}

template <int D>
__device__ void key_gradient(const bf16* q, const bf16* k, const bf16* v, const bf16* d_o, const float* lse,
                             const float* delta, int images, int heads, int head, int queries, int keys, int slice,
                             float scale, float* partial) {
    SHARED(bf16, rows, [TILE][D + PAD]);
    SHARED(bf16, more_rows, [TILE][D + PAD]);
    SHARED(bf16, across, [D][TILE + PAD]);
    SHARED(bf16, more_across, [D][TILE + PAD]);
    SHARED(float, tile_lse, [TILE]);
    SHARED(float, tile_delta, [TILE]);
    int image = blockIdx.y / heads, h = blockIdx.y % heads, channels = heads * head, first = blockIdx.x * TILE;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4 * 2;
    size_t query_start = size_t(image) * queries * channels + h * head;
    size_t key_start = size_t(image) * keys * channels + h * head;

    load_tile<D>(k + key_start, first, keys, channels, head, rows);
    load_tile<D>(v + key_start, first, keys, channels, head, more_rows);
    __syncthreads();
    unsigned ka[D / 16][4], va[D / 16][4];
    for (int i = 0; i < D / 16; i++) {
        fragment(rows, warp * 16, i * 16, ka[i]);
        fragment(more_rows, warp * 16, i * 16, va[i]);
    }
    // Transposed scores: rows are the warp's keys, columns the tile's queries.
    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[TILE / 8][4], ds[TILE / 8][4];
    int begin = blockIdx.z * slice, end = min(queries, begin + slice);
    for (int start = begin; start < end; start += TILE) {
        __syncthreads();
        load_tile<D>(q + query_start, start, end, channels, head, rows);
        load_tile<D>(d_o + query_start, start, end, channels, head, more_rows);
        load_transposed<D>(q + query_start, start, end, channels, head, across);
        load_transposed<D>(d_o + query_start, start, end, channels, head, more_across);
        if (threadIdx.x < TILE) {
            int query = start + threadIdx.x;
            tile_lse[threadIdx.x] = query < end ? lse[size_t(blockIdx.y) * queries + query] : 0.0f;
            tile_delta[threadIdx.x] = query < end ? delta[size_t(blockIdx.y) * queries + query] : 0.0f;
        }
        __syncthreads();
        scores<D>(ka, rows, s);
        scores<D>(va, more_rows, ds);
        for (int n = 0; n < TILE / 8; n++) {
            for (int i = 0; i < 4; i++) {
                int column = n * 8 + t + i % 2;
                through_softmax(s[n][i], ds[n][i], scale, tile_lse[column], tile_delta[column]);
            }
        }
        // Queries past the end are zero in both tiles, so what stands in their columns does not count.
        accumulate<D>(s, more_across, dv);
        accumulate<D>(ds, across, dk);
    }
    size_t n = size_t(images) * keys * channels;
    partial += blockIdx.z * 2 * n + key_start;
    for (int m = 0; m < D / 8; m++) {
        for (int i = 0; i < 4; i++) {
            int row = first + warp * 16 + g + i / 2 * 8, c = m * 8 + t + i % 2;
            if (row < keys && c < head) {
                partial[size_t(row) * channels + c] = scale * dk[m][i];
                partial[n + size_t(row) * channels + c] = dv[m][i];
            }
        }
    }
}

// Grid: (ceil(keys / TILE), images·heads, ceil(queries / slice)), blocks of BLOCK. `slice` is a multiple of TILE.
KERNEL(BLOCK) attention_backward_keys_32(const bf16* q /* (images, queries, heads·head) */,
                                         const bf16* k /* (images, keys, heads·head) */, const bf16* v /* as k */,
                                         const bf16* d_o /* as q */, const float* lse /* (images, heads, queries) */,
                                         const float* delta /* as lse */, int images, int heads, int head, int queries,
                                         int keys, int slice, float scale,
                                         float* partial /* (slices, 2, images, keys, heads·head): dK, dV */) {
    key_gradient<32>(q, k, v, d_o, lse, delta, images, heads, head, queries, keys, slice, scale, partial);
}

KERNEL(BLOCK) attention_backward_keys_64(const bf16* q, const bf16* k, const bf16* v, const bf16* d_o, const float* lse,
                                         const float* delta, int images, int heads, int head, int queries, int keys,
                                         int slice, float scale, float* partial) {
    key_gradient<64>(q, k, v, d_o, lse, delta, images, heads, head, queries, keys, slice, scale, partial);
}

// The slices of dK and dV in order. Threads: n.
KERNEL(THREADS) attention_backward_join(const float* partial /* (slices, 2, n) */, int slices, u64 n, bf16* dk /* (n) */,
                                        bf16* dv /* (n) */) {
    size_t i = thread_number();
    if (i >= n) return;
    float k = 0, v = 0;
    for (int s = 0; s < slices; s++) {
        k += partial[s * 2 * n + i];
        v += partial[(s * 2 + 1) * n + i];
    }
    dk[i] = __float2bfloat16_rn(k);
    dv[i] = __float2bfloat16_rn(v);
}
