// Gathering convolution windows into rows (ky, kx, channel), so that a convolution becomes a product, and the way back.
//
// pixel_patches reads 8-bit pixels and writes normalised bf16 rows in one pass: flip, brightness and contrast (a table
// of 256 levels) and ImageNet normalisation cost no pass of their own. A block normalises the lines that a strip of
// windows needs, by a table, into shared memory, and from there writes the strip's rows, one behind the other and 16
// bytes at a time. Where a picture is only embedded, its rows are never written: embed_pixels multiplies them by the
// weights as they lie in shared memory, and normalises what comes out, once for the tokens and once more for attention.
// patches_backward gathers per input token instead of scattering per window, so no two threads add to one number.
#include "common.cuh"
#include "layer_norm.cuh"
#include "mma.cuh"

// Numbers of the lines that a strip needs at most: side·((strip - 1)·stride + side)·3.
constexpr int STAGED = 12288;

// Levels to normalised bf16 numbers, by channel (the mean and standard deviation of ImageNet). A thread per level.
__device__ __forceinline__ void fill_table(const unsigned char* levels, unsigned short (*table)[3]) {
    float level = float(levels[threadIdx.x]) / 255.0f;
    table[threadIdx.x][0] = pair_of((level - 0.485f) / 0.229f, 0.0f);
    table[threadIdx.x][1] = pair_of((level - 0.456f) / 0.224f, 0.0f);
    table[threadIdx.x][2] = pair_of((level - 0.406f) / 0.225f, 0.0f);
}

// Grid: (ceil(out_size / strip), out_size, images), where they begin; blocks of 256, the levels.
KERNEL(THREADS) pixel_patches(const unsigned char* pixels /* (pictures, size, size, 3) */,
                              const int* positions /* (images): which picture */,
                              const unsigned char* levels /* (images, 256) */,
                              const unsigned char* flips /* (images) */, int size, int side, int stride, int padding,
                              int out_size, int strip, bf16* out /* (images, out_size², side²·3) */) {
    SHARED(unsigned short, table, [THREADS][3]);
    SHARED(unsigned short, staged, [STAGED]);
    int first = blockIdx.x * strip, windows = min(strip, out_size - first), line = ((windows - 1) * stride + side) * 3;
    fill_table(levels + blockIdx.z * 256, table);
    __syncthreads();

    const unsigned char* image = pixels + size_t(positions[blockIdx.z]) * size * size * 3;
    bool flip = flips[blockIdx.z];
    int across = line / 3, left = first * stride - padding, top = int(blockIdx.y) * stride - padding;
    for (int i = threadIdx.x, ky = 0;; i += THREADS) {
        for (; i >= across; i -= across) ky++;
        if (ky >= side) break;
        int y = top + ky, x = left + i;
        bool inside = y >= 0 && y < size && x >= 0 && x < size;
        int pixel = (y * size + (flip ? size - 1 - x : x)) * 3;
        for (int c = 0; c < 3; c++) staged[ky * line + i * 3 + c] = inside ? table[image[pixel + c]][c] : 0;
    }
    __syncthreads();

    // Where the strip's rows lie in `out`; what is not a multiple of 8 at its ends is written number by number.
    int run = side * 3, numbers = windows * side * run;
    size_t begin = ((size_t(blockIdx.z) * out_size + blockIdx.y) * out_size + first) * (side * run);
    int shift = int(begin % 8);
    unsigned short* rows = reinterpret_cast<unsigned short*>(out) + (begin - shift);
    for (int i = int(threadIdx.x) * 8 - shift; i < numbers; i += THREADS * 8) {
        if (i >= 0 && i + 8 <= numbers && run >= 8) {
            // At most one line ends among the eight.
            int window = i / (side * run), in_window = i - window * (side * run), ky = in_window / run;
            int end = run * (ky + 1) - in_window, at = window * stride * 3 + ky * line + run - end;
            int jump = line - run + (ky == side - 1 ? stride * 3 - side * line : 0);
            unsigned words[4];
            for (int j = 0; j < 4; j++) {
                int e = 2 * j, low = at + e + (e >= end ? jump : 0), high = at + e + 1 + (e + 1 >= end ? jump : 0);
                words[j] = staged[low] | unsigned(staged[high]) << 16;
            }
            uint4 raw = {words[0], words[1], words[2], words[3]};
            *reinterpret_cast<uint4*>(rows + shift + i) = raw;
        } else {
#pragma unroll 1  // rare
            for (int e = max(i, 0); e < min(i + 8, numbers); e++) {
                rows[shift + e] = staged[e / (side * run) * stride * 3 + e / run % side * line + e % run];
            }
        }
    }
}

// ---- pixels straight to tokens

// SegFormer's first patch embedding. A line of a window is 21 numbers; here one of weight 0 goes before, so that pairs of
// them are aligned, and the 154 of a window are filled up to a multiple of 16.
constexpr int SIDE = 7, STRIDE = 4, PADDING = 3, LINE = 3 * SIDE, PAIRS = (LINE + 1) / 2, DEPTH = 160;
// A block embeds two lines of windows at a time, STRIP side by side, sixteen a warp. Lines of pixels are staged for that, by
// groups of four, whose 12 bytes are three words in memory; the first pixel of a line is one before the first window's.
constexpr int STRIP = THREADS / 4, STAGED_LINES = STRIDE + SIDE, GROUPS = STRIP + 1, PITCH = GROUPS * 12;

// The pixels that two lines of windows take, on their way to shared memory.
struct Pixels {
    static constexpr int EACH = (GROUPS * STAGED_LINES + THREADS - 1) / THREADS;
    unsigned words[EACH][3];

    // Asks for those of lines from `top` and columns from `left` on; 0 where the picture has none, and in `outside` a bit.
    __device__ __forceinline__ unsigned fetch(const unsigned char* image, bool flip, int size, int left, int top) {
        unsigned outside = 0;
        for (int k = 0; k < EACH; k++) {
            int i = threadIdx.x + k * THREADS, y = top + i / GROUPS, x = left + i % GROUPS * 4;
            if (i < GROUPS * STAGED_LINES && y >= 0 && y < size && x >= 0 && x < size) {
                const unsigned* from = reinterpret_cast<const unsigned*>(image + (y * size + (flip ? size - 4 - x : x)) * 3);
                for (int w = 0; w < 3; w++) words[k][w] = from[w];
            } else {
                outside |= 1u << k;
            }
        }
        return outside;
    }

    // Normalises them.
    template <bool FLIP>
    __device__ __forceinline__ void put(unsigned outside, const unsigned short (*table)[3], unsigned short* staged) const {
        for (int k = 0; k < EACH; k++) {
            int i = threadIdx.x + k * THREADS;
            if (i >= GROUPS * STAGED_LINES) break;
            uint2* to = reinterpret_cast<uint2*>(staged + i / GROUPS * PITCH + i % GROUPS * 12);
            unsigned pairs[6] = {};
            if (!(outside >> k & 1)) {
                for (int e = 0; e < 12; e++) {
                    int byte = FLIP ? (3 - e / 3) * 3 + e % 3 : e;
                    pairs[e / 2] |= unsigned(table[words[k][byte / 4] >> byte % 4 * 8 & 255][e % 3]) << e % 2 * 16;
                }
            }
            for (int w = 0; w < 3; w++) to[w] = {pairs[2 * w], pairs[2 * w + 1]};
        }
    }
};

template <int N>
__device__ void embed(const unsigned char* pixels, const int* positions, const unsigned char* levels,
                      const unsigned char* flips, int size, int out_size, int lines, const bf16* w, const bf16* bias,
                      const float* gamma, const float* beta, bf16* y, bf16* raw, float* stats, const NextNorm& next,
                      unsigned short (*table)[3], unsigned short* staged, Row<DEPTH>* weights) {
    constexpr int TILES = N / 8;
    for (int i = threadIdx.x; i < N * DEPTH; i += THREADS) {
        int n = i / DEPTH, k = i % DEPTH, ky = k / (2 * PAIRS), x = k % (2 * PAIRS);
        bool real = ky < SIDE && x > 0;
        weights[n].at[k] = real ? w[n * SIDE * LINE + ky * LINE + x - 1] : __float2bfloat16_rn(0.0f);
    }
    fill_table(levels + blockIdx.z * 256, table);
    const unsigned char* image = pixels + size_t(positions[blockIdx.z]) * size * size * 3;
    bool flip = flips[blockIdx.z];
    int first = blockIdx.x * STRIP, windows = min(STRIP, out_size - first);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int own = threadIdx.x / 32 % (STRIP / 16) * 16 + g, below = threadIdx.x / (2 * STRIP);
    // Windows past the last one repeat it, for nothing.
    const unsigned short* low = staged + below * (STRIDE * PITCH) + min(own, windows - 1) * (STRIDE * 3) + 2;
    const unsigned short* high = staged + below * (STRIDE * PITCH) + min(own + 8, windows - 1) * (STRIDE * 3) + 2;
    auto pair = [&](const unsigned short* window, int number) {
        // What is past the last line has weight 0.
        int ky = number / PAIRS, at = ky < SIDE ? ky * PITCH + (number - ky * PAIRS) * 2 : 0;
        return *reinterpret_cast<const unsigned*>(window + at);
    };
    int stop = min(out_size, (int(blockIdx.y) + 1) * lines), left = (first - 1) * STRIDE;
    Pixels ahead;
    unsigned outside = ahead.fetch(image, flip, size, left, int(blockIdx.y) * lines * STRIDE - PADDING);
    for (int line = blockIdx.y * lines; line < stop; line += 2) {
        __syncthreads();
        flip ? ahead.put<true>(outside, table, staged) : ahead.put<false>(outside, table, staged);
        __syncthreads();
        if (line + 2 < stop) outside = ahead.fetch(image, flip, size, left, (line + 2) * STRIDE - PADDING);
        float d[TILES][4] = {};
#pragma unroll 5
        for (int k = 0; k < DEPTH; k += 16) {
            int at = k / 2 + t;
            unsigned a[4] = {pair(low, at), pair(high, at), pair(low, at + 4), pair(high, at + 4)};
            for (int n = 0; n < TILES; n += 2) {
                unsigned b[4];
                ::across(weights, 8 * n, k, b);
                mma(d[n], a, b[0], b[1]);
                mma(d[n + 1], a, b[2], b[3]);
            }
        }
        // Rows own and own + 8; of each tile, channels 2t and 2t + 1.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int window = own + 8 * half;
            bool inside = window < windows && line + below < stop;
            size_t token = (size_t(blockIdx.z) * out_size + line + below) * out_size + first + window;
            unsigned words[TILES];
            float sum = 0, square = 0;
            for (int n = 0; n < TILES; n++) {
                float2 shift = {};
                if (bias != nullptr) {
                    shift = {__bfloat162float(bias[8 * n + 2 * t]), __bfloat162float(bias[8 * n + 2 * t + 1])};
                }
                words[n] = pair_of(d[n][2 * half] + shift.x, d[n][2 * half + 1] + shift.y);
                sum += __uint_as_float(words[n] << 16) + __uint_as_float(words[n] & 0xffff0000u);
            }
            float mean = group_sum(sum, 4) / N;
            for (int n = 0; n < TILES; n++) {
                float a = __uint_as_float(words[n] << 16) - mean, b = __uint_as_float(words[n] & 0xffff0000u) - mean;
                square += a * a + b * b;
            }
            float scale = rsqrtf(group_sum(square, 4) / N + EPSILON);
            unsigned normed[TILES];
            for (int n = 0; n < TILES; n++) {
                float a = __uint_as_float(words[n] << 16) - mean, b = __uint_as_float(words[n] & 0xffff0000u) - mean;
                float2 scales = *reinterpret_cast<const float2*>(gamma + 8 * n + 2 * t);
                float2 shifts = *reinterpret_cast<const float2*>(beta + 8 * n + 2 * t);
                normed[n] = pair_of(a * scale * scales.x + shifts.x, b * scale * scales.y + shifts.y);
            }
            // A lane receives whole tiles, 16 bytes each.
            float x[N / 4];
            for (int n = 0; n < TILES; n += 4) {
                unsigned out[4] = {normed[n], normed[n + 1], normed[n + 2], normed[n + 3]};
                transpose_quad(out);
                if (inside) *reinterpret_cast<uint4*>(y + token * N + 8 * (n + t)) = {out[0], out[1], out[2], out[3]};
                Pack<8> rounded = widen<8>({out[0], out[1], out[2], out[3]});
                for (int i = 0; i < 8; i++) x[2 * n + i] = rounded.x[i];
                if (raw == nullptr) continue;
                unsigned before[4] = {words[n], words[n + 1], words[n + 2], words[n + 3]};
                transpose_quad(before);
                if (inside) {
                    *reinterpret_cast<uint4*>(raw + token * N + 8 * (n + t)) = {before[0], before[1], before[2], before[3]};
                }
            }
            if (raw != nullptr && inside && t == 0) *reinterpret_cast<float2*>(stats + 2 * token) = {mean, scale};
            if (next.y == nullptr) continue;
            float2 next_stats = centre<N>(x);
            for (int n = 0; n < TILES; n += 4) {
                int c = 8 * (n + t);
                Pack<8> p, slope = load<8>(next.gamma + c), offset = load<8>(next.beta + c);
                for (int i = 0; i < 8; i++) p.x[i] = x[2 * n + i] * next_stats.y * slope.x[i] + offset.x[i];
                if (inside) store(next.y + token * N + c, p);
            }
            if (inside && t == 0) *reinterpret_cast<float2*>(next.stats + 2 * token) = next_stats;
        }
    }
}

// y = layer_norm(patches·wᵀ + bias) for windows of 7 x 7 pixels, 4 apart, padded by 3, in pictures of a multiple of 4;
// what the LayerNorm's gradient takes, if raw is given; next = layer_norm(y), if that is given. Grid:
// (ceil(out_size / STRIP), ceil(out_size / lines), images).
KERNEL(THREADS, 3) embed_pixels_32(
    const unsigned char* pixels /* (pictures, size, size, 3) */, const int* positions /* (images): which picture */,
    const unsigned char* levels /* (images, 256) */, const unsigned char* flips /* (images) */, int size, int out_size,
    int lines, const bf16* w /* (32, 7·7·3) */, const bf16* bias /* (32) or null */, const float* gamma /* (32) */,
    const float* beta /* (32) */, bf16* y /* (images·out_size², 32) */,
    bf16* raw /* (images·out_size², 32) or null: before the LayerNorm */,
    float* stats /* (images·out_size², 2), with raw: mean, 1/std */, const float* next_gamma /* (32) */,
    const float* next_beta /* (32) */, bf16* next /* (images·out_size², 32) or null */,
    float* next_stats /* (images·out_size², 2), with next */) {
    SHARED(unsigned short, table, [THREADS][3]);
    SHARED(uint2, staged, [STAGED_LINES * PITCH / 4]);
    SHARED(Row<DEPTH>, weights, [32]);
    embed<32>(pixels, positions, levels, flips, size, out_size, lines, w, bias, gamma, beta, y, raw, stats,
              {next_gamma, next_beta, next, next_stats}, table, reinterpret_cast<unsigned short*>(staged), weights);
}

// The same with 64 channels.
KERNEL(THREADS, 2) embed_pixels_64(
    const unsigned char* pixels, const int* positions, const unsigned char* levels, const unsigned char* flips, int size,
    int out_size, int lines, const bf16* w /* (64, 7·7·3) */, const bf16* bias /* (64) or null */,
    const float* gamma /* (64) */, const float* beta /* (64) */, bf16* y /* (images·out_size², 64) */,
    bf16* raw /* (images·out_size², 64) or null */, float* stats /* (images·out_size², 2) */,
    const float* next_gamma /* (64) */, const float* next_beta /* (64) */,
    bf16* next /* (images·out_size², 64) or null */, float* next_stats /* (images·out_size², 2) */) {
    SHARED(unsigned short, table, [THREADS][3]);
    SHARED(uint2, staged, [STAGED_LINES * PITCH / 4]);
    SHARED(Row<DEPTH>, weights, [64]);
    embed<64>(pixels, positions, levels, flips, size, out_size, lines, w, bias, gamma, beta, y, raw, stats,
              {next_gamma, next_beta, next, next_stats}, table, reinterpret_cast<unsigned short*>(staged), weights);
}

// Channels by taps: a warp takes tiles of 8 taps, as many apart as there are warps, and sums over the block's windows.
template <int N>
__device__ void embed_backward(const unsigned char* pixels, const int* positions, const unsigned char* levels,
                               const unsigned char* flips, int size, int out_size, int lines, const bf16* draw,
                               float* partial, unsigned short (*table)[3], unsigned short* staged, Row<N>* gradients) {
    constexpr int TAPS = SIDE * LINE, TILES = (TAPS + 7) / 8, WARPS = THREADS / 32, EACH = (TILES + WARPS - 1) / WARPS;
    fill_table(levels + blockIdx.z * 256, table);
    const unsigned char* image = pixels + size_t(positions[blockIdx.z]) * size * size * 3;
    bool flip = flips[blockIdx.z];
    int first = blockIdx.x * STRIP, windows = min(STRIP, out_size - first);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const unsigned short* taps[EACH];
    for (int j = 0; j < EACH; j++) {
        int tap = (warp + j * WARPS) * 8 + g;
        taps[j] = staged + (tap < TAPS ? tap / LINE * PITCH + tap % LINE + 3 : 0);
    }
    float d[EACH][N / 16][4] = {};
    int stop = min(out_size, (int(blockIdx.y) + 1) * lines), left = (first - 1) * STRIDE;
    for (int line = blockIdx.y * lines; line < stop; line += 2) {
        // Not asked for ahead of time: the sums take the registers.
        Pixels window;
        unsigned outside = window.fetch(image, flip, size, left, line * STRIDE - PADDING);
        __syncthreads();
        flip ? window.put<true>(outside, table, staged) : window.put<false>(outside, table, staged);
        size_t token = (size_t(blockIdx.z) * out_size + line) * out_size + first;
        for (int i = threadIdx.x; i < 2 * STRIP * N / 8; i += THREADS) {
            int row = i / (N / 8), c = i % (N / 8) * 8, window = row % STRIP, below = row / STRIP;
            uint4 raw = {};
            if (window < windows && line + below < stop) {
                raw = fetch<8>(draw + (token + below * out_size + window) * N + c);
            }
            *reinterpret_cast<uint4*>(&gradients[row].at[c]) = raw;
        }
        __syncthreads();
        for (int k = 0; k < 2 * STRIP; k += 16) {
            unsigned a[N / 16][4];
            for (int m = 0; m < N / 16; m++) upright(gradients, k, 16 * m, a[m]);
            // Windows past the last one have no gradient; they repeat its pixels.
            int at[4];
            for (int i = 0; i < 4; i++) {
                int window = min(k % STRIP + 2 * t + i % 2 + i / 2 * 8, windows - 1);
                at[i] = window * (STRIDE * 3) + k / STRIP * (STRIDE * PITCH);
            }
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                if (warp + j * WARPS >= TILES) break;
                unsigned b0 = taps[j][at[0]] | unsigned(taps[j][at[1]]) << 16;
                unsigned b1 = taps[j][at[2]] | unsigned(taps[j][at[3]]) << 16;
                for (int m = 0; m < N / 16; m++) mma(d[j][m], a[m], b0, b1);
            }
        }
    }
    partial += ((size_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * (N * TAPS);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        for (int m = 0; m < N / 16; m++) {
            for (int i = 0; i < 4; i++) {
                int n = 16 * m + g + i / 2 * 8, tap = (warp + j * WARPS) * 8 + 2 * t + i % 2;
                if (tap < TAPS) partial[n * TAPS + tap] = d[j][m][i];
            }
        }
    }
}

// The gradient of w from that of raw, by blocks. Grid: as embed_pixels has it.
KERNEL(THREADS, 2) embed_pixels_backward_32(
    const unsigned char* pixels, const int* positions, const unsigned char* levels, const unsigned char* flips, int size,
    int out_size, int lines, const bf16* draw /* (images·out_size², 32) */, float* partial /* (blocks, 32, 7·7·3) */) {
    SHARED(unsigned short, table, [THREADS][3]);
    SHARED(uint2, staged, [STAGED_LINES * PITCH / 4]);
    SHARED(Row<32>, gradients, [2 * STRIP]);
    embed_backward<32>(pixels, positions, levels, flips, size, out_size, lines, draw, partial, table,
                       reinterpret_cast<unsigned short*>(staged), gradients);
}

KERNEL(THREADS, 2) embed_pixels_backward_64(
    const unsigned char* pixels, const int* positions, const unsigned char* levels, const unsigned char* flips, int size,
    int out_size, int lines, const bf16* draw /* (images·out_size², 64) */, float* partial /* (blocks, 64, 7·7·3) */) {
    SHARED(unsigned short, table, [THREADS][3]);
    SHARED(uint2, staged, [STAGED_LINES * PITCH / 4]);
    SHARED(Row<64>, gradients, [2 * STRIP]);
    embed_backward<64>(pixels, positions, levels, flips, size, out_size, lines, draw, partial, table,
                       reinterpret_cast<unsigned short*>(staged), gradients);
}

template <int V>
__device__ void gather(const bf16* x, int images, int height, int width, int channels, int side, int stride, int padding,
                       int out_height, int out_width, bf16* out) {
    int packs = channels / V, taps = side * side;
    size_t i = thread_number();
    if (i >= size_t(images) * out_height * out_width * taps * packs) return;
    int c = int(i % packs) * V, tap = int(i / packs % taps);
    size_t window = i / packs / taps;
    int ox = int(window % out_width), oy = int(window / out_width % out_height);
    size_t image = window / out_width / out_height;
    int y = oy * stride + tap / side - padding, xx = ox * stride + tap % side - padding;
    Pack<V> p = {};
    if (y >= 0 && y < height && xx >= 0 && xx < width) {
        p = load<V>(x + ((image * height + y) * width + xx) * channels + c);
    }
    store(out + i * V, p);
}

// Threads: images·out_height·out_width·side²·channels/V.
KERNEL(THREADS) patches(const bf16* x /* (images, height, width, channels) */, int images, int height, int width,
                        int channels, int side, int stride, int padding, int out_height, int out_width,
                        bf16* out /* (images·windows, side²·channels) */) {
    BY_WIDTH(channels, gather, x, images, height, width, channels, side, stride, padding, out_height, out_width, out);
}

template <int V>
__device__ void gather_back(const bf16* dout, int height, int width, int channels, int side, int stride, int padding,
                            int out_height, int out_width, bf16* dx) {
    int packs = channels / V, i = blockIdx.x * THREADS + threadIdx.x, x = i / packs, c = (i - x * packs) * V;
    if (x >= width) return;
    // In each direction, the last window that begins before or at the token, and where that has it; in the window before,
    // it is `stride` further on.
    int last_y = (int(blockIdx.y) + padding) / stride, last_x = (x + padding) / stride;
    int first_ky = int(blockIdx.y) + padding - last_y * stride, first_kx = x + padding - last_x * stride;
    size_t at = (size_t(blockIdx.z) * height + blockIdx.y) * (width * channels) + x * channels + c;
    Pack<V> sum = load<V>(dx + at);
    for (int ky = first_ky, oy = last_y; ky < side && oy >= 0; ky += stride, oy--) {
        if (oy >= out_height) continue;
        size_t line = (size_t(blockIdx.z) * out_height + oy) * out_width;
#pragma unroll 1
        for (int kx = first_kx, ox = last_x; kx < side && ox >= 0; kx += stride, ox--) {
            if (ox >= out_width) continue;
            Pack<V> d = load<V>(dout + ((line + ox) * (side * side) + ky * side + kx) * channels + c);
            for (int j = 0; j < V; j++) sum.x[j] += d.x[j];
        }
    }
    store(dx + at, sum);
}

// dx += the gradient of x. Grid: (ceil(width·channels/V / THREADS), height, images).
KERNEL(THREADS) patches_backward(const bf16* dout /* (images·windows, side²·channels) */, int height, int width,
                                 int channels, int side, int stride, int padding, int out_height, int out_width,
                                 bf16* dx /* (images, height, width, channels) */) {
    BY_WIDTH(channels, gather_back, dout, height, width, channels, side, stride, padding, out_height, out_width, dx);
}
