// The end of the decoder: stages joined → BatchNorm (eps 1e-5) → ReLU → dropout → classifier, forward and backward.
// The product of a first stage of 32 channels is made where the others, at halves, quarters and eighths, are joined to it. In
// evaluation all of it is one kernel (classify_stages), so that for two classes the joined stages are nowhere in memory.
//
// The reduction over rows and the element-wise work of a pass are one kernel wherever the algorithm allows it. For two
// classes everything between z and the logits is one pass over z either way: the activation, its gradient and the
// classifier's products exist in registers only (classify and what follows); the separate kernels serve other shapes.
#include "common.cuh"
#include "interpolate.cuh"
#include "mma.cuh"

constexpr float EPSILON = 1e-5f;

// 0 for what is below it; a NaN stays.
__device__ __forceinline__ float relu(float x) {
#ifdef __CUDACC__
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
#else
    return x < 0.0f ? 0.0f : x;
#endif
}

// relu(low) and relu(high) as a pair.
__device__ __forceinline__ unsigned relu_pair(float low, float high) {
#ifdef __CUDACC__
    unsigned pair;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return pair_of(relu(low), relu(high));
#endif
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

// Interpolation at these ratios is a product with a constant matrix, so tensor cores do it: a warp takes tiles of 2
// lines, 8 columns and 32 channels of z, and the 16 pixels of a tile read 32 pixels of the stages at a half, a quarter
// and an eighth of z's resolution: 3 · 6, 2 · 4 and 2 · 3. That is 16 x 32 weights times 32 pixels x 8 channels, four
// times. The weights are products of two numbers of 4 bits, which bf16 holds, so that only the sums are rounded, to
// f32. Beyond its edge a stage repeats the pixels there, which is what interpolation that ends at its edge amounts to.
//
// Lane l = 4·g + t holds of z, per line, channels 8·t.. of the tile's column g, 16 bytes. These are columns 2·t and 2·t
// + 1 of the four products: column n of product i is channel 8·(n / 2) + 2·i + n % 2. So of a pixel of a stage, lane l
// needs every second one of channels 8·(g / 2).., and reads all 16 bytes too.
constexpr int TILE_LINES = 2, TILE_COLUMNS = 8, TILE_CHANNELS = 32;
// Lines of a picture that a warp takes.
constexpr int PIECE = 64;
// Pairs of lines after which the weights repeat.
constexpr int PHASES = 4;

// Which tiles a warp takes: `side` warps of a block lie side by side along the channels, groups of as many beside each
// other along the lines. Grid: (ceil(channels / (32·side)), ceil(ceil(width / 8) / (warps / side)), ..).
struct Place {
    int warp, side, strips, group, strip;
    int g, t;

    __device__ __forceinline__ explicit Place(int side)
        : warp(threadIdx.x / 32), side(side), strips(blockDim.x / 32 / side), group(blockIdx.x * side + warp % side),
          strip(blockIdx.y * strips + warp / side), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}

    __device__ __forceinline__ int left() const { return strip * TILE_COLUMNS; }
    // The first of the channels that the lane holds.
    __device__ __forceinline__ int channel() const { return group * TILE_CHANNELS + 8 * t; }
    // The first of the channels of which it brings every second one to the products.
    __device__ __forceinline__ int brings() const { return group * TILE_CHANNELS + g / 2 * 8; }
};

// A stage at its resolution; all of the images, or null.
struct Stage {
    const bf16* x;
    int height, width;
};

__device__ __forceinline__ unsigned word_of(const uint4& raw, int i) {
    return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
}

// The upper or the lower numbers of two pairs, as a pair.
__device__ __forceinline__ unsigned halves(unsigned first, unsigned second, bool upper) {
#ifdef __CUDACC__
    return __byte_perm(first, second, upper ? 0x7632 : 0x5410);
#else
    return upper ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
#endif
}

// Bilinear weight of a stage's pixel for a pixel of z, along one axis, where neither ends.
__device__ __forceinline__ float tent(int of, int at, int ratio) {
    float share = ratio == 2 ? 0.5f : ratio == 4 ? 0.25f : 0.125f;
    float apart = fabsf((float(at) + 0.5f) * share - 0.5f - float(of));
    return apart < 1.0f ? 1.0f - apart : 0.0f;
}

// The pixels of the stages that lanes with the same t bring to the products, by slot; relative to the tile's corner in
// column, for line 2·pair of z. Slots 0 to 3 are rows 2·t, 2·t + 1, 2·t + 8, 2·t + 9 of the first 16, slots 4 to 7 of
// the others.
struct Tap {
    int ratio, row, column;

    // For column `g` of line 2·pair + line.
    __device__ __forceinline__ float weight(int pair, int line, int g) const {
        return tent(row, 2 * pair + line, ratio) * tent(column, g, ratio);
    }
};

__device__ __forceinline__ Tap tap(int slot, int t, int pair) {
    int quarter = ((pair + 1) >> 1) - 1, eighth = ((pair + 2) >> 2) - 1;
    if (slot < 3) return {2, pair - 1 + slot, t - 1};
    if (slot == 3) return {2, pair - 1 + t / 2, 3 + t % 2};
    if (slot < 6) return {4, quarter + slot - 4, t - 1};
    if (slot == 6) return {8, eighth + t / 2, t % 2 - 1};
    if (t < 2) return {2, pair + 1, 3 + t};
    return {8, eighth + t % 2, 1};
}

// The weights of slots from.. from + 3 as an operand of products.
__device__ __forceinline__ uint4 tap_weights(int from, int lane, int phase) {
    int g = lane / 4, t = lane % 4;
    auto pair = [&](int slot, int line) {
        return pair_of(tap(slot, t, phase).weight(phase, line, g), tap(slot + 1, t, phase).weight(phase, line, g));
    };
    return {pair(from, 0), pair(from, 1), pair(from + 2, 0), pair(from + 2, 1)};
}

// A tile of z in a warp's registers, as the products leave it.
struct Tile {
    float products[4][4];

    // Channel i of the lane's 8.
    __device__ __forceinline__ float& at(int line, int i) { return products[i / 2][2 * line + i % 2]; }

    __device__ __forceinline__ uint4 rounded(int line) const {
        unsigned words[4];
        for (int i = 0; i < 4; i++) words[i] = pair_of(products[i][2 * line], products[i][2 * line + 1]);
        return {words[0], words[1], words[2], words[3]};
    }
};

// Weights of slots 4 to 7 by phase and lane, the same for all warps; all threads of a block fill them, and a barrier
// follows.
typedef uint4 Weights[PHASES][32];
__device__ __forceinline__ void fill_weights(Weights& weights) {
    for (int i = threadIdx.x; i < PHASES * 32; i += blockDim.x) {
        weights[i / 32][i % 32] = tap_weights(4, i % 32, i / 32);
    }
    __syncthreads();
}

// 16 bytes of shared memory.
struct alignas(16) Aligned {
    bf16 at[8];
};

// Two neighbouring lines of a stage, as distances from its first one, on the way down. Beyond its edges a stage repeats
// them.
struct Lines {
    unsigned pitch, last, upper, lower;

    __device__ __forceinline__ Lines(int height, int pitch, int row)
        : pitch(pitch), last((height - 1) * pitch), upper(max(0, min(row, height - 1)) * pitch),
          lower(max(0, min(row + 1, height - 1)) * pitch) {}

    __device__ __forceinline__ void advance() {
        upper = lower;
        lower = lower == last ? last : lower + pitch;
    }
};

// Calls each(y, tile) for the tiles of lines first.. end, from top to bottom, with z and the stages summed. Ratios of
// the stages are 2, 4 and 8, height and width of z multiples of 8, as is `first`, and channels too: lanes past the last
// channel repeat the last ones.
template <class Each>
__device__ __forceinline__ void walk_tiles(const Place& place, const bf16* z, const bf16* __restrict__ p,
                                           const bf16* __restrict__ q, const bf16* __restrict__ r, int image,
                                           int height, int width, int channels, int first, int end,
                                           const Weights& weights, Each each) {
    constexpr int SLOTS = 8, AHEAD = 2;  // tiles of z under way
    int g = place.g, t = place.t, lane = threadIdx.x % 32;
    bool upper = g % 2;
    uint4 constant = tap_weights(0, lane, 0);
    const unsigned always[4] = {constant.x, constant.y, constant.z, constant.w};
    // Where a line of the stage begins for the lane.
    unsigned columns[SLOTS];
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        Tap from = tap(slot, t, 0);
        int column = place.left() / from.ratio + from.column;
        column = max(0, min(column, width / from.ratio - 1));
        columns[slot] = unsigned(column * channels + min(place.brings(), channels - 8));
    }
    size_t area = size_t(height) * width * channels;
    p += image * area / 4;
    q += image * area / 16;
    r += image * area / 64;
    const bf16* mixed = t < 2 ? p : r;
    int pair = first / 2;
    Lines halves_at(height / 2, width / 2 * channels, pair);
    Lines quarters_at(height / 4, width / 4 * channels, (pair + 1) / 2 - 1);
    Lines eighths_at(height / 8, width / 8 * channels, (pair + 2) / 4 - 1);
    unsigned before = unsigned(max(pair - 1, 0) * (width / 2 * channels));
    size_t pitch = size_t(width) * channels;
    z += image * area + first * pitch + (place.left() + g) * channels + min(place.channel(), channels - 8);
    uint4 ahead[AHEAD][TILE_LINES];
    for (auto& tile : ahead) {
        for (int l = 0; l < TILE_LINES; l++, z += pitch) tile[l] = fetch<8>(z);
    }
#pragma unroll 1
    for (int start = first; start < end; start += AHEAD * TILE_LINES) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++, pair++) {
            int y = start + k * TILE_LINES;
            Tile tile;
            for (int l = 0; l < TILE_LINES; l++, z += pitch) {
                Pack<8> wide = widen<8>(ahead[k][l]);
                for (int i = 0; i < 8; i++) tile.at(l, i) = wide.x[i];
                if (y + AHEAD * TILE_LINES < end) ahead[k][l] = fetch<8>(z);
            }
            const unsigned lines[SLOTS] = {
                before, halves_at.upper, halves_at.lower, t < 2 ? before : halves_at.upper, quarters_at.upper,
                quarters_at.lower, t < 2 ? eighths_at.upper : eighths_at.lower,
                t < 2 ? halves_at.lower : t == 2 ? eighths_at.upper : eighths_at.lower};
            uint4 raw[SLOTS];
            for (int slot = 0; slot < SLOTS; slot++) {
                const bf16* stage = slot < 4 ? p : slot < 6 ? q : slot == 6 ? r : mixed;
                raw[slot] = fetch<8>(stage + lines[slot] + size_t(columns[slot]));
            }
            uint4 varying = weights[pair % PHASES][lane];
            const unsigned now[4] = {varying.x, varying.y, varying.z, varying.w};
            for (int i = 0; i < 4; i++) {
                auto operand = [&](int slot) {
                    return halves(word_of(raw[slot], i), word_of(raw[slot + 1], i), upper);
                };
                mma(tile.products[i], always, operand(0), operand(2));
                mma(tile.products[i], now, operand(4), operand(6));
            }
            before = halves_at.upper;
            halves_at.advance();
            if (pair % 2 == 0) quarters_at.advance();
            if (pair % 4 == 1) eighths_at.advance();
            each(y, tile);
        }
    }
}

// Pixels of the stages in shared memory, 32 channels each: what a warp's tile reads, and what its next two will.
// A line's place follows from its number; lines of p, q and r are 6, 4 and 3 pixels, of which the first lies left of
// the tile. In memory, pixels lie a multiple of all banks of L1 apart, so that lanes that want the same channels of
// several are served one after the other; from here, matrices go to the products.
//
// Piece i of a pixel is column by column what product i takes: pairs i, i + 4, i + 8 and i + 12 of its channels. Where
// the 4 pieces lie changes by line and column, so that the pixels of a matrix meet few times in a bank.
struct StageRing {
    static constexpr int LINES = 6, P = 0, Q = P + LINES * 6, R = Q + 4 * 4, PIXELS = R + 4 * 4;

    Aligned at[PIXELS * TILE_CHANNELS / 8];

    // Where a line of the stage at 1 / ratio begins, from line -1 on.
    __device__ static __forceinline__ int begin(int ratio, int line) {
        int pixel = ratio == 2 ? P + int(unsigned(line + LINES) % LINES) * 6 : (ratio == 4 ? Q : R) + (line & 3) * 4;
        return pixel * TILE_CHANNELS;
    }

    // Where in a line a piece lies; piece i + 2 at this ^ 16.
    __device__ static __forceinline__ int within(int line, int column, int piece) {
        return column * TILE_CHANNELS + ((piece ^ ((column >> 1 ^ column >> 2) & 1)) * 8 ^ (line & 1) << 4);
    }
};

// A pixel of a stage that a lane names to load_matrices: row lane % 16 of the first or the other 16 of a product.
struct Row16 {
    int ratio, line, column, piece;

    __device__ __forceinline__ Row16(int first, int lane) {
        int k = lane % 16, t = k % 8 / 2;
        // As for pairs of lines that begin all three stages' cells.
        Tap from = tap(first + k % 2 + k / 8 * 2, t, 0);
        ratio = from.ratio;
        line = from.row;
        column = from.column + 1;
        piece = lane / 16;
    }

    __device__ __forceinline__ int place(int pair) const {
        int cell = ratio == 2 ? pair : ratio == 4 ? (pair + 1) >> 1 : (pair + 2) >> 2;
        return StageRing::begin(ratio, cell + line) + StageRing::within(cell + line, column, piece);
    }
};

// Channels of the first stage's tokens, which make z.
constexpr int FIRST = 32;

// As walk_tiles, for z = tokens · firstᵀ + constants, where tokens have FIRST channels, `channels` are a multiple of 32 and
// `left` is the tile's first column; constants are those of the lane's channels. Calls each(y, k, tile), k being the tile's
// place among the PHASES of `weights`. TOKENS_AHEAD: tiles whose tokens are under way.
//
// Here the stages go through shared memory. The 16 pixels of a tile are the rows of all products. Where a product sums
// over tokens' channels, these have another order, as in mix_ffn.cu, so that a lane's part of a token, or of a row of
// `first`, is 16 bytes of memory.
template <int TOKENS_AHEAD, class Each>
__device__ __forceinline__ void walk_tokens(const Place& place, int left, const bf16* __restrict__ tokens,
                                            const bf16* __restrict__ first, const uint4& constants,
                                            const bf16* __restrict__ p, const bf16* __restrict__ q,
                                            const bf16* __restrict__ r, int image, int height, int width, int channels,
                                            int top, int end, const Weights& weights, StageRing& stages, Each each) {
    constexpr int AHEAD = 2;  // tiles whose stages are under way
    int g = place.g, t = place.t, lane = threadIdx.x % 32, pair = top / 2;
    size_t area = size_t(height) * width * channels, pitch = size_t(width) * FIRST;
    bf16* ring = stages.at[0].at;

    // A lane copies a pair of channels of every second column of a line.
    p += image * area / 4;
    q += image * area / 16;
    r += image * area / 64;
    int word = lane % 16, channel = place.group * TILE_CHANNELS + 2 * word;
    auto bring = [&](int ratio, const bf16* stage, int columns, int line) {
        int row = max(0, min(line, height / ratio - 1)), at = StageRing::begin(ratio, line);
        for (int i = 0; i < columns; i += 2) {
            int column = i + lane / 16, from = max(0, min(left / ratio + column - 1, width / ratio - 1));
            if (column >= columns) continue;
            copy_async<4>(ring + at + StageRing::within(line, column, word % 4) + word / 4 * 2,
                          stage + unsigned(row * (width / ratio * channels)) + unsigned(from * channels + channel), 4);
        }
    };
    // What a pair of lines is the first to read; its number is `of` more than a multiple of 4.
    auto bring_pair = [&](int number, int of) {
        bring(2, p, 6, number + 1);
        if (of % 2 == 1) bring(4, q, 4, (number + 1) / 2);
        if (of == 2) bring(8, r, 3, (number + 2) / 4);
        copies_end_group();
    };
    for (int k = -1; k < 1; k++) {
        bring(2, p, 6, pair + k);
        bring(4, q, 4, pair / 2 + k);
        bring(8, r, 3, pair / 4 + k);
    }
    for (int k = 0; k < AHEAD; k++) bring_pair(pair + k, k);

    tokens += (size_t(image) * height + top) * pitch + (left + g) * FIRST + 8 * t;
    uint4 ahead[TOKENS_AHEAD][TILE_LINES];
    for (auto& tile : ahead) {
        for (int l = 0; l < TILE_LINES; l++, tokens += pitch) tile[l] = fetch<8>(tokens);
    }
    // The row of `first` that is column g of each of a tile's products.
    uint4 rows[4];
    for (int i = 0; i < 4; i++) rows[i] = fetch<8>(first + (place.brings() + g % 2 + 2 * i) * FIRST + 8 * t);
    uint4 constant = tap_weights(0, lane, 0);
    const unsigned always[4] = {constant.x, constant.y, constant.z, constant.w};
    const Row16 upper(0, lane), lower(4, lane);
#pragma unroll 1
    for (int start = top; start < end; start += PHASES * TILE_LINES) {
#pragma unroll
        for (int k = 0; k < PHASES; k++, pair++) {
            int y = start + k * TILE_LINES;
            Tile tile;
            {
                uint4(&raw)[TILE_LINES] = ahead[k % TOKENS_AHEAD];
                unsigned a[2][4] = {{raw[0].x, raw[1].x, raw[0].y, raw[1].y},
                                    {raw[0].z, raw[1].z, raw[0].w, raw[1].w}};
                // Where moments are summed too, there are no registers for it.
                if (TOKENS_AHEAD > 1) settle(a, threadIdx.y);
                for (int i = 0; i < 4; i++) {
                    float2 pair = widen(word_of(constants, i));
                    const float from[4] = {pair.x, pair.y, pair.x, pair.y};
                    mma(tile.products[i], a[0], rows[i].x, rows[i].y, from);
                    mma(tile.products[i], a[1], rows[i].z, rows[i].w);
                }
                for (int l = 0; l < TILE_LINES; l++, tokens += pitch) {
                    if (y + TOKENS_AHEAD * TILE_LINES < end) raw[l] = fetch<8>(tokens);
                }
            }
            uint4 varying = weights[k][lane];
            const unsigned now[4] = {varying.x, varying.y, varying.z, varying.w};
            copies_done_but<AHEAD - 1>();
            // What this pair reads is there for all lanes, and all have read what the next copies overwrite.
            __syncwarp();
            bring_pair(pair + AHEAD, (k + AHEAD) % PHASES);
            int from[2] = {upper.place(pair), lower.place(pair)};
            for (int h = 0; h < 2; h++) {
                unsigned x[4];
                load_matrices<true>(ring + (from[0] ^ 16 * h), x);
                mma(tile.products[2 * h], always, x[0], x[1]);
                mma(tile.products[2 * h + 1], always, x[2], x[3]);
                load_matrices<true>(ring + (from[1] ^ 16 * h), x);
                mma(tile.products[2 * h], now, x[0], x[1]);
                mma(tile.products[2 * h + 1], now, x[2], x[3]);
            }
            each(y, k, tile);
        }
    }
    copies_done();
}

// As walk_tiles, for stages at any ratio, or null, and any sizes; one number at a time. What lies outside of z is 0.
template <class Each>
__device__ __forceinline__ void walk_any(const Place& place, const bf16* z, const Stage (&stages)[3], int image,
                                         int height, int width, int channels, int first, int end, Each each) {
    int x = place.left() + place.g;
    for (int y = first; y < end; y += TILE_LINES) {
        Tile tile = {};
#pragma unroll
        for (int l = 0; l < TILE_LINES; l++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int c = place.channel() + i;
                if (x >= width || y + l >= end || c >= channels) continue;
                float sum = __bfloat162float(z[((size_t(image) * height + y + l) * width + x) * channels + c]);
#pragma unroll
                for (const Stage& stage : stages) {
                    if (stage.x == nullptr) continue;
                    Source column = source(x, stage.width, width), line = source(y + l, stage.height, height);
                    auto across = [&](int row) {
                        const bf16* at = stage.x + (size_t(image) * stage.height + row) * stage.width * channels + c;
                        return (1.0f - column.weight) * __bfloat162float(at[column.low * channels]) +
                               column.weight * __bfloat162float(at[column.high * channels]);
                    };
                    sum += (1.0f - line.weight) * across(line.low) + line.weight * across(line.high);
                }
                tile.at(l, i) = sum;
            }
        }
        each(y, tile);
    }
}

// Moments of what a warp has seen, per channel. Deviations are taken from a number of the channel itself, which loses
// nothing however far from 0 the numbers lie.
struct Moments {
    uint4 shift;
    Pack<8> sum, square;

    // Takes in numbers `x` of a pixel.
    __device__ __forceinline__ void take(const uint4& raw) {
        Pack<8> x = widen<8>(raw), shift = widen<8>(this->shift);
        for (int i = 0; i < 8; i++) {
            float apart = x.x[i] - shift.x[i];
            sum.x[i] += apart;
            square.x[i] += apart * apart;
        }
    }

    // All lanes of a warp call it; lanes with g = 0 write what `count` pixels left.
    __device__ __forceinline__ void write(const Place& place, float count, int channels,
                                          float* to /* (2, channels) */) {
        for (int i = 0; i < 8; i++) {
            for (int other = 4; other < 32; other *= 2) {
                sum.x[i] += __shfl_xor_sync(ALL_LANES, sum.x[i], other);
                square.x[i] += __shfl_xor_sync(ALL_LANES, square.x[i], other);
            }
            int c = place.channel() + i;
            if (place.g > 0 || c >= channels) continue;
            float mean = sum.x[i] / count;
            to[c] = widen<8>(shift).x[i] + mean;
            to[channels + c] = relu(square.x[i] - sum.x[i] * mean);
        }
    }
};

// How many lines and columns the numbers of a slab of join_stages come from.
__device__ __forceinline__ int slab_rows(int slab, int height, int width) {
    int strips = (width + TILE_COLUMNS - 1) / TILE_COLUMNS, pieces = (height + PIECE - 1) / PIECE;
    int left = slab % strips * TILE_COLUMNS, first = slab / strips % pieces * PIECE;
    return min(TILE_COLUMNS, width - left) * min(PIECE, height - first);
}

// Where z comes from: tokens and stages at fixed ratios, itself and such stages, itself and stages of any ratio.
enum class From { TOKENS, ITSELF, ANY };

template <From FROM>
__device__ __forceinline__ void join(const bf16* __restrict__ tokens, const bf16* __restrict__ first_weight,
                                     const bf16* __restrict__ shift, bf16* __restrict__ z, const Stage (&stages)[3],
                                     int height, int width, int channels, int side, float* __restrict__ partial) {
    constexpr bool ANY = FROM == From::ANY, TOKENS = FROM == From::TOKENS;
    SHARED(Weights, weights, [1]);
    if constexpr (!ANY) fill_weights(weights[0]);
    Place place(side);
    int pieces = (height + PIECE - 1) / PIECE, image = blockIdx.z / pieces, piece = blockIdx.z % pieces;
    int first = piece * PIECE, end = min(height, first + PIECE), strips = (width + TILE_COLUMNS - 1) / TILE_COLUMNS;
    if (place.strip >= strips || place.group * TILE_CHANNELS >= channels) return;
    bool writes = !ANY || stages[0].x != nullptr;
    Moments moments = {};
    size_t pitch = size_t(width) * channels;
    bf16* line = z + (size_t(image) * height + first) * pitch + (place.left() + place.g) * channels + place.channel();
    auto each = [&](int y, Tile& tile) {
        for (int l = 0; l < TILE_LINES; l++, line += pitch) {
            uint4 raw = tile.rounded(l);
            // What is measured is what is stored.
            if (partial != nullptr && l == 0 && y == first) {
                // All lanes deviate from the same numbers, so that their sums add up.
                auto own = [&](unsigned word) { return __shfl_sync(ALL_LANES, word, place.t); };
                moments.shift = {own(raw.x), own(raw.y), own(raw.z), own(raw.w)};
            }
            if constexpr (ANY) {
                if (place.left() + place.g >= width || y + l >= end) continue;
                for (int i = 0; writes && i < 8 && place.channel() + i < channels; i++) {
                    store<1>(line + i, {widen<8>(raw).x[i]});
                }
            } else if (TOKENS || place.channel() < channels) {
                *reinterpret_cast<uint4*>(line) = raw;
            }
            if (partial != nullptr) moments.take(raw);
        }
    };
    if constexpr (ANY) {
        walk_any(place, z, stages, image, height, width, channels, first, end, each);
    } else if constexpr (TOKENS) {
        SHARED(StageRing, rings, [THREADS / 32]);
        uint4 constants = {0, 0, 0, 0};
        if (shift != nullptr) constants = fetch<8>(shift + place.channel());
        walk_tokens<1>(place, place.left(), tokens, first_weight, constants, stages[0].x, stages[1].x, stages[2].x, image,
                       height, width, channels, first, end, weights[0], rings[place.warp],
                       [&](int y, int, Tile& tile) { each(y, tile); });
    } else {
        walk_tiles(place, z, stages[0].x, stages[1].x, stages[2].x, image, height, width, channels, first, end,
                   weights[0], each);
    }
    if (partial == nullptr) return;
    int slab = blockIdx.z * strips + place.strip;
    float count = float(slab_rows(slab, height, width));
    moments.write(place, count, channels, partial + size_t(slab) * 2 * channels);
}

// z = tokens · firstᵀ + shift + stages p, q and r, each interpolated to z's resolution, and the moments of every piece of 8
// columns. The stages are at a half, a quarter and an eighth of it; height and width are multiples of 8, channels of 32.
// Grid: (as Place has it, ceil(height / PIECE)·images).
KERNEL(THREADS, 2) join_tokens(const bf16* __restrict__ tokens /* (images, height, width, 32) */,
                               const bf16* __restrict__ first /* (channels, 32) */,
                               const bf16* __restrict__ shift /* (channels) or null */,
                               bf16* __restrict__ z /* (images, height, width, channels) */,
                               const bf16* __restrict__ p /* at its resolution */, const bf16* __restrict__ q,
                               const bf16* __restrict__ r, int height, int width, int channels, int side,
                               float* __restrict__ partial /* (slabs, 2, channels): means, squared deviations;
                                                              or null */) {
    const Stage stages[3] = {{p, 0, 0}, {q, 0, 0}, {r, 0, 0}};
    join<From::TOKENS>(tokens, first, shift, z, stages, height, width, channels, side, partial);
}

// z += the stages, for other first stages. Otherwise as join_tokens, but channels are a multiple of 8.
KERNEL(THREADS, 2) join_stages(bf16* __restrict__ z /* (images, height, width, channels) */,
                               const bf16* __restrict__ p /* at its resolution */, const bf16* __restrict__ q,
                               const bf16* __restrict__ r, int height, int width, int channels, int side,
                               float* __restrict__ partial /* (slabs, 2, channels): means, squared deviations;
                                                              or null */) {
    const Stage stages[3] = {{p, 0, 0}, {q, 0, 0}, {r, 0, 0}};
    join<From::ITSELF>(nullptr, nullptr, nullptr, z, stages, height, width, channels, side, partial);
}

// As join_stages, for stages of any sizes. Stages that are null add nothing, from the first one on.
KERNEL(THREADS) join_stages_any(bf16* z /* (images, height, width, channels) */, const bf16* p /* at its resolution */,
                                int p_height, int p_width, const bf16* q, int q_height, int q_width, const bf16* r,
                                int r_height, int r_width, int height, int width, int channels, int side,
                                float* partial /* (slabs, 2, channels): means, squared deviations; or null */) {
    const Stage stages[3] = {{p, p_height, p_width}, {q, q_height, q_width}, {r, r_height, r_width}};
    join<From::ANY>(nullptr, nullptr, nullptr, z, stages, height, width, channels, side, partial);
}

// ---- slabs to totals

// A block of JOIN_THREADS takes JOIN_COLUMNS channels: enough threads that all it reads is under way at once.
constexpr int JOIN_THREADS = 1024, JOIN_COLUMNS = 8, JOIN_LINES = JOIN_THREADS / JOIN_COLUMNS;

// Totals of K numbers that a thread has of its channel over all the block's threads that have the same, in a fixed
// order; thread 32·column of the block receives the column's.
template <int K> __device__ __forceinline__ void column_totals(float (&own)[K]) {
    SHARED(float, tile, [K][JOIN_COLUMNS][JOIN_THREADS / 32]);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int k = 0; k < K; k++) {
        for (int other = JOIN_COLUMNS; other < 32; other *= 2) own[k] += __shfl_xor_sync(ALL_LANES, own[k], other);
        if (lane < JOIN_COLUMNS) tile[k][lane][warp] = own[k];
    }
    __syncthreads();
    if (warp >= JOIN_COLUMNS) return;
    for (int k = 0; k < K; k++) own[k] = group_sum(tile[k][warp][lane], 32);
}

// Joins the moments of slabs. Around a number near all means, sums of deviations and of their squares add up without
// loss. Grid: ceil(channels / 8).
KERNEL(JOIN_THREADS) join_moments(const float* __restrict__ partial /* (slabs, 2, channels) */, int slabs, int height,
                                  int width, int channels,
                                  float* __restrict__ moments /* (2, channels): means, squared deviations */) {
    int column = threadIdx.x % JOIN_COLUMNS, line = threadIdx.x / JOIN_COLUMNS;
    int c = min(int(blockIdx.x) * JOIN_COLUMNS + column, channels - 1);
    float shift = partial[c], own[3] = {};
#pragma unroll 8
    for (int s = line; s < slabs; s += JOIN_LINES) {
        const float* set = partial + size_t(s) * 2 * channels + c;
        float rows = float(slab_rows(s, height, width)), apart = set[0] - shift;
        own[0] += rows;
        own[1] += rows * apart;
        own[2] += set[channels] + rows * apart * apart;
    }
    column_totals(own);
    c = blockIdx.x * JOIN_COLUMNS + threadIdx.x / 32;
    if (threadIdx.x % 32 > 0 || threadIdx.x / 32 >= JOIN_COLUMNS || c >= channels) return;
    float mean = own[1] / own[0];
    moments[c] = partial[c] + mean;
    moments[channels + c] = relu(own[2] - own[1] * mean);
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
    __device__ __forceinline__ float before(float z, int i) const { return z * slope.x[i] + offset.x[i]; }
};

__device__ __forceinline__ void load_classes(const bf16* from, float (&to)[CLASSES]) {
    unsigned pair = *reinterpret_cast<const unsigned*>(from);
    to[0] = __uint_as_float(pair << 16);
    to[1] = __uint_as_float(pair & 0xffff0000u);
}

// Sums of 4 numbers each over `lanes` neighbouring lanes, a power of two from 4 on: a lane receives that of number lane
// / (lanes / 4) of its group. Lanes exchange halves of what they have, so that 6 shuffles of a warp do for all 4, and 3
// where they go among 4 lanes.
__device__ __forceinline__ float group_sums(const float (&x)[4], int lanes) {
    float two[2];
    int apart = lanes / 2;
    bool upper = threadIdx.x & apart;
    for (int i = 0; i < 2; i++) {
        two[i] = (upper ? x[i + 2] : x[i]) + __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + 2], apart);
    }
    apart /= 2;
    upper = threadIdx.x & apart;
    float one = (upper ? two[1] : two[0]) + __shfl_xor_sync(ALL_LANES, upper ? two[0] : two[1], apart);
    return group_sum(one, apart);
}

// The rows of a group of lanes; WIDE stands for 256 channels, a warp's.
template <bool WIDE>
__device__ __forceinline__ void classify_rows(const bf16* __restrict__ z, const float* __restrict__ stats,
                                              const float* __restrict__ gamma, const float* __restrict__ beta,
                                              Dropout drop, const bf16* __restrict__ w, const bf16* __restrict__ bias,
                                              int rows, int channels, int each, unsigned char* __restrict__ passed,
                                              bf16* __restrict__ logits) {
    // Rows whose sums are exchanged at once, and that are under way.
    constexpr int AT_ONCE = WIDE ? 2 : 1;
    if (WIDE) channels = 256;
    int lanes = channels / 8, lane = threadIdx.x % lanes, c = lane * 8;
    int start = (int(blockIdx.x) * (THREADS / lanes) + int(threadIdx.x) / lanes) * each;
    Columns columns(stats, gamma, beta, w, channels, c);
    for (int l = 0; l < CLASSES; l++) {
        for (int i = 0; i < 8; i++) columns.weights[l].x[i] *= 1.0f / (1.0f - drop.rate);
    }
    float shift[CLASSES];
    load_classes(bias, shift);
    // Rows past the last one repeat it, for nothing: all of a warp goes the same way.
    auto element = [&](int row) { return size_t(min(row, rows - 1)) * channels + c; };
    uint4 ahead[AT_ONCE];
    for (int a = 0; a < AT_ONCE; a++) ahead[a] = fetch<8>(z + element(start + a));
    for (int k = 0; k < each; k += AT_ONCE) {
        float terms[AT_ONCE * CLASSES] = {};
        u64 starts[AT_ONCE];
        for (int a = 0; a < AT_ONCE; a++) starts[a] = element(start + k + a);
        unsigned words[AT_ONCE][8];
        drop.words(starts, words);
#pragma unroll
        for (int a = 0; a < AT_ONCE; a++) {
            int row = start + k + a;
            unsigned bits = 0;
            Pack<8> p = widen<8>(ahead[a]);
            if (k + AT_ONCE < each) ahead[a] = fetch<8>(z + element(row + AT_ONCE));
            for (int i = 0; i < 8; i++) {
                float before = columns.before(p.x[i], i);
                // Written so that a NaN passes through and shows in the loss.
                if (before <= 0.0f || !drop.keeps(words[a][i])) continue;
                bits |= 1u << i;
                for (int l = 0; l < CLASSES; l++) terms[a * CLASSES + l] += before * columns.weights[l].x[i];
            }
            if (passed != nullptr && row < rows) passed[size_t(row) * lanes + lane] = (unsigned char)bits;
        }
        if constexpr (WIDE) {
            int number = lane / 8, row = start + k + number / CLASSES;
            float total = group_sums(terms, 32) + (number % CLASSES ? shift[1] : shift[0]);
            if (lane % 8 == 0 && row < rows) {
                logits[size_t(row) * CLASSES + number % CLASSES] = __float2bfloat16_rn(total);
            }
        } else {
            for (int l = 0; l < CLASSES; l++) {
                float total = group_sum(terms[l], lanes) + shift[l];
                if (lane == 0 && start + k < rows) logits[size_t(start + k) * CLASSES + l] = __float2bfloat16_rn(total);
            }
        }
    }
}

// logits = classifier(dropout(relu(batch_norm(z)))); a bit of `passed` tells whether ReLU and dropout let its channel
// through, so that the way back draws no random numbers. A group of channels / 8 lanes, a power of two, takes `each`
// rows in a row, a multiple of 2. Threads: ceil(rows / each)·channels / 8.
KERNEL(THREADS, 3) classify(const bf16* __restrict__ z /* (rows, channels) */,
                            const float* __restrict__ stats /* (2, channels) */,
                            const float* __restrict__ gamma /* (channels) */,
                            const float* __restrict__ beta /* (channels) */, unsigned key0, unsigned key1,
                            unsigned site, const unsigned* __restrict__ step /* (1) */, u64 first, float rate,
                            const bf16* __restrict__ w /* (2, channels) */, const bf16* __restrict__ bias /* (2) */,
                            int rows, int channels, int each,
                            unsigned char* __restrict__ passed /* (rows, channels / 8) or null */,
                            bf16* __restrict__ logits /* (rows, 2) */) {
    Dropout drop(key0, key1, site, step, first, rate);
    channels == 256 ? classify_rows<true>(z, stats, gamma, beta, drop, w, bias, rows, channels, each, passed, logits)
                    : classify_rows<false>(z, stats, gamma, beta, drop, w, bias, rows, channels, each, passed, logits);
}

// Per channel and class, over the rows that pass ReLU and dropout: the sums of dlogit and of dlogit·normalised z, both
// times the dropout's factor, which is `kept` for all of them. Everything else follows from them (classify_sums). Grid:
// as column_partials has it.
KERNEL(THREADS, 3) classify_backward(const bf16* __restrict__ z /* (rows, channels) */,
                                     const float* __restrict__ stats /* (2, channels) */,
                                     const unsigned char* __restrict__ passed /* (rows, channels / 8) */, float kept,
                                     const bf16* __restrict__ dlogits /* (rows, 2) */, int rows, int channels, int slab,
                                     float* __restrict__ partial /* (slabs, 2, 2, channels) */) {
    // A row under way. Several are, as little is done with each.
    struct Row {
        uint4 z;
        unsigned bits, d;
    };
    constexpr int AHEAD = 2;
    int columns = channels / 8, lines = THREADS / columns, column = threadIdx.x % columns;
    int first = blockIdx.y * slab + threadIdx.x / columns, end = min(rows, (int(blockIdx.y) + 1) * slab);
    Pack<8> mean = load<8>(stats + column * 8);
    Pack<8> sums[2 * CLASSES] = {};
    auto read = [&](int row) {
        size_t at = size_t(row) * columns + column;
        unsigned d = *reinterpret_cast<const unsigned*>(dlogits + size_t(row) * CLASSES);
        return Row{fetch<8>(z + at * 8), passed[at], d};
    };
    Row ahead[AHEAD];
    for (int a = 0; a < AHEAD; a++) ahead[a] = read(min(first + a * lines, rows - 1));
    for (int start = first; start < end; start += AHEAD * lines) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int row = start + a * lines;
            Row own = ahead[a];
            if (row + AHEAD * lines < end) ahead[a] = read(row + AHEAD * lines);
            if (row >= end) break;
            Pack<8> p = widen<8>(own.z);
            float d[CLASSES] = {__uint_as_float(own.d << 16), __uint_as_float(own.d & 0xffff0000u)};
            for (int i = 0; i < 8; i++) {
                if (!(own.bits >> i & 1)) continue;
                float apart = p.x[i] - mean.x[i];
                for (int l = 0; l < CLASSES; l++) {
                    sums[l].x[i] += d[l];
                    sums[CLASSES + l].x[i] += d[l] * apart;
                }
            }
        }
    }
    Pack<8> scale = load<8>(stats + channels + column * 8);
    for (int l = 0; l < CLASSES; l++) {
        for (int i = 0; i < 8; i++) {
            sums[l].x[i] *= kept;
            sums[CLASSES + l].x[i] *= kept * scale.x[i];
        }
    }
    store_partials(sums, channels, partial);
}

// Joins the slabs: adds the gradient of the classifier's weights, if asked, and writes those of beta and gamma.
// Grid: ceil(channels / 8).
KERNEL(JOIN_THREADS) classify_sums(const float* __restrict__ partial /* (slabs, 2, 2, channels) */, int slabs,
                                   int channels, const float* __restrict__ gamma /* (channels) */,
                                   const float* __restrict__ beta /* (channels) */,
                                   const bf16* __restrict__ w /* (2, channels) */,
                                   float* __restrict__ dw /* (2, channels) or null */,
                                   float* __restrict__ sums /* (2, channels): beta's, gamma's gradient */) {
    constexpr int KINDS = 2 * CLASSES;
    int column = threadIdx.x % JOIN_COLUMNS, line = threadIdx.x / JOIN_COLUMNS;
    int c = min(int(blockIdx.x) * JOIN_COLUMNS + column, channels - 1);
    float own[KINDS] = {};
#pragma unroll 8
    for (int s = line; s < slabs; s += JOIN_LINES) {
        for (int k = 0; k < KINDS; k++) own[k] += partial[(size_t(s) * KINDS + k) * channels + c];
    }
    column_totals(own);
    c = blockIdx.x * JOIN_COLUMNS + threadIdx.x / 32;
    if (threadIdx.x % 32 > 0 || threadIdx.x / 32 >= JOIN_COLUMNS || c >= channels) return;
    float shift = 0, along = 0;
    for (int l = 0; l < CLASSES; l++) {
        float plain = own[l], normalised = own[CLASSES + l], weight = __bfloat162float(w[l * channels + c]);
        // The activation is gamma·normalised + beta where it passes.
        if (dw != nullptr) dw[l * channels + c] += gamma[c] * normalised + beta[c] * plain;
        shift += weight * plain;
        along += weight * normalised;
    }
    sums[c] = shift;
    sums[channels + c] = along;
}

// dz, the gradient before BatchNorm in training mode; share is 1 / rows of the batch. A thread takes `each` rows that
// are as far apart as the grid has groups. Threads: ceil(rows / each)·channels / 8.
KERNEL(THREADS) classify_backward_input(const bf16* z /* (rows, channels) */, const float* stats /* (2, channels) */,
                                        const float* gamma /* (channels) */,
                                        const unsigned char* passed /* (rows, channels / 8) */, float kept,
                                        const bf16* w /* (2, channels) */, const bf16* dlogits /* (rows, 2) */,
                                        const float* total /* (2, channels) */, float share, int rows, int channels,
                                        int each, bf16* dz /* (rows, channels) */) {
    int lanes = channels / 8, c = int(thread_number() % lanes) * 8;
    size_t groups = (size_t(rows) + each - 1) / each, group = thread_number() / lanes;
    if (group >= groups) return;
    // gamma·scale·(d - share·(shift + normalised·along)) as what d counts - (constant + linear·z).
    Pack<8> constant, linear, weights[CLASSES];
    for (int l = 0; l < CLASSES; l++) weights[l] = load<8>(w + l * channels + c);
    {
        Pack<8> mean = load<8>(stats + c), scale = load<8>(stats + channels + c), g = load<8>(gamma + c);
        Pack<8> shift = load<8>(total + c), along = load<8>(total + channels + c);
        for (int i = 0; i < 8; i++) {
            float slope = scale.x[i] * g.x[i];
            linear.x[i] = slope * share * along.x[i] * scale.x[i];
            constant.x[i] = slope * share * shift.x[i] - linear.x[i] * mean.x[i];
            for (int l = 0; l < CLASSES; l++) weights[l].x[i] *= slope * kept;
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
            float back = bits >> i & 1 ? d[0] * weights[0].x[i] + d[1] * weights[1].x[i] : 0.0f;
            p.x[i] = back - (constant.x[i] + linear.x[i] * p.x[i]);
        }
        store(dz + row * channels + c, p);
    }
}

// A channel's way from the logits' gradients to dz: what each of them counts, the constant and what z counts.
__device__ __forceinline__ float4 way_back(const float* stats, const float* gamma, float kept, const bf16* w,
                                           const float* total, float share, int channels, int c) {
    float scale = stats[channels + c], slope = scale * gamma[c];
    float linear = slope * share * total[channels + c] * scale, constant = slope * share * total[c] - linear * stats[c];
    float low = slope * kept * __bfloat162float(w[c]), high = slope * kept * __bfloat162float(w[channels + c]);
    return {low, high, constant, linear};
}

__device__ __forceinline__ float back_to(float z, const float4& way, float low, float high, bool passed) {
    float back = passed ? low * way.x + high * way.y : 0.0f;
    return back - (way.z + way.w * z);
}

// The same, and the gradient of the first stage's tokens, dz · first, for which dz is not read again. Channels are a multiple of
// 32, up to 256. A warp takes 16 rows at a time, `each` times, in the order for 16-byte access (mma.cuh).
// Grid: ceil(rows / (16·THREADS / 32·each)).
KERNEL(THREADS, 3) classify_backward_tokens(
    const bf16* __restrict__ z /* (rows, channels) */, const float* __restrict__ stats /* (2, channels) */,
    const float* __restrict__ gamma /* (channels) */, const unsigned char* __restrict__ passed /* (rows, channels / 8) */,
    float kept, const bf16* __restrict__ w /* (2, channels) */, const bf16* __restrict__ dlogits /* (rows, 2) */,
    const float* __restrict__ total /* (2, channels) */, float share, const bf16* __restrict__ first /* (channels, 32) */,
    int rows, int channels, int each, bf16* __restrict__ dz /* (rows, channels) */,
    bf16* __restrict__ dtokens /* (rows, 32) */) {
    // Channels whose weights are square.
    constexpr int SLICE = FIRST, SLICES = 256 / SLICE, TALL = 16;
    SHARED(Square<FIRST>, weights, [SLICES]);
    // Per channel; what lanes read together side by side.
    SHARED(float4, ways, [SLICES * SLICE]);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, slices = channels / SLICE;
    for (int s = 0; s < slices; s++) weights[s].copy(first + s * SLICE * FIRST, FIRST, threadIdx.x, THREADS);
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        ways[(c / SLICE * 8 + c % 8) * 4 + c % SLICE / 8] = way_back(stats, gamma, kept, w, total, share, channels, c);
    }
    copies_done();
    __syncthreads();

    for (int k = 0; k < each; k++) {
        int start = ((blockIdx.x * each + k) * (THREADS / 32) + threadIdx.x / 32) * TALL;
        if (start >= rows) return;
        // Rows past the last one repeat it, for nothing.
        auto row = [&](int half) { return size_t(min(start + half * 8 + g, rows - 1)); };
        auto at = [&](int half, int slice) { return row(half) * channels + slice * SLICE + t * 8; };
        unsigned bits[2];
        uint4 ahead[2];
        float d[2][CLASSES], sums[FIRST / 8][4] = {};
        auto read = [&](int half, int slice) {
            ahead[half] = fetch<8>(z + at(half, slice));
            bits[half] = passed[at(half, slice) / 8];
        };
        for (int half = 0; half < 2; half++) {
            load_classes(dlogits + row(half) * CLASSES, d[half]);
            read(half, 0);
        }
#pragma unroll 1
        for (int s = 0; s < slices; s++) {
            Pack<8> p[2] = {widen<8>(ahead[0]), widen<8>(ahead[1])};
            for (int i = 0; i < 8; i++) {
                float4 way = ways[(s * 8 + i) * 4 + t];
                for (int half = 0; half < 2; half++) {
                    p[half].x[i] = back_to(p[half].x[i], way, d[half][0], d[half][1], bits[half] >> i & 1);
                }
            }
            unsigned a[2][4];
            for (int half = 0; half < 2; half++) {
                uint4 own = words_of(p[half].x);
                if (start + half * 8 + g < rows) *reinterpret_cast<uint4*>(dz + at(half, s)) = own;
                if (s + 1 < slices) read(half, s + 1);
                set_half(a[0], a[1], half, own);
            }
            weights[s].multiply(a, sums);
        }
        for (int half = 0; half < 2; half++) {
            float own[8];
            for (int i = 0; i < 8; i++) own[i] = sums[i / 2][half * 2 + i % 2];
            if (start + half * 8 + g >= rows) continue;
            *reinterpret_cast<uint4*>(dtokens + row(half) * FIRST + t * 8) = words_of(own);
        }
    }
}

// Rows of a tile, and pieces of 8 channels of a row, of the most channels.
constexpr int BACK_TALL = 32, BACK_PIECES = 256 / 8;

// What a block has of a tile.
struct Back {
    Aligned dz[BACK_TALL * BACK_PIECES];
    Turned<FIRST> tokens[BACK_TALL];
    unsigned char passed[BACK_TALL][BACK_PIECES];
    unsigned dlogits[BACK_TALL];

    // The same piece of eight rows is in different banks.
    __device__ __forceinline__ bf16* piece(int row, int piece) { return dz[row * BACK_PIECES + (piece ^ row % 8)].at; }
};

// The same, and the gradient of the first stage's weight, dzᵀ · tokens, for which dz is not read again either. One product sums
// over channels, the other over rows, so tiles of dz go through shared memory: of the tokens' gradient, a warp makes 16 rows
// and 8 columns of each tile, with its part of `first` in registers, and of the weight's it owns 32 channels, over all tiles of
// the block. What a tile is made of is under way while the one before is multiplied, and two places take turns, so that one
// barrier a tile is enough. Of fewer than 256 channels, the missing ones are zeros.
//
// A fixed number of blocks share the tiles: they leave few partial sums, and the same on every GPU. Grid: any number of blocks,
// no more than there are tiles.
KERNEL(THREADS, 2) classify_backward_tokens_all(
    const bf16* __restrict__ z /* (rows, channels) */, const float* __restrict__ stats /* (2, channels) */,
    const float* __restrict__ gamma /* (channels) */, const unsigned char* __restrict__ passed /* (rows, channels / 8) */,
    float kept, const bf16* __restrict__ w /* (2, channels) */, const bf16* __restrict__ dlogits /* (rows, 2) */,
    const float* __restrict__ total /* (2, channels) */, float share, const bf16* __restrict__ first /* (channels, 32) */,
    const bf16* __restrict__ tokens /* (rows, 32) */, int rows, int channels, bf16* __restrict__ dz /* (rows, channels) */,
    bf16* __restrict__ dtokens /* (rows, 32) */, float* __restrict__ partial /* (blocks, channels, 32) */) {
    // Pieces of a thread, one in every so many rows.
    constexpr int TALL = BACK_TALL, EACH = TALL * BACK_PIECES / THREADS, APART = TALL / EACH, SLICES = BACK_PIECES * 8 / FIRST;
    SHARED(Back, rooms, [2]);
    // Per channel; the first channels of all pieces side by side, then the second ones.
    SHARED(float4, ways, [8][BACK_PIECES]);
    int pieces = channels / 8;
    // Made anew for each tile, which is cheaper than to keep all that follows from it.
    auto own = [] { return opaque(threadIdx.x); };
    unsigned ahead[EACH][4];
    auto read = [&](int start) {
        int lane = own() % 32, warp = own() / 32;
        for (int k = 0; k < EACH; k++) {
            int row = start + warp + k * APART;
            uint4 raw = {0, 0, 0, 0};
            if (lane < pieces && row < rows) raw = fetch<8>(z + (size_t(row) * pieces + lane) * 8);
            ahead[k][0] = raw.x;
            ahead[k][1] = raw.y;
            ahead[k][2] = raw.z;
            ahead[k][3] = raw.w;
        }
    };
    // Tokens past the last one are zeros: what stands for dz there does not count.
    auto copy_tokens = [&](Back& to, int start) {
        unsigned thread = own();
        int row = thread / 4, part = thread % 4;
        if (row >= TALL) return;
        bool exists = start + row < rows;
        copy_async<16>(turned(to.tokens, row, part), tokens + size_t(start + row) * FIRST + part * 8, exists ? 16 : 0);
    };
    auto copy_gradients = [&](Back& to, int start) {
        unsigned thread = own();
        int row = thread / 8, piece = thread % 8 * 4;
        size_t at = start + row;
        int bytes = start + row < rows ? 4 : 0;
        if (piece < pieces) copy_async<4>(&to.passed[row][piece], passed + at * pieces + piece, bytes);
        if (piece == 0) copy_async<4>(&to.dlogits[row], dlogits + at * CLASSES, bytes);
    };

    int c = threadIdx.x, start = blockIdx.x * TALL, stride = gridDim.x * TALL, odd = 0;
    // `first` passes through the place of a tile.
    for (int i = c; i < channels * FIRST / 8; i += THREADS) copy_async<16>(&rooms[0].dz[i], first + i * 8, 16);
    copy_tokens(rooms[0], start);
    copy_gradients(rooms[0], start);
    copy_gradients(rooms[1], start + stride);
    read(start);
    float4 way = {0.0f, 0.0f, 0.0f, 0.0f};
    if (c < channels) way = way_back(stats, gamma, kept, w, total, share, channels, c);
    ways[c % 8][c / 8] = way;
    copies_done();
    __syncthreads();
    unsigned weights[SLICES][4] = {};
    for (int s = 0; s < SLICES; s++) {
        int row = s * 32 + c % 32;
        if (s * 32 < channels) load_matrices<true>(rooms[0].dz[row * (FIRST / 8) + c / 64].at, weights[s]);
    }
    __syncthreads();

    float sums[2][FIRST / 8][4] = {};
#pragma unroll 1
    for (; start < rows; start += stride, odd ^= 1) {
        Back& room = rooms[odd];
        int lane = own() % 32, warp = own() / 32;
        // A byte of each row.
        unsigned bits = 0, d[EACH];
        for (int k = 0; k < EACH; k++) {
            bits |= unsigned(room.passed[warp + k * APART][lane]) << 8 * k;
            d[k] = room.dlogits[warp + k * APART];
        }
        for (int i = 0; i < 4; i++) {
            float4 low = ways[2 * i][lane], high = ways[2 * i + 1][lane];
            for (int k = 0; k < EACH; k++) {
                float2 x = widen(ahead[k][i]), both = widen(d[k]);
                x.x = back_to(x.x, low, both.x, both.y, bits >> (8 * k + 2 * i) & 1);
                x.y = back_to(x.y, high, both.x, both.y, bits >> (8 * k + 2 * i + 1) & 1);
                ahead[k][i] = pair_of(x.x, x.y);
            }
        }
        for (int k = 0; k < EACH; k++) {
            int row = warp + k * APART;
            uint4 raw = {ahead[k][0], ahead[k][1], ahead[k][2], ahead[k][3]};
            *reinterpret_cast<uint4*>(room.piece(row, lane)) = raw;
            row += start;
            if (lane < pieces && row < rows) *reinterpret_cast<uint4*>(dz + (size_t(row) * pieces + lane) * 8) = raw;
        }
        read(start + stride);
        copies_done();
        // The tile is there, and all are done with the one before.
        __syncthreads();
        copy_tokens(rooms[odd ^ 1], start + stride);
        copy_gradients(room, start + 2 * stride);

        int tall = warp % 2 * 16, column = warp / 2 * 8;
        float product[4] = {};
        for (int s = 0; s < SLICES; s++) {
            for (int h = 0; h < 2; h++) {
                unsigned a[4];
                load_matrices<false>(room.piece(tall + lane % 16, 4 * s + 2 * h + lane / 16), a);
                mma(product, a, weights[s][2 * h], weights[s][2 * h + 1]);
            }
        }
        for (int half = 0; half < 2; half++) {
            int row = start + tall + half * 8 + lane / 4;
            unsigned* to = reinterpret_cast<unsigned*>(dtokens + size_t(row) * FIRST + column + lane % 4 * 2);
            if (row < rows) *to = pair_of(product[2 * half], product[2 * half + 1]);
        }
        for (int k = 0; k < TALL; k += 16) {
            unsigned a[2][4], b[2][4];
            for (int i = 0; i < 2; i++) {
                load_matrices<true>(room.piece(k + lane / 16 * 8 + lane % 8, 4 * warp + 2 * i + lane / 8 % 2), a[i]);
                along(room.tokens, k, 16 * i, b[i]);
            }
            for (int i = 0; i < 2; i++) {
                for (int n = 0; n < FIRST / 8; n++) mma(sums[i][n], a[i], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
        }
    }
    copies_done();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp * FIRST >= channels) return;
    for (int i = 0; i < 4; i++) {
        float* to = partial + (size_t(blockIdx.x) * channels + warp * 32 + i * 8 + lane / 4) * FIRST + lane % 4 * 2;
        for (int n = 0; n < FIRST / 8; n++) {
            const float* pair = sums[i / 2][n] + i % 2 * 2;
            *reinterpret_cast<float2*>(to + n * 8) = float2{pair[0], pair[1]};
        }
    }
}

// ---- evaluation: from the stages to the logits

// Lines of a picture between barriers.
constexpr int SECTION = PHASES * TILE_LINES;

// A tile's numbers through BatchNorm, ReLU and the classifier, summed over a quad: lane t receives line t / 2's of
// class t % 2.
__device__ __forceinline__ float tile_logits(Tile& tile, const Columns& own) {
    float terms[TILE_LINES * CLASSES] = {};
    for (int l = 0; l < TILE_LINES; l++) {
        for (int i = 0; i < 8; i++) {
            float a = relu(own.before(tile.at(l, i), i));
            for (int k = 0; k < CLASSES; k++) terms[l * CLASSES + k] += a * own.weights[k].x[i];
        }
    }
    return group_sums(terms, 4);
}

// logits = classifier(relu(batch_norm(z + stages p, q and r, each interpolated to z's resolution))), where z = tokens ·
// firstᵀ + shift is nowhere in memory. Sizes and grid are as join_tokens has them, but channels are 32 to 256, a power
// of two, and `side` is channels / 32.
//
// What the tile's products leave in a lane, the classifier's read: the channels that it sums over are in their columns'
// order.
KERNEL(THREADS, 2) classify_stages(const bf16* __restrict__ tokens /* (images, height, width, 32) */,
                                   const bf16* __restrict__ first /* (channels, 32) */,
                                   const bf16* __restrict__ shift /* (channels) or null */,
                                   const bf16* __restrict__ p /* at its resolution */, const bf16* __restrict__ q,
                                   const bf16* __restrict__ r, int height, int width, int channels, int side,
                                   const float* __restrict__ stats /* (2, channels) */,
                                   const float* __restrict__ gamma /* (channels) */,
                                   const float* __restrict__ beta /* (channels) */,
                                   const bf16* __restrict__ w /* (2, channels) */,
                                   const bf16* __restrict__ bias /* (2) */,
                                   bf16* __restrict__ logits /* (images, height, width, 2) */) {
    SHARED(Weights, weights, [1]);
    SHARED(StageRing, rings, [THREADS / 32]);
    // Of each warp's channels, both classes, for two sections: while one is added up, the other is filled.
    SHARED(float2, sums, [2][THREADS / 32][SECTION][TILE_COLUMNS]);
    fill_weights(weights[0]);
    Place place(side);
    int g = place.g, t = place.t;
    // Warps past the last strip repeat it, for nothing: all of a block meet at barriers.
    int left = min(place.left(), width - TILE_COLUMNS);
    int pieces = (height + PIECE - 1) / PIECE, image = blockIdx.z / pieces;
    int top = blockIdx.z % pieces * PIECE, end = min(height, top + PIECE);
    Columns own(stats, gamma, beta, w, channels, place.channel());
    if (shift != nullptr) {
        Pack<8> constants = load<8>(shift + place.channel());
        for (int i = 0; i < 8; i++) own.offset.x[i] += constants.x[i] * own.slope.x[i];
    }
    // Of the classifier, class g.
    uint4 row = {0, 0, 0, 0};
    if (g < CLASSES) row = fetch<8>(w + g * channels + place.channel());
    float constants[CLASSES];
    load_classes(bias, constants);
    auto each = [&](int y, int k, Tile& tile) {
        int start = y - k * TILE_LINES, buffer = start / SECTION % 2;
        float totals[4] = {};
        for (int h = 0; h < 2; h++) {
            unsigned x[4];
            for (int i = 0; i < 4; i++) {
                // Of line i % 2, the pair of channels that product 2·h + i / 2 made.
                int c = 4 * h + i / 2 * 2, l = i % 2;
                x[i] = relu_pair(own.before(tile.at(l, c), c), own.before(tile.at(l, c + 1), c + 1));
            }
            mma(totals, x, h == 0 ? row.x : row.z, h == 0 ? row.y : row.w);
        }
        for (int l = 0; l < TILE_LINES && t == 0; l++) {
            sums[buffer][place.warp][k * TILE_LINES + l][g] = {totals[2 * l], totals[2 * l + 1]};
        }
        if (k < PHASES - 1) return;
        // Who fills this buffer again has passed the next section's barrier, after all have left this one.
        __syncthreads();
        int columns = place.strips * TILE_COLUMNS;
        for (int i = threadIdx.x; i < columns * SECTION; i += blockDim.x) {
            int column = i % columns, line = i / columns, x = blockIdx.y * columns + column;
            if (x >= width) continue;
            float2 total = {constants[0], constants[1]};
            for (int s = 0; s < side; s++) {
                float2 part = sums[buffer][column / TILE_COLUMNS * side + s][line][column % TILE_COLUMNS];
                total.x += part.x;
                total.y += part.y;
            }
            size_t token = (size_t(image) * height + start + line) * width + x;
            *reinterpret_cast<unsigned*>(logits + token * CLASSES) = pair_of(total.x, total.y);
        }
    };
    walk_tokens<2>(place, left, tokens, first, {0, 0, 0, 0}, p, q, r, image, height, width, channels, top, end,
                   weights[0], rings[place.warp], each);
}

// The same for stages of any sizes, or null.
KERNEL(THREADS) classify_stages_any(const bf16* z /* (images, height, width, channels) */,
                                    const bf16* p /* at its resolution */, int p_height, int p_width, const bf16* q,
                                    int q_height, int q_width, const bf16* r, int r_height, int r_width, int height,
                                    int width, int channels, int side, const float* stats /* (2, channels) */,
                                    const float* gamma /* (channels) */, const float* beta /* (channels) */,
                                    const bf16* w /* (2, channels) */, const bf16* bias /* (2) */,
                                    bf16* logits /* (images, height, width, 2) */) {
    const Stage stages[3] = {{p, p_height, p_width}, {q, q_height, q_width}, {r, r_height, r_width}};
    // Of each warp's channels.
    SHARED(float, sums, [THREADS / 32][PIECE][TILE_COLUMNS][CLASSES]);
    Place place(side);
    Columns own(stats, gamma, beta, w, channels, place.channel());
    int pieces = (height + PIECE - 1) / PIECE, image = blockIdx.z / pieces;
    int first = blockIdx.z % pieces * PIECE, end = min(height, first + PIECE);
    if (place.left() < width) {
        auto each = [&](int y, Tile& tile) {
            float total = tile_logits(tile, own);
            sums[place.warp][y - first + place.t / CLASSES][place.g][place.t % CLASSES] = total;
        };
        walk_any(place, z, stages, image, height, width, channels, first, end, each);
    }
    __syncthreads();
    float shift[CLASSES];
    load_classes(bias, shift);
    int columns = place.strips * TILE_COLUMNS;
    for (int i = threadIdx.x; i < columns * (end - first); i += blockDim.x) {
        int column = i % columns, y = i / columns, x = blockIdx.y * columns + column;
        if (x >= width) continue;
        float total[CLASSES] = {};
        for (int s = 0; s < side; s++) {
            for (int k = 0; k < CLASSES; k++) {
                total[k] += sums[column / TILE_COLUMNS * side + s][y][column % TILE_COLUMNS][k];
            }
        }
        size_t token = (size_t(image) * height + first + y) * width + x;
        *reinterpret_cast<unsigned*>(logits + token * CLASSES) = pair_of(total[0] + shift[0], total[1] + shift[1]);
    }
}

// ---- the way back to the stages

// The transpose is a product with constant weights as well: a warp walks down 16 columns and 32 channels of dz, and
// with every line sums what each 8 of them and 4 columns on either side give to the 4, 2 and 1 pixels of the stages
// that lie there. Two lines of each stage are under way at any time, at even and at odd rows: 16 rows of weights with
// the 16 columns. Beyond an edge of dz lie its columns mirrored, which gives the edge's pixels of the stages what is
// theirs.
//
// Neighbouring lanes bring the same channels of several pixels to a product, and pixels lie a multiple of all banks of
// L1 apart. So lines are copied to shared memory and go from there to the products as matrices; pieces of 16 bytes are
// permuted, so that neither touches a bank twice.
constexpr int SPLIT_PARTS = 2, SPLIT_WIDTH = SPLIT_PARTS * TILE_COLUMNS, SPLIT_COLUMNS = SPLIT_WIDTH + 8;
// Lines of dz in shared memory: one is summed while the others are under way.
constexpr int SPLIT_RING = 3;
constexpr int SPLIT_PERIOD = 16;

// The weights of row g, for even and odd lines of its stage, of columns 2·t, 2·t + 1, 2·t + 8 and 2·t + 9, counted
// from 4 left of the part.
__device__ __forceinline__ uint4 split_weights(int lane, int y) {
    int g = lane / 4, t = lane % 4, ratio = g < 4 ? 2 : g < 6 ? 4 : 8, column = g < 4 ? g : g < 6 ? g - 4 : 0;
    int above = (2 * y + 1 + ratio) / (2 * ratio) - 1;  // the stage's line above line y, from -1 on
    float weight = g < 7 ? tent(above, y, ratio) : 0.0f, next = g < 7 ? 1.0f - weight : 0.0f;
    float even = above % 2 == 0 ? weight : next, odd = above % 2 == 0 ? next : weight, across[4];
    for (int s = 0; s < 4; s++) across[s] = tent(column, 8 * (s / 2) + 2 * t + s % 2 - 4, ratio);
    return {pair_of(across[0] * even, across[1] * even), pair_of(across[0] * odd, across[1] * odd),
            pair_of(across[2] * even, across[3] * even), pair_of(across[2] * odd, across[3] * odd)};
}

// The sums of a warp on the way to the stages: of row g of the weights, even lines in the first two numbers of each
// product. Column n of product i is channel 8·i + n.
struct Split {
    float products[4][4];

    // A line's channels 8·t.. + 8. All lanes of a warp call it; those that `begin` begin the next line but one.
    __device__ __forceinline__ uint4 take(bool odd, bool begin) {
        unsigned words[4];
        for (int i = 0; i < 4; i++) {
            float(&x)[4] = products[i];
            words[i] = odd ? pair_of(x[2], x[3]) : pair_of(x[0], x[1]);
            if (begin && odd) x[2] = x[3] = 0.0f;
            if (begin && !odd) x[0] = x[1] = 0.0f;
        }
        transpose_quad(words);
        return {words[0], words[1], words[2], words[3]};
    }

    // Adds odd lines to even ones: a stage repeats its edge, so what goes to a line beyond it is the edge's.
    __device__ __forceinline__ void fold() {
        for (int i = 0; i < 4; i++) {
            for (int e = 0; e < 2; e++) {
                products[i][e] += products[i][2 + e];
                products[i][2 + e] = 0.0f;
            }
        }
    }
};

// The transpose of joining stages at a half, a quarter and an eighth of dz's resolution, in one pass over dz. Height,
// width and channels are multiples of 8. Grid: (as Place has it, with strips of SPLIT_WIDTH columns, images).
KERNEL(THREADS, 2) split_stages(const bf16* __restrict__ dz /* (images, height, width, channels) */, int height,
                                int width, int channels, int side,
                                bf16* __restrict__ p /* (images, height / 2, width / 2, channels) */,
                                bf16* __restrict__ q /* (images, height / 4, width / 4, channels) */,
                                bf16* __restrict__ r /* (images, height / 8, width / 8, channels) */) {
    constexpr int LINES = 8, LINE = SPLIT_COLUMNS * TILE_CHANNELS, EIGHT = 8 * TILE_CHANNELS;
    SHARED(uint4, weights, [SPLIT_PERIOD][32]);
    // By pixel, 4 pieces of 8 channels: piece i of pixel x at i ^ x / 2 % 4.
    SHARED(Aligned, lines, [THREADS / 32][SPLIT_RING * LINE / 8]);
    for (int i = threadIdx.x; i < SPLIT_PERIOD * 32; i += blockDim.x) {
        weights[i / 32][i % 32] = split_weights(i % 32, i / 32);
    }
    __syncthreads();
    Place place(side);
    int left = place.strip * SPLIT_WIDTH;
    if (left >= width || place.group * TILE_CHANNELS >= channels) return;
    int g = place.g, t = place.t, lane = threadIdx.x % 32, c = place.channel();
    size_t image = blockIdx.z, area = size_t(height) * width * channels;
    unsigned pitch = unsigned(width) * channels;
    bf16* ring = lines[place.warp][0].at;
    // A lane copies piece t of pixels g, g + 8 and g + 16.
    bf16* copy = ring + g * TILE_CHANNELS + (t ^ g / 2) * 8;
    unsigned columns[SPLIT_COLUMNS / 8];
    for (int s = 0; s < SPLIT_COLUMNS / 8; s++) {
        int x = left + 8 * s + g - 4;
        // Past the right edge's mirror image, for parts beyond the width, anything does.
        x = x < 0 ? -1 - x : x >= width ? max(2 * width - 1 - x, 0) : x;
        columns[s] = unsigned(x * channels + min(c, channels - 8));
    }
    dz += image * area;
    auto bring = [&](int slot, bool exists) {
        for (int s = 0; s < SPLIT_COLUMNS / 8; s++) {
            if (exists) copy_async<16>(copy + slot * LINE + s * EIGHT, dz + columns[s], 16);
        }
        dz += pitch;
        copies_end_group();
    };
    // Of a part's matrices, it names pixel lane % 16 of piece lane / 16, or two pieces further.
    int pixel = lane % 16, near = pixel * TILE_CHANNELS + (lane / 16 ^ pixel / 2 % 4) * 8, far = near ^ 16;
    // Where the lane's pixel of its stage lies, whose lines it writes.
    int ratio = g < 4 ? 2 : g < 6 ? 4 : 8, own = left / ratio + (g < 4 ? g : g < 6 ? g - 4 : 0);
    bf16* to = (g < 4 ? p : g < 6 ? q : r) + image * (area / (ratio * ratio)) + size_t(own) * channels + c;
    unsigned to_pitch = pitch / ratio;
    int next = TILE_COLUMNS / ratio * channels;  // from part to part
    auto inside = [&](int part) { return c < channels && left + part * TILE_COLUMNS < width; };
    Split split[SPLIT_PARTS] = {};
    for (int k = 0; k < SPLIT_RING - 1; k++) bring(k, true);
    int slot = 0;
    for (int start = 0; start < height; start += LINES) {
#pragma unroll
        for (int k = 0; k < LINES; k++) {
            int y = start + k;
            uint4 varying = weights[y % SPLIT_PERIOD][lane];
            const unsigned now[4] = {varying.x, varying.y, varying.z, varying.w};
            copies_done_but<SPLIT_RING - 2>();
            // The line is there for all lanes, and all have read the one before, whose place the next takes.
            __syncwarp();
            bring(slot == 0 ? SPLIT_RING - 1 : slot - 1, y + SPLIT_RING - 1 < height);
            for (int part = 0; part < SPLIT_PARTS; part++) {
                for (int h = 0; h < 2; h++) {
                    unsigned x[4];
                    load_matrices<true>(ring + (h == 0 ? near : far) + slot * LINE + part * EIGHT, x);
                    mma(split[part].products[2 * h], now, x[0], x[1]);
                    mma(split[part].products[2 * h + 1], now, x[2], x[3]);
                }
            }
            slot = slot == SPLIT_RING - 1 ? 0 : slot + 1;
            // A line of a stage is complete when the cell below it is; before the first, it lies beyond the edge.
            if (k == 7) continue;
            bool complete = k % 2 == 0 ? g < 4 : k % 4 == 1 ? g / 2 == 2 : g == 6;
            int line = k % 2 == 0 ? y / 2 - 1 : k % 4 == 1 ? (y - 1) / 4 - 1 : (y - 3) / 8 - 1;
            for (int part = 0; part < SPLIT_PARTS; part++) {
                if (line < 0) {
                    if (complete) split[part].fold();
                    continue;
                }
                bool odd = k == 3 ? line % 2 == 1 : k == 0 || k == 4 || k == 1;
                uint4 words = split[part].take(odd, complete);
                if (!complete || !inside(part)) continue;
                *reinterpret_cast<uint4*>(to + size_t(line * to_pitch) + part * next) = words;
            }
        }
    }
    // What lies beyond the lower edge is the last line's, which may be an odd one.
    for (int part = 0; part < SPLIT_PARTS; part++) {
        split[part].fold();
        uint4 words = split[part].take(false, false);
        if (g == 7 || !inside(part)) continue;
        *reinterpret_cast<uint4*>(to + size_t((height / ratio - 1) * to_pitch) + part * next) = words;
    }
}
