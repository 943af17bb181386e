// The end of the decoder: stages joined → BatchNorm (eps 1e-5) → ReLU → dropout → classifier, forward and backward.
// In evaluation all of it is one kernel (classify_stages), and the joined stages are never written.
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
                                unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
                                int rows, int channels, bf16* a /* (rows, channels) */) {
    Dropout drop(key0, key1, site, step, first, rate);
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
KERNEL(THREADS, 1) head_backward(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                                 const float* gamma /* (channels) */, const float* beta /* (channels) */, unsigned key0,
                                 unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
                                 int rows, int channels, int slab, bf16* da /* (rows, channels) */,
                                 float* partial /* (slabs, 2, channels): beta's, gamma's gradient */) {
    Dropout drop(key0, key1, site, step, first, rate);
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

// A stage's contribution to one column of z, from top to bottom: the two lines of the stage that z's current line lies between,
// each interpolated along x, stay in registers.
template <int V> struct Contribution {
    const bf16* left;  // (height, width, channels) of the image at the column's left neighbour, or null
    int right;         // how much further its right neighbour lies
    float weight;      // of the right one
    int height, pitch, low;
    Pack<V> above, below;

    __device__ __forceinline__ Contribution(const bf16* x /* (images, height, width, channels) or null */, int height,
                                            int width, int image, int column, int to_width, int channels, int c)
        : left(nullptr), height(height), pitch(width * channels), low(-2) {
        if (x == nullptr) return;
        Source s = source(column, width, to_width);
        x += size_t(image) * height * pitch + c;
        left = x + s.low * channels;
        right = (s.high - s.low) * channels;
        weight = s.weight;
    }

    __device__ __forceinline__ Pack<V> line(int y) const {
        const bf16* at = left + y * pitch;
        Pack<V> a = load<V>(at), b = load<V>(at + right);
        for (int i = 0; i < V; i++) a.x[i] = (1.0f - weight) * a.x[i] + weight * b.x[i];
        return a;
    }

    // Adds what stands at line `y` of `to_height`.
    __device__ __forceinline__ void add(int y, int to_height, Pack<V>& sum) {
        if (left == nullptr) return;
        Source s = source(y, height, to_height);
        if (s.low != low) {
            above = s.low == low + 1 ? below : line(s.low);
            below = line(s.high);
            low = s.low;
        }
        for (int i = 0; i < V; i++) sum.x[i] += (1.0f - s.weight) * above.x[i] + s.weight * below.x[i];
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

template <int V>
__device__ void join(bf16* z, const bf16* p, int p_height, int p_width, const bf16* q, int q_height, int q_width,
                     const bf16* r, int r_height, int r_width, int height, int width, int channels, int piece,
                     float* partial) {
    SHARED(float, means, [THREADS * V]);
    SHARED(float, squares, [THREADS * V]);
    int span = column_span<V>(channels), columns = span / V, lines = THREADS / columns;
    int column = threadIdx.x % columns, line = threadIdx.x / columns, c = blockIdx.x * span + column * V;
    int pieces = (height + piece - 1) / piece, x = blockIdx.y / pieces * lines + line;
    int first = blockIdx.y % pieces * piece, end = min(height, first + piece), image = blockIdx.z;
    // Welford's update, which needs no second pass over the rows.
    Pack<V> mean = {}, square = {};
    if (c < channels && line < lines && x < width) {
        Contribution<V> parts[3] = {{p, p_height, p_width, image, x, width, channels, c},
                                    {q, q_height, q_width, image, x, width, channels, c},
                                    {r, r_height, r_width, image, x, width, channels, c}};
        bf16* at = z + ((size_t(image) * height + first) * width + x) * channels + c;
        size_t pitch = size_t(width) * channels;
        // Several lines are under way at any time.
        constexpr int AHEAD = 4;
        typename Words<V>::type lines_ahead[AHEAD];
        for (int k = 0; k < AHEAD; k++) {
            if (first + k < end) lines_ahead[k] = fetch<V>(at + k * pitch);
        }
        float count = 0;
        for (int start = first; start < end; start += AHEAD) {
#pragma unroll
            for (int k = 0; k < AHEAD; k++, at += pitch) {
                int y = start + k;
                if (y >= end) break;
                Pack<V> sum = widen<V>(lines_ahead[k]);
                if (y + AHEAD < end) lines_ahead[k] = fetch<V>(at + AHEAD * pitch);
                for (int i = 0; i < 3; i++) parts[i].add(y, height, sum);
                if (p != nullptr) store(at, sum);
                if (partial == nullptr) continue;
                count += 1.0f;
                float share = 1.0f / count;
                for (int i = 0; i < V; i++) {
                    // What is measured is what is stored.
                    float value = __bfloat162float(__float2bfloat16_rn(sum.x[i])), delta = value - mean.x[i];
                    mean.x[i] += delta * share;
                    square.x[i] += delta * (value - mean.x[i]);
                }
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
        int inside = min(lines, width - int(blockIdx.y) / pieces * lines);
        for (int l = 0; l < inside; l++) {
            all.join(float(end - first), means[l * span + threadIdx.x], squares[l * span + threadIdx.x]);
        }
        size_t slab = size_t(image) * gridDim.y + blockIdx.y;
        partial[(slab * 3) * channels + own] = all.count;
        partial[(slab * 3 + 1) * channels + own] = all.mean;
        partial[(slab * 3 + 2) * channels + own] = all.square;
    }
}

// z += stages p, q and r, each interpolated to z's resolution (stages that are null add nothing, from the first one on), and the
// moments of what a block has seen: as many columns as it has lines of threads, `piece` lines of the picture. Grid:
// (ceil(channels / column_span<4 or 1>), ceil(width / lines)·ceil(height / piece), images).
KERNEL(THREADS) join_stages(bf16* z /* (images, height, width, channels) */, const bf16* p /* at its resolution */,
                            int p_height, int p_width, const bf16* q, int q_height, int q_width, const bf16* r,
                            int r_height, int r_width, int height, int width, int channels, int piece,
                            float* partial /* (blocks, 3, channels): counts, means, squared deviations; or null */) {
    // Three stages' lines take registers: 4 channels a thread rather than 8.
    channels % 4 == 0 ? join<4>(z, p, p_height, p_width, q, q_height, q_width, r, r_height, r_width, height, width,
                                channels, piece, partial)
                      : join<1>(z, p, p_height, p_width, q, q_height, q_width, r, r_height, r_width, height, width,
                                channels, piece, partial);
}

// Joins the blocks' moments in a fixed order. Grid: ceil(channels / 8).
KERNEL(THREADS) join_moments(const float* partial /* (slabs, 3, channels) */, int slabs, int channels,
                             float* moments /* (2, channels): means, squared deviations */) {
    constexpr int COLUMNS = 8, LINES = THREADS / COLUMNS;
    SHARED(float, counts, [LINES][COLUMNS]);
    SHARED(float, means, [LINES][COLUMNS]);
    SHARED(float, squares, [LINES][COLUMNS]);
    int column = threadIdx.x % COLUMNS, line = threadIdx.x / COLUMNS, c = blockIdx.x * COLUMNS + column;
    Moments own = {};
    if (c < channels) {
        for (int s = line; s < slabs; s += LINES) {
            const float* set = partial + size_t(s) * 3 * channels + c;
            own.join(set[0], set[channels], set[2 * channels]);
        }
    }
    counts[line][column] = own.count;
    means[line][column] = own.mean;
    squares[line][column] = own.square;
    __syncthreads();
    if (line > 0 || c >= channels) return;
    Moments all = {};
    for (int l = 0; l < LINES; l++) all.join(counts[l][column], means[l][column], squares[l][column]);
    moments[c] = all.mean;
    moments[channels + c] = all.square;
}

// ---- two classes, up to 256 channels in packs of 8

constexpr int CLASSES = 2;

// What stands before the classifier, for V channels: relu(slope·z + offset), and the classifier's weights.
template <int V> struct ColumnsOf {
    Pack<V> slope, offset, weights[CLASSES];

    __device__ __forceinline__ ColumnsOf(const float* stats, const float* gamma, const float* beta, const bf16* w,
                                       int channels, int c) {
        Pack<V> mean = load<V>(stats + c), scale = load<V>(stats + channels + c);
        Pack<V> g = load<V>(gamma + c), b = load<V>(beta + c);
        for (int i = 0; i < V; i++) {
            slope.x[i] = scale.x[i] * g.x[i];
            offset.x[i] = b.x[i] - mean.x[i] * slope.x[i];
        }
        for (int l = 0; l < CLASSES; l++) weights[l] = load<V>(w + l * channels + c);
    }

    // Before the ReLU.
    __device__ __forceinline__ float before(const Pack<V>& z, int i) const { return z.x[i] * slope.x[i] + offset.x[i]; }

    // The gradient after BatchNorm of channel i: through classifier, dropout and ReLU.
    __device__ __forceinline__ float back(const float (&d)[CLASSES], float factor, int i) const {
        float sum = 0;
        for (int l = 0; l < CLASSES; l++) sum += d[l] * weights[l].x[i];
        return sum * factor;
    }
};
typedef ColumnsOf<8> Columns;

__device__ __forceinline__ void load_classes(const bf16* from, float (&to)[CLASSES]) {
    unsigned pair = *reinterpret_cast<const unsigned*>(from);
    to[0] = __uint_as_float(pair << 16);
    to[1] = __uint_as_float(pair & 0xffff0000u);
}

// logits = classifier(dropout(relu(batch_norm(z)))); a bit of `passed` tells whether ReLU and dropout let its channel through,
// so that the way back draws no random numbers. A group of channels / 8 lanes, a power of two, takes `each` rows in a row.
// Threads: ceil(rows / each)·channels / 8.
KERNEL(THREADS) classify(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                         const float* gamma /* (channels) */, const float* beta /* (channels) */, unsigned key0,
                         unsigned key1, unsigned site, const unsigned* step /* (1) */, u64 first, float rate,
                         const bf16* w /* (2, channels) */, const bf16* bias /* (2) */, int rows, int channels, int each,
                         unsigned char* passed /* (rows, channels / 8) or null */, bf16* logits /* (rows, 2) */) {
    Dropout drop(key0, key1, site, step, first, rate);
    int lanes = channels / 8, c = threadIdx.x % lanes * 8;
    size_t start = thread_number() / lanes * each;
    Columns columns(stats, gamma, beta, w, channels, c);
    float shift[CLASSES];
    load_classes(bias, shift);
    for (int k = 0; k < each; k++) {
        size_t row = start + k;
        float sums[CLASSES] = {};
        // Groups past the last row take part in the sums, with nothing.
        if (row < size_t(rows)) {
            Pack<8> p = load<8>(z + row * channels + c), f = drop.factors<8>(row * channels + c);
            unsigned bits = 0;
            for (int i = 0; i < 8; i++) {
                float before = columns.before(p, i);
                // Written so that a NaN passes through and shows in the loss.
                float a = (before < 0.0f ? 0.0f : before) * f.x[i];
                if (a > 0.0f) bits |= 1u << i;
                for (int l = 0; l < CLASSES; l++) sums[l] += a * columns.weights[l].x[i];
            }
            if (passed != nullptr) passed[(row * channels + c) / 8] = (unsigned char)bits;
        }
        for (int l = 0; l < CLASSES; l++) sums[l] = group_sum(sums[l], lanes);
        if (c == 0 && row < size_t(rows)) {
            *reinterpret_cast<unsigned*>(logits + row * CLASSES) = pair_of(sums[0] + shift[0], sums[1] + shift[1]);
        }
    }
}

// Per channel and class, over the rows that pass ReLU and dropout: the sums of dlogit and of dlogit·normalised z, both times
// the dropout's factor, which is `kept` for all of them. Everything else follows from them (classify_sums). Grid: as
// column_partials has it.
KERNEL(THREADS) classify_backward(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                                  const unsigned char* passed /* (rows, channels / 8) */, float kept,
                                  const bf16* dlogits /* (rows, 2) */, int rows, int channels, int slab,
                                  float* partial /* (slabs, 2, 2, channels) */) {
    int span = column_span<8>(channels), own = min(int(blockIdx.x) * span + int(threadIdx.x) % (span / 8) * 8, channels - 8);
    Pack<8> mean = load<8>(stats + own), scale = load<8>(stats + channels + own);
    auto term = [&](int row, int c, Pack<8>(&terms)[2 * CLASSES]) {
        size_t at = size_t(row) * channels + c;
        Pack<8> p = load<8>(z + at);
        unsigned bits = passed[at / 8];
        float d[CLASSES];
        load_classes(dlogits + size_t(row) * CLASSES, d);
        for (int i = 0; i < 8; i++) {
            float factor = bits >> i & 1 ? kept : 0.0f;
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
                                        const unsigned char* passed /* (rows, channels / 8) */, float kept,
                                        const bf16* w /* (2, channels) */, const bf16* dlogits /* (rows, 2) */, const float* total /* (2, channels) */,
                                        float share, int rows, int channels, int each, bf16* dz /* (rows, channels) */) {
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
        Pack<8> p = load<8>(z + row * channels + c);
        unsigned bits = passed[(row * channels + c) / 8];
        float d[CLASSES];
        load_classes(dlogits + row * CLASSES, d);
        for (int i = 0; i < 8; i++) {
            float back = columns.back(d, bits >> i & 1 ? kept : 0.0f, i);
            p.x[i] = columns.slope.x[i] * back - (constant.x[i] + linear.x[i] * p.x[i]);
        }
        store(dz + row * channels + c, p);
    }
}

// ---- evaluation: from the stages to the logits

// Lines of a picture that a block of classify_stages takes, and how many it makes at a time.
constexpr int PIECE = 64, AT_ONCE = 4;

// Sums of 8 numbers each over `lanes` neighbouring lanes, a power of two from 8 on: a lane receives that of number
// lane / (lanes / 8) of its group. Lanes exchange halves of what they have, so that 9 shuffles of a warp do for all 8.
__device__ __forceinline__ float group_sums(const float (&x)[8], int lanes) {
    float four[4], two[2], one;
    int apart = lanes / 2;
    bool upper = threadIdx.x & apart;
    for (int i = 0; i < 4; i++) {
        four[i] = (upper ? x[i + 4] : x[i]) + __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + 4], apart);
    }
    apart /= 2;
    upper = threadIdx.x & apart;
    for (int i = 0; i < 2; i++) {
        two[i] = (upper ? four[i + 2] : four[i]) + __shfl_xor_sync(ALL_LANES, upper ? four[i] : four[i + 2], apart);
    }
    apart /= 2;
    upper = threadIdx.x & apart;
    one = (upper ? two[1] : two[0]) + __shfl_xor_sync(ALL_LANES, upper ? two[0] : two[1], apart);
    return group_sum(one, apart);
}

// logits = classifier(relu(batch_norm(z + stages p, q and r, each interpolated to z's resolution))), where stages that are null
// add nothing. Walks down columns as join_stages does, a column's channels side by side in a block; there are 32 to 256 of
// them, a power of two. Grid: (ceil(width / (4·THREADS / channels))·ceil(height / PIECE), images).
KERNEL(THREADS) classify_stages(const bf16* z /* (images, height, width, channels) */, const bf16* p /* at its resolution */,
                                int p_height, int p_width, const bf16* q, int q_height, int q_width, const bf16* r,
                                int r_height, int r_width, int height, int width, int channels,
                                const float* stats /* (2, channels) */, const float* gamma /* (channels) */,
                                const float* beta /* (channels) */, const bf16* w /* (2, channels) */,
                                const bf16* bias /* (2) */, bf16* logits /* (images, height, width, 2) */) {
    constexpr int V = 4;
    // By group of lanes: a column's channels are one group's, or two groups'.
    SHARED(float, sums, [THREADS / 8][PIECE][CLASSES]);
    int columns = channels / V, lanes = min(columns, 32), side_by_side = THREADS / columns;
    int c = threadIdx.x % columns * V, group = threadIdx.x / lanes, number = threadIdx.x % lanes / (lanes / 8);
    bool writes = threadIdx.x % (lanes / 8) == 0;
    int pieces = (height + PIECE - 1) / PIECE, left = blockIdx.x / pieces * side_by_side;
    int first = blockIdx.x % pieces * PIECE, end = min(height, first + PIECE), image = blockIdx.y;
    // Threads past the last column repeat it, for nothing.
    int x = min(left + int(threadIdx.x) / columns, width - 1);
    ColumnsOf<V> head(stats, gamma, beta, w, channels, c);
    Contribution<V> parts[3] = {{p, p_height, p_width, image, x, width, channels, c},
                                {q, q_height, q_width, image, x, width, channels, c},
                                {r, r_height, r_width, image, x, width, channels, c}};
    const bf16* at = z + ((size_t(image) * height + first) * width + x) * channels + c;
    size_t pitch = size_t(width) * channels;
    typename Words<V>::type lines_ahead[AT_ONCE];
    for (int k = 0; k < AT_ONCE; k++) {
        if (first + k < end) lines_ahead[k] = fetch<V>(at + k * pitch);
    }
    for (int start = first; start < end; start += AT_ONCE) {
        float terms[AT_ONCE * CLASSES] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++, at += pitch) {
            int y = start + k;
            if (y >= end) continue;
            Pack<V> sum = widen<V>(lines_ahead[k]);
            if (y + AT_ONCE < end) lines_ahead[k] = fetch<V>(at + AT_ONCE * pitch);
            for (int i = 0; i < 3; i++) parts[i].add(y, height, sum);
            for (int i = 0; i < V; i++) {
                float before = head.before(sum, i), a = before < 0.0f ? 0.0f : before;
                for (int l = 0; l < CLASSES; l++) terms[k * CLASSES + l] += a * head.weights[l].x[i];
            }
        }
        float total = group_sums(terms, lanes);
        if (writes) sums[group][start - first + number / CLASSES][number % CLASSES] = total;
    }
    __syncthreads();
    float shift[CLASSES];
    load_classes(bias, shift);
    for (int i = threadIdx.x; i < side_by_side * (end - first); i += THREADS) {
        int own = i % side_by_side, y = i / side_by_side, groups = columns / lanes;
        if (left + own >= width) continue;
        float total[CLASSES] = {};
        for (int g = 0; g < groups; g++) {
            for (int l = 0; l < CLASSES; l++) total[l] += sums[own * groups + g][y][l];
        }
        size_t token = (size_t(image) * height + first + y) * width + left + own;
        *reinterpret_cast<unsigned*>(logits + token * CLASSES) = pair_of(total[0] + shift[0], total[1] + shift[1]);
    }
}

// ---- the way back to the stages

// Threads of split_stages: a strip of columns with a halo, by packs of 4 channels.
constexpr int STRIP = 32, HALO = 4, STRIP_COLUMNS = STRIP + 2 * HALO, PACK = 4, STRIP_PACKS = 8;
constexpr int STRIP_THREADS = STRIP_COLUMNS * STRIP_PACKS;

// The way of one column of dz to a stage of 1 / R the resolution: lines are summed as they come, and a line of the stage is
// complete when dz's lines lie below it.
template <int R> struct Collected {
    Pack<PACK> current, next;

    // Takes line `y` in.
    __device__ __forceinline__ void take(const Pack<PACK>& d, int y, int height) {
        Source s = source(y, height / R, height);
        float upper = s.high == s.low ? 1.0f : 1.0f - s.weight, lower = s.high == s.low ? 0.0f : s.weight;
        for (int i = 0; i < PACK; i++) {
            current.x[i] += upper * d.x[i];
            next.x[i] += lower * d.x[i];
        }
    }

    // The stage's line that is complete after line `y`, or -1.
    static __device__ __forceinline__ int complete(int y, int height) {
        if (y + 1 == height) return height / R - 1;
        int past = y + 1 - R / 2;
        return past >= R && past % R == 0 ? past / R - 1 : -1;
    }

    // Sums the strip's columns to the stage's line `line` of `height / R`. All threads of the block call it.
    __device__ __forceinline__ void emit(int line, float (*tile)[STRIP_PACKS * PACK], int strip, int c, int width, int channels,
                                         bf16* dx /* (height / R, width / R, channels) of the image */) {
        int column = threadIdx.x / STRIP_PACKS, pack = threadIdx.x % STRIP_PACKS * PACK;
        for (int i = 0; i < PACK; i++) {
            tile[column][pack + i] = current.x[i];
            current.x[i] = next.x[i];
            next.x[i] = 0.0f;
        }
        __syncthreads();
        int x = strip / R + column;
        if (column < STRIP / R && x < width / R && c < channels) {
            Pack<PACK> sum = {};
            int first = R * x - R / 2;
            for (int i = 0; i < 2 * R; i++) {
                if (first + i < 0 || first + i >= width) continue;
                float weight = weight_of(source(first + i, width / R, width), x);
                const float* from = &tile[first + i - strip + HALO][pack];
                for (int j = 0; j < PACK; j++) sum.x[j] += weight * from[j];
            }
            store(dx + (size_t(line) * (width / R) + x) * channels + c, sum);
        }
        // No barrier: the next line goes to the other tile, and its barrier comes before this one is written again.
    }
};

// The transpose of joining stages at a half, a quarter and an eighth of dz's resolution, in one pass over dz. Height and width
// are multiples of 8, channels of 8. Grid: (ceil(channels / 32), ceil(width / STRIP), images), blocks of STRIP_THREADS.
KERNEL(STRIP_THREADS, 2) split_stages(const bf16* dz /* (images, height, width, channels) */, int height, int width,
                                   int channels, bf16* p /* (images, height / 2, width / 2, channels) */,
                                   bf16* q /* (images, height / 4, width / 4, channels) */,
                                   bf16* r /* (images, height / 8, width / 8, channels) */) {
    SHARED(float, tiles, [2][STRIP_COLUMNS][STRIP_PACKS * PACK]);
    int emitted = 0;
    int c = blockIdx.x * STRIP_PACKS * PACK + threadIdx.x % STRIP_PACKS * PACK, strip = blockIdx.y * STRIP;
    int x = strip - HALO + int(threadIdx.x) / STRIP_PACKS;
    bool inside = x >= 0 && x < width && c < channels;
    size_t image = blockIdx.z, area = size_t(height) * width * channels, pitch = size_t(width) * channels;
    dz += image * area + size_t(max(x, 0)) * channels + c;
    p += image * (area / 4);
    q += image * (area / 16);
    r += image * (area / 64);
    Collected<2> halves = {};
    Collected<4> quarters = {};
    Collected<8> eighths = {};
    constexpr int AHEAD = 2;
    typename Words<PACK>::type lines_ahead[AHEAD] = {};
    for (int k = 0; k < AHEAD; k++) {
        if (inside && k < height) lines_ahead[k] = fetch<PACK>(dz + k * pitch);
    }
    for (int start = 0; start < height; start += AHEAD) {
#pragma unroll
      for (int k = 0; k < AHEAD; k++) {
        int y = start + k;
        if (y >= height) break;
        Pack<PACK> d = widen<PACK>(lines_ahead[k]);
        if (inside && y + AHEAD < height) lines_ahead[k] = fetch<PACK>(dz + (y + AHEAD) * pitch);
        halves.take(d, y, height);
        quarters.take(d, y, height);
        eighths.take(d, y, height);
        int line = Collected<2>::complete(y, height);
        if (line >= 0) halves.emit(line, tiles[emitted++ % 2], strip, c, width, channels, p);
        line = Collected<4>::complete(y, height);
        if (line >= 0) quarters.emit(line, tiles[emitted++ % 2], strip, c, width, channels, q);
        line = Collected<8>::complete(y, height);
        if (line >= 0) eighths.emit(line, tiles[emitted++ % 2], strip, c, width, channels, r);
      }
    }
}
