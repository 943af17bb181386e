// The middle of a Mix-FFN: depth-wise 3x3 convolution with zero padding, bias, GELU in its erf form; and the way back.
//
// Convolution, bias and GELU are one pass: the nine reads of a token come from the caches, since neighbouring threads
// read neighbouring channels of the same tokens. The backward pass recomputes the convolution instead of storing it.
#include "common.cuh"

// Sums over the 3x3 neighbourhood of token `token` = (image, y, x); tap t reads weight row t, mirrored 8 - t.
template <int V>
__device__ __forceinline__ Pack<V> convolve(const bf16* x, const float* w, size_t token, int height, int width,
                                            int channels, int c, bool mirrored) {
    int column = int(token % width), line = int(token / width % height);
    Pack<V> sum = {};
    for (int tap = 0; tap < 9; tap++) {
        int dy = tap / 3 - 1, dx = tap % 3 - 1;
        if (line + dy < 0 || line + dy >= height || column + dx < 0 || column + dx >= width) continue;
        Pack<V> p = load<V>(x + (token + dy * width + dx) * channels + c);
        Pack<V> k = load<V>(w + (mirrored ? 8 - tap : tap) * channels + c);
        for (int i = 0; i < V; i++) sum.x[i] += p.x[i] * k.x[i];
    }
    return sum;
}

// Φ(u), the normal distribution.
__device__ __forceinline__ float normal(float u) { return 0.5f * (1.0f + erff(u * 0.70710678118654752f)); }

template <int V>
__device__ void forward(const bf16* h, const float* w, const float* b, int tokens, int height, int width, int channels,
                        bf16* g) {
    int packs = channels / V;
    size_t i = thread_number();
    if (i >= size_t(tokens) * packs) return;
    int c = int(i % packs) * V;
    Pack<V> u = convolve<V>(h, w, i / packs, height, width, channels, c, false), bias = load<V>(b + c);
    for (int j = 0; j < V; j++) {
        float v = u.x[j] + bias.x[j];
        u.x[j] = v * normal(v);
    }
    store(g + i * V, u);
}

// Threads: tokens·channels/V; tokens = images·height·width.
KERNEL(THREADS) depthwise_gelu(const bf16* h /* (tokens, channels) */, const float* w /* (9, channels) */,
                               const float* b /* (channels) */, int tokens, int height, int width, int channels,
                               bf16* g /* (tokens, channels) */) {
    BY_WIDTH(channels, forward, h, w, b, tokens, height, width, channels, g);
}

template <int V>
__device__ void backward(const bf16* h, const float* w, const float* b, int tokens, int height, int width, int channels,
                         bf16* dg, bf16* g) {
    int packs = channels / V;
    size_t i = thread_number();
    if (i >= size_t(tokens) * packs) return;
    int c = int(i % packs) * V;
    Pack<V> u = convolve<V>(h, w, i / packs, height, width, channels, c, false), bias = load<V>(b + c);
    Pack<V> d = load<V>(dg + i * V);
    for (int j = 0; j < V; j++) {
        float v = u.x[j] + bias.x[j], share = normal(v);
        d.x[j] *= share + v * 0.39894228040143268f * __expf(-0.5f * v * v);
        u.x[j] = v * share;
    }
    store(dg + i * V, d);
    if (g != nullptr) store(g + i * V, u);
}

// dg becomes the gradient before the GELU; g, if given, receives the forward output again. Threads: tokens·channels/V.
KERNEL(THREADS) depthwise_gelu_backward(const bf16* h /* (tokens, channels) */, const float* w /* (9, channels) */,
                                        const float* b /* (channels) */, int tokens, int height, int width, int channels,
                                        bf16* dg /* (tokens, channels) */, bf16* g /* (tokens, channels) or null */) {
    BY_WIDTH(channels, backward, h, w, b, tokens, height, width, channels, dg, g);
}

template <int V>
__device__ void input_gradient(const bf16* du, const float* w, int tokens, int height, int width, int channels, bf16* dh) {
    int packs = channels / V;
    size_t i = thread_number();
    if (i >= size_t(tokens) * packs) return;
    int c = int(i % packs) * V;
    store(dh + i * V, convolve<V>(du, w, i / packs, height, width, channels, c, true));
}

// Threads: tokens·channels/V.
KERNEL(THREADS) depthwise_backward_input(const bf16* du /* (tokens, channels) */, const float* w /* (9, channels) */,
                                         int tokens, int height, int width, int channels,
                                         bf16* dh /* (tokens, channels) */) {
    BY_WIDTH(channels, input_gradient, du, w, tokens, height, width, channels, dh);
}

template <int V>
__device__ void parameter_partials(const bf16* du, const bf16* h, int tokens, int height, int width, int channels,
                                   int slab, float* partial) {
    auto term = [&](int token, int c, Pack<V>(&terms)[10]) {
        Pack<V> d = load<V>(du + size_t(token) * channels + c);
        int column = token % width, line = token / width % height;
        for (int tap = 0; tap < 9; tap++) {
            int dy = tap / 3 - 1, dx = tap % 3 - 1;
            bool inside = line + dy >= 0 && line + dy < height && column + dx >= 0 && column + dx < width;
            Pack<V> p = {};
            if (inside) p = load<V>(h + (size_t(token) + dy * width + dx) * channels + c);
            for (int i = 0; i < V; i++) terms[tap].x[i] = d.x[i] * p.x[i];
        }
        terms[9] = d;
    };
    column_partials<V, 10>(term, tokens, channels, slab, partial);
}

// Grid: as column_partials has it.
KERNEL(THREADS) depthwise_backward_params(const bf16* du /* (tokens, channels) */, const bf16* h /* (tokens, channels) */,
                                          int tokens, int height, int width, int channels, int slab,
                                          float* partial /* (slabs, 10, channels): nine taps, bias */) {
    BY_WIDTH(channels, parameter_partials, du, h, tokens, height, width, channels, slab, partial);
}
