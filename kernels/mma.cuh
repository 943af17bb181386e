// Tensor-core products of one warp: D (16 x 8, f32) += A (16 x 16, bf16) · B (16 x 8, bf16).
//
// Lane l = 4·g + t holds, in pairs of neighbouring columns of A (or rows of B):
//   A: rows g and g + 8, columns 2t and 2t + 8;   B: column g, rows 2t and 2t + 8;   D: rows g and g + 8, column 2t.
// So a D, rounded, is at once half of an A: products chain without leaving the registers.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    host::mma(d, a, b0, b1, __LINE__);
#endif
}

// D = A · B + C.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                    const float (&c)[4]) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    for (int i = 0; i < 4; i++) d[i] = c[i];
    host::mma(d, a, b0, b1, __LINE__);
#endif
}

// A pair of ones, with which a product sums the columns of its other operand.
constexpr unsigned ONES = 0x3f803f80;

// ---- the order for 16-byte access
//
// Products may have their channels in another order: where they sum, pair i of the channels 8·t.. 8·t + 8 stands at
// 8·i + 2·t, by 32 channels; and column 2·t of the i-th of four tiles of D is that pair. So a lane's part of a token or of a
// weight's row is 16 bytes of memory, and what the tiles of D leave in a lane is 16 bytes of a token.

// Eight numbers that a product reads, by 16-byte access.
__device__ __forceinline__ uint4 sixteen(const bf16* from) { return *reinterpret_cast<const uint4*>(from); }

// D += A·B for one of the two halves of 32 summed channels.
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const uint4& b, int half) {
    if (half == 0) mma(d, a, b.x, b.y);
    else mma(d, a, b.z, b.w);
}

// Eight numbers of a row, as what an A has of row g + 8·half for both halves of 32 summed channels.
__device__ __forceinline__ void set_half(unsigned (&low)[4], unsigned (&high)[4], int half, const uint4& x) {
    low[half] = x.x;
    low[half + 2] = x.y;
    high[half] = x.z;
    high[half + 2] = x.w;
}

// A lane's channels of a row, as what an operand of C summed channels has of it: rows g + 8·half.
template <int C>
__device__ __forceinline__ void load_half(const bf16* row, bool exists, int half, unsigned (&a)[C / 16][4]) {
    for (int n = 0; n < C / 32; n++) {
        uint4 x = {0, 0, 0, 0};
        if (exists) x = sixteen(row + n * 32 + threadIdx.x % 4 * 8);
        set_half(a[2 * n], a[2 * n + 1], half, x);
    }
}

// Makes operands of what was loaded. Or-ing `zero` changes nothing, which the compiler cannot know: what was loaded together would else be
// moved apart, into the four neighbouring registers that a product takes, before every product.
template <int N> __device__ __forceinline__ void settle(unsigned (&a)[N][4], unsigned zero) {
    for (int i = 0; i < N * 4; i++) a[i / 4][i % 4] |= zero;
}

// Of 32 consecutive rows of a weight, the one in column g of a product's first tile; two more per tile.
__device__ __forceinline__ int weight_row(int g) { return g / 2 * 8 + g % 2; }

__device__ __forceinline__ uint4 words_of(const float (&x)[8]) {
    return {pair_of(x[0], x[1]), pair_of(x[2], x[3]), pair_of(x[4], x[5]), pair_of(x[6], x[7])};
}

// ---- operands in shared memory

// Four 8 x 8 matrices from shared memory: lane l names row l % 8 of matrix l / 8, 16 aligned bytes. Of each, lane
// 4·g + t receives columns 2t, 2t + 1 of row g; transposed, rows 2t, 2t + 1 of column g.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(const bf16* row, unsigned (&x)[4]) {
#ifdef __CUDACC__
    unsigned at = unsigned(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(at));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(at));
    }
#else
    host::load_matrices<TRANSPOSED>(row, x, __LINE__);
#endif
}

// An 8 x 8 matrix, of which lane 4·g + t holds columns 2t, 2t + 1 of row g, transposed.
__device__ __forceinline__ unsigned transpose(unsigned x) {
#ifdef __CUDACC__
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
#else
    return host::transpose(x, __LINE__);
#endif
}

// A row of a tile for them. The padding takes neighbouring rows to different banks.
template <int D> struct alignas(16) Row {
    bf16 at[D + 8];
};

// A from 16 rows and 16 columns of a tile.
template <int D> __device__ __forceinline__ void operand(const Row<D>* tile, int row, int column, unsigned (&a)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices<false>(&tile[row + lane % 16].at[column + lane / 16 * 8], a);
}

// Two B from 16 rows and 16 columns of a tile, the first in x[0], x[1]. Across: D's columns are the tile's rows, and
// the sum runs along the tile's columns.
template <int D> __device__ __forceinline__ void across(const Row<D>* tile, int row, int column, unsigned (&x)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices<false>(&tile[row + lane / 16 * 8 + lane % 8].at[column + lane / 8 % 2 * 8], x);
}

// Along: D's columns are the tile's, and the sum runs along its rows.
template <int D> __device__ __forceinline__ void along(const Row<D>* tile, int row, int column, unsigned (&x)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices<true>(&tile[row + lane % 16].at[column + lane / 16 * 8], x);
}

// A along: D's rows are the tile's columns.
template <int D> __device__ __forceinline__ void upright(const Row<D>* tile, int row, int column, unsigned (&a)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices<true>(&tile[row + lane / 16 * 8 + lane % 8].at[column + lane / 8 % 2 * 8], a);
}

// A row of a tile without padding, in parts of eight, which take turns from row to row, or, where a row ends amid the banks
// (of 32, say), from two rows to the next: the same part of eight neighbouring rows is in different banks.
template <int D> struct Turned {
    uint4 at[D / 8];
};

template <int D> __device__ __forceinline__ uint4* turned(Turned<D>* rows, int row, int part) {
    // Rows begin this far apart in the banks.
    constexpr int APART = D % 64 == 0 ? 64 : D % 64;
    static_assert(64 % APART == 0, "whole turns");
    return &rows[row].at[part ^ row / (64 / APART) % (APART / 8)];
}

// As above; `row` is a multiple of 16.
template <int D> __device__ __forceinline__ void operand(Turned<D>* tile, int row, int column, unsigned (&a)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices<false>(reinterpret_cast<bf16*>(turned(tile + row, lane % 16, column / 8 + lane / 16)), a);
}

template <int D> __device__ __forceinline__ void across(Turned<D>* tile, int row, int column, unsigned (&x)[4]) {
    int lane = threadIdx.x % 32;
    uint4* at = turned(tile + row, lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2);
    load_matrices<false>(reinterpret_cast<bf16*>(at), x);
}

template <int D> __device__ __forceinline__ void along(Turned<D>* tile, int row, int column, unsigned (&x)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices<true>(reinterpret_cast<bf16*>(turned(tile + row, lane % 16, column / 8 + lane / 16)), x);
}

// A along: D's rows are the tile's columns.
template <int D> __device__ __forceinline__ void upright(Turned<D>* tile, int row, int column, unsigned (&a)[4]) {
    int lane = threadIdx.x % 32;
    uint4* at = turned(tile + row, lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2);
    load_matrices<true>(reinterpret_cast<bf16*>(at), a);
}

// Begins to copy `bytes` bytes, and zeros up to N, to shared memory past the registers; done, for this thread, after
// copies_done. Of no bytes, `from` may lie anywhere.
template <int N> __device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "n"(N), "r"(bytes)
                 : "memory");
#else
    host::copy_begin(to, from, bytes, N);
#endif
}

__device__ __forceinline__ void copies_done() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    host::copies_end_group();
    host::copies_wait_but(0);
#endif
}

// Ends a group of copies that this thread has begun.
__device__ __forceinline__ void copies_end_group() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    host::copies_end_group();
#endif
}

// As copies_done, but for all groups except the last N.
template <int N> __device__ __forceinline__ void copies_done_but() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    host::copies_wait_but(N);
#endif
}

// A square weight, (C, C), in the order for 16-byte access, as the right operand of products that sum over its rows. Where in a
// row pieces lie changes so that rows that go to a product together do not meet in a bank.
template <int C> struct Square {
    // Eight columns of a row: those of a tile of D.
    struct alignas(16) Piece {
        unsigned at[4];
    };

    Piece at[C][C / 8];

    __device__ static __forceinline__ int place(int row, int piece) {
        return piece ^ (row / 8 % 4 | (C > 32 ? row % 2 * 4 : 0));
    }

    // Begins to copy rows that lie `pitch` apart, by `threads` threads.
    __device__ __forceinline__ void copy(const bf16* from, size_t pitch, int thread, int threads) {
        for (int i = thread; i < C * C / 2; i += threads) {
            int row = i / (C / 2), pair = i % (C / 2), piece = pair / 16 * 4 + pair % 4;
            copy_async<4>(&at[row][place(row, piece)].at[pair % 16 / 4], from + row * pitch + 2 * pair, 4);
        }
    }

    // Adds a · this.
    __device__ __forceinline__ void multiply(const unsigned (&a)[C / 16][4], float (&d)[C / 8][4]) const {
        int lane = threadIdx.x % 32;
        for (int s = 0; s < C / 16; s++) {
            int row = s / 2 * 32 + lane % 8 / 2 * 8 + lane % 2 + s % 2 * 4 + lane / 8 % 2 * 2;
            for (int n = 0; n < C / 8; n += 2) {
                unsigned b[4];
                load_matrices<true>(reinterpret_cast<const bf16*>(&at[row][place(row, n + lane / 16)]), b);
                mma(d[n], a[s], b[0], b[1]);
                mma(d[n + 1], a[s], b[2], b[3]);
            }
        }
    }
};

// Among the four lanes of a quad, word i of lane t becomes word t of lane i. All lanes of a warp call it.
__device__ __forceinline__ void transpose_quad(unsigned (&x)[4]) {
    for (int apart = 1; apart < 4; apart *= 2) {
        bool upper = threadIdx.x & apart;
        for (int i = 0; i < 4; i++) {
            if (i & apart) continue;
            unsigned other = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + apart], apart);
            (upper ? x[i] : x[i + apart]) = other;
        }
    }
}

// Begins to bring what lies there to the L2 cache.
__device__ __forceinline__ void prefetch(const void* from) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
#else
    (void)from;
#endif
}
