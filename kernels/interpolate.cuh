// Bilinear interpolation with half-pixel centres (align_corners = false), along one axis, as PyTorch computes it.
#pragma once
#include "common.cuh"

// The two inputs an output reads, and the second one's weight.
struct Source {
    int low, high;
    float weight;
};

// Where output `i` of `to` reads among `from` inputs: source = (i + ½)·from/to - ½, not below 0.
__device__ __forceinline__ Source source(int i, int from, int to) {
    float position = (float(i) + 0.5f) * (float(from) / float(to)) - 0.5f;
    if (position < 0.0f) position = 0.0f;
    int low = min(int(position), from - 1);
    return {low, min(low + 1, from - 1), position - float(low)};
}

// The outputs that may read input `i`: the first one and the one after the last.
__device__ __forceinline__ void reach(int i, int from, int to, int& first, int& end) {
    float ratio = float(to) / float(from);
    first = i == 0 ? 0 : max(0, int((float(i) - 0.5f) * ratio - 0.5f) - 1);
    end = i == from - 1 ? to : min(to, int((float(i) + 1.5f) * ratio - 0.5f) + 2);
}

// The weight with which an output that reads `s` reads input `i`.
__device__ __forceinline__ float weight_of(const Source& s, int i) {
    return (s.low == i ? 1.0f - s.weight : 0.0f) + (s.high == i ? s.weight : 0.0f);
}
