// Tensor-core products of one warp: D (16 x 8, f32) += A (16 x 16, bf16) · B (16 x 8, bf16).
//
// Lane l = 4·g + t holds, in pairs of neighbouring columns of A (or rows of B):
//   A: rows g and g + 8, columns 2t and 2t + 8;   B: column g, rows 2t and 2t + 8;   D: rows g and g + 8, columns 2t, 2t + 1.
// So a D, rounded, is at once half of an A: products chain without leaving the registers.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    host::mma(d, a, b0, b1, __LINE__);
#endif
}

// Two neighbouring numbers.
__device__ __forceinline__ unsigned pair_at(const bf16* p) { return *reinterpret_cast<const unsigned*>(p); }

// A from rows row.. row + 16 and columns k.. k + 16 of a tile.
template <int S> __device__ __forceinline__ void fragment(const bf16 (*tile)[S], int row, int k, unsigned (&a)[4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
    a[0] = pair_at(&tile[row + g][k + t]);
    a[1] = pair_at(&tile[row + g + 8][k + t]);
    a[2] = pair_at(&tile[row + g][k + t + 8]);
    a[3] = pair_at(&tile[row + g + 8][k + t + 8]);
}

// d += A·tileᵀ for 8 rows of a tile from `row` on, whose columns k.. k + 16 run along A's.
template <int S>
__device__ __forceinline__ void mma_tile(float (&d)[4], const unsigned (&a)[4], const bf16 (*tile)[S], int row, int k) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
    mma(d, a, pair_at(&tile[row + g][k + t]), pair_at(&tile[row + g][k + t + 8]));
}
