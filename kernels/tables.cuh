// Tables that let one launch work on all tensors of a model at once.
//
// A block looks up which tensor is its own and which part of it. Tables hold addresses that stay the same during a run,
// so they are copied to the device once. The structures here are those of src/backend/cuda/tables.rs.
#pragma once
#include "common.cuh"

// Numbers of a tensor that one block takes: 8 for each thread.
constexpr int PART = 8 * THREADS;

// What a block takes: a part, by number, of a tensor of a table.
struct Piece {
    int tensor, part;
};

// A tensor by itself.
struct Span {
    float* x /* (n) */;
    u64 n;
};

// How many consecutive numbers are worked on at once.
template <int V> struct Width {
    static constexpr int value = V;
};

// Calls work(first, width) for what this thread has of a tensor of `n` numbers: with 8 of them, or, where the tensor ends
// among those, with each by itself.
template <class Work> __device__ __forceinline__ void each_of_part(int part, u64 n, Work work) {
    u64 first = u64(part) * PART + threadIdx.x * 8;
    if (first + 8 <= n) {
        work(first, Width<8>{});
    } else {
        for (u64 i = first; i < n; i++) work(i, Width<1>{});
    }
}

template <int V> __device__ __forceinline__ void store(float* to, const Pack<V>& p) {
    if constexpr (V == 8) {
        float4* four = reinterpret_cast<float4*>(to);
        four[0] = {p.x[0], p.x[1], p.x[2], p.x[3]};
        four[1] = {p.x[4], p.x[5], p.x[6], p.x[7]};
    } else {
        for (int i = 0; i < V; i++) to[i] = p.x[i];
    }
}
