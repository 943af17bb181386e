// The way back through the output product in front of attention's own: of the gradient d of what the product made and of its input
// o, each read once, that of o, the sums of both's products that a softmax takes back (attention.cu), and the weight's gradient. A
// warp makes 32 channels, one head's, of 16 tokens, with its part of the weight in registers. Channels of o and of its
// gradient are in the order for 16-byte access (mma.cuh).
#include "common.cuh"
#include "mma.cuh"
#include "square_gradient.cuh"

template <int C>
__device__ __forceinline__ void go_back(const bf16* d, const bf16* o, const bf16* weight, int rows, int queries, bf16* d_o,
                                        float* deltas, float* partial) {
    constexpr int TOKENS = WALK_TOKENS<C>, HEADS = C / 32;
    SHARED(Pieces<C>, tiles, [TILES_AHEAD]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int begin = warp % (TOKENS / 16) * 16, head = warp / (TOKENS / 16);

    // The weight goes where the last tile will be, and from there to registers.
    auto square = reinterpret_cast<Square<C>*>(tiles + TILES_AHEAD - 1);
    square->copy(weight, C, threadIdx.x, WALK_BLOCK);
    copies_done();
    __syncthreads();
    unsigned weights[C / 16][2][4];
    for (int i = 0; i < C / 8; i++) {
        int row = i / 2 * 16 + lane % 16, piece = head * 4 + i % 2 * 2 + lane / 16;
        auto at = reinterpret_cast<const bf16*>(&square->at[row][Square<C>::place(row, piece)]);
        load_matrices<true>(at, weights[i / 2][i % 2]);
    }
    __syncthreads();

    unsigned d_place = place_of<C>(begin + lane % 16, lane / 16), o_place = place_of<C>(begin + g, head * 4 + t);
    size_t to = (size_t(blockIdx.x) * TOKENS + begin + g) * C + head * 32 + t * 8;
    SquareGradient<C, false> gradient;
    gradient.walk(d, o, rows, tiles, [&](Pieces<C>& tile, int first) {
        float made[4][4] = {}, delta[2];
        for (int s = 0; s < C / 16; s++) {
            unsigned a[4];
            load_matrices<false>(at_place(tile.dy, d_place ^ s * 32), a);
            for (int n = 0; n < 4; n++) mma(made[n], a, weights[s][n / 2][n % 2 * 2], weights[s][n / 2][n % 2 * 2 + 1]);
        }
        for (int half = 0; half < 2; half++) {
            float eight[8];
            for (int i = 0; i < 8; i++) eight[i] = made[i / 2][2 * half + i % 2];
            // The sum is of the rounded gradient, as those of the probabilities are, whose mean it is, rounding included: of
            // the other, dq and dk would be further from exact ones.
            uint4 words = words_of(eight), x = sixteen(at_place(tile.x, o_place + half * (8 * C * 2)));
            delta[half] = dot(x.x, words.x) + dot(x.y, words.y) + dot(x.z, words.z) + dot(x.w, words.w);
            bf16* at = d_o + to + half * 8 * C;
            if (first + begin + half * 8 + g < rows) *reinterpret_cast<uint4*>(at) = words;
        }
        to += size_t(gridDim.x) * TOKENS * C;
        // Even lanes add up the first row's, odd ones the second's.
        float own = t % 2 ? delta[1] : delta[0], others = t % 2 ? delta[0] : delta[1];
        own += __shfl_xor_sync(ALL_LANES, others, 1);
        own += __shfl_xor_sync(ALL_LANES, own, 2);
        int row = first + begin + t * 8 + g;
        if (t > 1 || row >= rows) return;
        size_t at = row;
        if constexpr (HEADS > 1) at = size_t(row / queries * HEADS + head) * queries + row % queries;
        deltas[at] = own;
    });
    gradient.store(tiles, partial);
}

// Heads of 32 channels. Grid: any number of blocks of WALK_BLOCK, no more than there are tiles.
KERNEL(WALK_BOUNDS) attention_output_backward_32(const bf16* d /* (rows, 32) */, const bf16* o /* as d */,
                                                 const bf16* weight /* (32, 32) */, int rows, int queries,
                                                 bf16* d_o /* as d */,
                                                 float* deltas /* (images, heads, queries), queries·images = rows */,
                                                 float* partial /* (blocks, 32, 32): the weight's gradient */) {
    go_back<32>(d, o, weight, rows, queries, d_o, deltas, partial);
}

KERNEL(WALK_BOUNDS) attention_output_backward_64(const bf16* d /* (rows, 64) */, const bf16* o /* as d */,
                                                 const bf16* weight /* (64, 64) */, int rows, int queries,
                                                 bf16* d_o /* as d */,
                                                 float* deltas /* (images, heads, queries), queries·images = rows */,
                                                 float* partial /* (blocks, 64, 64): the weight's gradient */) {
    go_back<64>(d, o, weight, rows, queries, d_o, deltas, partial);
}
