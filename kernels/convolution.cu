// Convolutions over tokens with the LayerNorm behind, without gathered patches: the sequence reductions, whose windows share no
// token, and the overlapping patch embeddings, whose outputs may be normalised once more, for attention; the way back through
// these, and through the reduction of many channels, to their input, and through all to their weights. The convolution's weights
// are (outputs, side², inputs).
#include "common.cuh"
#include "layer_norm.cuh"
#include "mma.cuh"
#include "windows.cuh"

constexpr int TILE = 16;

// ---- the sequence reductions of few channels
//
// A block has REDUCED windows; its warps take turns by taps, and what they have summed is added up at the end, and normalised.
constexpr int WARPS = 8, TILES = 2, REDUCED = TILE * TILES;

template <int C>
__device__ __forceinline__ void reduce(const bf16* tokens, const bf16* weight, const bf16* bias, const float* gamma,
                                       const float* beta, int keys, int width, int side, bf16* raw, bf16* y,
                                       float* stats) {
    // A tile's sums by warp. The padding takes neighbouring rows to different banks.
    SHARED(float4, sums, [WARPS][TILE][C / 4 + 1]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int first = blockIdx.x * REDUCED, taps = side * side, origins[TILES][2];
    for (int i = 0; i < 2 * TILES; i++) origins[i / 2][i % 2] = origin_of(first + i * 8 + g, keys, width, side);
    float d[TILES][C / 8][4] = {};
#pragma unroll 1
    for (int tap = warp; tap < taps; tap += WARPS) {
        int beyond = tap / side * width + tap % side;
#pragma unroll 1  // more would take too many registers
        for (int s = 0; s < C / 32; s++) {
            unsigned a[TILES][2][4];
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) {
                int origin = origins[i / 2][i % 2];
                const bf16* row = tokens + size_t(max(origin, 0) + beyond) * C + s * 32;
                load_half<32>(row, origin >= 0, i % 2, a[i / 2]);
            }
            const bf16* row = weight + (weight_row(g) * taps + tap) * C + s * 32 + t * 8;
#pragma unroll
            for (int n = 0; n < C / 8; n++) {
                uint4 b = sixteen(row + (n / 4 * 32 + n % 4 * 2) * (taps * C));
                for (int i = 0; i < 2 * TILES; i++) multiply(d[i / 2][n], a[i / 2][i % 2], b, i % 2);
            }
        }
    }
    constexpr int LANES = C / 4;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        __syncthreads();
        for (int half = 0; half < 2; half++) {
            for (int n = 0; n < C / 8; n += 2) {
                float4 four = {d[m][n][2 * half], d[m][n][2 * half + 1], d[m][n + 1][2 * half], d[m][n + 1][2 * half + 1]};
                sums[warp][g + 8 * half][n / 4 * 8 + t * 2 + n % 4 / 2] = four;
            }
        }
        __syncthreads();
        // Whole warps, as LANES is a power of two.
        int line = threadIdx.x / LANES, part = threadIdx.x % LANES, key = first + m * TILE + line;
        if (line >= TILE) continue;
        Pack<4> p = {};
        if (bias != nullptr) p = load<4>(bias + part * 4);
        for (int w = 0; w < WARPS; w++) {
            float4 four = sums[w][line][part];
            p.x[0] += four.x;
            p.x[1] += four.y;
            p.x[2] += four.z;
            p.x[3] += four.w;
        }
        // What is normalised is what is stored.
        uint2 words = {pair_of(p.x[0], p.x[1]), pair_of(p.x[2], p.x[3])};
        p = widen<4>(words);
        float sum = 0, square = 0;
        for (int i = 0; i < 4; i++) sum += p.x[i];
        size_t at = size_t(key) * C + part * 4;
        if (raw != nullptr && key < keys) *reinterpret_cast<uint2*>(raw + at) = words;
        float mean = group_sum(sum, LANES) / C;
        for (int i = 0; i < 4; i++) {
            p.x[i] -= mean;
            square += p.x[i] * p.x[i];
        }
        float scale = rsqrtf(group_sum(square, LANES) / C + EPSILON);
        Pack<4> slope = load<4>(gamma + part * 4), offset = load<4>(beta + part * 4);
        for (int i = 0; i < 4; i++) p.x[i] = p.x[i] * scale * slope.x[i] + offset.x[i];
        if (key >= keys) continue;
        store(y + at, p);
        if (stats != nullptr && part == 0) *reinterpret_cast<float2*>(stats + 2 * size_t(key)) = {mean, scale};
    }
}

// raw = the strided convolution of tokens, y its LayerNorm. Windows are `side` x `side` tokens, and height and width multiples
// of that. Grid: ceil(keys / REDUCED), blocks of THREADS. So for both.
KERNEL(THREADS, 2) reduce_tokens_32(const bf16* tokens /* (images, height, width, 32) */,
                                    const bf16* weight /* (32, side², 32) */, const bf16* bias /* (32) or null */,
                                    const float* gamma /* (32) */, const float* beta /* (32) */, int keys, int width,
                                    int side, bf16* raw /* (keys, 32) or null */, bf16* y /* (keys, 32) */,
                                    float* stats /* (keys, 2): mean, 1/std; or null */) {
    reduce<32>(tokens, weight, bias, gamma, beta, keys, width, side, raw, y, stats);
}

KERNEL(THREADS, 2) reduce_tokens_64(const bf16* tokens /* (images, height, width, 64) */,
                                    const bf16* weight /* (64, side², 64) */, const bf16* bias /* (64) or null */,
                                    const float* gamma /* (64) */, const float* beta /* (64) */, int keys, int width,
                                    int side, bf16* raw /* (keys, 64) or null */, bf16* y /* (keys, 64) */,
                                    float* stats /* (keys, 2): mean, 1/std; or null */) {
    reduce<64>(tokens, weight, bias, gamma, beta, keys, width, side, raw, y, stats);
}

// ---- the patch embeddings, and the sequence reduction of many channels
//
// A block has 16 windows per line of warps and all their outputs, which COLUMNS warps share. It goes through the sums by CHUNK
// channels of a tap: tokens and weights pass through shared memory, where of RING chunks one is read and the others are on
// their way; what lies outside of the picture is zero there. So LayerNorm finds a row in the registers of its warps.
// Windows begin STRIDE tokens apart: by their side, an embedding's overlap, and a reduction's are apart.
constexpr int STRIDE = 2, OVERLAPPING = 3, APART = 2, CHUNK = 32;

template <int SIDE, int IN, int OUT, int LINES, int COLUMNS, int RING>
__device__ __forceinline__ void embed(const bf16* __restrict__ tokens, const bf16* __restrict__ weight,
                                      const bf16* __restrict__ bias, const float* __restrict__ gamma,
                                      const float* __restrict__ beta, int height, int width, int out_height,
                                      int out_width, int rows, bf16* __restrict__ raw, bf16* __restrict__ y,
                                      float* __restrict__ stats, const NextNorm& next) {
    constexpr int BLOCK = 32 * LINES * COLUMNS, TALL = TILE * LINES, OWN = OUT / COLUMNS, GROUPS = OWN / 32;
    constexpr int PADDING = SIDE - STRIDE, CHUNKS = SIDE * SIDE * IN / CHUNK, PIECES = CHUNK / 8;
    // Rows of a chunk that a block copies at a time.
    constexpr int AT_ONCE = BLOCK / PIECES, PLACES = TALL / AT_ONCE;
    static_assert(IN % CHUNK == 0 && OWN % 32 == 0 && TALL % AT_ONCE == 0 && OUT % AT_ONCE == 0, "whole copies");
    static_assert(AT_ONCE % 32 == 0, "whole groups of outputs");
    SHARED(Turned<CHUNK>, windows, [RING][TALL]);
    SHARED(Turned<CHUNK>, weights, [RING][OUT]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int line = warp / COLUMNS, column = warp % COLUMNS, start = blockIdx.x * TALL;

    // What a thread copies of a chunk: a piece of some windows, whose first tap these are, and of some outputs' weights.
    unsigned piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
    const bf16* images[PLACES];
    int tops[PLACES], lefts[PLACES];
    for (int i = 0; i < PLACES; i++) {
        int window = start + row + i * AT_ONCE, above = window / out_width;
        images[i] = tokens + size_t(above / out_height) * height * width * IN + piece * 8;
        tops[i] = window < rows ? above % out_height * STRIDE - PADDING : -SIDE;
        lefts[i] = window % out_width * STRIDE - PADDING;
    }
    // The output that column n of tile j is, by 32: rows 8·j + n.
    unsigned output = row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
    weight += output * (SIDE * SIDE * IN) + piece * 8;
    auto bring = [&](unsigned chunk) {
        if (chunk < CHUNKS) {
            unsigned slot = chunk % RING, tap = chunk / (IN / CHUNK), c = chunk % (IN / CHUNK) * CHUNK;
            for (int i = 0; i < PLACES; i++) {
                int y = tops[i] + int(tap / SIDE), x = lefts[i] + int(tap % SIDE);
                bool exists = unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width);
                const bf16* from = images[i] + (exists ? size_t(y * width + x) * IN + c : 0);
                copy_async<16>(turned(windows[slot], row + i * AT_ONCE, piece), from, exists ? 16 : 0);
            }
#pragma unroll
            for (int i = 0; i < OUT / AT_ONCE; i++) {
                const bf16* from = weight + i * (AT_ONCE * SIDE * SIDE * IN) + chunk * CHUNK;
                copy_async<16>(turned(weights[slot], row + i * AT_ONCE, piece), from, 16);
            }
        }
        copies_end_group();
    };
    for (int chunk = 0; chunk < RING - 1; chunk++) bring(chunk);
    float d[4 * GROUPS][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        copies_done_but<RING - 2>();
        // The chunk is there for all, and all have read the one before, whose place the next takes.
        __syncthreads();
        bring(chunk + RING - 1);
        int slot = chunk % RING;
        for (int s = 0; s < CHUNK / 16; s++) {
            unsigned a[4];
            operand(windows[slot], line * TILE, s * 16, a);
            for (int n = 0; n < 4 * GROUPS; n += 2) {
                unsigned b[4];
                across(weights[slot], column * OWN + n * 8, s * 16, b);
                mma(d[n], a, b[0], b[1]);
                mma(d[n + 1], a, b[2], b[3]);
            }
        }
    }

    // A lane's channels of group n: 8 from here on.
    auto channel = [&](int n) { return column * OWN + n * 32 + t * 8; };
    // What warps that share rows exchange, where weights were.
    typedef float4 Sums[COLUMNS][LINES * 8][4];
    Sums* sums = reinterpret_cast<Sums*>(weights);
    static_assert(COLUMNS == 1 || (COLUMNS == 2 && GROUPS == 4 && 2 * sizeof(Sums) <= sizeof(weights)), "one other warp");
    int turn = 0;
    auto join = [&](float (&parts)[GROUPS]) {
        if constexpr (COLUMNS == 2) {
            sums[turn][column][line * 8 + g][t] = {parts[0], parts[1], parts[2], parts[3]};
            // Who has come to this one has read the turn before, whose place the next takes.
            __syncthreads();
            float4 other = sums[turn][1 - column][line * 8 + g][t];
            turn = 1 - turn;
            parts[0] += other.x;
            parts[1] += other.y;
            parts[2] += other.z;
            parts[3] += other.w;
        }
    };
    // All have read the last chunk.
    if (COLUMNS > 1) __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int own = start + line * TILE + g + 8 * half;
        bool exists = own < rows;
        float x[8 * GROUPS];
        // What is normalised, here and behind, is what is stored.
        auto put = [&](int n, const Pack<8>& p, bf16* to) {
            uint4 words = words_of(p.x);
            if (exists && to != nullptr) *reinterpret_cast<uint4*>(to + (size_t(own) * OUT + channel(n))) = words;
            Pack<8> rounded = widen<8>(words);
            for (int i = 0; i < 8; i++) x[8 * n + i] = rounded.x[i];
        };
        auto normalise = [&](const float* gamma, const float* beta, bf16* to, float* stats) {
            float2 own_stats = centre<OUT, 4>(x, join);
            for (int n = 0; n < GROUPS; n++) {
                Pack<8> p, slope = load<8>(gamma + channel(n)), offset = load<8>(beta + channel(n));
                for (int i = 0; i < 8; i++) p.x[i] = x[8 * n + i] * own_stats.y * slope.x[i] + offset.x[i];
                put(n, p, to);
            }
            bool writes = exists && stats != nullptr && t == 0 && column == 0;
            if (writes) *reinterpret_cast<float2*>(stats + 2 * size_t(own)) = own_stats;
        };
        for (int n = 0; n < GROUPS; n++) {
            Pack<8> p = {};
            if (bias != nullptr) p = load<8>(bias + channel(n));
            for (int i = 0; i < 8; i++) p.x[i] += d[4 * n + i / 2][2 * half + i % 2];
            put(n, p, raw);
        }
        normalise(gamma, beta, y, stats);
        if (next.y != nullptr) normalise(next.gamma, next.beta, next.y, next.stats);
    }
}

// The embeddings of SegFormer-B0 from the second stage on: raw = the convolution of tokens, y its LayerNorm, next that of y; rows
// are images · out_height · out_width. Blocks of 256, 128 and 256 threads, with 128, 64 and 64 rows each.
KERNEL(256, 2) embed_tokens_64(
    const bf16* tokens /* (images, height, width, 32) */, const bf16* weight /* (64, 3·3, 32) */,
    const bf16* bias /* (64) or null */, const float* gamma /* (64) */, const float* beta /* (64) */, int height,
    int width, int out_height, int out_width, int rows, bf16* raw /* (rows, 64) or null */, bf16* y /* (rows, 64) */,
    float* stats /* (rows, 2): mean, 1/std; or null */, const float* next_gamma /* (64) */,
    const float* next_beta /* (64) */, bf16* next /* (rows, 64) or null */, float* next_stats /* (rows, 2) */) {
    embed<OVERLAPPING, 32, 64, 8, 1, 3>(tokens, weight, bias, gamma, beta, height, width, out_height, out_width, rows,
                                        raw, y, stats, {next_gamma, next_beta, next, next_stats});
}

KERNEL(128, 3) embed_tokens_160(
    const bf16* tokens /* (images, height, width, 64) */, const bf16* weight /* (160, 3·3, 64) */,
    const bf16* bias /* (160) or null */, const float* gamma /* (160) */, const float* beta /* (160) */, int height,
    int width, int out_height, int out_width, int rows, bf16* raw /* (rows, 160) or null */, bf16* y /* (rows, 160) */,
    float* stats /* (rows, 2): mean, 1/std; or null */, const float* next_gamma /* (160) */,
    const float* next_beta /* (160) */, bf16* next /* (rows, 160) or null */, float* next_stats /* (rows, 2) */) {
    embed<OVERLAPPING, 64, 160, 4, 1, 3>(tokens, weight, bias, gamma, beta, height, width, out_height, out_width, rows,
                                         raw, y, stats, {next_gamma, next_beta, next, next_stats});
}

KERNEL(256, 2) embed_tokens_256(
    const bf16* tokens /* (images, height, width, 160) */, const bf16* weight /* (256, 3·3, 160) */,
    const bf16* bias /* (256) or null */, const float* gamma /* (256) */, const float* beta /* (256) */, int height,
    int width, int out_height, int out_width, int rows, bf16* raw /* (rows, 256) or null */, bf16* y /* (rows, 256) */,
    float* stats /* (rows, 2): mean, 1/std; or null */, const float* next_gamma /* (256) */,
    const float* next_beta /* (256) */, bf16* next /* (rows, 256) or null */, float* next_stats /* (rows, 2) */) {
    embed<OVERLAPPING, 160, 256, 4, 2, 2>(tokens, weight, bias, gamma, beta, height, width, out_height, out_width, rows,
                                          raw, y, stats, {next_gamma, next_beta, next, next_stats});
}

// The reduction of SegFormer-B0's third stage, in the same way. Blocks of 128 threads, with 64 rows each.
KERNEL(128, 3) reduce_tokens_160(
    const bf16* tokens /* (images, height, width, 160) */, const bf16* weight /* (160, 2·2, 160) */,
    const bf16* bias /* (160) or null */, const float* gamma /* (160) */, const float* beta /* (160) */, int height,
    int width, int out_height, int out_width, int rows, bf16* raw /* (rows, 160) or null */, bf16* y /* (rows, 160) */,
    float* stats /* (rows, 2): mean, 1/std; or null */, const float* next_gamma /* (160) */,
    const float* next_beta /* (160) */, bf16* next /* (rows, 160) or null */, float* next_stats /* (rows, 2) */) {
    embed<APART, 160, 160, 4, 1, 3>(tokens, weight, bias, gamma, beta, height, width, out_height, out_width, rows, raw, y,
                                    stats, {next_gamma, next_beta, next, next_stats});
}

// ---- the way back through the patch embeddings, and through the sequence reduction of many channels
//
// Windows are two tokens apart and three wide: a token of an even line lies on the middle line of one window, one of an odd line
// on the last line of one and on the first of the next; so it is across. Window (i, j) therefore has four tokens, of each
// parity one, (2·i + py, 2·j + px), whose gradients are sums of 1, 2, 2 and 4 products: of the gradients of windows (i, j) up to
// (i + py, j + px) with the weights at the tap where that window has the token. These are all nine taps, each once. Where windows
// share no token, one has all four, each at one of its four taps.
//
// A block has DOWN x ACROSS windows, and of their tokens BAND channels. It goes through the sums by DEPTH outputs, which pass
// through shared memory like the chunks above, the weights in the order for 16-byte access. Sums begin with what dx has.
constexpr int DOWN = 8, ACROSS = TILE, BAND = 32, DEPTH = 16, SLOTS = 3;
// Lines of windows of a warp, and how many warps share these: one the parities that are equal, the other those that are not.
constexpr int OWN_LINES = 2, PARITIES = 2;
// The windows whose gradients a block reads: one line and one column more, where they overlap.
template <int SIDE> constexpr int PITCH = ACROSS + SIDE - STRIDE;
template <int SIDE> constexpr int READ = (DOWN + SIDE - STRIDE) * PITCH<SIDE>;
static_assert(THREADS / 32 * OWN_LINES == DOWN * PARITIES, "a warp for each");

// Eight outputs of a window's gradient. Windows side by side are in different banks.
template <int SIDE>
__device__ __forceinline__ uint4* gradient_at(Turned<DEPTH>* gradients, int line, int column, int piece) {
    return &gradients[line * PITCH<SIDE> + column].at[piece ^ column / 4 % 2];
}

// A warp's products of a chunk; its parities are (0, UNEQUAL) and (1, !UNEQUAL).
template <int SIDE, bool UNEQUAL>
__device__ __forceinline__ void spread(Turned<DEPTH>* gradients, Turned<BAND> (*weights)[DEPTH], int line,
                                       float (&d)[PARITIES][OWN_LINES][BAND / 8][4]) {
    constexpr int PADDING = SIDE - STRIDE, REACHED = PADDING > 0 ? 4 : 1;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int beyond = 0; beyond < REACHED; beyond++) {
        int below = beyond / 2, right = beyond % 2;
        if (UNEQUAL && below + right == 2) continue;
        unsigned a[OWN_LINES][4];
        for (int m = 0; m < OWN_LINES; m++) {
            uint4* row = gradient_at<SIDE>(gradients, line + m + below, lane % 16 + right, lane / 16);
            load_matrices<false>(reinterpret_cast<bf16*>(row), a[m]);
        }
#pragma unroll
        for (int py = 0; py < PARITIES; py++) {
            int px = UNEQUAL ? 1 - py : py;
            if (below > py || right > px) continue;
            int ky = py + PADDING - below * STRIDE, kx = px + PADDING - right * STRIDE;
            for (int n = 0; n < BAND / 8; n += 2) {
                unsigned b[4];
                along(weights[ky * SIDE + kx], 0, n * 8, b);
                for (int m = 0; m < OWN_LINES; m++) {
                    mma(d[py][m][n], a[m], b[0], b[1]);
                    mma(d[py][m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
}

// The tokens of a lane, by the parity of their line, the line of their window and which of two windows in it.
struct OwnTokens {
    static constexpr int COUNT = PARITIES * OWN_LINES * 2;
    // What kind its warp is, its first line of windows in the block, its channels in the band, and its first token.
    bool unequal;
    int line, part, first;
    // A bit for each token that the picture has.
    unsigned exist;

    __device__ __forceinline__ OwnTokens(int thread, int top, int left, int height, int width) {
        int lane = thread % 32, warp = thread / 32;
        // Warps of both kinds on each quarter of a multiprocessor.
        unequal = warp >= THREADS / 64;
        line = warp % (THREADS / 64) * OWN_LINES;
        part = lane % 4 * 8;
        int y = 2 * (top + line), x = 2 * (left + lane / 4);
        first = (int(blockIdx.z) * height + y) * width + x;
        exist = 0;
        for (int i = 0; i < COUNT; i++) exist |= unsigned(y + down(i) < height && x + across(i) < width) << i;
    }

    __device__ __forceinline__ int down(int i) const { return 2 * (i / 2 % 2) + i / 4; }
    __device__ __forceinline__ int across(int i) const { return 16 * (i % 2) + (unequal ? 1 - i / 4 : i / 4); }
    __device__ __forceinline__ bool exists(int i) const { return exist >> i & 1; }
    __device__ __forceinline__ int number(int i, int width) const { return first + down(i) * width + across(i); }

    // Its sum of one of the eight channels.
    __device__ __forceinline__ float& sum(float (&d)[PARITIES][OWN_LINES][BAND / 8][4], int i, int c) const {
        return d[i / 4][i / 2 % 2][c / 2][i % 2 * 2 + c % 2];
    }
};

template <int SIDE, int IN, int OUT>
__device__ __forceinline__ void embed_back(const bf16* __restrict__ draw, const bf16* __restrict__ weight, int height,
                                           int width, int out_height, int out_width, bf16* __restrict__ dx) {
    constexpr int BANDS = IN / BAND, CHUNKS = OUT / DEPTH, PIECES = DEPTH / 8, PAIRS = BAND / 2;
    constexpr int TAPS = SIDE * SIDE, COPIES = (READ<SIDE> * PIECES + THREADS - 1) / THREADS;
    static_assert(IN % BAND == 0 && OUT % DEPTH == 0 && THREADS == DEPTH * PAIRS, "whole copies");
    SHARED(Turned<DEPTH>, gradients, [SLOTS][READ<SIDE>]);
    SHARED(Turned<BAND>, weights, [SLOTS][TAPS][DEPTH]);
    int top = blockIdx.y * DOWN, left = int(blockIdx.x) / BANDS * ACROSS, band = int(blockIdx.x) % BANDS * BAND;
    draw += size_t(blockIdx.z) * out_height * out_width * OUT + threadIdx.x % PIECES * 8;

    // What a thread copies of a chunk: pieces of windows' gradients, and of an output's weights a pair at each tap.
    int windows[COPIES];
    for (int i = 0; i < COPIES; i++) {
        int number = threadIdx.x + i * THREADS, window = number / PIECES;
        int y = top + window / PITCH<SIDE>, x = left + window % PITCH<SIDE>;
        windows[i] = y < out_height && x < out_width ? y * out_width + x : -1;
    }
    int output = threadIdx.x / PAIRS, pair = threadIdx.x % PAIRS;
    weight += output * (TAPS * IN) + band + 2 * pair;
    auto bring = [&](int chunk) {
        if (chunk < CHUNKS) {
            int slot = chunk % SLOTS;
            for (int i = 0; i < COPIES; i++) {
                int number = threadIdx.x + i * THREADS, window = number / PIECES;
                if (window >= READ<SIDE>) break;
                int line = window / PITCH<SIDE>, column = window % PITCH<SIDE>;
                uint4* to = gradient_at<SIDE>(gradients[slot], line, column, number % PIECES);
                const bf16* from = draw + size_t(max(windows[i], 0)) * OUT;
                copy_async<16>(to, from, windows[i] >= 0 ? 16 : 0);
            }
#pragma unroll
            for (int tap = 0; tap < TAPS; tap++) {
                unsigned* to = reinterpret_cast<unsigned*>(turned(weights[slot][tap], output, pair % 4)) + pair / 4;
                copy_async<4>(to, weight + tap * IN, 4);
            }
            draw += DEPTH;
            weight += DEPTH * TAPS * IN;
        }
        copies_end_group();
    };
    for (int chunk = 0; chunk < SLOTS - 1; chunk++) bring(chunk);

    OwnTokens own(threadIdx.x, top, left, height, width);
    float d[PARITIES][OWN_LINES][BAND / 8][4];
#pragma unroll
    for (int i = 0; i < OwnTokens::COUNT; i++) {
        uint4 words = {0, 0, 0, 0};
        if (own.exists(i)) words = sixteen(dx + size_t(own.number(i, width)) * IN + band + own.part);
        Pack<8> old = widen<8>(words);
        for (int c = 0; c < 8; c++) own.sum(d, i, c) = old.x[c];
    }
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        copies_done_but<SLOTS - 2>();
        // The chunk is there for all, and all have read the one before, whose place the next takes.
        __syncthreads();
        bring(chunk + SLOTS - 1);
        int slot = chunk % SLOTS;
        if (own.unequal) spread<SIDE, true>(gradients[slot], weights[slot], own.line, d);
        else spread<SIDE, false>(gradients[slot], weights[slot], own.line, d);
    }
    // Found again, so that where they are took no registers meanwhile.
    OwnTokens again(int(opaque(threadIdx.x)), top, left, height, width);
#pragma unroll
    for (int i = 0; i < OwnTokens::COUNT; i++) {
        Pack<8> sum;
        for (int c = 0; c < 8; c++) sum.x[c] = again.sum(d, i, c);
        if (again.exists(i)) store(dx + size_t(again.number(i, width)) * IN + band + again.part, sum);
    }
}

// dx += the gradient of the convolution's input, from that of what it made. Grid: (ceil(out_width / ACROSS) · channels
// of dx / BAND, ceil(out_height / DOWN), images), blocks of THREADS.
KERNEL(THREADS, 2) embed_tokens_backward_64(
    const bf16* draw /* (images, out_height, out_width, 64) */, const bf16* weight /* (64, 3·3, 32) */, int height,
    int width, int out_height, int out_width, bf16* dx /* (images, height, width, 32) */) {
    embed_back<OVERLAPPING, 32, 64>(draw, weight, height, width, out_height, out_width, dx);
}

KERNEL(THREADS, 2) embed_tokens_backward_160(
    const bf16* draw /* (images, out_height, out_width, 160) */, const bf16* weight /* (160, 3·3, 64) */, int height,
    int width, int out_height, int out_width, bf16* dx /* (images, height, width, 64) */) {
    embed_back<OVERLAPPING, 64, 160>(draw, weight, height, width, out_height, out_width, dx);
}

KERNEL(THREADS, 2) embed_tokens_backward_256(
    const bf16* draw /* (images, out_height, out_width, 256) */, const bf16* weight /* (256, 3·3, 160) */, int height,
    int width, int out_height, int out_width, bf16* dx /* (images, height, width, 160) */) {
    embed_back<OVERLAPPING, 160, 256>(draw, weight, height, width, out_height, out_width, dx);
}

KERNEL(THREADS, 2) reduce_tokens_backward_160(
    const bf16* draw /* (images, out_height, out_width, 160) */, const bf16* weight /* (160, 2·2, 160) */, int height,
    int width, int out_height, int out_width, bf16* dx /* (images, height, width, 160) */) {
    embed_back<APART, 160, 160>(draw, weight, height, width, out_height, out_width, dx);
}

// ---- the gradient of the patch embeddings' weights
//
// dw = drawᵀ · the windows of tokens, which lie in shared memory as a picture, not as patches: a tap of windows side by side are
// every second token of a line. There the even columns of a line come first, then the odd ones, so that such tokens are
// neighbours. A block has OUTPUTS outputs and BAND channels at all taps, a warp eight of the channels; it goes through its share of
// the windows by TALL lines of ACROSS. What lies outside of the picture is zero, gradients as well as tokens.
constexpr int SIDE = OVERLAPPING, PADDING = SIDE - STRIDE, TAPS = SIDE * SIDE;
constexpr int TALL = 2, WIDE = BAND / 8, SEEN_LINES = (TALL - 1) * STRIDE + SIDE, SEEN = (ACROSS - 1) * STRIDE + SIDE;
constexpr int EVEN = (SEEN + 1) / 2, OUTPUTS = 32, OUTPUT_TILES = OUTPUTS / TILE, WALKERS = 32 * WIDE;

// Eight channels of a token, by its line and by its place in it.
__device__ __forceinline__ uint4* token_at(Turned<BAND>* tokens, int line, int place, int piece) {
    return &tokens[line * SEEN + place].at[piece ^ place / 2 % 4];
}

template <int IN, int OUT>
__device__ __forceinline__ void embed_weights(const bf16* __restrict__ tokens, const bf16* __restrict__ draw,
                                              int images, int height, int width, int out_height, int out_width,
                                              float* __restrict__ partial) {
    constexpr int BANDS = IN / BAND, GRADIENTS = TALL * ACROSS * (OUTPUTS / 8);
    static_assert(IN % BAND == 0 && OUT % OUTPUTS == 0 && GRADIENTS % WALKERS == 0, "whole copies");
    static_assert(WALKERS == WIDE * (SEEN - 1), "a line but for a column");
    SHARED(Turned<BAND>, seen, [SLOTS][SEEN_LINES * SEEN]);
    SHARED(Row<OUTPUTS>, gradients, [SLOTS][TALL * ACROSS]);
    int lane = threadIdx.x % 32, piece = threadIdx.x / 32;
    int band = int(blockIdx.x) % BANDS * BAND, output = int(blockIdx.x) / BANDS * OUTPUTS;

    // This block's part of the windows, and the next chunk of them that it brings.
    int across = (out_width + ACROSS - 1) / ACROSS, down = (out_height + TALL - 1) / TALL;
    int all = images * down * across, share = (all + gridDim.y - 1) / gridDim.y;
    int next = int(blockIdx.y) * share, chunks = min(all - next, share);
    int column = next % across, line = next / across % down, image = next / across / down;
    auto bring = [&](int chunk) {
        if (chunk < chunks) {
            int slot = chunk % SLOTS, window_x = column * ACROSS, window_y = line * TALL;
            int left = window_x * STRIDE - PADDING, top = window_y * STRIDE - PADDING;
            // What lies outside is not read, wherever that would be.
            const bf16* corner = tokens + (long long)((image * height + top) * width + left) * IN + band;
            auto copy = [&](int at_y, int at_x) {
                bool exists = unsigned(top + at_y) < unsigned(height) && unsigned(left + at_x) < unsigned(width);
                uint4* to = token_at(seen[slot], at_y, at_x / 2 + at_x % 2 * EVEN, threadIdx.x % WIDE);
                copy_async<16>(to, corner + (at_y * width + at_x) * IN + threadIdx.x % WIDE * 8, exists ? 16 : 0);
            };
            // All columns but the first, then that.
#pragma unroll
            for (int at_y = 0; at_y < SEEN_LINES; at_y++) copy(at_y, threadIdx.x / WIDE + 1);
            if (threadIdx.x < SEEN_LINES * WIDE) copy(threadIdx.x / WIDE, 0);
            const bf16* first = draw + size_t((image * out_height + window_y) * out_width + window_x) * OUT + output;
#pragma unroll
            for (int i = 0; i < GRADIENTS / WALKERS; i++) {
                int number = threadIdx.x + i * WALKERS, window = number / (OUTPUTS / 8), eight = number % (OUTPUTS / 8);
                int y = window / ACROSS, x = window % ACROSS;
                bool exists = window_y + y < out_height && window_x + x < out_width;
                copy_async<16>(&gradients[slot][window].at[eight * 8], first + (y * out_width + x) * OUT + eight * 8,
                               exists ? 16 : 0);
            }
            if (++column == across) {
                column = 0;
                if (++line == down) {
                    line = 0;
                    image++;
                }
            }
        }
        copies_end_group();
    };
    for (int chunk = 0; chunk < SLOTS - 1; chunk++) bring(chunk);

    float d[TAPS][OUTPUT_TILES][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        copies_done_but<SLOTS - 2>();
        // The chunk is there for all, and all have read the one before, whose place the next takes.
        __syncthreads();
        bring(chunk + SLOTS - 1);
        int slot = chunk % SLOTS;
        unsigned a[TALL][OUTPUT_TILES][4];
        for (int k = 0; k < TALL; k++) {
            for (int m = 0; m < OUTPUT_TILES; m++) upright(gradients[slot], k * ACROSS, m * TILE, a[k][m]);
        }
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) {
            // Both lines of windows: lane l names window l % 16 of line l / 16.
            int kx = tap % SIDE, place = kx % 2 * EVEN + kx / 2 + lane % ACROSS;
            unsigned b[4];
            uint4* row = token_at(seen[slot], lane / ACROSS * STRIDE + tap / SIDE, place, piece);
            load_matrices<true>(reinterpret_cast<bf16*>(row), b);
            for (int k = 0; k < TALL; k++) {
                for (int m = 0; m < OUTPUT_TILES; m++) mma(d[tap][m], a[k][m], b[2 * k], b[2 * k + 1]);
            }
        }
    }
    int g = lane / 4, t = lane % 4;
    partial += size_t(blockIdx.y) * (OUT * TAPS * IN) + band + piece * 8 + t * 2;
#pragma unroll
    for (int m = 0; m < OUTPUT_TILES; m++) {
        for (int half = 0; half < 2; half++) {
            int row = output + m * TILE + half * 8 + g;
            for (int tap = 0; tap < TAPS; tap++) {
                float2 pair = {d[tap][m][2 * half], d[tap][m][2 * half + 1]};
                *reinterpret_cast<float2*>(partial + (row * TAPS + tap) * IN) = pair;
            }
        }
    }
}

// The gradient of an embedding's weights from that of what its convolution made, by shares of the windows. Grid: (outputs / OUTPUTS ·
// inputs / BAND, shares), blocks of WALKERS threads.
KERNEL(WALKERS, 3) embed_tokens_backward_weights_64(
    const bf16* tokens /* (images, height, width, 32) */, const bf16* draw /* (images, out_height, out_width, 64) */,
    int images, int height, int width, int out_height, int out_width, float* partial /* (shares, 64, 3·3, 32) */) {
    embed_weights<32, 64>(tokens, draw, images, height, width, out_height, out_width, partial);
}

KERNEL(WALKERS, 3) embed_tokens_backward_weights_160(
    const bf16* tokens /* (images, height, width, 64) */, const bf16* draw /* (images, out_height, out_width, 160) */,
    int images, int height, int width, int out_height, int out_width, float* partial /* (shares, 160, 3·3, 64) */) {
    embed_weights<64, 160>(tokens, draw, images, height, width, out_height, out_width, partial);
}

KERNEL(WALKERS, 3) embed_tokens_backward_weights_256(
    const bf16* tokens /* (images, height, width, 160) */, const bf16* draw /* (images, out_height, out_width, 256) */,
    int images, int height, int width, int out_height, int out_width, float* partial /* (shares, 256, 3·3, 160) */) {
    embed_weights<160, 256>(tokens, draw, images, height, width, out_height, out_width, partial);
}

// ---- the gradient of the sequence reductions' weights
//
// dw = drawᵀ · the windows of tokens. A window's line of taps lies in memory as in a row of dw, (side, C), so that it need not
// be gathered. A block has COLUMNS of dw, in all rows, so that it reads of tokens what no other block does; a warp has OWN x OWN.
// It goes through its share of the windows by WINDOWS, which pass through shared memory like the chunks above. What lies past
// the last window is zero in both operands, what lies past the last column in tokens.
constexpr int WINDOWS = 32, OWN = 32;
template <int C, int COLUMNS> constexpr int OWNERS = C / OWN * (COLUMNS / OWN) * 32;

template <int C, int COLUMNS, int RING>
__device__ __forceinline__ void reduce_weights(const bf16* __restrict__ tokens, const bf16* __restrict__ draw, int keys,
                                               int width, int side, float* __restrict__ partial) {
    constexpr int BLOCK = OWNERS<C, COLUMNS>, PIECES = COLUMNS / 8, OUTPUT_PIECES = C / 8;
    // Windows that a block copies at a time, of which a thread has these many.
    constexpr int AT_ONCE = BLOCK / PIECES, COPIES = (WINDOWS + AT_ONCE - 1) / AT_ONCE;
    static_assert(BLOCK % PIECES == 0 && WINDOWS * OUTPUT_PIECES % BLOCK == 0, "whole copies");
    SHARED(Turned<COLUMNS>, seen, [RING][WINDOWS]);
    SHARED(Turned<C>, gradients, [RING][WINDOWS]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int output = warp / (COLUMNS / OWN) * OWN, column = warp % (COLUMNS / OWN) * OWN;

    // This block's part of the windows, and the first of the next chunk that it brings.
    int all = (keys + WINDOWS - 1) / WINDOWS, share = (all + gridDim.y - 1) / gridDim.y;
    int start = int(blockIdx.y) * share, chunks = min(all - start, share), key = start * WINDOWS;

    // What a thread copies: a piece of some windows, which lie at these places of their lines, and whose first tokens these are.
    int line = side * C, numbers = side * line, first = blockIdx.x * COLUMNS;
    int piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES, number = first + piece * 8;
    if (number < numbers) tokens += size_t(number / line * width) * C + number % line;
    unsigned across = width / side, places[COPIES], origins[COPIES];
    for (int i = 0; i < COPIES; i++) {
        unsigned window = key + row + i * AT_ONCE;
        places[i] = window % across;
        origins[i] = (window / across * width + places[i]) * side;
    }
    // The same windows of the next chunk are as far on, and farther if they lie past the end of the line.
    unsigned right = WINDOWS % across, on = (WINDOWS / across * width + right) * side, down = (width - across) * side;
    draw += size_t(key) * C + threadIdx.x * 8;
    auto bring = [&](int chunk) {
        if (chunk < chunks) {
            int slot = chunk % RING;
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                int window = row + i * AT_ONCE;
                if (WINDOWS % AT_ONCE == 0 || window < WINDOWS) {
                    bool exists = key + window < keys && number < numbers;
                    const bf16* from = tokens + (exists ? size_t(origins[i]) * C : 0);
                    copy_async<16>(turned(seen[slot], window, piece), from, exists ? 16 : 0);
                }
                places[i] += right;
                origins[i] += on;
                if (places[i] >= across) {
                    places[i] -= across;
                    origins[i] += down;
                }
            }
#pragma unroll
            for (int i = 0; i < WINDOWS * OUTPUT_PIECES; i += BLOCK) {
                int window = (i + threadIdx.x) / OUTPUT_PIECES;
                uint4* to = turned(gradients[slot], window, (i + threadIdx.x) % OUTPUT_PIECES);
                copy_async<16>(to, draw + i * 8, key + window < keys ? 16 : 0);
            }
            key += WINDOWS;
            draw += WINDOWS * C;
        }
        copies_end_group();
    };
    for (int chunk = 0; chunk < RING - 1; chunk++) bring(chunk);

    float d[OWN / TILE][OWN / 8][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        copies_done_but<RING - 2>();
        // The chunk is there for all, and all have read the one before, whose place the next takes.
        __syncthreads();
        bring(chunk + RING - 1);
        int slot = chunk % RING;
#pragma unroll
        for (int k = 0; k < WINDOWS; k += TILE) {
            unsigned a[OWN / TILE][4], b[OWN / TILE][4];
            for (int m = 0; m < OWN / TILE; m++) {
                upright(gradients[slot], k, output + m * TILE, a[m]);
                along(seen[slot], k, column + m * TILE, b[m]);
            }
            for (int m = 0; m < OWN / TILE; m++) {
                for (int n = 0; n < OWN / 8; n++) mma(d[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
        }
    }
    if (first + column >= numbers) return;
    int g = lane / 4, t = lane % 4;
    partial += (size_t(blockIdx.y) * C + output + g) * numbers + first + column + t * 2;
#pragma unroll
    for (int m = 0; m < OWN / TILE; m++) {
        for (int half = 0; half < 2; half++) {
            for (int n = 0; n < OWN / 8; n++) {
                float2 pair = {d[m][n][2 * half], d[m][n][2 * half + 1]};
                *reinterpret_cast<float2*>(partial + size_t(m * TILE + half * 8) * numbers + n * 8) = pair;
            }
        }
    }
}

// The gradient of a reduction's weights from that of what its convolution made, by shares of the windows. Grid: (ceil(side² ·
// channels / COLUMNS), shares), blocks of OWNERS threads; of COLUMNS there are 128, 64 and 64.
KERNEL(OWNERS<32, 128>, 4) reduce_tokens_backward_weights_32(
    const bf16* tokens /* (images, height, width, 32) */, const bf16* draw /* (keys, 32) */, int keys, int width,
    int side, float* partial /* (shares, 32, side², 32) */) {
    reduce_weights<32, 128, 4>(tokens, draw, keys, width, side, partial);
}

KERNEL(OWNERS<64, 64>, 4) reduce_tokens_backward_weights_64(
    const bf16* tokens /* (images, height, width, 64) */, const bf16* draw /* (keys, 64) */, int keys, int width,
    int side, float* partial /* (shares, 64, side², 64) */) {
    reduce_weights<64, 64, 4>(tokens, draw, keys, width, side, partial);
}

KERNEL(OWNERS<160, 64>, 2) reduce_tokens_backward_weights_160(
    const bf16* tokens /* (images, height, width, 160) */, const bf16* draw /* (keys, 160) */, int keys, int width,
    int side, float* partial /* (shares, 160, side², 160) */) {
    reduce_weights<160, 64, 3>(tokens, draw, keys, width, side, partial);
}
