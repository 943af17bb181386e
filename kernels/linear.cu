// Beside the products themselves: the gradient of a bias, which is the column sums of dy, and that of a square weight with it.
//
// Slabs of rows are summed by many blocks at once (linear_backward_bias), then the slabs in order (sum_partials, which
// column-wise reductions end with): one pass over dy, no atomics, the same bits every time.
#include "common.cuh"
#include "square_gradient.cuh"

template <int V>
__device__ void bias_partials(const bf16* dy, int rows, int outputs, int slab, float* partial) {
    auto term = [&](int row, int c, Pack<V>(&terms)[1]) { terms[0] = load<V>(dy + size_t(row) * outputs + c); };
    column_partials<V, 1>(term, rows, outputs, slab, partial);
}

// Grid: as column_partials has it.
KERNEL(THREADS) linear_backward_bias(const bf16* dy /* (rows, outputs) */, int rows, int outputs, int slab,
                                     float* partial /* (slabs, 1, outputs) */) {
    BY_WIDTH(outputs, bias_partials, dy, rows, outputs, slab, partial);
}

// Tiles in shared memory at a time.
constexpr int TILES_AHEAD = 3;

// The weight's gradient and the bias's in one pass over both operands: dyᵀ·x, and the column sums of dy.
template <int C>
__device__ __forceinline__ void square_gradient(const bf16* dy, const bf16* x, int rows, float* partial) {
    // Tokens of both operands, (TOKENS, C) each.
    struct Tile {
        uint4 dy[WALK_TOKENS<C> * C / 8], x[WALK_TOKENS<C> * C / 8];
    };
    constexpr int TOKENS = WALK_TOKENS<C>;
    SHARED(Tile, tiles, [TILES_AHEAD]);
    Copied<C> own(threadIdx.x);
    int row = blockIdx.x * TOKENS + own.token;
    size_t from = size_t(row) * C + own.part * 8;
    auto copy = [&](int stage) {
        for (int k = 0; k < 2; k++) {
            int bytes = row + k * own.APART < rows ? 16 : 0;
            copy_async<16>(at_place(tiles[stage].dy, own.place(k)), dy + from + k * own.APART * C, bytes);
            copy_async<16>(at_place(tiles[stage].x, own.place(k)), x + from + k * own.APART * C, bytes);
        }
        copies_end_group();
        row += gridDim.x * TOKENS;
        from += size_t(gridDim.x) * TOKENS * C;
    };
    for (int stage = 0; stage < TILES_AHEAD - 1; stage++) copy(stage);
    SquareGradient<C, true> gradient;
    int stage = 0;
#pragma unroll 1
    for (int first = blockIdx.x * TOKENS; first < rows; first += gridDim.x * TOKENS) {
        copies_done_but<TILES_AHEAD - 2>();
        meet_walkers<C>();
        // All are done with the tile before, so its place is free.
        copy(stage > 0 ? stage - 1 : TILES_AHEAD - 1);
        gradient.add(tiles[stage].dy, tiles[stage].x);
        stage = stage + 1 < TILES_AHEAD ? stage + 1 : 0;
    }
    gradient.store(tiles, partial);
}

// Grid: any number of blocks of WALK_BLOCK, no more than there are tiles.
KERNEL(WALK_BOUNDS) linear_backward_square_32(const bf16* dy /* (rows, 32) */, const bf16* x /* (rows, 32) */, int rows,
                                              float* partial /* (blocks, 32·32 + 32) */) {
    square_gradient<32>(dy, x, rows, partial);
}

KERNEL(WALK_BOUNDS) linear_backward_square_64(const bf16* dy /* (rows, 64) */, const bf16* x /* (rows, 64) */, int rows,
                                              float* partial /* (blocks, 64·64 + 64) */) {
    square_gradient<64>(dy, x, rows, partial);
}

// Σ_s partial[s] to up to three outputs, one behind the other in a row of `partial`, each added to if so told, or null. Rows are
// `stride` apart. A block takes 8 columns, and every 32nd slab is one line's, so that many reads are under way at once.
// Grid: ceil((n + n1 + n2) / 8).
KERNEL(THREADS) sum_partials(const float* partial /* (slabs, stride) */, int slabs, int stride, int n, float* out /* (n) */,
                             int add, int n1, float* out1 /* (n1) */, int add1, int n2, float* out2 /* (n2) */, int add2) {
    constexpr int COLUMNS = 8, LINES = THREADS / COLUMNS;
    SHARED(float, sums, [LINES][COLUMNS]);
    int column = threadIdx.x % COLUMNS, line = threadIdx.x / COLUMNS, i = blockIdx.x * COLUMNS + column;
    bool inside = i < n + n1 + n2;
    float sum = 0;
    if (inside) {
#pragma unroll 8
        for (int s = line; s < slabs; s += LINES) sum += partial[size_t(s) * stride + i];
    }
    sums[line][column] = sum;
    __syncthreads();
    if (line > 0 || !inside) return;
    float total = 0;
    for (int l = 0; l < LINES; l++) total += sums[l][column];
    if (i >= n + n1) {
        out = out2;
        add = add2;
        i -= n + n1;
    } else if (i >= n) {
        out = out1;
        add = add1;
        i -= n;
    }
    if (out != nullptr) out[i] = add ? out[i] + total : total;
}

// The same of few slabs and many columns, to one output. A thread takes four columns, a multiple of which there are. Threads: n / 4.
KERNEL(THREADS) sum_few_partials(const float* partial /* (slabs, n) */, int slabs, int n, float* out /* (n) */, int add) {
    size_t i = thread_number() * 4;
    if (i >= size_t(n)) return;
    Pack<4> sum = {};
#pragma unroll 4
    for (int s = 0; s < slabs; s++) {
        Pack<4> slab = load<4>(partial + size_t(s) * n + i);
        for (int j = 0; j < 4; j++) sum.x[j] += slab.x[j];
    }
    if (add) {
        Pack<4> old = load<4>(out + i);
        for (int j = 0; j < 4; j++) sum.x[j] += old.x[j];
    }
    *reinterpret_cast<float4*>(out + i) = {sum.x[0], sum.x[1], sum.x[2], sum.x[3]};
}
