// Clipping by the global norm and AdamW (Loshchilov and Hutter, 2019) on f32 master weights.
//
// The norm stays on the device, so an update needs no answer from it. AdamW reads and writes each number once.
#include "common.cuh"

// Sum of squares per block. Grid: any number of blocks.
KERNEL(THREADS) square_sums(const float* x /* (n) */, int n, float* partial /* (gridDim.x) */) {
    float sum = 0;
    for (size_t i = thread_number(); i < size_t(n); i += size_t(gridDim.x) * THREADS) sum += x[i] * x[i];
    float total = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// norm[0] = sqrt(Σ partial). Grid: one block.
KERNEL(THREADS) gradient_norm(const float* partial /* (n) */, int n, float* norm /* (1) */) {
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += partial[i];
    float total = block_sum(sum);
    if (threadIdx.x == 0) norm[0] = sqrtf(total);
}

// One update. `keep` is 1 - lr·weight decay, `step_size` lr / (1 - beta1^t), `root` sqrt(1 - beta2^t). Threads: n.
KERNEL(THREADS) adamw(const float* norm /* (1) */, const float* gradient /* (n) */, int n, float max_norm, float keep,
                      float step_size, float root, float beta1, float beta2, float rest1, float rest2, float epsilon,
                      float* parameter /* (n) */, float* m /* (n) */, float* v /* (n) */) {
    size_t i = thread_number();
    if (i >= size_t(n)) return;
    float clip = max_norm / (norm[0] + 1e-6f);
    float g = gradient[i] * (clip < 1.0f ? clip : 1.0f);
    m[i] = beta1 * m[i] + rest1 * g;
    v[i] = beta2 * v[i] + rest2 * (g * g);
    parameter[i] = parameter[i] * keep - step_size * m[i] / (sqrtf(v[i]) / root + epsilon);
}
