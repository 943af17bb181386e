// The way back through a Mix-FFN, from the gradient d of the stream behind it to that of the LayerNorm's output, in one kernel: the
// hidden tensors, four times as large as the tokens, are read once, but for what blocks share at their edges, and, but for what a
// product with a weight's gradient wants, not written. Where stochastic depth drops an image, d counts as zero.
//
// A block takes a strip of a picture's columns, one wider on each side than what it puts out, and walks down its rows; a warp has
// 8 of the CHUNK hidden channels that are under way at a time, a lane two of them at WIDE tokens side by side. That is how the
// tensor cores hand out a product's result, if row g + 8i of it is token WIDE·g + i of the strip. So dg = d·W2 arises where it
// is used, next to u, which the convolution of h gives; du stays in registers, and the tokens beside a lane's own come from
// the lanes beside it; the transposed convolution of du gives dh. Only dh goes through shared memory, in the place of the row of h
// that was last used, for the product over all channels of the chunk: dn = dh·W1. A row that arrives adds to the sums of
// three rows, of which it ends one, in both convolutions: row r of h ends row r - 1 of u, and that row r - 2 of dh. One
// barrier a step is enough, since the rows of h lie in a ring of three steps.
//
// The columns of all images lie side by side, with one between images that is zero: it is the padding of both. So strips
// are full, however wide the picture. Where there are more hidden channels than a chunk has, the strip is walked once for each chunk, and
// the sums of dn wait in `room`, rounded.
#include "common.cuh"
#include "gelu.cuh"
#include "mma.cuh"

constexpr int WARPS = 16, BLOCK = 32 * WARPS, CHUNK = 8 * WARPS, TAPS = 9;
// Sums per hidden channel: w's gradient, b's, and that of a bias in front of h.
constexpr int KINDS = TAPS + 2;

// 8 channels of a token. Tiles are (channels / 8, tokens): 8 rows of a matrix then lie behind one another, in all banks.
struct alignas(16) Piece {
    bf16 at[8];
};

__device__ __forceinline__ unsigned& pair_at(Piece& piece, int channel) {
    return *reinterpret_cast<unsigned*>(&piece.at[channel]);
}

__device__ __forceinline__ float2 two(const float* from) { return *reinterpret_cast<const float2*>(from); }

// Number, in row 0, of the token in a column of all images' columns; -1 where there is none.
__device__ __forceinline__ int token_of(int column, int images, int height, int width) {
    int image = column / (width + 1), x = column - image * (width + 1);
    return column < 0 || x == width || image >= images ? -1 : image * height * width + x;
}

// Stochastic depth of the branch, with the factor of what it keeps.
struct Depth {
    DropPath path;
    float kept;
};

// Where a thread reads or writes what a row has for it: numbers before it, in row 0. One register, also where there is no token.
struct Place {
    unsigned at;

    __device__ __forceinline__ Place(int token, int row, int width, int channels, int c)
        : at(opaque(token < 0 ? ~0u : unsigned(token + row * width) * channels + c)) {}
    __device__ __forceinline__ bool exists() const { return int(at) >= 0; }
};

// For channels C of tokens. WEIGHTS: the parameters' gradients are summed, where that is wanted; the sums leave a lane registers for
// half of the columns, so a step takes two rows. Those of the products' weights that the warp's hidden channels take part in are
// summed on tensor cores, from what is in its registers: the contraction's with d; the expansion's with n, for which there are
// registers if channels are few. Of more, dh is written.
template <int C, bool WEIGHTS>
__device__ __forceinline__ void walk(const bf16* d, const bf16* h, const bf16* w2, const float* w, const float* b,
                                     const bf16* w1, int images, int height, int width, int rows, const Depth& depth,
                                     unsigned* room, bf16* dn, const bf16* n, bf16* dh, float* partial) {
    constexpr int HIDDEN = 4 * C, ROWS = WEIGHTS ? 2 : 1, WIDE = 4 / ROWS, TOKENS = 8 * WIDE, OUTPUTS = TOKENS - 2;
    constexpr bool EXPANSION = WEIGHTS && C == 32;
    constexpr int PRODUCTS = EXPANSION ? 2 : 1, ALL_KINDS = KINDS + PRODUCTS * C;
    // Tiles of 16 tokens and 8 channels of dn, one a warp; where warps are left, they take turns by steps.
    constexpr int SLOTS = 32, TILES = SLOTS / 16 * C / 8, TURNS = WARPS / TILES;
    constexpr int D_PIECES = C / 8 * SLOTS, BUFFER = PRODUCTS * D_PIECES;
    SHARED(Piece, tile_h, [3][WARPS][SLOTS]);
    // Of d, then of n.
    SHARED(Piece, tile_d, [2][PRODUCTS][C / 8][SLOTS]);
    SHARED(Piece, tile_w, [C / 8][CHUNK]);

    for (int base = 0; base < HIDDEN; base += CHUNK) {
        // Made anew for each chunk, which is cheaper than to keep it.
        unsigned thread = opaque(threadIdx.x);
        int lane = thread % 32, warp = thread / 32, line = lane / 4, channel = lane % 4 * 2;
        int block = blockIdx.y * gridDim.x + blockIdx.x, column = blockIdx.x * OUTPUTS - 1;
        int y0 = blockIdx.y * rows, y1 = min(y0 + rows, height), h_rows = min(y1 + 2, height);
        auto token_at = [&](int i) { return token_of(column + i, images, height, width); };
        auto dropped = [&](int i) {
            // Made anew for each chunk, too.
            DropPath path = depth.path;
            path.site = opaque(path.site);
            path.key0 = opaque(path.key0);
            path.key1 = opaque(path.key1);
            path.rate = __uint_as_float(opaque(__float_as_uint(path.rate)));
            return path.factor((column + i) / (width + 1)) == 0.0f;
        };

        // A step's tokens are, row by row, in the order of the rows of the products: i WIDE apart before i + 1. Neighbouring
        // threads have pieces that lie behind one another in memory, by twos of h and by rows of d.
        bool copies_d = thread < BUFFER, of_d = !EXPANSION || thread < D_PIECES;
        int h_chunk = thread / (2 * SLOTS) * 2 + thread % 2, h_slot = thread / 2 % SLOTS, h_row = h_slot / TOKENS;
        int d_chunk = thread % (C / 8), d_slot = thread / (C / 8) % SLOTS, d_row = d_slot / TOKENS;
        auto column_of = [](int slot) { return slot % 8 * WIDE + slot % TOKENS / 8; };
        int h_column = column_of(h_slot);
        Place h_place(token_at(h_column), h_row, width, HIDDEN, base + h_chunk * 8);
        int d_token = token_at(column_of(d_slot));
        if (of_d && d_token >= 0 && dropped(column_of(d_slot))) d_token = -1;
        Place d_place(d_token, d_row, width, C, d_chunk * 8);
        unsigned h_piece = h_chunk * SLOTS + h_slot, d_piece = d_chunk * SLOTS + d_slot + (of_d ? 0 : D_PIECES);

        // The columns of h beside the strip, of the lanes there.
        bool at_left = line == 0, at_right = line == 7;
        Place beside(at_left || at_right ? token_at(at_left ? -1 : TOKENS) : -1, 0, width, HIDDEN, base + warp * 8 + channel);

        // The warp's tile of dn and the lane's tokens in it. Of two neighbours, both are of one image.
        int tile = warp % TILES, turn = warp / TILES, tile_row = tile % 2, tile_column = tile / 2;
        int output = line * WIDE + (ROWS == 1 ? tile_row * 2 : 0), output_row = ROWS == 1 ? 0 : tile_row;
        int outputs[2] = {token_at(output), token_at(output + 1)};
        bool puts_out[2] = {output > 0 && outputs[0] >= 0, output < OUTPUTS && outputs[1] >= 0};
        output = (outputs[0] >= 0 ? outputs[0] : outputs[1] - 1) + output_row * width;
        // With WEIGHTS, these are all of the lane's tokens: what the block sums over. And whether the thread has a piece of them.
        bool own[2] = {WEIGHTS && puts_out[0], WEIGHTS && puts_out[1]};

        int c = base + warp * 8 + channel;
        float2 weight[TAPS], bias = two(b + c);
        for (int tap = 0; tap < TAPS; tap++) weight[tap] = two(w + tap * HIDDEN + c);

        // The contraction's weights go where the second and third row of h will be, and from there to registers.
        Piece* staged = &tile_h[1][0][0];
        __syncthreads();
        for (int i = thread; i < C * WARPS; i += BLOCK) {
            int chunk = i % WARPS, row = i / WARPS;
            copy_async<16>(staged + chunk * C + row, w2 + row * HIDDEN + base + chunk * 8, 16);
        }
        for (int i = thread; i < C / 8 * CHUNK; i += BLOCK) {
            int chunk = i % (C / 8), row = i / (C / 8);
            copy_async<16>(&tile_w[chunk][row], w1 + (base + row) * C + chunk * 8, 16);
        }
        // Begins to copy the rows of a step from y on; `beside_ahead` receives what lies beside them.
        unsigned beside_ahead[ROWS];
        auto copy_h = [&](int k, int y) {
            unsigned before = y * width * HIDDEN;
            bool exists = h_place.exists() && unsigned(y + h_row) < unsigned(h_rows);
            copy_async<16>(&tile_h[k][0][0] + h_piece, h + (h_place.at + before), exists ? 16 : 0);
            for (int r = 0; r < ROWS; r++) {
                const bf16* from = h + (beside.at + unsigned((y + r) * width * HIDDEN));
                exists = beside.exists() && unsigned(y + r) < unsigned(h_rows);
                beside_ahead[r] = exists ? *reinterpret_cast<const unsigned*>(from) : 0;
            }
        };
        copy_h(0, y0 - 2);
        copies_done();
        __syncthreads();
        unsigned contract[C / 32][4];
        for (int s = 0; s < C / 32; s++) load_matrices<true>(staged[warp * C + 32 * s + lane].at, contract[s]);
        __syncthreads();

        // Sums of u's rows and of dh's; gradients; h's rows, where the sums over tokens are the block's.
        float2 u[3][WIDE], sum[3][WIDE] = {}, gradient[WEIGHTS ? KINDS : 1] = {};
        // Of the products' weights, 16 of the tokens' channels by the warp's hidden ones: the contraction's, the expansion's.
        float products[PRODUCTS][WEIGHTS ? C / 16 : 1][4] = {};
        unsigned held[3][WIDE] = {};
        for (int i = 0; i < WIDE; i++) u[0][i] = u[2][i] = bias;
        for (int round = y0 - 2; round <= y1 + 1; round += 3 * ROWS) {
#pragma unroll
            for (int k = 0; k < 3; k++) {
                int start = round + k * ROWS;
                if (start > y1 + 1) break;
                int odd = (start - y0 + 2) / ROWS % 2;
                Piece* pieces = tile_h[k][warp];
                unsigned words[ROWS][WIDE + 2];
                for (int r = 0; r < ROWS; r++) {
                    Piece* row = pieces + r * TOKENS;
                    for (int i = 0; i < WIDE; i++) words[r][i + 1] = pair_at(row[8 * i + line], channel);
                    // Of the first and the last lanes, these are not used, but exist.
                    unsigned left = pair_at(row[8 * (WIDE - 1) + line - 1], channel), right = pair_at(row[line + 1], channel);
                    words[r][0] = at_left ? beside_ahead[r] : left;
                    words[r][WIDE + 1] = at_right ? beside_ahead[r] : right;
                }
                copy_h((k + 1) % 3, start + ROWS);
                if (copies_d) {
                    // The step to come ends u's rows from this one on, and dh's from the one before it.
                    int y = start + ROWS - (of_d ? 1 : 2);
                    bool exists = d_place.exists() && unsigned(y + d_row) < unsigned(h_rows);
                    Piece* to = &tile_d[0][0][0][0] + (odd ? 0 : BUFFER) + d_piece;
                    copy_async<16>(to, (of_d ? d : n) + (d_place.at + unsigned(y * width * C)), exists ? 16 : 0);
                }

#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    // Row y of h arrives, ends row y - 1 of u, and that row y - 2 of dh.
                    int y = start + r, now = (k * ROWS + r) % 3, last = (now + 2) % 3, next = (now + 1) % 3;
                    float2 row[WIDE + 2];
                    for (int i = 0; i < WIDE + 2; i++) row[i] = widen(words[r][i]);
                    for (int i = 0; i < WIDE; i++) {
                        u[next][i] = bias;
                        for (int j = 0; j < 3; j++) {
                            add(u[last][i], row[i + j], weight[6 + j]);
                            add(u[now][i], row[i + j], weight[3 + j]);
                            add(u[next][i], row[i + j], weight[j]);
                        }
                        if (WEIGHTS) held[now][i] = own[i % 2] && y >= y0 && y < y1 ? words[r][i + 1] : 0;
                    }

                    Piece* pieces_d = &tile_d[0][0][lane / 16][lane % 16] + (odd ? BUFFER : 0) + r * TOKENS;
                    // Adds what a row of g or dh makes of one of the weights' gradients, with the tokens that begin at `from`.
                    auto multiply_row = [&](float(&sums)[WEIGHTS ? C / 16 : 1][4], const Piece* from, const unsigned (&row)[2]) {
                        unsigned right[2] = {transpose(row[0]), transpose(row[1])};
                        for (int m = 0; m < C / 16; m++) {
                            unsigned x[4];
                            load_matrices<true>(from[2 * m * SLOTS].at, x);
                            mma(sums[m], {x[0], x[2], x[1], x[3]}, right[0], right[1]);
                        }
                    };
                    // Where there is no token, d is zero, and so is du.
                    if (start >= y0) {
                        float dg[WIDE / 2][4] = {};
                        for (int s = 0; s < C / 16; s++) {
                            for (int m = 0; m < WIDE / 2; m++) {
                                unsigned a[4];
                                load_matrices<false>(pieces_d[2 * s * SLOTS + 16 * m].at, a);
                                mma(dg[m], a, contract[s / 2][s % 2 * 2], contract[s / 2][s % 2 * 2 + 1]);
                            }
                        }
                        unsigned du[WIDE + 2], own_g[WIDE] = {};
                        for (int i = 0; i < WIDE; i++) {
                            float2 grad = widen(pair_of(dg[i / 2][i % 2 * 2], dg[i / 2][i % 2 * 2 + 1]));
                            grad.x *= depth.kept;
                            grad.y *= depth.kept;
                            gelu_backward(u[last][i].x, grad.x);
                            gelu_backward(u[last][i].y, grad.y);
                            du[i + 1] = pair_of(grad.x, grad.y);
                            if constexpr (WEIGHTS) {
                                if (own[i] && y > y0 && y <= y1) {
                                    add(gradient[TAPS], grad, {1.0f, 1.0f});
                                    own_g[i] = pair_of(u[last][i].x, u[last][i].y);
                                }
                            }
                        }
                        if constexpr (WEIGHTS) multiply_row(products[0], pieces_d, own_g);
                        du[0] = __shfl_up_sync(ALL_LANES, du[WIDE], 4);
                        du[WIDE + 1] = __shfl_down_sync(ALL_LANES, du[1], 4);
                        for (int i = 0; i < WIDE + 2; i++) row[i] = widen(du[i]);
                        for (int i = 0; i < WIDE; i++) {
                            sum[next][i] = {};
                            for (int j = 0; j < 3; j++) {
                                add(sum[last][i], row[i + j], weight[2 - j]);
                                add(sum[now][i], row[i + j], weight[5 - j]);
                                add(sum[next][i], row[i + j], weight[8 - j]);
                            }
                        }
                        if constexpr (WEIGHTS) {
                            // In the forward direction, this row of u took rows y - 2 to y of h, by the taps of line t.
                            for (int t = 0; t < 3; t++) {
                                for (int i = 0; i < WIDE; i++) {
                                    float2 x = widen(held[(now + 1 + t) % 3][i]);
                                    for (int j = 0; j < 3; j++) add(gradient[3 * t + j], row[i + 2 - j], x);
                                }
                            }
                        }
                    }

                    // The warp's part of the row of h makes way for dh.
                    __syncwarp();
                    if (start >= y0 + 2) {
                        unsigned own_dh[WIDE] = {};
                        for (int i = 0; i < WIDE; i++) {
                            unsigned pair = pair_of(sum[last][i].x, sum[last][i].y);
                            pair_at(pieces[r * TOKENS + 8 * i + line], channel) = pair;
                            if constexpr (WEIGHTS) {
                                if (own[i] && y <= y1 + 1) {
                                    add(gradient[TAPS + 1], sum[last][i], {1.0f, 1.0f});
                                    own_dh[i] = pair;
                                }
                            }
                        }
                        if constexpr (EXPANSION) multiply_row(products[1], pieces_d + D_PIECES, own_dh);
                    }
                }
                copies_done();
                __syncthreads();
                if (start < y0 + 2) continue;
                // Of pieces that the strip puts out; made anew, as registers are short.
                int slot = opaque(threadIdx.x) / 2 % SLOTS;
                bool writes = unsigned(column_of(slot) - 1) < unsigned(OUTPUTS) && h_place.exists();
                if (WEIGHTS && !EXPANSION && dh != nullptr && writes && start - 2 + slot / TOKENS < y1) {
                    bf16* to = dh + (h_place.at + unsigned((start - 2) * width * HIDDEN));
                    *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4&>((&tile_h[k][0][0])[h_piece]);
                }
                if (TURNS > 1 && turn != odd) continue;
                float dn_sum[4] = {};
                unsigned step = block * ((rows + ROWS - 1) / ROWS) + (start - y0 - 2) / ROWS;
                unsigned* kept = room + (step * (TILES * 32) + thread % (TILES * 32)) * 2;
                if (base > 0) {
                    uint2 words = *reinterpret_cast<const uint2*>(kept);
                    Pack<4> before = widen<4>(words);
                    for (int i = 0; i < 4; i++) dn_sum[i] = before.x[i];
                }
                unsigned own = opaque(threadIdx.x) % 32;
                for (int s = 0; s < CHUNK / 16; s += 2) {
                    unsigned expand[4];
                    load_matrices<true>(tile_w[tile_column][16 * s + own].at, expand);
                    for (int i = 0; i < 2; i++) {
                        unsigned a[4];
                        load_matrices<false>(tile_h[k][2 * (s + i) + own / 16][16 * tile_row + own % 16].at, a);
                        mma(dn_sum, a, expand[2 * i], expand[2 * i + 1]);
                    }
                }
                if (base + CHUNK < HIDDEN) {
                    *reinterpret_cast<uint2*>(kept) = {pair_of(dn_sum[0], dn_sum[1]), pair_of(dn_sum[2], dn_sum[3])};
                } else if (start - 2 + output_row < y1) {
                    for (int i = 0; i < 2; i++) {
                        bf16* to = dn + unsigned(output + i + (start - 2) * width) * C + tile_column * 8 + channel;
                        if (puts_out[i]) *reinterpret_cast<unsigned*>(to) = pair_of(dn_sum[2 * i], dn_sum[2 * i + 1]);
                    }
                }
            }
        }

        if constexpr (WEIGHTS) {
            if (partial == nullptr) continue;
            // Made anew, as registers were short.
            unsigned thread = opaque(threadIdx.x), lane = thread % 32, line = lane / 4;
            int c = base + thread / 32 * 8 + lane % 4 * 2;
            float* own_partial = partial + size_t(blockIdx.y * gridDim.x + blockIdx.x) * (ALL_KINDS * HIDDEN);
            for (int kind = 0; kind < KINDS; kind++) {
                float2 total = gradient[kind];
                for (int other = 4; other < 32; other *= 2) {
                    total.x += __shfl_xor_sync(ALL_LANES, total.x, other);
                    total.y += __shfl_xor_sync(ALL_LANES, total.y, other);
                }
                if (line == 0) {
                    *reinterpret_cast<float2*>(own_partial + kind * HIDDEN + c) = total;
                }
            }
            float* contracted = own_partial + KINDS * HIDDEN;
            float* expanded = contracted + C * HIDDEN;
            for (int i = 0; i < C / 8; i++) {
                int row = 8 * i + line;
                const float *x = products[0][i / 2] + i % 2 * 2, *y = products[PRODUCTS - 1][i / 2] + i % 2 * 2;
                *reinterpret_cast<float2*>(contracted + row * HIDDEN + c) = {depth.kept * x[0], depth.kept * x[1]};
                for (int j = 0; EXPANSION && j < 2; j++) expanded[(c + j) * C + row] = y[j];
            }
        }
    }
}

// Grid: (strips, ceil(height / rows)); strips are of 30 (14 for `all`) of the images·(width + 1) - 1 columns. With
// 64 channels there are two chunks, and `room` is used. `kept` is the factor of images that stochastic depth keeps.
KERNEL(BLOCK, 1) mix_ffn_backward_32(const bf16* d /* (tokens, 32) */, const bf16* h /* (tokens, 128) */,
                                     const bf16* w2 /* (32, 128) */, const float* w /* (9, 128) */,
                                     const float* b /* (128) */, const bf16* w1 /* (128, 32) */, int images,
                                     int height, int width, int rows, unsigned key0, unsigned key1, unsigned site,
                                     const unsigned* step /* (1) */, u64 first, float rate, float kept,
                                     unsigned* room /* (blocks, rows, 32, 16), pairs, if one chunk is not all */,
                                     bf16* dn /* (tokens, 32) */) {
    walk<32, false>(d, h, w2, w, b, w1, images, height, width, rows, {{key0, key1, site, step, first, rate}, kept}, room, dn,
                    nullptr, nullptr, nullptr);
}

KERNEL(BLOCK, 1) mix_ffn_backward_64(const bf16* d, const bf16* h, const bf16* w2, const float* w, const float* b,
                                     const bf16* w1, int images, int height, int width, int rows, unsigned key0,
                                     unsigned key1, unsigned site, const unsigned* step, u64 first, float rate, float kept,
                                     unsigned* room /* (blocks, rows, 32, 32), pairs */, bf16* dn) {
    walk<64, false>(d, h, w2, w, b, w1, images, height, width, rows, {{key0, key1, site, step, first, rate}, kept}, room, dn,
                    nullptr, nullptr, nullptr);
}

// The same with sums of all parameters' gradients.
KERNEL(BLOCK, 1) mix_ffn_backward_all_32(const bf16* d, const bf16* h, const bf16* w2, const float* w, const float* b,
                                         const bf16* w1, int images, int height, int width, int rows, unsigned key0,
                                         unsigned key1, unsigned site, const unsigned* step, u64 first, float rate,
                                         float kept, unsigned* room /* (blocks, ceil(rows / 2), 32, 16), as before */,
                                         bf16* dn, const bf16* n /* (tokens, 32): what was expanded */,
                                         float* partial /* (blocks, 9 + 1 + 1 + 32 + 32, 128): w's, b's, dh's; then w2's
                                                           (32, 128) and w1's (128, 32) */) {
    walk<32, true>(d, h, w2, w, b, w1, images, height, width, rows, {{key0, key1, site, step, first, rate}, kept}, room, dn,
                   n, nullptr, partial);
}

// With dh, the gradient of h, in place of that of w1.
KERNEL(BLOCK, 1) mix_ffn_backward_all_64(const bf16* d, const bf16* h, const bf16* w2, const float* w, const float* b,
                                         const bf16* w1, int images, int height, int width, int rows, unsigned key0,
                                         unsigned key1, unsigned site, const unsigned* step, u64 first, float rate,
                                         float kept, unsigned* room, bf16* dn, bf16* dh /* (tokens, 256) or null */,
                                         float* partial /* (blocks, 9 + 1 + 1 + 64, 256): w's, b's, dh's; then w2's
                                                           (64, 256); or null */) {
    walk<64, true>(d, h, w2, w, b, w1, images, height, width, rows, {{key0, key1, site, step, first, rate}, kept}, room, dn,
                   nullptr, dh, partial);
}
