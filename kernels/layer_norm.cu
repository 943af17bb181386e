// LayerNorm over channels, eps 1e-5, forward and backward.
//
// A row belongs to a group of neighbouring lanes, as many as it has packs of 8 channels (up to a warp): with 32 channels
// a warp works on 8 rows at once. The mean is taken first and the variance from the deviations; the row stays in
// registers, or comes from the cache the second time, so memory is read once.
#include "layer_norm.cuh"

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

// Where a lane's only pack of a row of up to 256 channels in packs of 8 stands.
struct Place {
    size_t row, at;
    int c;
    bool inside;

    __device__ __forceinline__ Place(int rows, int channels, int lanes)
        : row(thread_number() / lanes), c(threadIdx.x % lanes * 8) {
        at = row * channels + c;
        inside = row < size_t(rows) && c < channels;
    }
};

// Normalises such rows, whose packs stay in registers: p, nothing outside.
__device__ __forceinline__ void normalise_pack(Pack<8>& p, const Place& place, const float* gamma, const float* beta,
                                               int channels, int lanes, bf16* y, float* stats) {
    auto [row, at, c, inside] = place;
    float sum = 0, square = 0, inverse = 1.0f / channels;
    for (int i = 0; i < 8; i++) sum += p.x[i];
    float mean = __fmul_rn(group_sum(sum, lanes), inverse);
    for (int i = 0; i < 8; i++) {
        p.x[i] -= mean;
        square += p.x[i] * p.x[i];
    }
    float scale = rsqrtf(group_sum(inside ? square : 0.0f, lanes) * inverse + EPSILON);
    if (!inside) return;
    Pack<8> g = load<8>(gamma + c), b = load<8>(beta + c);
    for (int i = 0; i < 8; i++) p.x[i] = p.x[i] * scale * g.x[i] + b.x[i];
    store(y + at, p);
    if (c == 0) *reinterpret_cast<float2*>(stats + 2 * row) = {mean, scale};
}

// Threads: rows·lanes. `lanes` is a power of two up to 32.
KERNEL(THREADS) layer_norm(const bf16* x /* (rows, channels) */, const float* gamma /* (channels) */,
                           const float* beta /* (channels) */, int rows, int channels, int lanes,
                           bf16* y /* (rows, channels) */, float* stats /* (rows, 2): mean, 1/std */) {
    if (channels % 8 == 0 && channels <= 256) {
        Place place(rows, channels, lanes);
        Pack<8> p = {};
        if (place.inside) p = load<8>(x + place.at);
        normalise_pack(p, place, gamma, beta, channels, lanes, y, stats);
    } else {
        BY_WIDTH(channels, normalise, x, gamma, beta, rows, channels, lanes, y, stats);
    }
}

// A branch joins the residual stream, y = x + factor(image)·branch, and LayerNorm of y, for up to 256 channels in packs of 8; an
// image has `area` rows. Threads: rows·lanes.
KERNEL(THREADS) residual_norm(const bf16* x /* (rows, channels) */, const bf16* branch /* (rows, channels) */,
                              unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first,
                              float rate, int area,
                              const float* gamma /* (channels) */, const float* beta /* (channels) */, int rows,
                              int channels, int lanes, bf16* y /* (rows, channels) */,
                              bf16* normed /* (rows, channels) */, float* stats /* (rows, 2): mean, 1/std */) {
    Dropout drop(key0, key1, site, step, first, rate);
    Place place(rows, channels, lanes);
    Pack<8> p = {};
    if (place.inside) {
        float factor = drop.factors<1>(unsigned(place.row) / unsigned(area)).x[0];
        p = load<8>(x + place.at);
        Pack<8> b = load<8>(branch + place.at);
        for (int i = 0; i < 8; i++) {
            // What is normalised is what is stored.
            p.x[i] = __bfloat162float(__float2bfloat16_rn(p.x[i] + factor * b.x[i]));
        }
        store(y + place.at, p);
    }
    normalise_pack(p, place, gamma, beta, channels, lanes, normed, stats);
}

template <int V>
__device__ void input_gradient(const bf16* dy, const bf16* x, const float* stats, const float* gamma, int rows,
                               int channels, int lanes, bf16* dx, int add, Dropout drop, int area, bf16* scaled) {
    size_t row = thread_number() / lanes;
    int lane = threadIdx.x % lanes;
    int count = row < size_t(rows) ? channels : 0;
    float factor = scaled != nullptr && count > 0 ? drop.factors<1>(unsigned(row) / unsigned(area)).x[0] : 1.0f;
    dy += row * channels;
    x += row * channels;
    dx += row * channels;
    if (scaled != nullptr) scaled += row * channels;
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
        if (scaled == nullptr) continue;
        for (int i = 0; i < V; i++) p.x[i] *= factor;
        store(scaled + c, p);
    }
}

// Threads: rows·lanes.
KERNEL(THREADS) layer_norm_backward(const bf16* dy /* (rows, channels) */, const bf16* x /* (rows, channels) */,
                                    const float* stats /* (rows, 2) */, const float* gamma /* (channels) */, int rows,
                                    int channels, int lanes, bf16* dx /* (rows, channels) */, int add) {
    BY_WIDTH(channels, input_gradient, dy, x, stats, gamma, rows, channels, lanes, dx, add,
             Dropout(0, 0, 0, nullptr, 0, 0.0f), 1, nullptr);
}

// The same, and dx times the factor of its image, which has `area` rows: what goes into a branch with stochastic depth.
// Threads: rows·lanes.
KERNEL(THREADS) layer_norm_backward_branch(const bf16* dy /* (rows, channels) */, const bf16* x /* (rows, channels) */,
                                           const float* stats /* (rows, 2) */, const float* gamma /* (channels) */,
                                           int rows, int channels, int lanes, bf16* dx /* (rows, channels) */, int add,
                                           unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */,
                                           u64 first, float rate, int area, bf16* scaled /* (rows, channels) */) {
    Dropout drop(key0, key1, site, step, first, rate);
    BY_WIDTH(channels, input_gradient, dy, x, stats, gamma, rows, channels, lanes, dx, add, drop, area, scaled);
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

// Both gradients in one pass over dy and x, for up to 256 channels in packs of 8: a lane keeps to its channels, so that it can
// sum the parameters' gradients over the rows of its slab while it makes dx, and with them dx times its image's factor: the
// gradient of a bias in front. Grid: slabs.
KERNEL(THREADS, 3) layer_norm_backward_both(const bf16* dy /* (rows, channels) */, const bf16* x /* (rows, channels) */,
                                         const float* stats /* (rows, 2) */, const float* gamma /* (channels) */,
                                         int rows, int channels, int lanes, int slab, bf16* dx /* (rows, channels) */,
                                         int add, unsigned key0, unsigned key1, unsigned site, const unsigned* step /* (1) */,
                                         u64 first_factor, float rate, int area, bf16* scaled /* (rows, channels) or null */,
                                         float* partial /* (slabs, 3, channels): gamma's, beta's, a bias's in front */) {
    constexpr int KINDS = 3;
    Dropout drop(key0, key1, site, step, first_factor, rate);
    SHARED(float, tile, [THREADS * 8]);
    int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = THREADS / lanes, c = lane * 8;
    int first = blockIdx.x * slab, end = min(rows, first + slab);
    bool inside = c < channels;
    Pack<8> g = {}, sums[KINDS] = {};
    if (inside) g = load<8>(gamma + c);
    // Of the image that the row lies in, whose last row comes before `next`.
    float factor = 1;
    int next = rate > 0.0f ? 0 : rows;
    // Groups past the slab's end take part in the sums, with nothing.
#pragma unroll 1
    for (int start = first; start < end; start += groups) {
        int row = start + group;
        bool active = inside && row < end;
        if (active && row >= next) {
            int image = row / area;
            factor = drop.factors<1>(image).x[0];
            next = (image + 1) * area;
        }
        size_t at = size_t(row) * channels + c;
        Pack<8> d = {}, p = {};
        Words<8>::type old = {};
        float mean = 0, scale = 0;
        if (active) {
            d = load<8>(dy + at);
            p = load<8>(x + at);
            if (add) old = fetch<8>(dx + at);
            mean = stats[2 * size_t(row)];
            scale = stats[2 * size_t(row) + 1];
        }
        float plain = 0, along = 0;
        for (int i = 0; i < 8; i++) {
            p.x[i] = (p.x[i] - mean) * scale;
            sums[0].x[i] += d.x[i] * p.x[i];
            sums[1].x[i] += d.x[i];
            d.x[i] *= g.x[i];
            plain += d.x[i];
            along += d.x[i] * p.x[i];
        }
        plain = group_sum(plain, lanes) / channels;
        along = group_sum(along, lanes) / channels;
        if (active) {
            Pack<8> before = widen<8>(old);
            for (int i = 0; i < 8; i++) p.x[i] = before.x[i] + (d.x[i] - plain - p.x[i] * along) * scale;
            store(dx + at, p);
            for (int i = 0; i < 8; i++) {
                p.x[i] *= factor;
                sums[2].x[i] += p.x[i];
            }
            if (scaled != nullptr) store(scaled + at, p);
        }
    }
    int span = lanes * 8;
    for (int k = 0; k < KINDS; k++) {
        __syncthreads();
        for (int i = 0; i < 8; i++) tile[group * span + c + i] = sums[k].x[i];
        __syncthreads();
        for (int own = threadIdx.x; own < channels; own += THREADS) {
            float total = 0;
            for (int l = 0; l < groups; l++) total += tile[l * span + own];
            partial[(size_t(blockIdx.x) * KINDS + k) * channels + own] = total;
        }
    }
}
