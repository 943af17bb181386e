// Small element-wise work among f32 parameters: parts of matrices, scaling, sums. Latency, not bandwidth, is their cost.
#include "common.cuh"

// y (rows, n) = columns start.. start + n of x. Threads: rows·n.
KERNEL(THREADS) columns(const float* x /* (rows, columns) */, int rows, int columns, int start, int n,
                        float* y /* (rows, n) */) {
    size_t i = thread_number();
    if (i < size_t(rows) * n) y[i] = x[i / n * columns + start + i % n];
}

// Columns start.. start + n of x += y. Threads: rows·n.
KERNEL(THREADS) add_columns(const float* y /* (rows, n) */, int rows, int columns, int start, int n,
                            float* x /* (rows, columns) */) {
    size_t i = thread_number();
    if (i < size_t(rows) * n) x[i / n * columns + start + i % n] += y[i];
}

// y = alpha·x. Threads: n.
KERNEL(THREADS) scale(float alpha, const float* x /* (n) */, int n, float* y /* (n) */) {
    size_t i = thread_number();
    if (i < size_t(n)) y[i] = alpha * x[i];
}

// y += x[start..]. Threads: n.
KERNEL(THREADS) add_part(const float* x /* (start + n) */, int start, int n, float* y /* (n) */) {
    size_t i = thread_number();
    if (i < size_t(n)) y[i] += x[start + i];
}
