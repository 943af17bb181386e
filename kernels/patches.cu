// Gathering convolution windows into rows (ky, kx, channel), so that a convolution becomes a product, and the way back.
//
// pixel_patches reads 8-bit pixels and writes normalised bf16 rows in one pass: flip, brightness and contrast (a table
// of 256 levels) and ImageNet normalisation cost no pass of their own. A block normalises the lines that a strip of
// windows needs, by a table, into shared memory, and from there writes the strip's rows, one behind the other and 16
// bytes at a time. patches_backward gathers per input token instead of scattering per window, so no two threads add
// to one number.
#include "common.cuh"

// Numbers of the lines that a strip needs at most: side·((strip - 1)·stride + side)·3.
constexpr int STAGED = 12288;

// Grid: (ceil(out_size / strip), out_size, images), where they begin; blocks of 256, the levels.
KERNEL(THREADS) pixel_patches(const unsigned char* pixels /* (pictures, size, size, 3) */,
                              const int* positions /* (images): which picture */,
                              const unsigned char* levels /* (images, 256) */,
                              const unsigned char* flips /* (images) */, int size, int side, int stride, int padding,
                              int out_size, int strip, bf16* out /* (images, out_size², side²·3) */) {
    SHARED(unsigned short, table, [THREADS][3]);
    SHARED(unsigned short, staged, [STAGED]);
    int first = blockIdx.x * strip, windows = min(strip, out_size - first), line = ((windows - 1) * stride + side) * 3;
    float level = float(levels[blockIdx.z * 256 + threadIdx.x]) / 255.0f;
    table[threadIdx.x][0] = pair_of((level - 0.485f) / 0.229f, 0.0f);
    table[threadIdx.x][1] = pair_of((level - 0.456f) / 0.224f, 0.0f);
    table[threadIdx.x][2] = pair_of((level - 0.406f) / 0.225f, 0.0f);
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
                            int out_height, int out_width, bf16* dx, int add) {
    int packs = channels / V, i = blockIdx.x * THREADS + threadIdx.x, x = i / packs, c = (i - x * packs) * V;
    if (x >= width) return;
    // In each direction, the last window that begins before or at the token, and where that has it; in the window before,
    // it is `stride` further on.
    int last_y = (int(blockIdx.y) + padding) / stride, last_x = (x + padding) / stride;
    int first_ky = int(blockIdx.y) + padding - last_y * stride, first_kx = x + padding - last_x * stride;
    Pack<V> sum = {};
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
    size_t at = (size_t(blockIdx.z) * height + blockIdx.y) * (width * channels) + x * channels + c;
    if (add) {
        Pack<V> old = load<V>(dx + at);
        for (int j = 0; j < V; j++) sum.x[j] += old.x[j];
    }
    store(dx + at, sum);
}

// Grid: (ceil(width·channels/V / THREADS), height, images).
KERNEL(THREADS) patches_backward(const bf16* dout /* (images·windows, side²·channels) */, int height, int width,
                                 int channels, int side, int stride, int padding, int out_height, int out_width,
                                 bf16* dx /* (images, height, width, channels) */, int add) {
    BY_WIDTH(channels, gather_back, dout, height, width, channels, side, stride, padding, out_height, out_width, dx, add);
}
