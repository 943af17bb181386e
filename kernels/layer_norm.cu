// LayerNorm over channels, eps 1e-5, forward and backward.
//
// A row belongs to a group of neighbouring lanes, as many as it has packs of 8 channels (up to a warp): with 32 channels
// a warp works on 8 rows at once. The mean is taken first and the variance from the deviations; the row comes from the
// cache the second time, so memory is read once.
#include "common.cuh"

constexpr float EPSILON = 1e-5f;

template <int V>
__device__ void normalise(const bf16* x, const float* gamma, const float* beta, int rows, int channels, int lanes,
                          bf16* y, float* stats) {
    size_t row = thread_number() / lanes;
    int lane = threadIdx.x % lanes;
    // Lanes past the last row take part in the sums, with nothing.
    int count = row < size_t(rows) ? channels : 0;
    x += row * channels;
    y += row * channels;
    float sum = 0, square = 0;
    for (int c = lane * V; c < count; c += lanes * V) {
        Pack<V> p = load<V>(x + c);
        for (int i = 0; i < V; i++) sum += p.x[i];
    }
    float mean = group_sum(sum, lanes) / channels;
    for (int c = lane * V; c < count; c += lanes * V) {
        Pack<V> p = load<V>(x + c);
        for (int i = 0; i < V; i++) square += (p.x[i] - mean) * (p.x[i] - mean);
    }
    float scale = rsqrtf(group_sum(square, lanes) / channels + EPSILON);
    for (int c = lane * V; c < count; c += lanes * V) {
        Pack<V> p = load<V>(x + c), g = load<V>(gamma + c), b = load<V>(beta + c);
        for (int i = 0; i < V; i++) p.x[i] = (p.x[i] - mean) * scale * g.x[i] + b.x[i];
        store(y + c, p);
    }
    if (count > 0 && lane == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = scale;
    }
}

// Threads: rows·lanes. `lanes` is a power of two up to 32.
KERNEL(THREADS) layer_norm(const bf16* x /* (rows, channels) */, const float* gamma /* (channels) */,
                           const float* beta /* (channels) */, int rows, int channels, int lanes,
                           bf16* y /* (rows, channels) */, float* stats /* (rows, 2): mean, 1/std */) {
    BY_WIDTH(channels, normalise, x, gamma, beta, rows, channels, lanes, y, stats);
}

template <int V>
__device__ void input_gradient(const bf16* dy, const bf16* x, const float* stats, const float* gamma, int rows,
                               int channels, int lanes, bf16* dx, int add) {
    size_t row = thread_number() / lanes;
    int lane = threadIdx.x % lanes;
    int count = row < size_t(rows) ? channels : 0;
    dy += row * channels;
    x += row * channels;
    dx += row * channels;
    float mean = count > 0 ? stats[2 * row] : 0.0f, scale = count > 0 ? stats[2 * row + 1] : 0.0f;
    float first = 0, second = 0;
    for (int c = lane * V; c < count; c += lanes * V) {
        Pack<V> d = load<V>(dy + c), p = load<V>(x + c), g = load<V>(gamma + c);
        for (int i = 0; i < V; i++) {
            first += d.x[i] * g.x[i];
            second += d.x[i] * g.x[i] * (p.x[i] - mean);
        }
    }
    first = group_sum(first, lanes) / channels;
    second = group_sum(second, lanes) / channels * scale * scale;
    for (int c = lane * V; c < count; c += lanes * V) {
        Pack<V> d = load<V>(dy + c), p = load<V>(x + c), g = load<V>(gamma + c);
        Pack<V> old = {};
        if (add) old = load<V>(dx + c);
        for (int i = 0; i < V; i++) p.x[i] = old.x[i] + (d.x[i] * g.x[i] - first - (p.x[i] - mean) * second) * scale;
        store(dx + c, p);
    }
}

// Threads: rows·lanes.
KERNEL(THREADS) layer_norm_backward(const bf16* dy /* (rows, channels) */, const bf16* x /* (rows, channels) */,
                                    const float* stats /* (rows, 2) */, const float* gamma /* (channels) */, int rows,
                                    int channels, int lanes, bf16* dx /* (rows, channels) */, int add) {
    BY_WIDTH(channels, input_gradient, dy, x, stats, gamma, rows, channels, lanes, dx, add);
}

template <int V>
__device__ void parameter_partials(const bf16* dy, const bf16* x, const float* stats, int rows, int channels, int slab,
                                   float* partial) {
    auto term = [&](int row, int c, Pack<V>(&terms)[2]) {
        Pack<V> d = load<V>(dy + size_t(row) * channels + c), p = load<V>(x + size_t(row) * channels + c);
        float mean = stats[2 * size_t(row)], scale = stats[2 * size_t(row) + 1];
        for (int i = 0; i < V; i++) {
            terms[0].x[i] = d.x[i] * ((p.x[i] - mean) * scale);
            terms[1].x[i] = d.x[i];
        }
    };
    column_partials<V, 2>(term, rows, channels, slab, partial);
}

// Grid: as column_partials has it.
KERNEL(THREADS) layer_norm_backward_params(const bf16* dy /* (rows, channels) */, const bf16* x /* (rows, channels) */,
                                           const float* stats /* (rows, 2) */, int rows, int channels, int slab,
                                           float* partial /* (slabs, 2, channels): gamma's, beta's */) {
    BY_WIDTH(channels, parameter_partials, dy, x, stats, rows, channels, slab, partial);
}
