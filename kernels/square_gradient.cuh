// The gradient of a square weight, (C, C), as a block sums it while it walks over tokens: Σ dyᵀ·x. Tiles of both come to shared
// memory ahead of their turn, where whoever walks may read them too, so that what else is made of the same tokens costs no bytes.
// A warp owns 32 x 32 numbers of the gradient: with 32 channels all of them, over the tokens that it copies itself, so that
// warps never meet; with 64 a quarter, over half of a tile. A fixed number of blocks share the tiles: they leave few partial sums, and
// the same on every GPU.
#pragma once
#include "common.cuh"
#include "mma.cuh"

constexpr int WALK_BLOCK = 256, WALK_WARPS = WALK_BLOCK / 32;
// Two blocks share a multiprocessor: at most 128 registers, and 48 KB.
#define WALK_BOUNDS WALK_BLOCK, 2
// Tiles in shared memory at a time.
constexpr int TILES_AHEAD = 3;
// Tokens of a tile.
template <int C> constexpr int WALK_TOKENS = 4096 / C;

// Tokens of both operands, (WALK_TOKENS, C) each.
template <int C> struct Pieces {
    uint4 dy[WALK_TOKENS<C> * C / 8], x[WALK_TOKENS<C> * C / 8];
};

// Where in a tile, in bytes, eight channels of a token are. What is read together, the same part of eight tokens or half the parts
// of two, is in different banks. Turned alike are tokens eight apart, so that these are eight rows apart; part p ^ n is at the
// place of p, ^ 16·n.
template <int C> __device__ __forceinline__ unsigned place_of(int token, int part) {
    int turn = token / 2 % 4 | (C > 32 ? token % 2 * 4 : 0);
    return opaque(token * (C / 8) + (part ^ turn)) * 16;
}

__device__ __forceinline__ bf16* at_place(uint4* tokens, unsigned place) {
    return reinterpret_cast<bf16*>(reinterpret_cast<char*>(tokens) + place);
}

// Whoever copies tokens for each other.
template <int C> __device__ __forceinline__ void meet_walkers() {
    if constexpr (C == 32) __syncwarp();
    else __syncthreads();
}

// BIAS: the column sums of dy, too.
template <int C, bool BIAS> struct SquareGradient {
    static constexpr int TOKENS = WALK_TOKENS<C>, QUARTERS = C / 32 * (C / 32), SLICES = WALK_WARPS / QUARTERS;
    static constexpr int SUMS = C * C + (BIAS ? C : 0);
    typedef Pieces<C> Tiles[TILES_AHEAD];

    float sums[2][4][4] = {};
    float bias[2][4] = {};

    // Walks over all tokens: `each(tile, row)` may read the tile whose first row that is, where the calling warp copies it, or,
    // with more than 32 channels, all of it.
    template <class Each>
    __device__ __forceinline__ void walk(const bf16* dy, const bf16* x, int rows, Tiles& tiles, Each each) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        // A thread copies the same part of two tokens.
        constexpr int PARTS = C / 8, APART = 32 / PARTS;
        int part = lane % PARTS, row = blockIdx.x * TOKENS + warp * 2 * APART + lane / PARTS;
        unsigned to = place_of<C>(warp * 2 * APART + lane / PARTS, part);
        size_t from = size_t(row) * C + part * 8;
        auto copy = [&](int stage) {
            for (int k = 0; k < 2; k++) {
                // Four tokens on, the parts are turned by two.
                unsigned place = (APART % 8 == 0 ? to : to ^ k * 32) + k * (APART * PARTS * 16);
                int bytes = row + k * APART < rows ? 16 : 0;
                copy_async<16>(at_place(tiles[stage].dy, place), dy + from + k * APART * C, bytes);
                copy_async<16>(at_place(tiles[stage].x, place), x + from + k * APART * C, bytes);
            }
            copies_end_group();
            row += gridDim.x * TOKENS;
            from += size_t(gridDim.x) * TOKENS * C;
        };

        // Lanes hold pairs of tokens of both operands, as what the product sums over: both are read transposed.
        int quarter = warp % QUARTERS, slice = warp / QUARTERS * (TOKENS / SLICES);
        unsigned a_place = place_of<C>(slice + lane / 16 * 8 + lane % 8, quarter / (C / 32) * 4 + lane / 8 % 2);
        unsigned b_place = place_of<C>(slice + lane % 16, quarter % (C / 32) * 4 + lane / 16);
        auto add = [&](Pieces<C>& tile) {
#pragma unroll
            for (int s = 0; s < TOKENS / SLICES / 16; s++) {
                unsigned a[2][4], b[2][4], beyond = s * (16 * PARTS * 16);
                for (int i = 0; i < 2; i++) {
                    load_matrices<true>(at_place(tile.dy, (a_place ^ i * 32) + beyond), a[i]);
                    load_matrices<true>(at_place(tile.x, (b_place ^ i * 32) + beyond), b[i]);
                }
                for (int i = 0; i < 2; i++) {
                    for (int j = 0; j < 4; j++) mma(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                    if constexpr (BIAS) mma(bias[i], a[i], ONES, ONES);
                }
            }
        };

        for (int stage = 0; stage < TILES_AHEAD - 1; stage++) copy(stage);
        int stage = 0;
#pragma unroll 1
        for (int first = blockIdx.x * TOKENS; first < rows; first += gridDim.x * TOKENS) {
            copies_done_but<TILES_AHEAD - 2>();
            meet_walkers<C>();
            // All are done with the tile before, so its place is free.
            copy(stage > 0 ? stage - 1 : TILES_AHEAD - 1);
            each(tiles[stage], first);
            add(tiles[stage]);
            stage = stage + 1 < TILES_AHEAD ? stage + 1 : 0;
        }
    }

    // Leaves the block's sums, of its warps in order: of the weight, then of the bias.
    __device__ __forceinline__ void store(Tiles& tiles, float* partial /* (blocks, SUMS) */) {
        float* room = reinterpret_cast<float*>(tiles);
        static_assert(SLICES * SUMS * sizeof(float) <= sizeof(Tiles), "sums fit where tiles were");
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, quarter = threadIdx.x / 32 % QUARTERS;
        int output = quarter / (C / 32) * 32, input = quarter % (C / 32) * 32;
        copies_done();
        __syncthreads();
        float* own = room + threadIdx.x / 32 / QUARTERS * SUMS;
        for (int i = 0; i < 4; i++) {
            int row = output + i * 8 + g;
            for (int j = 0; j < 4; j++) {
                const float* pair = sums[i / 2][j] + i % 2 * 2;
                *reinterpret_cast<float2*>(own + row * C + input + j * 8 + 2 * t) = float2{pair[0], pair[1]};
            }
            if (BIAS && t == 0 && input == 0) own[C * C + row] = bias[i / 2][i % 2 * 2];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < SUMS; i += WALK_BLOCK) {
            float total = 0;
            for (int s = 0; s < SLICES; s++) total += room[s * SUMS + i];
            partial[size_t(blockIdx.x) * SUMS + i] = total;
        }
    }
};
