// The way back through a Mix-FFN, from the gradient d of its output to that of the LayerNorm's output, in one kernel: the hidden
// tensors, four times as large as the tokens, are read at most once and, but for what products with weights' gradients want,
// not written.
//
// A block takes a strip of a picture's columns, one wider on each side than what it puts out, and walks down its rows; a warp has
// 8 of the CHUNK hidden channels that are under way at a time, a lane two of them at WIDE tokens side by side. That is how the
// tensor cores hand out a product's result, if row g + 8i of it is token WIDE·g + i of the strip. So dg = d·W2 arises where it
// is used, next to u, which the convolution of h gives; du stays in registers, and the tokens beside a lane's own come from
// the lanes beside it; the transposed convolution of du gives dh. Only dh goes through shared memory, in the place of the row of h
// that was last used, for the product over all channels of the chunk: dn = dh·W1. A row that arrives adds to the sums of
// three rows, of which it ends one, in both convolutions: row r of h ends row r - 1 of u, and that row r - 2 of dh. One
// barrier a row is enough, since the rows of h lie in a ring of three.
//
// The columns of all images lie side by side, with one between images that is zero: it is the padding of both. So strips
// are full, however wide the picture. Where there are more hidden channels than a chunk has, the strip is walked once for each chunk, and
// the sums of dn wait in `room`.
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

__device__ __forceinline__ float2 widen(unsigned pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// sum += a·b
__device__ __forceinline__ void add(float2& sum, float2 a, float2 b) {
    sum.x += a.x * b.x;
    sum.y += a.y * b.y;
}

__device__ __forceinline__ float2 two(const float* from) { return *reinterpret_cast<const float2*>(from); }

// x, of which the compiler no longer knows where it comes from.
__device__ __forceinline__ unsigned settled(unsigned x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// Number, in row 0, of the token in a column of all images' columns; -1 where there is none.
__device__ __forceinline__ int token_of(int column, int images, int height, int width) {
    int image = column / (width + 1), x = column - image * (width + 1);
    return column < 0 || x == width || image >= images ? -1 : image * height * width + x;
}

// Where a thread reads or writes what a row has for it.
struct Place {
    unsigned at;  // numbers before it, in row 0
    bool exists;

    __device__ __forceinline__ Place(int token, int channels, int c)
        : at(unsigned(max(token, 0)) * channels + c), exists(token >= 0) {}
};

// For channels C of tokens. WEIGHTS: g and dh are written and the parameters' gradients summed, where that is wanted.
template <int C, int WIDE, bool WEIGHTS>
__device__ __forceinline__ void walk(const bf16* d, const bf16* h, const bf16* w2, const float* w, const float* b,
                                     const bf16* w1, int images, int height, int width, int rows, float* room,
                                     bf16* dn, bf16* g, bf16* dh, float* partial) {
    constexpr int HIDDEN = 4 * C, TOKENS = 8 * WIDE, OUTPUTS = TOKENS - 2, STEPS = C / 16;
    // Tiles of 16 tokens and 8 channels of dn, one a warp; where warps are left, they take turns by rows.
    constexpr int TILES = WIDE / 2 * C / 8, TURNS = WARPS / TILES;
    constexpr int H_PIECES = WARPS * TOKENS, D_PIECES = C / 8 * TOKENS;
    SHARED(Piece, tile_h, [3][WARPS][TOKENS]);
    SHARED(Piece, tile_d, [2][C / 8][TOKENS]);
    SHARED(Piece, tile_w, [C / 8][CHUNK]);
    SHARED(Piece, tile_g, [2][WARPS][TOKENS]);

    for (int base = 0; base < HIDDEN; base += CHUNK) {
        // Made anew for each chunk, which is cheaper than to keep it.
        unsigned thread = settled(threadIdx.x);
        int lane = thread % 32, warp = thread / 32, line = lane / 4, channel = lane % 4 * 2;
        int block = blockIdx.y * gridDim.x + blockIdx.x, column = blockIdx.x * OUTPUTS - 1;
        int y0 = blockIdx.y * rows, y1 = min(y0 + rows, height), h_rows = min(y1 + 2, height);
        auto token_at = [&](int i) { return token_of(column + i, images, height, width); };

        // Tokens arrive, and leave, in the order of the rows of the products: i WIDE apart before i + 1. Neighbouring threads
        // have pieces that lie behind one another in memory, by twos of h and by rows of d.
        bool copies_h = thread < H_PIECES, copies_d = thread < D_PIECES;
        int h_chunk = thread / (2 * TOKENS) * 2 + thread % 2, h_slot = thread / 2 % TOKENS;
        int d_chunk = thread % (C / 8), d_slot = thread / (C / 8) % TOKENS;
        int h_column = h_slot % 8 * WIDE + h_slot / 8;
        Place h_place(token_at(h_column), HIDDEN, base + h_chunk * 8);
        Place d_place(token_at(d_slot % 8 * WIDE + d_slot / 8), C, d_chunk * 8);
        unsigned h_piece = settled(h_chunk * TOKENS + h_slot), d_piece = settled(d_chunk * TOKENS + d_slot);

        // The columns of h beside the strip, of the lanes there.
        bool at_left = line == 0, at_right = line == 7;
        Place beside(at_left || at_right ? token_at(at_left ? -1 : TOKENS) : -1, HIDDEN, base + warp * 8 + channel);

        // The warp's tile of dn and the lane's tokens in it.
        int tile = warp % TILES, turn = warp / TILES, tile_row = tile % (WIDE / 2), tile_column = tile / (WIDE / 2);
        int output = line * WIDE + tile_row * 2, outputs[2] = {token_at(output), token_at(output + 1)};
        bool puts_out[2] = {output > 0 && outputs[0] >= 0, output < OUTPUTS && outputs[1] >= 0};
        // Of two neighbours, both are of one image.
        output = outputs[0] >= 0 ? outputs[0] : outputs[1] - 1;
        // Which of the lane's tokens are the block's to sum over, and whether the thread has a piece of them to write.
        bool own[WIDE];
        for (int i = 0; i < WIDE; i++) {
            int at = line * WIDE + i;
            own[i] = WEIGHTS && at > 0 && at <= OUTPUTS && token_at(at) >= 0;
        }
        bool writes = WEIGHTS && copies_h && h_place.exists && h_column > 0 && h_column <= OUTPUTS;

        int c = base + warp * 8 + channel;
        float2 weight[TAPS], bias = two(b + c);
        for (int tap = 0; tap < TAPS; tap++) weight[tap] = two(w + tap * HIDDEN + c);
        unsigned contract[STEPS][2];
        for (int s = 0; s < STEPS; s++) {
            for (int i = 0; i < 2; i++) {
                const unsigned short* from = reinterpret_cast<const unsigned short*>(w2) +
                                             (16 * s + 8 * i + channel) * HIDDEN + base + warp * 8 + line;
                contract[s][i] = from[0] | unsigned(from[HIDDEN]) << 16;
            }
        }

        __syncthreads();
        for (unsigned i = thread; i < C / 8 * CHUNK; i += BLOCK) {
            copy_async<16>(&tile_w[i % (C / 8)][i / (C / 8)], w1 + (base + i / (C / 8)) * C + i % (C / 8) * 8, 16);
        }
        // Begins to copy row y; returns what lies beside it.
        auto copy_h = [&](int k, int y) {
            unsigned before = y * width * HIDDEN;
            bool exists = unsigned(y) < unsigned(h_rows);
            if (copies_h) copy_async<16>(&tile_h[k][0][0] + h_piece, h + (h_place.at + before), exists && h_place.exists ? 16 : 0);
            return exists && beside.exists ? *reinterpret_cast<const unsigned*>(h + (beside.at + before)) : 0;
        };
        unsigned beside_ahead = copy_h(0, y0 - 2);
        copies_done();
        __syncthreads();

        // Sums of u's rows and of dh's; gradients; h's rows, where the sums over tokens are the block's.
        float2 u[3][WIDE], sum[3][WIDE] = {}, gradient[WEIGHTS ? KINDS : 1] = {};
        unsigned held[3][WIDE] = {};
        for (int i = 0; i < WIDE; i++) u[0][i] = u[2][i] = bias;
        for (int round = y0 - 2; round <= y1 + 1; round += 3) {
#pragma unroll
            for (int k = 0; k < 3; k++) {
                // Row y of h arrives, ends row y - 1 of u, and that row y - 2 of dh.
                int y = round + k, last = (k + 2) % 3, next = (k + 1) % 3;
                if (y > y1 + 1) break;
                unsigned words[WIDE + 2];
                Piece* pieces = tile_h[k][warp];
                words[0] = pair_at(pieces[8 * (WIDE - 1) + line - 1], channel);
                words[WIDE + 1] = pair_at(pieces[line + 1], channel);
                if (at_left) words[0] = beside_ahead;
                if (at_right) words[WIDE + 1] = beside_ahead;
                beside_ahead = copy_h(next, y + 1);
                if (copies_d) {
                    bool exists = d_place.exists && unsigned(y) < unsigned(h_rows);
                    Piece* to = &tile_d[0][0][0] + (y % 2 != 0 ? D_PIECES : 0) + d_piece;
                    copy_async<16>(to, d + (d_place.at + unsigned(y * width * C)), exists ? 16 : 0);
                }

                float2 row[WIDE + 2];
                for (int i = 0; i < WIDE; i++) words[i + 1] = pair_at(pieces[8 * i + line], channel);
                for (int i = 0; i < WIDE + 2; i++) row[i] = widen(words[i]);
                for (int i = 0; i < WIDE; i++) {
                    u[next][i] = bias;
                    for (int j = 0; j < 3; j++) {
                        add(u[last][i], row[i + j], weight[6 + j]);
                        add(u[k][i], row[i + j], weight[3 + j]);
                        add(u[next][i], row[i + j], weight[j]);
                    }
                    if (WEIGHTS) held[k][i] = own[i] && y >= y0 && y < y1 ? words[i + 1] : 0;
                }

                // Where there is no token, d is zero, and so is du.
                if (y >= y0) {
                    float dg[WIDE / 2][4] = {};
                    Piece* pieces_d = &tile_d[0][lane / 16][lane % 16] + (y % 2 != 0 ? 0 : D_PIECES);
                    for (int s = 0; s < STEPS; s++) {
                        for (int m = 0; m < WIDE / 2; m++) {
                            unsigned a[4];
                            load_matrices<false>(pieces_d[2 * s * TOKENS + 16 * m].at, a);
                            mma(dg[m], a, contract[s][0], contract[s][1]);
                        }
                    }
                    unsigned du[WIDE + 2];
                    for (int i = 0; i < WIDE; i++) {
                        float2 grad = widen(pair_of(dg[i / 2][i % 2 * 2], dg[i / 2][i % 2 * 2 + 1]));
                        gelu_backward(u[last][i].x, grad.x);
                        gelu_backward(u[last][i].y, grad.y);
                        du[i + 1] = pair_of(grad.x, grad.y);
                        if constexpr (WEIGHTS) {
                            if (own[i] && y > y0 && y <= y1) add(gradient[TAPS], grad, {1.0f, 1.0f});
                            pair_at(tile_g[y % 2][warp][8 * i + line], channel) = pair_of(u[last][i].x, u[last][i].y);
                        }
                    }
                    du[0] = __shfl_up_sync(ALL_LANES, du[WIDE], 4);
                    du[WIDE + 1] = __shfl_down_sync(ALL_LANES, du[1], 4);
                    for (int i = 0; i < WIDE + 2; i++) row[i] = widen(du[i]);
                    for (int i = 0; i < WIDE; i++) {
                        sum[next][i] = {};
                        for (int j = 0; j < 3; j++) {
                            add(sum[last][i], row[i + j], weight[2 - j]);
                            add(sum[k][i], row[i + j], weight[5 - j]);
                            add(sum[next][i], row[i + j], weight[8 - j]);
                        }
                    }
                    if constexpr (WEIGHTS) {
                        // In the forward direction, this row of u took rows y - 2 to y of h, by the taps of line t.
                        for (int t = 0; t < 3; t++) {
                            for (int i = 0; i < WIDE; i++) {
                                float2 x = widen(held[(k + 1 + t) % 3][i]);
                                for (int j = 0; j < 3; j++) add(gradient[3 * t + j], row[i + 2 - j], x);
                            }
                        }
                    }
                }

                // The warp's part of the row of h makes way for dh.
                __syncwarp();
                if (y >= y0 + 2) {
                    for (int i = 0; i < WIDE; i++) {
                        pair_at(pieces[8 * i + line], channel) = pair_of(sum[last][i].x, sum[last][i].y);
                        if constexpr (WEIGHTS) {
                            if (own[i]) add(gradient[TAPS + 1], sum[last][i], {1.0f, 1.0f});
                        }
                    }
                }
                copies_done();
                __syncthreads();
                if constexpr (WEIGHTS) {
                    auto write = [&](bf16* to, int row, const Piece& piece) {
                        to += h_place.at + row * width * HIDDEN;
                        *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4&>(piece);
                    };
                    if (writes && g != nullptr && y > y0 && y <= y1) write(g, y - 1, (&tile_g[y % 2][0][0])[h_piece]);
                    if (writes && dh != nullptr && y >= y0 + 2) write(dh, y - 2, (&tile_h[k][0][0])[h_piece]);
                }
                if (y < y0 + 2) continue;
                if (TURNS == 1 || turn == y % TURNS) {
                    float dn_sum[4] = {};
                    float* kept = room + unsigned(block * rows + y - y0 - 2) * (TILES * 32 * 4) + thread % (TILES * 32) * 4;
                    if (base > 0) {
                        Pack<4> before = load<4>(kept);
                        for (int i = 0; i < 4; i++) dn_sum[i] = before.x[i];
                    }
                    for (int s = 0; s < CHUNK / 16; s += 2) {
                        unsigned expand[4];
                        load_matrices<true>(tile_w[tile_column][16 * s + lane].at, expand);
                        for (int i = 0; i < 2; i++) {
                            unsigned a[4];
                            load_matrices<false>(tile_h[k][2 * (s + i) + lane / 16][16 * tile_row + lane % 16].at, a);
                            mma(dn_sum, a, expand[2 * i], expand[2 * i + 1]);
                        }
                    }
                    if (base + CHUNK < HIDDEN) {
                        *reinterpret_cast<float4*>(kept) = {dn_sum[0], dn_sum[1], dn_sum[2], dn_sum[3]};
                    } else {
                        for (int i = 0; i < 2; i++) {
                            bf16* to = dn + unsigned(output + i + (y - 2) * width) * C + tile_column * 8 + channel;
                            if (puts_out[i]) *reinterpret_cast<unsigned*>(to) = pair_of(dn_sum[2 * i], dn_sum[2 * i + 1]);
                        }
                    }
                }
            }
        }

        if constexpr (WEIGHTS) {
            if (partial == nullptr) continue;
            for (int kind = 0; kind < KINDS; kind++) {
                float2 total = gradient[kind];
                for (int other = 4; other < 32; other *= 2) {
                    total.x += __shfl_xor_sync(ALL_LANES, total.x, other);
                    total.y += __shfl_xor_sync(ALL_LANES, total.y, other);
                }
                if (line == 0) {
                    *reinterpret_cast<float2*>(partial + (block * KINDS + kind) * HIDDEN + c) = total;
                }
            }
        }
    }
}

// Grid: (strips, ceil(height / rows)); strips are of 8·WIDE - 2 of the images·(width + 1) - 1 columns. For 64
// channels, twice as many of each, and `room` is used.
KERNEL(BLOCK, 1) mix_ffn_backward_32(const bf16* d /* (tokens, 32) */, const bf16* h /* (tokens, 128) */,
                                     const bf16* w2 /* (32, 128) */, const float* w /* (9, 128) */,
                                     const float* b /* (128) */, const bf16* w1 /* (128, 32) */, int images,
                                     int height, int width, int rows,
                                     float* room /* (blocks, rows, 32, 32); unused */,
                                     bf16* dn /* (tokens, 32) */) {
    walk<32, 4, false>(d, h, w2, w, b, w1, images, height, width, rows, room, dn, nullptr, nullptr, nullptr);
}

KERNEL(BLOCK, 1) mix_ffn_backward_64(const bf16* d, const bf16* h, const bf16* w2, const float* w, const float* b,
                                     const bf16* w1, int images, int height, int width, int rows,
                                     float* room, bf16* dn) {
    walk<64, 4, false>(d, h, w2, w, b, w1, images, height, width, rows, room, dn, nullptr, nullptr, nullptr);
}

// The same with g, the convolution's output after the GELU; dh, the gradient of h; and sums of the parameters' gradients.
KERNEL(BLOCK, 1) mix_ffn_backward_all_32(const bf16* d, const bf16* h, const bf16* w2, const float* w, const float* b,
                                         const bf16* w1, int images, int height, int width, int rows,
                                         float* room /* (blocks, rows, 16, 32); unused */, bf16* dn,
                                         bf16* g /* (tokens, 128) or null */,
                                         bf16* dh /* (tokens, 128) or null */,
                                         float* partial /* (blocks, 9 + 1 + 1, 128): w's, b's, dh's; or null */) {
    walk<32, 2, true>(d, h, w2, w, b, w1, images, height, width, rows, room, dn, g, dh, partial);
}

KERNEL(BLOCK, 1) mix_ffn_backward_all_64(const bf16* d, const bf16* h, const bf16* w2, const float* w, const float* b,
                                         const bf16* w1, int images, int height, int width, int rows,
                                         float* room, bf16* dn, bf16* g, bf16* dh, float* partial) {
    walk<64, 2, true>(d, h, w2, w, b, w1, images, height, width, rows, room, dn, g, dh, partial);
}
