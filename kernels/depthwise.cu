// The middle of a Mix-FFN: depth-wise 3x3 convolution with zero padding, bias, GELU in its erf form; and the way back.
//
// Each way is one kernel that reads every activation from memory once. A block walks down a strip of COLUMNS tokens, a
// thread down its column with two channels, whose weights and running sums stay in registers. A thread asks for its
// token rows ahead, and hands it to its neighbours through shared memory: one barrier per row. The way back recomputes
// the convolution instead of storing it; the gradient before the GELU goes to the neighbours in f32, never to memory.
#include "common.cuh"

// A block's tokens side by side, its rows at most, its threads per token, its weights and bias per channel.
constexpr int COLUMNS = 16, SEGMENT = 64, LANES = 16, KINDS = 10;
// Going back, a further warp computes the gradient before the GELU for the columns beside the strip.
constexpr int INNER = COLUMNS * LANES, BACKWARD_THREADS = INNER + 2 * LANES;

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

__device__ __forceinline__ float2 widen(unsigned pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// sum += a·b
__device__ __forceinline__ void add(float2& sum, float2 a, float2 b) {
    sum.x += a.x * b.x;
    sum.y += a.y * b.y;
}

// sum += Σ a[i]·w[i]
__device__ __forceinline__ void add(float2& sum, const float2 (&a)[3], const float2* w) {
    for (int i = 0; i < 3; i++) add(sum, a[i], w[i]);
}

// 2^x and 1/x to a unit or two in the last place; what would be subnormal is 0.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// The normal distribution at u: its density, and the tail beyond |u| to 7.5e-8 (Abramowitz and Stegun, 1964, 26.2.17).
// It takes half of the instructions of erff, and the density is what the derivative needs.
struct Normal {
    float density, tail;

    __device__ __forceinline__ explicit Normal(float u) {
        float c = u * 0.84932180028801905f;  // c² = log2(e)·u²/2
        density = power_of_two(-c * c - 1.3257480647361593f);
        float t = reciprocal(0.2316419f * fabsf(u) + 1.0f);
        tail = 1.330274429f;
        tail = tail * t - 1.821255978f;
        tail = tail * t + 1.781477937f;
        tail = tail * t - 0.356563782f;
        tail = tail * t + 0.319381530f;
        tail *= t * density;
    }
};

__device__ __forceinline__ float gelu(float u) { return fmaxf(u, 0.0f) - fabsf(u) * Normal(u).tail; }

// Turns d into the gradient before the GELU, and u into the GELU's output.
__device__ __forceinline__ void gelu_backward(float& u, float& d) {
    Normal normal(u);
    float share = u > 0.0f ? 1.0f - normal.tail : normal.tail;
    d *= share + u * normal.density;
    u *= share;
}

// What a block works on, and what one of its threads does.
template <int V> struct Place {
    int y0, y1, x, c;  // the block's rows, the thread's column and first channel
    int stride;        // numbers from row to row
    size_t image;      // numbers before its image
    int at;            // numbers from there to row 0 at x and c
    bool inside;       // whether the thread has a token of the picture

    __device__ __forceinline__ Place(int column, int height, int width, int channels) {
        int groups = (channels + LANES * V - 1) / (LANES * V), block = blockIdx.x;
        c = (block % groups * LANES + threadIdx.x % LANES) * V;
        x = block / groups * COLUMNS + column;
        y0 = blockIdx.y * SEGMENT;
        y1 = min(y0 + SEGMENT, height);
        stride = width * channels;
        image = size_t(blockIdx.z) * (height * stride);
        at = x * channels + c;
        inside = c < channels && x >= 0 && x < width;
    }
};

// p + numbers, in global memory, kept as it is: else the compiler adds it up again at each use.
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

struct Lines {
    unsigned h[3][COLUMNS + 2][LANES];
};

template <int V>
__device__ __forceinline__ void forward(const bf16* h, const float* w, const float* b, int height, int width,
                                        int channels, bf16* g, Lines& lines) {
    int lane = threadIdx.x % LANES, column = threadIdx.x / LANES;
    Place<V> place(column, height, width, channels);
    // The first warp also fetches the columns beside the strip.
    bool edge = threadIdx.x < 2 * LANES;
    int edge_column = column == 0 ? -1 : COLUMNS;
    Place<V> beside(edge_column, height, width, channels);

    float2 weight[9] = {}, bias = {};
    if (place.c < channels) {
        for (int tap = 0; tap < 9; tap++) weight[tap] = load_two<V>(w + tap * channels + place.c);
        bias = load_two<V>(b + place.c);
    }
    int first = max(place.y0 - 1, 0), stop = min(place.y1 + 1, height), stride = place.stride;
    int at = place.at + first * stride;
    h = settled(h, place.image);
    g = settled(g, place.image);
    int to_beside = (edge_column - column) * channels;
    unsigned ahead[3], edge_ahead[3];
    for (int k = 0; k < 3; k++) {
        ahead[k] = place.inside && first + k < stop ? load_pair<V>(h + (at + k * stride)) : 0;
        edge_ahead[k] = edge && beside.inside && first + k < stop ? load_pair<V>(h + (at + k * stride + to_beside)) : 0;
    }
    float2 u[3] = {bias, bias, bias};
    for (int round = first; round <= place.y1; round += 3) {
#pragma unroll
        for (int k = 0; k < 3; k++) {
            // Row y arrives and ends the sums of row y - 1.
            int y = round + k;
            if (y > place.y1) break;
            float2 row[3];
            row[1] = widen(ahead[k]);
            lines.h[k][column + 1][lane] = ahead[k];
            ahead[k] = place.inside && y + 3 < stop ? load_pair<V>(h + (at + 3 * stride)) : 0;
            if (edge) {
                lines.h[k][edge_column + 1][lane] = edge_ahead[k];
                edge_ahead[k] = beside.inside && y + 3 < stop ? load_pair<V>(h + (at + 3 * stride + to_beside)) : 0;
            }
            __syncthreads();
            row[0] = widen(lines.h[k][column][lane]);
            row[2] = widen(lines.h[k][column + 2][lane]);
            float2& done = u[(k + 2) % 3];
            add(done, row, weight + 6);
            if (y > place.y0 && place.inside) store_pair<V>(g + (at - stride), {gelu(done.x), gelu(done.y)});
            add(u[k], row, weight + 3);
            u[(k + 1) % 3] = bias;
            add(u[(k + 1) % 3], row, weight);
            at += stride;
        }
    }
}

// Grid: (channels by LANES·V and then columns by COLUMNS, rows by SEGMENT, images); V is 2 where channels are even,
// else 1. Tokens are (images, height, width).
KERNEL(THREADS) depthwise_gelu(const bf16* h /* (tokens, channels) */, const float* w /* (9, channels) */,
                               const float* b /* (channels) */, int height, int width, int channels,
                               bf16* g /* (tokens, channels) */) {
    SHARED(Lines, lines, [1]);
    if (channels % 2 == 0) forward<2>(h, w, b, height, width, channels, g, lines[0]);
    else forward<1>(h, w, b, height, width, channels, g, lines[0]);
}

struct BackwardLines {
    unsigned h[3][COLUMNS + 4][LANES];
    float2 du[3][COLUMNS + 2][LANES];
};

// Sums over the tokens of a warp.
typedef float WarpSums[INNER / 32][KINDS][2 * LANES];

template <int V, bool PARAMETERS>
__device__ __forceinline__ void backward(const bf16* h, const float* w, const float* b, int height, int width,
                                         int channels, const bf16* dg, bf16* g, bf16* dh, BackwardLines& lines,
                                         WarpSums* warps, float* partial) {
    int lane = threadIdx.x % LANES;
    bool inner = threadIdx.x < INNER;
    int column = inner ? threadIdx.x / LANES : threadIdx.x < INNER + LANES ? -1 : COLUMNS;
    Place<V> place(column, height, width, channels);
    // The further warp also fetches the next column outwards.
    int outwards = column < 0 ? -1 : 1;
    bool outer = !inner && place.c < channels && place.x + outwards >= 0 && place.x + outwards < width;

    float2 weight[9] = {}, bias = {};
    if (place.c < channels) {
        for (int tap = 0; tap < 9; tap++) weight[tap] = load_two<V>(w + tap * channels + place.c);
        bias = load_two<V>(b + place.c);
    }
    // The rows needed of h, and of the gradient before the GELU.
    int y0 = place.y0, y1 = place.y1, stride = place.stride;
    int first = max(y0 - 2, 0), stop = min(y1 + 2, height), du_first = max(y0 - 1, 0), du_stop = min(y1 + 1, height);
    int at = place.at + first * stride;
    h = settled(h, place.image);
    dg = settled(dg, place.image);
    // At step y, h is there by rows y.. y + 2, dg by y - 1.. y + 1; the outer columns, which another block fetches from
    // memory, by y.
    unsigned ahead[3] = {}, dg_ahead[3] = {};
    unsigned outer_next = outer ? load_pair<V>(h + (at + outwards * channels)) : 0;
    for (int k = 0; k < 2; k++) {
        int y = first + k;
        ahead[k] = place.inside && y < stop ? load_pair<V>(h + (at + k * stride)) : 0;
        dg_ahead[k] = k == 0 && place.inside && y >= du_first && y < du_stop ? load_pair<V>(dg + (at + k * stride)) : 0;
    }
    // Steps at which this thread writes: rows behind, if it has any to write.
    int g_rows = g != nullptr && inner && place.inside ? y1 - y0 : 0;
    int dh_first = dh != nullptr && place.inside ? y0 + 3 : y1 + 3;
    g = settled(g, place.image);
    dh = settled(dh, place.image);
    bool works = inner || place.inside;
    if (!works) {
        for (int k = 0; k < 3; k++) lines.du[k][column + 1][lane] = {0.0f, 0.0f};
    }
    if (PARAMETERS) lines.h[2][column + 2][lane] = 0;  // row first - 1
    float2 u[3] = {bias, bias, bias}, sum[3] = {}, own_du = {}, gradient[KINDS] = {};
    for (int round = first; round <= y1 + 2; round += 3) {
#pragma unroll
        for (int k = 0; k < 3; k++) {
            int y = round + k;
            if (y > y1 + 2) break;
            unsigned own = ahead[k], row_y_3 = PARAMETERS ? lines.h[k][column + 2][lane] : 0;
            lines.h[k][column + 2][lane] = own;
            ahead[(k + 2) % 3] = place.inside && y + 2 < stop ? load_pair<V>(h + (at + 2 * stride)) : 0;
            if (!inner) {
                lines.h[k][column + 2 + outwards][lane] = outer_next;
                outer_next = outer && y + 1 < stop ? load_pair<V>(h + (at + stride + outwards * channels)) : 0;
            }
            __syncthreads();

            // Row y - 2 of du, of the last step, ends the sums of row y - 3 of dh.
            if (inner && y - 2 >= du_first) {
                if (y - 2 < du_stop) {
                    const float2(&du)[COLUMNS + 2][LANES] = lines.du[(k + 2) % 3];
                    float2 mirrored[3] = {du[column + 2][lane], own_du, du[column][lane]};
                    add(sum[k], mirrored, weight);
                    add(sum[(k + 1) % 3], mirrored, weight + 3);
                    sum[(k + 2) % 3] = {0.0f, 0.0f};
                    add(sum[(k + 2) % 3], mirrored, weight + 6);
                    // The token itself is what its neighbours saw through these taps: rows y - 3 to y - 1 of h.
                    if (PARAMETERS && y - 2 >= y0 && y - 2 < y1) {
                        for (int i = 0; i < 3; i++) {
                            float2 x = widen(i == 0 ? row_y_3 : lines.h[(k + i) % 3][column + 2][lane]);
                            for (int j = 0; j < 3; j++) add(gradient[3 * i + j], mirrored[j], x);
                        }
                        gradient[9].x += own_du.x;
                        gradient[9].y += own_du.y;
                    }
                }
                if (y >= dh_first) store_pair<V>(dh + (at - 3 * stride), sum[k]);
            }

            // Row y of h ends the sums of row y - 1 of u.
            if (works) {
                if (y < stop) {
                    float2 row[3] = {widen(lines.h[k][column + 1][lane]), widen(own),
                                     widen(lines.h[k][column + 3][lane])};
                    add(u[(k + 2) % 3], row, weight + 6);
                    add(u[k], row, weight + 3);
                    u[(k + 1) % 3] = bias;
                    add(u[(k + 1) % 3], row, weight);
                }
                if (y - 1 >= du_first && y - 1 < du_stop) {
                    float2 value = u[(k + 2) % 3], d = widen(dg_ahead[(k + 2) % 3]);
                    gelu_backward(value.x, d.x);
                    gelu_backward(value.y, d.y);
                    own_du = d;
                    lines.du[k][column + 1][lane] = d;
                    if (unsigned(y - 1 - y0) < unsigned(g_rows)) store_pair<V>(g + (at - stride), value);
                }
            }
            dg_ahead[(k + 1) % 3] = place.inside && y + 1 < du_stop ? load_pair<V>(dg + (at + stride)) : 0;
            at += stride;
        }
    }
    if constexpr (PARAMETERS) {
        if (inner) {
            float(&sums)[KINDS][2 * LANES] = (*warps)[threadIdx.x / 32];
            for (int kind = 0; kind < KINDS; kind++) {
                // A warp has two columns.
                float2 both = gradient[kind];
                both.x += __shfl_xor_sync(ALL_LANES, both.x, LANES);
                both.y += __shfl_xor_sync(ALL_LANES, both.y, LANES);
                if (threadIdx.x % 32 < LANES) {
                    sums[kind][lane] = both.x;
                    sums[kind][LANES + lane] = both.y;
                }
            }
        }
        __syncthreads();
        int strips = (width + COLUMNS - 1) / COLUMNS;
        size_t slab = (size_t(blockIdx.z) * gridDim.y + blockIdx.y) * strips + (place.x - column) / COLUMNS;
        for (int i = threadIdx.x; i < KINDS * LANES; i += BACKWARD_THREADS) {
            int kind = i / LANES;  // the lane is the thread's own
            float2 total = {};
            for (int warp = 0; warp < INNER / 32; warp++) {
                total.x += (*warps)[warp][kind][lane];
                total.y += (*warps)[warp][kind][LANES + lane];
            }
            if (place.c < channels) {
                float* to = partial + (slab * KINDS + kind) * channels + place.c;
                to[0] = total.x;
                if (V == 2) to[1] = total.y;
            }
        }
    }
}

// From dg, the gradient after the GELU, to dh, that of h; and the forward output g again; each unless null. Grid: as
// depthwise_gelu has it.
KERNEL(BACKWARD_THREADS, 3) depthwise_gelu_backward(
    const bf16* h /* (tokens, channels) */, const float* w /* (9, channels) */, const float* b /* (channels) */,
    int height, int width, int channels, const bf16* dg /* (tokens, channels) */,
    bf16* g /* (tokens, channels) or null */, bf16* dh /* (tokens, channels) or null */) {
    SHARED(BackwardLines, lines, [1]);
    if (channels % 2 == 0) {
        backward<2, false>(h, w, b, height, width, channels, dg, g, dh, lines[0], nullptr, nullptr);
    } else {
        backward<1, false>(h, w, b, height, width, channels, dg, g, dh, lines[0], nullptr, nullptr);
    }
}

// The same with the gradients of w and b, summed over each block's tokens.
KERNEL(BACKWARD_THREADS, 2) depthwise_gelu_backward_params(
    const bf16* h /* (tokens, channels) */, const float* w /* (9, channels) */, const float* b /* (channels) */,
    int height, int width, int channels, const bf16* dg /* (tokens, channels) */,
    bf16* g /* (tokens, channels) or null */, bf16* dh /* (tokens, channels) or null */,
    float* partial /* (images·segments·strips, 10, channels): nine taps, bias */) {
    SHARED(BackwardLines, lines, [1]);
    SHARED(WarpSums, warps, [1]);
    if (channels % 2 == 0) {
        backward<2, true>(h, w, b, height, width, channels, dg, g, dh, lines[0], warps, partial);
    } else {
        backward<1, true>(h, w, b, height, width, channels, dg, g, dh, lines[0], warps, partial);
    }
}
