// The end of the decoder: stages joined → BatchNorm (eps 1e-5) → ReLU → dropout → classifier, forward and backward.
//
// The reduction over rows and the element-wise work of a pass are one kernel wherever the algorithm allows it. For two
// classes everything between z and the logits is one pass over z either way: the activation, its gradient and the
// classifier's products exist in registers only (classify and what follows); the separate kernels serve other shapes.
#include "common.cuh"
#include "interpolate.cuh"

constexpr float EPSILON = 1e-5f;

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

// ---- stages joined

// A stage's contribution at its own resolution.
struct Contribution {
    const bf16* x;  // (images, height, width, channels), or null
    int height, width;

    // Adds V channels from `c` on, interpolated at (y, xx) of `to_height` x `to_width`.
    template <int V>
    __device__ __forceinline__ void add(Pack<V>& sum, size_t image, int y, int xx, int to_height, int to_width, int channels,
                                        int c) const {
        if (x == nullptr) return;
        Source line = source(y, height, to_height), column = source(xx, width, to_width);
        const bf16* upper = x + (image * height + line.low) * width * channels + c;
        const bf16* lower = x + (image * height + line.high) * width * channels + c;
        Pack<V> a = load<V>(upper + column.low * channels), b = load<V>(upper + column.high * channels);
        Pack<V> d = load<V>(lower + column.low * channels), e = load<V>(lower + column.high * channels);
        for (int i = 0; i < V; i++) {
            float above = (1.0f - column.weight) * a.x[i] + column.weight * b.x[i];
            float below = (1.0f - column.weight) * d.x[i] + column.weight * e.x[i];
            sum.x[i] += (1.0f - line.weight) * above + line.weight * below;
        }
    }
};

// Moments of a set: how many, their mean, the sum of squared deviations from it.
struct Moments {
    float count, mean, square;

    // Takes in another set (Chan, Golub, LeVeque, 1979).
    __device__ __forceinline__ void join(float n, float other_mean, float other_square) {
        if (n == 0.0f) return;
        float delta = other_mean - mean, share = n / (count + n);
        mean += delta * share;
        square += other_square + delta * delta * count * share;
        count += n;
    }
};

// Rows that line `line` of `lines` takes of those from `first` to `end`.
__device__ __forceinline__ int rows_of_line(int first, int end, int line, int lines) {
    return max(0, (end - first - line + lines - 1) / lines);
}

template <int V>
__device__ void join(bf16* z, const Contribution (&parts)[3], int rows, int height, int width, int channels, int slab,
                     float* partial) {
    SHARED(float, means, [THREADS * V]);
    SHARED(float, squares, [THREADS * V]);
    int span = column_span<V>(channels), columns = span / V, lines = THREADS / columns;
    int column = threadIdx.x % columns, line = threadIdx.x / columns, c = blockIdx.x * span + column * V;
    int first = blockIdx.y * slab, end = min(rows, first + slab);
    bool joins = parts[0].x != nullptr;
    // Welford's update, which needs no second pass over the rows.
    Pack<V> mean = {}, square = {};
    float count = 0;
    if (c < channels && line < lines) {
        for (int row = first + line; row < end; row += lines) {
            Pack<V> sum = load<V>(z + size_t(row) * channels + c);
            if (joins) {
                int x = row % width, y = row / width % height;
                size_t image = row / width / height;
                for (int p = 0; p < 3; p++) parts[p].add(sum, image, y, x, height, width, channels, c);
                store(z + size_t(row) * channels + c, sum);
            }
            count += 1.0f;
            float share = 1.0f / count;
            for (int i = 0; i < V; i++) {
                // What is measured is what is stored.
                float value = joins ? __bfloat162float(__float2bfloat16_rn(sum.x[i])) : sum.x[i];
                float delta = value - mean.x[i];
                mean.x[i] += delta * share;
                square.x[i] += delta * (value - mean.x[i]);
            }
        }
    }
    if (partial == nullptr) return;
    if (line < lines) {
        for (int i = 0; i < V; i++) {
            means[line * span + column * V + i] = mean.x[i];
            squares[line * span + column * V + i] = square.x[i];
        }
    }
    __syncthreads();
    int own = blockIdx.x * span + threadIdx.x;
    if (int(threadIdx.x) < span && own < channels) {
        Moments all = {};
        for (int l = 0; l < lines; l++) {
            all.join(float(rows_of_line(first, end, l, lines)), means[l * span + threadIdx.x],
                     squares[l * span + threadIdx.x]);
        }
        partial[size_t(blockIdx.y) * 2 * channels + own] = all.mean;
        partial[(size_t(blockIdx.y) * 2 + 1) * channels + own] = all.square;
    }
}

// z += stages p, q and r, each interpolated to z's resolution (stages that are null add nothing, from the first one on), and the
// moments of each slab. Grid: as column_partials has it.
KERNEL(THREADS) join_stages(bf16* z /* (images, height, width, channels) */, const bf16* p /* at its resolution */,
                            int p_height, int p_width, const bf16* q, int q_height, int q_width, const bf16* r,
                            int r_height, int r_width, int rows, int height, int width, int channels, int slab,
                            float* partial /* (slabs, 2, channels): means, squared deviations; or null */) {
    Contribution parts[3] = {{p, p_height, p_width}, {q, q_height, q_width}, {r, r_height, r_width}};
    BY_WIDTH(channels, join, z, parts, rows, height, width, channels, slab, partial);
}

// Joins the slabs' moments in a fixed order. Grid: ceil(channels / 32).
KERNEL(THREADS) join_moments(const float* partial /* (slabs, 2, channels) */, int slabs, int rows, int slab, int channels,
                             float* moments /* (2, channels): means, squared deviations */) {
    constexpr int LINES = THREADS / 32;
    SHARED(float, counts, [LINES][32]);
    SHARED(float, means, [LINES][32]);
    SHARED(float, squares, [LINES][32]);
    int lane = threadIdx.x % 32, line = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    Moments own = {};
    if (c < channels) {
        for (int s = line; s < slabs; s += LINES) {
            float n = float(min(slab, rows - s * slab));
            own.join(n, partial[size_t(s) * 2 * channels + c], partial[(size_t(s) * 2 + 1) * channels + c]);
        }
    }
    counts[line][lane] = own.count;
    means[line][lane] = own.mean;
    squares[line][lane] = own.square;
    __syncthreads();
    if (line > 0 || c >= channels) return;
    Moments all = {};
    for (int l = 0; l < LINES; l++) all.join(counts[l][lane], means[l][lane], squares[l][lane]);
    moments[c] = all.mean;
    moments[channels + c] = all.square;
}

// ---- two classes, up to 256 channels in packs of 8

constexpr int CLASSES = 2;

// What stands before the classifier, for 8 channels: relu(slope·z + offset), and the classifier's weights.
struct Columns {
    Pack<8> slope, offset, weights[CLASSES];

    __device__ __forceinline__ Columns(const float* stats, const float* gamma, const float* beta, const bf16* w,
                                       int channels, int c) {
        Pack<8> mean = load<8>(stats + c), scale = load<8>(stats + channels + c);
        Pack<8> g = load<8>(gamma + c), b = load<8>(beta + c);
        for (int i = 0; i < 8; i++) {
            slope.x[i] = scale.x[i] * g.x[i];
            offset.x[i] = b.x[i] - mean.x[i] * slope.x[i];
        }
        for (int l = 0; l < CLASSES; l++) weights[l] = load<8>(w + l * channels + c);
    }

    // Before the ReLU.
    __device__ __forceinline__ float before(const Pack<8>& z, int i) const { return z.x[i] * slope.x[i] + offset.x[i]; }

    // The gradient after BatchNorm of channel i: through classifier, dropout and ReLU.
    __device__ __forceinline__ float back(const Pack<8>& z, const float (&d)[CLASSES], float factor, int i) const {
        float sum = 0;
        for (int l = 0; l < CLASSES; l++) sum += d[l] * weights[l].x[i];
        return before(z, i) > 0.0f ? sum * factor : 0.0f;
    }
};

__device__ __forceinline__ void load_classes(const bf16* from, float (&to)[CLASSES]) {
    unsigned pair = *reinterpret_cast<const unsigned*>(from);
    to[0] = __uint_as_float(pair << 16);
    to[1] = __uint_as_float(pair & 0xffff0000u);
}

// logits = classifier(dropout(relu(batch_norm(z)))). A group of channels / 8 lanes, a power of two, takes `each` rows in a
// row. Threads: ceil(rows / each)·channels / 8.
KERNEL(THREADS) classify(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                         const float* gamma /* (channels) */, const float* beta /* (channels) */, unsigned key0,
                         unsigned key1, unsigned high0, unsigned high1, u64 first, float rate,
                         const bf16* w /* (2, channels) */, const float* bias /* (2) */, int rows, int channels, int each,
                         bf16* logits /* (rows, 2) */) {
    Dropout drop = {key0, key1, high0, high1, first, rate};
    int lanes = channels / 8, c = threadIdx.x % lanes * 8;
    size_t start = thread_number() / lanes * each;
    Columns columns(stats, gamma, beta, w, channels, c);
    float shift[CLASSES] = {bias[0], bias[1]};
    for (int k = 0; k < each; k++) {
        size_t row = start + k;
        float sums[CLASSES] = {};
        // Groups past the last row take part in the sums, with nothing.
        if (row < size_t(rows)) {
            Pack<8> p = load<8>(z + row * channels + c), f = drop.factors<8>(row * channels + c);
            for (int i = 0; i < 8; i++) {
                float before = columns.before(p, i);
                // Written so that a NaN passes through and shows in the loss.
                float a = (before < 0.0f ? 0.0f : before) * f.x[i];
                for (int l = 0; l < CLASSES; l++) sums[l] += a * columns.weights[l].x[i];
            }
        }
        for (int l = 0; l < CLASSES; l++) sums[l] = group_sum(sums[l], lanes);
        if (c == 0 && row < size_t(rows)) {
            *reinterpret_cast<unsigned*>(logits + row * CLASSES) = pair_of(sums[0] + shift[0], sums[1] + shift[1]);
        }
    }
}

// Per channel and class, over the rows that pass ReLU and dropout: the sums of dlogit and of dlogit·normalised z, both times
// the dropout's factor. Everything else follows from them (classify_sums). Grid: as column_partials has it.
KERNEL(THREADS) classify_backward(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                                  const float* gamma /* (channels) */, const float* beta /* (channels) */, unsigned key0,
                                  unsigned key1, unsigned high0, unsigned high1, u64 first, float rate,
                                  const bf16* dlogits /* (rows, 2) */, int rows, int channels, int slab,
                                  float* partial /* (slabs, 2, 2, channels) */) {
    Dropout drop = {key0, key1, high0, high1, first, rate};
    int span = column_span<8>(channels), own = min(int(blockIdx.x) * span + int(threadIdx.x) % (span / 8) * 8, channels - 8);
    Pack<8> mean = load<8>(stats + own), scale = load<8>(stats + channels + own);
    Pack<8> g = load<8>(gamma + own), b = load<8>(beta + own), slope, offset;
    for (int i = 0; i < 8; i++) {
        slope.x[i] = scale.x[i] * g.x[i];
        offset.x[i] = b.x[i] - mean.x[i] * slope.x[i];
    }
    auto term = [&](int row, int c, Pack<8>(&terms)[2 * CLASSES]) {
        size_t at = size_t(row) * channels + c;
        Pack<8> p = load<8>(z + at), f = drop.factors<8>(at);
        float d[CLASSES];
        load_classes(dlogits + size_t(row) * CLASSES, d);
        for (int i = 0; i < 8; i++) {
            float factor = p.x[i] * slope.x[i] + offset.x[i] > 0.0f ? f.x[i] : 0.0f;
            float normalised = (p.x[i] - mean.x[i]) * scale.x[i];
            for (int l = 0; l < CLASSES; l++) {
                terms[l].x[i] = d[l] * factor;
                terms[CLASSES + l].x[i] = d[l] * factor * normalised;
            }
        }
    };
    column_partials<8, 2 * CLASSES>(term, rows, channels, slab, partial);
}

// Joins the slabs: adds the gradient of the classifier's weights, if asked, and writes those of beta and gamma.
// Grid: ceil(channels / 32).
KERNEL(THREADS) classify_sums(const float* partial /* (slabs, 2, 2, channels) */, int slabs, int channels,
                              const float* gamma /* (channels) */, const float* beta /* (channels) */,
                              const bf16* w /* (2, channels) */, float* dw /* (2, channels) or null */,
                              float* sums /* (2, channels): beta's, gamma's gradient */) {
    constexpr int LINES = THREADS / 32, KINDS = 2 * CLASSES;
    SHARED(float, tile, [LINES][KINDS][32]);
    int lane = threadIdx.x % 32, line = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float own[KINDS] = {};
    if (c < channels) {
        for (int s = line; s < slabs; s += LINES) {
            for (int k = 0; k < KINDS; k++) own[k] += partial[(size_t(s) * KINDS + k) * channels + c];
        }
    }
    for (int k = 0; k < KINDS; k++) tile[line][k][lane] = own[k];
    __syncthreads();
    if (line > 0 || c >= channels) return;
    float shift = 0, along = 0;
    for (int l = 0; l < CLASSES; l++) {
        float plain = 0, normalised = 0, weight = __bfloat162float(w[l * channels + c]);
        for (int i = 0; i < LINES; i++) {
            plain += tile[i][l][lane];
            normalised += tile[i][CLASSES + l][lane];
        }
        // The activation is gamma·normalised + beta where it passes.
        if (dw != nullptr) dw[l * channels + c] += gamma[c] * normalised + beta[c] * plain;
        shift += weight * plain;
        along += weight * normalised;
    }
    sums[c] = shift;
    sums[channels + c] = along;
}

// dz, the gradient before BatchNorm in training mode; share is 1 / rows of the batch. A thread takes `each` rows that are
// as far apart as the grid has groups. Threads: ceil(rows / each)·channels / 8.
KERNEL(THREADS) classify_backward_input(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                                        const float* gamma /* (channels) */, const float* beta /* (channels) */,
                                        unsigned key0, unsigned key1, unsigned high0, unsigned high1, u64 first,
                                        float rate, const bf16* w /* (2, channels) */,
                                        const bf16* dlogits /* (rows, 2) */, const float* total /* (2, channels) */,
                                        float share, int rows, int channels, int each, bf16* dz /* (rows, channels) */) {
    Dropout drop = {key0, key1, high0, high1, first, rate};
    int lanes = channels / 8, c = int(thread_number() % lanes) * 8;
    size_t groups = (size_t(rows) + each - 1) / each, group = thread_number() / lanes;
    if (group >= groups) return;
    Columns columns(stats, gamma, beta, w, channels, c);
    // gamma·scale·(d - share·(shift + normalised·along)) as slope·d - (constant + linear·z).
    Pack<8> constant, linear;
    {
        Pack<8> mean = load<8>(stats + c), scale = load<8>(stats + channels + c);
        Pack<8> shift = load<8>(total + c), along = load<8>(total + channels + c);
        for (int i = 0; i < 8; i++) {
            linear.x[i] = columns.slope.x[i] * share * along.x[i] * scale.x[i];
            constant.x[i] = columns.slope.x[i] * share * shift.x[i] - linear.x[i] * mean.x[i];
        }
    }
    for (int k = 0; k < each; k++) {
        size_t row = group + k * groups;
        if (row >= size_t(rows)) return;
        Pack<8> p = load<8>(z + row * channels + c), f = drop.factors<8>(row * channels + c);
        float d[CLASSES];
        load_classes(dlogits + row * CLASSES, d);
        for (int i = 0; i < 8; i++) {
            float back = columns.back(p, d, f.x[i], i);
            p.x[i] = columns.slope.x[i] * back - (constant.x[i] + linear.x[i] * p.x[i]);
        }
        store(dz + row * channels + c, p);
    }
}
