// LayerNorm of rows that neighbouring lanes hold in registers, in kernels that make them: to the bits of layer_norm.cu.
#pragma once
#include "common.cuh"

constexpr float EPSILON = 1e-5f;

// A LayerNorm behind what a kernel writes: its scale and shift, and where its output and its (mean, 1/std) per row go.
struct NextNorm {
    const float *gamma, *beta;
    bf16* y;
    float* stats;
};

// Adds up what LANES neighbouring lanes have, by eights of channels, in the order of layer_norm's lanes: those far apart first.
template <int LANES, int N> __device__ __forceinline__ float sum_of_eights(float (&parts)[N]) {
    static_assert(N * LANES <= 32, "a warp of layer_norm");
    for (int apart = 16; apart > 0; apart /= 2) {
        for (int k = 0; k < apart && k + apart < N; k++) parts[k] += parts[k + apart];
    }
    return group_sum(parts[0], LANES);
}

// Makes deviations from their mean of the C channels of a row, of which each of LANES neighbouring lanes has N, 8 of every
// 8·LANES; returns (mean, 1/std). join(parts) adds to a lane's sums of eights those of the warp that has the row's other half.
template <int C, int LANES, int N, class Join> __device__ __forceinline__ float2 centre(float (&x)[N], Join join) {
    float parts[N / 8] = {};
    for (int i = 0; i < N; i++) parts[i / 8] += x[i];
    join(parts);
    // As a product by itself: subtracted in one operation, it would not be rounded.
    float mean = __fmul_rn(sum_of_eights<LANES>(parts), 1.0f / C);
    for (int k = 0; k < N; k += 8) {
        parts[k / 8] = 0;
        for (int i = k; i < k + 8; i++) {
            x[i] -= mean;
            parts[k / 8] += x[i] * x[i];
        }
    }
    join(parts);
    return {mean, rsqrtf(sum_of_eights<LANES>(parts) * (1.0f / C) + EPSILON)};
}

// The same, where these lanes have the whole row.
template <int C, int N> __device__ __forceinline__ float2 centre(float (&x)[N]) {
    return centre<C, C / N>(x, [](float (&)[N / 8]) {});
}
