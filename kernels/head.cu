// The end of the decoder: BatchNorm (eps 1e-5) → ReLU → dropout, forward and backward.
//
// The reduction over rows and the element-wise work of a pass are one kernel wherever the algorithm allows it:
// head_backward masks the gradient in place and sums it in the same pass.
#include "common.cuh"

constexpr float EPSILON = 1e-5f;

template <int V>
__device__ void value_partials(const bf16* z, int rows, int channels, int slab, float* partial) {
    auto term = [&](int row, int c, Pack<V>(&terms)[1]) { terms[0] = load<V>(z + size_t(row) * channels + c); };
    column_partials<V, 1>(term, rows, channels, slab, partial);
}

// For the mean. Grid: as column_partials has it.
KERNEL(THREADS) batch_sum(const bf16* z /* (rows, channels) */, int rows, int channels, int slab,
                          float* partial /* (slabs, 1, channels) */) {
    BY_WIDTH(channels, value_partials, z, rows, channels, slab, partial);
}

template <int V>
__device__ void deviation_partials(const bf16* z, const float* mean, int rows, int channels, int slab, float* partial) {
    auto term = [&](int row, int c, Pack<V>(&terms)[1]) {
        Pack<V> p = load<V>(z + size_t(row) * channels + c), m = load<V>(mean + c);
        for (int i = 0; i < V; i++) terms[0].x[i] = (p.x[i] - m.x[i]) * (p.x[i] - m.x[i]);
    };
    column_partials<V, 1>(term, rows, channels, slab, partial);
}

// Squared deviations from the mean. Grid: as column_partials has it.
KERNEL(THREADS) batch_deviation(const bf16* z /* (rows, channels) */, const float* mean /* (channels) */, int rows,
                                int channels, int slab, float* partial /* (slabs, 1, channels) */) {
    BY_WIDTH(channels, deviation_partials, z, mean, rows, channels, slab, partial);
}

// Joins the moments of `added` rows to those of `count` rows (Chan, Golub, LeVeque, 1979). Threads: channels.
KERNEL(THREADS) batch_join(const float* moments /* (2, channels): means, squared deviations */, float added, float count,
                           int channels, float* joined /* (2, channels) */) {
    int c = int(thread_number());
    if (c >= channels) return;
    float mean = count == 0.0f ? 0.0f : joined[c], square = count == 0.0f ? 0.0f : joined[channels + c];
    float delta = moments[c] - mean, share = added / (count + added);
    joined[c] = mean + delta * share;
    joined[channels + c] = square + moments[channels + c] + delta * delta * count * share;
}

// Joined moments of `rows` rows to (mean, 1/std); running estimates move by `momentum`. Threads: channels.
KERNEL(THREADS) batch_stats(const float* joined /* (2, channels) */, float rows, float momentum, int channels,
                            float* stats /* (2, channels): means, 1/std */, float* running_mean /* (channels) */,
                            float* running_var /* (channels) */) {
    int c = int(thread_number());
    if (c >= channels) return;
    float mean = joined[c], square = joined[channels + c];
    stats[c] = mean;
    stats[channels + c] = 1.0f / sqrtf(square / rows + EPSILON);
    running_mean[c] = (1.0f - momentum) * running_mean[c] + momentum * mean;
    running_var[c] = (1.0f - momentum) * running_var[c] + momentum * square / (rows > 1.0f ? rows - 1.0f : 1.0f);
}

// Threads: channels.
KERNEL(THREADS) running_stats(const float* running_mean /* (channels) */, const float* running_var /* (channels) */,
                              int channels, float* stats /* (2, channels) */) {
    int c = int(thread_number());
    if (c >= channels) return;
    stats[c] = running_mean[c];
    stats[channels + c] = 1.0f / sqrtf(running_var[c] + EPSILON);
}

template <int V>
__device__ void activate(const bf16* z, const float* stats, const float* gamma, const float* beta, Dropout drop, int rows,
                         int channels, bf16* a) {
    size_t i = thread_number() * V;
    if (i >= size_t(rows) * channels) return;
    int c = int(i % channels);
    Pack<V> p = load<V>(z + i), mean = load<V>(stats + c), scale = load<V>(stats + channels + c);
    Pack<V> g = load<V>(gamma + c), b = load<V>(beta + c), f = drop.factors<V>(i);
    for (int j = 0; j < V; j++) {
        float after = (p.x[j] - mean.x[j]) * scale.x[j] * g.x[j] + b.x[j];
        // Written so that a NaN passes through and shows in the loss.
        p.x[j] = (after < 0.0f ? 0.0f : after) * f.x[j];
    }
    store(a + i, p);
}

// a = dropout(relu(batch_norm(z))). Threads: rows·channels/V.
KERNEL(THREADS) head_activation(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                                const float* gamma /* (channels) */, const float* beta /* (channels) */, unsigned key0,
                                unsigned key1, unsigned high0, unsigned high1, u64 first, float rate, int rows,
                                int channels, bf16* a /* (rows, channels) */) {
    Dropout drop = {key0, key1, high0, high1, first, rate};
    BY_WIDTH(channels, activate, z, stats, gamma, beta, drop, rows, channels, a);
}

template <int V>
__device__ void mask_and_sum(const bf16* z, const float* stats, const float* gamma, const float* beta, Dropout drop,
                             int rows, int channels, int slab, bf16* da, float* partial) {
    auto term = [&](int row, int c, Pack<V>(&terms)[2]) {
        size_t at = size_t(row) * channels + c;
        Pack<V> p = load<V>(z + at), d = load<V>(da + at), f = drop.factors<V>(at);
        Pack<V> mean = load<V>(stats + c), scale = load<V>(stats + channels + c);
        Pack<V> g = load<V>(gamma + c), b = load<V>(beta + c);
        for (int i = 0; i < V; i++) {
            float normalised = (p.x[i] - mean.x[i]) * scale.x[i];
            d.x[i] = normalised * g.x[i] + b.x[i] > 0.0f ? d.x[i] * f.x[i] : 0.0f;
            terms[0].x[i] = d.x[i];
            terms[1].x[i] = d.x[i] * normalised;
        }
        store(da + at, d);
    };
    column_partials<V, 2>(term, rows, channels, slab, partial);
}

// da becomes the gradient after BatchNorm. Grid: as column_partials has it.
KERNEL(THREADS) head_backward(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                              const float* gamma /* (channels) */, const float* beta /* (channels) */, unsigned key0,
                              unsigned key1, unsigned high0, unsigned high1, u64 first, float rate, int rows,
                              int channels, int slab, bf16* da /* (rows, channels) */,
                              float* partial /* (slabs, 2, channels): beta's, gamma's gradient */) {
    Dropout drop = {key0, key1, high0, high1, first, rate};
    BY_WIDTH(channels, mask_and_sum, z, stats, gamma, beta, drop, rows, channels, slab, da, partial);
}

template <int V>
__device__ void centre(const bf16* z, const float* stats, const float* gamma, const float* total, float share, int rows,
                       int channels, bf16* dy) {
    size_t i = thread_number() * V;
    if (i >= size_t(rows) * channels) return;
    int c = int(i % channels);
    Pack<V> p = load<V>(z + i), d = load<V>(dy + i), mean = load<V>(stats + c), scale = load<V>(stats + channels + c);
    Pack<V> g = load<V>(gamma + c), shift = load<V>(total + c), along = load<V>(total + channels + c);
    for (int j = 0; j < V; j++) {
        float normalised = (p.x[j] - mean.x[j]) * scale.x[j];
        d.x[j] = g.x[j] * scale.x[j] * (d.x[j] - share * (shift.x[j] + normalised * along.x[j]));
    }
    store(dy + i, d);
}

// dy becomes the gradient before BatchNorm; share is 1 / rows of the batch. Threads: rows·channels/V.
KERNEL(THREADS) batch_norm_backward(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                                    const float* gamma /* (channels) */, const float* total /* (2, channels) */,
                                    float share, int rows, int channels, bf16* dy /* (rows, channels) */) {
    BY_WIDTH(channels, centre, z, stats, gamma, total, share, rows, channels, dy);
}
