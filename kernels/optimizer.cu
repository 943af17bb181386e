// Clipping by the global norm and AdamW (Loshchilov and Hutter, 2019) on f32 master weights.
//
// One launch covers all tensors: most are far too small to fill a GPU. The norm stays on the device, so an update needs no
// answer from it. AdamW reads and writes each number once, and rounds for products what it has just made.
#include "tables.cuh"

// A tensor under AdamW.
struct Moving {
    const float* gradient /* (n) */;
    float* parameter /* (n) */;
    float* m /* (n) */;
    float* v /* (n) */;
    bf16* product /* (n), or null */;
    int n, decays;
};

// Sum of squares per block. Grid: the pieces.
KERNEL(THREADS) square_sums(const Piece* pieces /* (gridDim.x) */, const Span* gradients /* (tensors) */,
                            float* partial /* (gridDim.x) */) {
    Piece piece = pieces[blockIdx.x];
    Span gradient = gradients[piece.tensor];
    float sum = 0;
    each_of_part(piece.part, gradient.n, [&](u64 at, auto width) {
        constexpr int V = decltype(width)::value;
        const float* from = gradient.x + at;
        Pack<V> x = load<V>(from);
        for (int i = 0; i < V; i++) sum += x.x[i] * x.x[i];
    });
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

// One update. What changes from one to the next is read from memory: `rates` are 1 - lr·weight decay, for tensors that decay,
// lr / (1 - beta1^t) and sqrt(1 - beta2^t). Grid: the pieces.
KERNEL(THREADS) adamw(const Piece* pieces /* (gridDim.x) */, const Moving* tensors /* (tensors) */,
                      const float* norm /* (1) */, const float* rates /* (3) */, float max_norm, float beta1, float beta2,
                      float rest1, float rest2, float epsilon) {
    Piece piece = pieces[blockIdx.x];
    Moving t = tensors[piece.tensor];
    float clip = max_norm / (norm[0] + 1e-6f);
    clip = clip < 1.0f ? clip : 1.0f;
    float keep = t.decays ? rates[0] : 1.0f, step_size = rates[1], root = rates[2];
    each_of_part(piece.part, t.n, [&](u64 at, auto width) {
        constexpr int V = decltype(width)::value;
        const float *from = t.gradient + at, *old_m = t.m + at, *old_v = t.v + at, *old = t.parameter + at;
        Pack<V> g = load<V>(from), m = load<V>(old_m), v = load<V>(old_v), x = load<V>(old);
        for (int i = 0; i < V; i++) {
            float clipped = g.x[i] * clip;
            m.x[i] = beta1 * m.x[i] + rest1 * clipped;
            v.x[i] = beta2 * v.x[i] + rest2 * (clipped * clipped);
            x.x[i] = x.x[i] * keep - step_size * m.x[i] / (sqrtf(v.x[i]) / root + epsilon);
        }
        store(t.m + at, m);
        store(t.v + at, v);
        store(t.parameter + at, x);
        if (t.product) store(t.product + at, x);
    });
}
