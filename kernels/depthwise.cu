// The middle of a Mix-FFN: depth-wise 3x3 convolution with zero padding, bias, GELU in its erf form; and the way back.
//
// A thread walks down COLUMNS tokens side by side with two channels, whose weights stay in registers; a row that arrives
// adds to the sums of three rows, of which it ends one. Each thread loads the columns beside its own itself, which its
// neighbours have brought into the L1 cache: no barrier, no shared memory, and rows asked for ahead of their use. The way
// back is two such walks: over h for u, which is recomputed instead of stored, and du; then over du, with the weights
// mirrored, for dh. The gradient of the bias is summed on the first, that of the weights and of a bias in front of h on the second. u is what enters
// the GELU, du its gradient.
#include "common.cuh"
#include "gelu.cuh"

// Tokens side by side of a thread; strips of a block, one a warp; weights per channel.
constexpr int COLUMNS = 4, STRIPS = THREADS / 32, TAPS = 9;

// Two neighbouring channels; V is 2 where channels are even, else 1, and the second number is 0.
template <int V> __device__ __forceinline__ unsigned load_pair(const bf16* from) {
    if constexpr (V == 2) return *reinterpret_cast<const unsigned*>(from);
    else return *reinterpret_cast<const unsigned short*>(from);
}

template <int V> __device__ __forceinline__ float2 load_two(const float* from) {
    if constexpr (V == 2) return *reinterpret_cast<const float2*>(from);
    else return {*from, 0.0f};
}

template <int V> __device__ __forceinline__ void store_pair(bf16* to, float2 p) {
    if constexpr (V == 2) *reinterpret_cast<unsigned*>(to) = pair_of(p.x, p.y);
    else *to = __float2bfloat16_rn(p.x);
}

// p + numbers, in global memory, kept as it is: else the compiler adds it up again at each use. Null does not stay null.
template <class T> __device__ __forceinline__ T* settled(T* p, size_t numbers) {
#ifdef __CUDACC__
    p += numbers;
    asm("" : "+l"(p));
    __builtin_assume(__isGlobal(p));
    return p;
#else
    return p == nullptr ? p : p + numbers;
#endif
}

// What a warp works on, and what one of its lanes does. Blocks go by channels first, 32·V each, then by strips, STRIPS
// each; strips by columns first, then by rows, then by images.
template <int V> struct Strip {
    int slab, chunk;   // the block's strips and channels
    int c;             // the lane's first channel
    int y0, y1;        // the strip's rows
    bool left;         // whether there is a column to its left
    int columns;       // columns from its first on, with the one to its right; 0: nothing to do
    int step, stride;  // numbers from column to column and from row to row
    size_t image;      // numbers before its image
    unsigned at;       // numbers from there to row 0 of its first column, at c

    __device__ __forceinline__ Strip(int images, int height, int width, int channels, int rows) {
        int chunks = (channels + 32 * V - 1) / (32 * V), across = (width + COLUMNS - 1) / COLUMNS;
        int down = (height + rows - 1) / rows;
        slab = blockIdx.x / chunks;
        chunk = blockIdx.x % chunks;
        c = (chunk * 32 + threadIdx.x % 32) * V;
        int strip = slab * STRIPS + threadIdx.x / 32, x = strip % across * COLUMNS;
        y0 = strip / across % down * rows;
        y1 = min(y0 + rows, height);
        columns = c < channels && strip < images * down * across ? min(width - x, COLUMNS + 1) : 0;
        left = columns > 0 && x > 0;
        step = channels;
        stride = width * channels;
        image = size_t(strip / across / down) * (height * stride);
        at = x * channels + c;
    }

    // Its columns and those beside it, at `at` in the first of its own; 0 where the picture has none.
    __device__ __forceinline__ void load(const bf16* from, unsigned at, bool wanted, unsigned (&words)[COLUMNS + 2]) const {
        int present = wanted ? columns : 0;
        words[0] = wanted && left ? load_pair<V>(from + (at - step)) : 0;
        for (int i = 0; i <= COLUMNS; i++) words[i + 1] = i < present ? load_pair<V>(from + (at + i * step)) : 0;
    }

    // Its columns alone.
    __device__ __forceinline__ void load(const bf16* from, unsigned at, bool wanted, unsigned (&words)[COLUMNS]) const {
        int present = wanted ? columns : 0;
        for (int i = 0; i < COLUMNS; i++) words[i] = i < present ? load_pair<V>(from + (at + i * step)) : 0;
    }

    __device__ __forceinline__ void store(bf16* to, unsigned at, const float2 (&values)[COLUMNS]) const {
        for (int i = 0; i < COLUMNS; i++) {
            if (i < columns) store_pair<V>(to + (at + i * step), values[i]);
        }
    }
};

// A walk: from h to g; from h and dg to du and b's gradient; from du to dh; from du and h to dh, its sums and w's gradient.
enum Way { FORWARD, BEFORE_GELU, TRANSPOSED, WEIGHTS };

// x is convolved. At row y, `beside` is wanted: by BEFORE_GELU dg of row y - 1, by WEIGHTS h of rows y - 1 to y + 1.
template <int V, Way WAY, int KINDS>
__device__ __forceinline__ void walk(const Strip<V>& strip, const bf16* x, const bf16* beside, const float* w,
                                     const float* b, int height, bf16* out, float2 (&gradient)[KINDS]) {
    constexpr bool MIRRORED = WAY == TRANSPOSED || WAY == WEIGHTS;
    if (strip.columns == 0) return;
    float2 weight[TAPS], bias = {};
    for (int tap = 0; tap < TAPS; tap++) {
        weight[MIRRORED ? TAPS - 1 - tap : tap] = load_two<V>(w + tap * strip.step + strip.c);
    }
    if (!MIRRORED) bias = load_two<V>(b + strip.c);
    int y0 = strip.y0, y1 = strip.y1, stride = strip.stride, first = max(y0 - 1, 0), stop = min(y1 + 1, height);
    unsigned at = strip.at + first * stride;
    bool wants_out = WAY != WEIGHTS || out != nullptr;
    x = settled(x, strip.image);
    beside = settled(beside, strip.image);
    out = settled(out, strip.image);

    // The next row of x; of dg, the row whose sums end next, and of h, the rows y - 1.. y + 1.
    unsigned ahead[COLUMNS + 2], beside_ahead[3][COLUMNS] = {};
    strip.load(x, at, true, ahead);
    if (WAY == WEIGHTS) {
        for (int k = 0; k < 2; k++) {
            strip.load(beside, at + k * stride, first + k >= y0 && first + k < y1, beside_ahead[k]);
        }
    }
    float2 sum[3][COLUMNS];
    for (int i = 0; i < COLUMNS; i++) sum[0][i] = sum[2][i] = bias;
    for (int round = first; round <= y1; round += 3) {
#pragma unroll
        for (int k = 0; k < 3; k++) {
            // Row y arrives and ends the sums of row y - 1.
            int y = round + k, last = (k + 2) % 3, next = (k + 1) % 3;
            if (y > y1) break;
            float2 row[COLUMNS + 2];
            for (int i = 0; i < COLUMNS + 2; i++) row[i] = widen(ahead[i]);
            strip.load(x, at + stride, y + 1 < stop, ahead);
            if (WAY == BEFORE_GELU) strip.load(beside, at, y >= y0 && y < y1, beside_ahead[k]);
            if constexpr (WAY == WEIGHTS) {
                // In the forward direction, this row of u took row y + t - 1 of h, by the taps of line t.
                for (int t = 0; t < 3; t++) {
                    for (int i = 0; i < COLUMNS; i++) {
                        float2 h = widen(beside_ahead[(k + t + 2) % 3][i]);
                        for (int j = 0; j < 3; j++) add(gradient[3 * t + j], row[i + 2 - j], h);
                    }
                    if (t == 0) strip.load(beside, at + 2 * stride, y + 2 < y1, beside_ahead[last]);
                }
            }
            for (int i = 0; i < COLUMNS; i++) {
                sum[next][i] = bias;
                for (int j = 0; j < 3; j++) {
                    add(sum[last][i], row[i + j], weight[6 + j]);
                    add(sum[k][i], row[i + j], weight[3 + j]);
                    add(sum[next][i], row[i + j], weight[j]);
                }
            }
            if (y > y0) {
                if constexpr (WAY == FORWARD) {
                    for (float2& u : sum[last]) u = {gelu(u.x), gelu(u.y)};
                }
                if constexpr (WAY == BEFORE_GELU) {
                    float2 du[COLUMNS];
                    for (int i = 0; i < COLUMNS; i++) {
                        du[i] = widen(beside_ahead[last][i]);
                        gelu_backward(sum[last][i].x, du[i].x);
                        gelu_backward(sum[last][i].y, du[i].y);
                        gradient[0].x += du[i].x;
                        gradient[0].y += du[i].y;
                    }
                    strip.store(out, at - stride, du);
                } else {
                    if (wants_out) strip.store(out, at - stride, sum[last]);
                    if constexpr (WAY == WEIGHTS) {
                        for (int i = 0; i < COLUMNS; i++) {
                            if (i < strip.columns) add(gradient[TAPS], sum[last][i], {1.0f, 1.0f});
                        }
                    }
                }
            }
            at += stride;
        }
    }
}

// Where no gradient is summed.
template <int V, Way WAY>
__device__ __forceinline__ void walk(const bf16* x, const float* w, const float* b, int images, int height, int width,
                                     int channels, int rows, bf16* out) {
    float2 none[1];
    walk<V, WAY>(Strip<V>(images, height, width, channels, rows), x, nullptr, w, b, height, out, none);
}

// Where the sums of a block's tokens go to `partial`, unless that is null.
template <int V, Way WAY, int KINDS>
__device__ __forceinline__ void walk_and_sum(const bf16* x, const bf16* beside, const float* w, const float* b,
                                             int images, int height, int width, int channels, int rows, bf16* out,
                                             float* partial /* (ceil(strips / STRIPS), KINDS, channels) */,
                                             float (*sums)[KINDS][V][32] /* (STRIPS, KINDS, V, 32) */) {
    Strip<V> strip(images, height, width, channels, rows);
    float2 gradient[KINDS] = {};
    walk<V, WAY>(strip, x, beside, w, b, height, out, gradient);
    if (partial == nullptr) return;
    int lane = threadIdx.x % 32;
    for (int kind = 0; kind < KINDS; kind++) {
        sums[threadIdx.x / 32][kind][0][lane] = gradient[kind].x;
        if (V == 2) sums[threadIdx.x / 32][kind][V - 1][lane] = gradient[kind].y;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < KINDS * V * 32; i += THREADS) {
        int kind = i / 32 / V, which = i / 32 % V, c = strip.c + which;  // the lane is the thread's own
        float total = 0;
        for (int s = 0; s < STRIPS; s++) total += sums[s][kind][which][lane];
        if (c < channels) partial[(size_t(strip.slab) * KINDS + kind) * channels + c] = total;
    }
}

// Grid: ceil(channels / 32·V)·ceil(strips / STRIPS), of strips COLUMNS wide and `rows` high; V is 2 where channels are
// even, else 1. Tokens are (images, height, width). So for all kernels here.
KERNEL(THREADS, 3) depthwise_gelu(const bf16* h /* (tokens, channels) */, const float* w /* (9, channels) */,
                                  const float* b /* (channels) */, int images, int height, int width, int channels,
                                  int rows, bf16* g /* (tokens, channels) */) {
    if (channels % 2 == 0) walk<2, FORWARD>(h, w, b, images, height, width, channels, rows, g);
    else walk<1, FORWARD>(h, w, b, images, height, width, channels, rows, g);
}

// From dg, the gradient after the GELU, to du, that before it, which may take its place; and the gradient of b.
KERNEL(THREADS, 2) depthwise_gelu_backward(
    const bf16* h /* (tokens, channels) */, const float* w /* (9, channels) */, const float* b /* (channels) */,
    int images, int height, int width, int channels, int rows, const bf16* dg /* (tokens, channels) */,
    bf16* du /* (tokens, channels) */,
    float* partial /* (ceil(strips / STRIPS), channels) or null */) {
    SHARED(float, even, [STRIPS][1][2][32]);
    SHARED(float, odd, [STRIPS][1][1][32]);
    if (channels % 2 == 0) {
        walk_and_sum<2, BEFORE_GELU>(h, dg, w, b, images, height, width, channels, rows, du, partial, even);
    } else {
        walk_and_sum<1, BEFORE_GELU>(h, dg, w, b, images, height, width, channels, rows, du, partial, odd);
    }
}

// From du to dh, the gradient of h.
KERNEL(THREADS, 3) depthwise_backward(const bf16* du /* (tokens, channels) */, const float* w /* (9, channels) */,
                                      int images, int height, int width, int channels, int rows,
                                      bf16* dh /* (tokens, channels) */) {
    if (channels % 2 == 0) walk<2, TRANSPOSED>(du, w, nullptr, images, height, width, channels, rows, dh);
    else walk<1, TRANSPOSED>(du, w, nullptr, images, height, width, channels, rows, dh);
}

// The same with the gradient of w and the sums of dh.
KERNEL(THREADS, 2) depthwise_backward_weights(
    const bf16* du /* (tokens, channels) */, const bf16* h /* (tokens, channels) */,
    const float* w /* (9, channels) */, int images, int height, int width, int channels, int rows,
    bf16* dh /* (tokens, channels) or null */,
    float* partial /* (ceil(strips / STRIPS), 9 + 1, channels): w's gradient, dh's sums */) {
    SHARED(float, even, [STRIPS][TAPS + 1][2][32]);
    SHARED(float, odd, [STRIPS][TAPS + 1][1][32]);
    if (channels % 2 == 0) {
        walk_and_sum<2, WEIGHTS>(du, h, w, nullptr, images, height, width, channels, rows, dh, partial, even);
    } else {
        walk_and_sum<1, WEIGHTS>(du, h, w, nullptr, images, height, width, channels, rows, dh, partial, odd);
    }
}
