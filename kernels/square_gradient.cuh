// The gradient of a square weight, (C, C), as a block sums it while it walks over tokens: Σ dyᵀ·x. Tiles of both lie in shared
// memory, where whoever walks may read them too, so that what else is made of the same tokens costs no bytes. A warp owns
// 32 x 32 numbers of the gradient: with 32 channels all of them, over the tokens that it copies itself, so that warps never
// meet; with 64 a quarter, over half of a tile.
#pragma once
#include "common.cuh"
#include "mma.cuh"

constexpr int WALK_BLOCK = 256, WALK_WARPS = WALK_BLOCK / 32;
// Two blocks share a multiprocessor: at most 128 registers, and 48 KB.
#define WALK_BOUNDS WALK_BLOCK, 2
// Tokens of a tile.
template <int C> constexpr int WALK_TOKENS = 4096 / C;

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

// What a thread copies of a tile: the same part of two tokens.
template <int C> struct Copied {
    static constexpr int PARTS = C / 8, APART = 32 / PARTS;
    int part, token;
    unsigned to;

    __device__ __forceinline__ Copied(unsigned thread)
        : part(thread % PARTS), token(thread / 32 * 2 * APART + thread % 32 / PARTS),
          to(place_of<C>(token, part)) {}
    // Where in the tile the part of the k-th is. Four tokens on, parts are turned by two.
    __device__ __forceinline__ unsigned place(int k) const {
        return (APART % 8 == 0 ? to : to ^ k * 32) + k * (APART * PARTS * 16);
    }
};

// BIAS: the column sums of dy, too.
template <int C, bool BIAS> struct SquareGradient {
    static constexpr int TOKENS = WALK_TOKENS<C>, QUARTERS = C / 32 * (C / 32), SLICES = WALK_WARPS / QUARTERS;
    static constexpr int SUMS = C * C + (BIAS ? C : 0);

    float sums[2][4][4] = {};
    float bias[2][4] = {};

    // Adds what a tile's tokens make, which is read by the warp that copied them, or, with more than 32 channels, by all.
    __device__ __forceinline__ void add(uint4* dy, uint4* x) {
        // Lanes hold pairs of tokens of both operands, as what the product sums over: both are read transposed.
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        int quarter = warp % QUARTERS, slice = warp / QUARTERS * (TOKENS / SLICES);
        unsigned a_place = place_of<C>(slice + lane / 16 * 8 + lane % 8, quarter / (C / 32) * 4 + lane / 8 % 2);
        unsigned b_place = place_of<C>(slice + lane % 16, quarter % (C / 32) * 4 + lane / 16);
#pragma unroll
        for (int s = 0; s < TOKENS / SLICES / 16; s++) {
            unsigned a[2][4], b[2][4], beyond = s * (16 * (C / 8) * 16);
            for (int i = 0; i < 2; i++) {
                load_matrices<true>(at_place(dy, (a_place ^ i * 32) + beyond), a[i]);
                load_matrices<true>(at_place(x, (b_place ^ i * 32) + beyond), b[i]);
            }
            for (int i = 0; i < 2; i++) {
                for (int j = 0; j < 4; j++) mma(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                if constexpr (BIAS) mma(bias[i], a[i], ONES, ONES);
            }
        }
    }

    // Leaves the block's sums, of its warps in order: of the weight, then of the bias.
    template <class Tiles> __device__ __forceinline__ void store(Tiles& tiles, float* partial /* (blocks, SUMS) */) {
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
