// Small products and element-wise work among f32 parameters. Latency, not bandwidth, is their cost, so one launch covers
// many products: a block makes a tile of one of them, over a slice of its sum, and the slices are joined in order.
#include "tables.cuh"

// y (rows, n) = columns start.. start + n of x. Threads: rows·n.
KERNEL(THREADS) columns(const float* x /* (rows, columns) */, int rows, int columns, int start, int n,
                        float* y /* (rows, n) */) {
    size_t i = thread_number();
    if (i < size_t(rows) * n) y[i] = x[i / n * columns + start + i % n];
}

// Columns start.. start + n of x += y. Threads: rows·n.
KERNEL(THREADS) add_columns(const float* y /* (rows, n) */, int rows, int columns, int start, int n,
                            float* x /* (rows, columns) */) {
    size_t i = thread_number();
    if (i < size_t(rows) * n) x[i / n * columns + start + i % n] += y[i];
}

// A tensor to scale.
struct Scaled {
    const float* x /* (n) */;
    float* y /* (n) */;
    bf16* product /* (n), or null */;
    u64 n;
};

// y = alpha·x, rounded to `product` too. Grid: the pieces.
KERNEL(THREADS) scale_all(const Piece* pieces /* (gridDim.x) */, const Scaled* tensors /* (tensors) */,
                           const float* alpha /* (1) */) {
    Piece piece = pieces[blockIdx.x];
    Scaled t = tensors[piece.tensor];
    float factor = *alpha;
    each_of_part(piece.part, t.n, [&](u64 at, auto width) {
        constexpr int V = decltype(width)::value;
        const float* from = t.x + at;
        Pack<V> y = load<V>(from);
        for (int i = 0; i < V; i++) y.x[i] *= factor;
        store(t.y + at, y);
        if (t.product) store(t.product + at, y);
    });
}

// y += x[start..]. Threads: n.
KERNEL(THREADS) add_part(const float* x /* (start + n) */, int start, int n, float* y /* (n) */) {
    size_t i = thread_number();
    if (i < size_t(n)) y[i] += x[start + i];
}

// c = base + alpha·a·b, rounded to `product` too; without a base, that is zero, and without alpha, 1. A stride is the distance between
// neighbours along the named index. Lanes of a warp lie along the rows, so the launch calls what is contiguous in c its
// rows where it can.
struct Small {
    const float* a /* (m, k) */;
    const float* b /* (k, n) */;
    const float* base /* (m, n), or null */;
    float* c /* (m, n) */;
    bf16* product /* (m, n), or null */;
    // Where this product's slices start in the partial sums.
    u64 partial;
    const float* alpha /* (1), or null */;
    int m, n, k;
    int a_row, a_k, b_k, b_column, c_row, c_column;
};

// What a block makes: a tile of a product over a slice of k.
struct Tile {
    int product, row, column, slice;
};

constexpr int TILE = 32;
// Terms of a sum that one block adds up: few enough that the longest sums do not outlast the many short ones.
constexpr int SLICE = 256;
// Columns of a tile that a warp makes.
constexpr int COLUMNS = TILE / (THREADS / 32);

// What this thread fetches of the numbers (i, k) of a TILE x TILE block that starts at (first, k): zeros outside
// (count, end). Neighbouring lanes take neighbouring addresses.
__device__ __forceinline__ Pack<COLUMNS> fetch(const float* x, int stride, int k_stride, int first, int count, int k,
                                               int end) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Pack<COLUMNS> p;
    for (int j = 0; j < COLUMNS; j++) {
        int line = warp + j * (THREADS / 32);
        int i = first + (k_stride == 1 ? line : lane), at = k + (k_stride == 1 ? lane : line);
        p.x[j] = i < count && at < end ? x[size_t(i) * stride + size_t(at) * k_stride] : 0.0f;
    }
    return p;
}

// Puts what was fetched into shared memory: (i, k) to tile[k][i], with rows of `width` numbers.
__device__ __forceinline__ void put(const Pack<COLUMNS>& p, bool along_k, float* tile, int width) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int j = 0; j < COLUMNS; j++) {
        int line = warp + j * (THREADS / 32);
        tile[along_k ? lane * width + line : line * width + lane] = p.x[j];
    }
}

__device__ __forceinline__ void finish(const Small& p, int row, int column, float sum) {
    size_t at = size_t(row) * p.c_row + size_t(column) * p.c_column;
    float y = (p.alpha ? *p.alpha : 1.0f) * sum + (p.base ? p.base[at] : 0.0f);
    p.c[at] = y;
    if (p.product) p.product[at] = __float2bfloat16_rn(y);
}

// Where the partial sum of an element over a slice stands.
__device__ __forceinline__ size_t partial_at(const Small& p, int slice, int row, int column) {
    return p.partial + (size_t(slice) * p.n + column) * p.m + row;
}

// Grid: the tiles. A product of several slices leaves them in `partial` for join_slices.
KERNEL(THREADS) small_products(const Tile* tiles /* (gridDim.x) */, const Small* products /* (products) */,
                               float* partial) {
    // [k][row] and [k][column], padded against conflicts of banks.
    SHARED(float, a, [TILE * (TILE + 1)]);
    SHARED(float4, b, [TILE * (TILE / 4 + 1)]);
    Tile tile = tiles[blockIdx.x];
    Small p = products[tile.product];
    int first_row = tile.row * TILE, first_column = tile.column * TILE;
    int lane = threadIdx.x % 32, own = threadIdx.x / 32 * COLUMNS;
    int row = first_row + lane, column = first_column + own;
    int start = tile.slice * SLICE, end = min(p.k, start + SLICE);
    float sums[COLUMNS] = {};
    Pack<COLUMNS> next_a = fetch(p.a, p.a_row, p.a_k, first_row, p.m, start, end);
    Pack<COLUMNS> next_b = fetch(p.b, p.b_column, p.b_k, first_column, p.n, start, end);
    for (int k = start; k < end; k += TILE) {
        put(next_a, p.a_k == 1, a, TILE + 1);
        put(next_b, p.b_k == 1, reinterpret_cast<float*>(b), TILE + 4);
        __syncthreads();
        // On their way while this tile is summed.
        next_a = fetch(p.a, p.a_row, p.a_k, first_row, p.m, k + TILE, end);
        next_b = fetch(p.b, p.b_column, p.b_k, first_column, p.n, k + TILE, end);
        if (column < p.n) {
            for (int i = 0; i < TILE; i++) {
                float x = a[i * (TILE + 1) + lane];
                float4 y = b[i * (TILE / 4 + 1) + own / 4];
                sums[0] += x * y.x;
                sums[1] += x * y.y;
                sums[2] += x * y.z;
                sums[3] += x * y.w;
            }
        }
        __syncthreads();
    }
    for (int j = 0; j < COLUMNS; j++) {
        if (row >= p.m || column + j >= p.n) continue;
        if (p.k > SLICE) {
            partial[partial_at(p, tile.slice, row, column + j)] = sums[j];
        } else {
            finish(p, row, column + j, sums[j]);
        }
    }
}

// Adds up the slices that small_products left, in order. Grid: the tiles of products of several slices.
KERNEL(THREADS) join_slices(const Tile* tiles /* (gridDim.x) */, const Small* products /* (products) */,
                            const float* partial) {
    Tile tile = tiles[blockIdx.x];
    Small p = products[tile.product];
    int row = tile.row * TILE + threadIdx.x % 32, column = tile.column * TILE + threadIdx.x / 32 * COLUMNS;
    for (int j = 0; j < COLUMNS; j++) {
        if (row >= p.m || column + j >= p.n) continue;
        float sum = 0;
        for (int slice = 0; slice * SLICE < p.k; slice++) sum += partial[partial_at(p, slice, row, column + j)];
        finish(p, row, column + j, sum);
    }
}
