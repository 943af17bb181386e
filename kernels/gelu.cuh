// GELU in its erf form, and its derivative.
#pragma once
#include "common.cuh"

// 1/x to a unit or two in the last place; what would be subnormal is 0.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// The normal distribution at u: its density, and the tail beyond |u| to 7.5e-8 (Abramowitz and Stegun, 1964, 26.2.17).
// It takes half of the instructions of erff, and the density is what the derivative needs.
struct Normal {
    float density, tail;

    __device__ __forceinline__ explicit Normal(float u) {
        float c = u * 0.84932180028801905f;  // c² = log2(e)·u²/2
        density = power_of_two(-c * c - 1.3257480647361593f);
        float t = reciprocal(0.2316419f * fabsf(u) + 1.0f);
        tail = 1.330274429f;
        tail = tail * t - 1.821255978f;
        tail = tail * t + 1.781477937f;
        tail = tail * t - 0.356563782f;
        tail = tail * t + 0.319381530f;
        tail *= t * density;
    }
};

// The logarithm of the tail beyond |u|, to base 2, is near a polynomial up to |u| = 5.5: there GELU is off by 2.6e-7 at most, and
// up to |u| = 3 by 5e-6 of itself. Beyond 5.5 the tail counts as 2e-8. That takes fewer instructions than Normal.
__device__ __forceinline__ float gelu(float u) {
    float a = fminf(fabsf(u), 5.5f), power = 3.32594188e-5f;
    power = power * a - 0.000762818003f;
    power = power * a + 0.00802762653f;
    power = power * a - 0.0532703187f;
    power = power * a - 0.458926712f;
    power = power * a - 1.15113600f;
    return fmaxf(u, 0.0f) - fabsf(u) * power_of_two(power * a - 1.0f);
}

// Turns d into the gradient before the GELU, and u into the GELU's output.
__device__ __forceinline__ void gelu_backward(float& u, float& d) {
    Normal normal(u);
    float share = u > 0.0f ? 1.0f - normal.tail : normal.tail;
    d *= share + u * normal.density;
    u *= share;
}
