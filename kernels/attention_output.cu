// The way back through the LayerNorm behind attention's branch and the branch's output product, in front of attention's own. From
// the gradient dn of what the LayerNorm made of the stream, that of the stream, in the place of the one behind; with its
// stochastic depth applied, which is nowhere in memory, that of the product's input o; the sums of both's products that a softmax
// takes back (attention.cu); and the gradients of the weight and, if wanted, of the LayerNorm's and the product's bias. Every
// tensor is read once.
//
// Tiles of dn, o and the stream come to shared memory ahead of their turn. The lanes that copied a row go back through its
// LayerNorm together, and leave the product's gradient in the place of dn. Then a warp makes 32 channels, one head's, of 16
// tokens, with its part of the weight in registers. Channels of o and of its gradient are in the order for 16-byte access
// (mma.cuh).
#include "common.cuh"
#include "mma.cuh"
#include "square_gradient.cuh"

// Sums per channel: gamma's gradient, beta's, and that of the product's bias.
constexpr int KINDS = 3;

// LayerNorm behind the branch: gradient of its output, input, (mean, 1/std) per row, scale.
struct Behind {
    const bf16 *dn, *x;
    const float *stats, *gamma;
};

// Adds up what the lanes that have the same 8 channels hold, with as few shuffles as there are numbers: each receives the sums of
// its share of the channels, in x[0] and so on, from channel `share_of` on.
template <int LANES> __device__ __forceinline__ void scatter_sums(float (&x)[8]) {
    int half = 4;
    for (int apart = 16; apart >= LANES; apart /= 2, half /= 2) {
        bool upper = threadIdx.x & apart;
        for (int i = 0; i < half; i++) {
            float sent = upper ? x[i] : x[i + half];
            x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(ALL_LANES, sent, apart);
        }
    }
}

// The first channel, of 8, of the calling lane's share.
template <int LANES> __device__ __forceinline__ int share_of() {
    int channel = 0, half = 4;
    for (int apart = 16; apart >= LANES; apart /= 2, half /= 2) channel += threadIdx.x & apart ? half : 0;
    return channel;
}

// SUMS: of the gradients per channel, too.
template <int C, bool SUMS>
__device__ __forceinline__ void go_back(const Behind& norm, const DropPath& depth, const bf16* o, const bf16* weight,
                                        int rows, int queries, bf16* d, bf16* d_o, float* deltas, float* partial,
                                        float* norm_partial) {
    constexpr int TOKENS = WALK_TOKENS<C>, HEADS = C / 32, TILES = 2;
    // Of (TOKENS, C) each; dy arrives as dn.
    struct Tile {
        uint4 dy[TOKENS * C / 8], o[TOKENS * C / 8], x[TOKENS * C / 8];
    };
    SHARED(Tile, tiles, [TILES]);
    // The weight goes where the second tile will be, and from there to registers.
    auto square = reinterpret_cast<Square<C>*>(tiles + TILES - 1);
    square->copy(weight, C, threadIdx.x, WALK_BLOCK);
    copies_done();
    __syncthreads();
    unsigned weights[C / 16][2][4];
    for (int i = 0; i < C / 8; i++) {
        int lane = threadIdx.x % 32, head = threadIdx.x / 32 / (TOKENS / 16);
        int row = i / 2 * 16 + lane % 16, piece = head * 4 + i % 2 * 2 + lane / 16;
        auto at = reinterpret_cast<const bf16*>(&square->at[row][Square<C>::place(row, piece)]);
        load_matrices<true>(at, weights[i / 2][i % 2]);
    }
    __syncthreads();

    constexpr int APART = Copied<C>::APART, LANES = Copied<C>::PARTS;
    // Begins to bring the tile whose first row that is.
    auto copy = [&](Tile& tile, int first) {
        Copied<C> own(opaque(threadIdx.x));
        for (int k = 0; k < 2; k++) {
            int row = first + own.token + k * APART;
            unsigned from = unsigned(row) * C + own.part * 8;
            bool exists = row < rows;
            copy_async<16>(at_place(tile.dy, own.place(k)), norm.dn + from, exists ? 16 : 0);
            copy_async<16>(at_place(tile.o, own.place(k)), o + from, exists ? 16 : 0);
            copy_async<16>(at_place(tile.x, own.place(k)), norm.x + from, exists ? 16 : 0);
            // For these there is no room yet.
            if (!exists) continue;
            prefetch(d + from);
            prefetch(norm.stats + 2 * row);
        }
    };

    // Of the channels that are the lane's share.
    constexpr int SHARE = LANES / 4;
    float sums[KINDS][SHARE] = {};
    auto add_sums = [&](int kind, Pack<8> terms) {
        if constexpr (SUMS) {
            scatter_sums<LANES>(terms.x);
            for (int i = 0; i < SHARE; i++) sums[kind][i] += terms.x[i];
        }
    };
    // From dn to dy in the k-th of the thread's rows. Past the last row, everything is zero.
    auto normalise_back = [&](Tile& tile, int first, int k) {
        Copied<C> own(opaque(threadIdx.x));
        int row = first + own.token + k * APART;
        bf16 *at = at_place(tile.dy, own.place(k)), *stream = d + (unsigned(row) * C + own.part * 8);
        uint4 old = {0, 0, 0, 0};
        float2 moments = {0, 0};
        if (row < rows) {
            old = fetch<8>(stream);
            moments = reinterpret_cast<const float2*>(norm.stats)[row];
        }
        Pack<8> dy = load<8>(at), x = load<8>(at_place(tile.x, own.place(k)));
        // Read anew, as registers are short.
        Pack<8> gamma = load<8>(norm.gamma + opaque(own.part) * 8), products;
        float plain = 0, along = 0;
        add_sums(1, dy);
        for (int i = 0; i < 8; i++) {
            x.x[i] = (x.x[i] - moments.x) * moments.y;
            products.x[i] = dy.x[i] * x.x[i];
            dy.x[i] *= gamma.x[i];
            plain += dy.x[i];
            along += dy.x[i] * x.x[i];
        }
        add_sums(0, products);
        plain = group_sum(plain, LANES) * (1.0f / C);
        along = group_sum(along, LANES) * (1.0f / C);
        Pack<8> before = widen<8>(old);
        for (int i = 0; i < 8; i++) x.x[i] = before.x[i] + (dy.x[i] - plain - x.x[i] * along) * moments.y;
        if (row < rows) store(stream, x);
        // All of this made anew, too.
        DropPath path = depth;
        path.key0 = opaque(path.key0);
        path.key1 = opaque(path.key1);
        path.site = opaque(path.site);
        float factor = path.factor(opaque(row) / queries);
        for (int i = 0; i < 8; i++) x.x[i] *= factor;
        store(at, x);
        add_sums(2, x);
    };

    SquareGradient<C, false> gradient;
    copy(tiles[0], blockIdx.x * TOKENS);
    int stage = 0;
#pragma unroll 1
    for (int first = blockIdx.x * TOKENS; first < rows; first += gridDim.x * TOKENS) {
        Tile& tile = tiles[stage];
        copies_done();
        // All are done with the tile before, so its place is free.
        meet_walkers<C>();
        copy(tiles[stage ^ 1], first + gridDim.x * TOKENS);
#pragma unroll 1
        for (int k = 0; k < 2; k++) normalise_back(tile, first, k);
        meet_walkers<C>();

        // Places, made anew in every round: registers are short.
        unsigned thread = opaque(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
        int begin = warp % (TOKENS / 16) * 16, head = warp / (TOKENS / 16);
        unsigned d_place = place_of<C>(begin + lane % 16, lane / 16), o_place = place_of<C>(begin + g, head * 4 + t);
        float made[4][4] = {}, delta[2];
        for (int s = 0; s < C / 16; s++) {
            unsigned a[4];
            load_matrices<false>(at_place(tile.dy, d_place ^ s * 32), a);
            for (int n = 0; n < 4; n++) mma(made[n], a, weights[s][n / 2][n % 2 * 2], weights[s][n / 2][n % 2 * 2 + 1]);
        }
        int row = first + begin + g;
        for (int half = 0; half < 2; half++) {
            float eight[8];
            for (int i = 0; i < 8; i++) eight[i] = made[i / 2][2 * half + i % 2];
            // The sum is of the rounded gradient, as those of the probabilities are, whose mean it is, rounding included: of
            // the other, dq and dk would be further from exact ones.
            uint4 words = words_of(eight), x = sixteen(at_place(tile.o, o_place + half * (8 * C * 2)));
            delta[half] = dot(x.x, words.x) + dot(x.y, words.y) + dot(x.z, words.z) + dot(x.w, words.w);
            bf16* at = d_o + (unsigned(row + half * 8) * C + head * 32 + t * 8);
            if (row + half * 8 < rows) *reinterpret_cast<uint4*>(at) = words;
        }
        // Even lanes add up the first row's, odd ones the second's.
        float mine = t % 2 ? delta[1] : delta[0], others = t % 2 ? delta[0] : delta[1];
        mine += __shfl_xor_sync(ALL_LANES, others, 1);
        mine += __shfl_xor_sync(ALL_LANES, mine, 2);
        row += t * 8;
        if (t < 2 && row < rows) {
            size_t at = row;
            if constexpr (HEADS > 1) at = size_t(row / queries * HEADS + head) * queries + row % queries;
            deltas[at] = mine;
        }
        gradient.add(tile.dy, tile.o);
        stage ^= 1;
    }
    gradient.store(tiles, partial);

    if constexpr (SUMS) {
        auto room = reinterpret_cast<float(*)[WALK_WARPS][C]>(tiles);
        static_assert(KINDS * WALK_WARPS * C * sizeof(float) <= sizeof(tiles), "sums fit where tiles were");
        int c = threadIdx.x % LANES * 8 + share_of<LANES>();
        __syncthreads();
        for (int i = 0; i < KINDS * SHARE; i++) room[i / SHARE][threadIdx.x / 32][c + i % SHARE] = sums[i / SHARE][i % SHARE];
        __syncthreads();
        for (int i = threadIdx.x; i < KINDS * C; i += WALK_BLOCK) {
            float total = 0;
            for (int warp = 0; warp < WALK_WARPS; warp++) total += room[i / C][warp][i % C];
            norm_partial[size_t(blockIdx.x) * (KINDS * C) + i] = total;
        }
    }
}

// Heads of 32 channels; an image has `queries` rows. Grid: any number of blocks of WALK_BLOCK, no more than there are tiles.
KERNEL(WALK_BOUNDS) attention_output_backward_32(const bf16* dn /* (rows, 32) */, const bf16* x /* as dn */,
                                                 const float* stats /* (rows, 2) */, const float* gamma /* (32) */,
                                                 unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */,
                                                 u64 first, float rate, const bf16* o /* as dn */,
                                                 const bf16* weight /* (32, 32) */, int rows, int queries, bf16* d /* as dn */,
                                                 bf16* d_o /* as dn */,
                                                 float* deltas /* (images, heads, queries), queries·images = rows */,
                                                 float* partial /* (blocks, 32, 32): the weight's gradient */) {
    go_back<32, false>({dn, x, stats, gamma}, {key0, key1, site, step, first, rate}, o, weight, rows, queries, d, d_o, deltas,
                       partial, nullptr);
}

KERNEL(WALK_BOUNDS) attention_output_backward_64(const bf16* dn /* (rows, 64) */, const bf16* x, const float* stats,
                                                 const float* gamma, unsigned key0, unsigned key1, unsigned site,
                                                 const unsigned* step, u64 first, float rate, const bf16* o,
                                                 const bf16* weight /* (64, 64) */, int rows, int queries, bf16* d, bf16* d_o,
                                                 float* deltas, float* partial /* (blocks, 64, 64) */) {
    go_back<64, false>({dn, x, stats, gamma}, {key0, key1, site, step, first, rate}, o, weight, rows, queries, d, d_o, deltas,
                       partial, nullptr);
}

// The same with the gradients per channel.
KERNEL(WALK_BOUNDS) attention_output_backward_all_32(const bf16* dn, const bf16* x, const float* stats, const float* gamma,
                                                     unsigned key0, unsigned key1, unsigned site, const unsigned* step,
                                                     u64 first, float rate, const bf16* o, const bf16* weight, int rows,
                                                     int queries, bf16* d, bf16* d_o, float* deltas, float* partial,
                                                     float* norm_partial /* (blocks, 3, 32): gamma's, beta's, the product's
                                                                            bias's */) {
    go_back<32, true>({dn, x, stats, gamma}, {key0, key1, site, step, first, rate}, o, weight, rows, queries, d, d_o, deltas,
                      partial, norm_partial);
}

KERNEL(WALK_BOUNDS) attention_output_backward_all_64(const bf16* dn, const bf16* x, const float* stats, const float* gamma,
                                                     unsigned key0, unsigned key1, unsigned site, const unsigned* step,
                                                     u64 first, float rate, const bf16* o, const bf16* weight, int rows,
                                                     int queries, bf16* d, bf16* d_o, float* deltas, float* partial,
                                                     float* norm_partial /* (blocks, 3, 64) */) {
    go_back<64, true>({dn, x, stats, gamma}, {key0, key1, site, step, first, rate}, o, weight, rows, queries, d, d_o, deltas,
                      partial, norm_partial);
}
