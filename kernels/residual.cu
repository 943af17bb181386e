// Additions along the residual stream, with stochastic depth and dropout.
//
// One pass each, 16-byte accesses. Masks are recomputed from their counters wherever they are needed, so none is stored.
#include "common.cuh"

template <int V>
__device__ void add_branch(const bf16* x, const bf16* branch, Dropout drop, int images, int per_image, bf16* y) {
    size_t i = thread_number() * V;
    if (i >= size_t(images) * per_image) return;
    float factor = drop.factors<1>(i / per_image).x[0];
    Pack<V> p = load<V>(x + i), b = load<V>(branch + i);
    for (int j = 0; j < V; j++) p.x[j] += factor * b.x[j];
    store(y + i, p);
}

// y = x + factor(image)·branch. Threads: images·per_image/V; the width follows per_image.
KERNEL(THREADS) residual(const bf16* x /* (images, per_image) */, const bf16* branch /* (images, per_image) */,
                         unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first,
                         float rate, int images, int per_image, bf16* y /* (images, per_image) */) {
    Dropout drop(key0, key1, site, step, first, rate);
    BY_WIDTH(per_image, add_branch, x, branch, drop, images, per_image, y);
}

template <int V>
__device__ void scale_images(const bf16* x, Dropout drop, int images, int per_image, bf16* y) {
    size_t i = thread_number() * V;
    if (i >= size_t(images) * per_image) return;
    float factor = drop.factors<1>(i / per_image).x[0];
    Pack<V> p = load<V>(x + i);
    for (int j = 0; j < V; j++) p.x[j] *= factor;
    store(y + i, p);
}

// y = factor(image)·x. Threads: images·per_image/V.
KERNEL(THREADS) drop_path(const bf16* x /* (images, per_image) */, unsigned key0, unsigned key1, unsigned site,
                          const unsigned* step /* (1) */, u64 first, float rate, int images, int per_image,
                          bf16* y /* (images, per_image) */) {
    Dropout drop(key0, key1, site, step, first, rate);
    BY_WIDTH(per_image, scale_images, x, drop, images, per_image, y);
}

template <int V> __device__ void scale_elements(const bf16* x, Dropout drop, u64 n, bf16* y) {
    size_t i = thread_number() * V;
    if (i >= n) return;
    Pack<V> p = load<V>(x + i), f = drop.factors<V>(i);
    for (int j = 0; j < V; j++) p.x[j] *= f.x[j];
    store(y + i, p);
}

// y = factor(element)·x. Threads: n/V; the width follows n.
KERNEL(THREADS) dropout(const bf16* x /* (n) */, unsigned key0, unsigned key1, unsigned site,
                        const unsigned* step /* (1) */, u64 first, float rate, u64 n, bf16* y /* (n) */) {
    Dropout drop(key0, key1, site, step, first, rate);
    BY_WIDTH(n, scale_elements, x, drop, n, y);
}

template <int V> __device__ void add_elements(const bf16* x, u64 n, bf16* y) {
    size_t i = thread_number() * V;
    if (i >= n) return;
    Pack<V> p = load<V>(x + i), q = load<V>(y + i);
    for (int j = 0; j < V; j++) q.x[j] += p.x[j];
    store(y + i, q);
}

// y += x. Threads: n/V; the width follows n.
KERNEL(THREADS) accumulate(const bf16* x /* (n) */, u64 n, bf16* y /* (n) */) {
    BY_WIDTH(n, add_elements, x, n, y);
}
