// Gathering convolution windows into rows (ky, kx, channel), so that a convolution becomes a product, and the way back.
//
// pixel_patches reads 8-bit pixels and writes normalised bf16 rows in one pass: flip, brightness and contrast (a table of
// 256 levels) and ImageNet normalisation cost no pass of their own. patches_backward gathers per input token instead of
// scattering per window, so no two threads add to one number.
#include "common.cuh"

// Threads: ceil(images·windows·side²·3 / 8).
KERNEL(THREADS) pixel_patches(const unsigned char* pixels /* (pictures, size, size, 3) */,
                              const int* positions /* (images): which picture */,
                              const unsigned char* levels /* (images, 256) */,
                              const unsigned char* flips /* (images) */, int images, int size, int side, int stride,
                              int padding, int out_size, bf16* out /* (images, out_size², side²·3) */) {
    int row = side * side * 3, windows = out_size * out_size;
    size_t n = size_t(images) * windows * row, first = thread_number() * 8;
    if (first >= n) return;
    size_t window = first / row;
    int e = int(first % row);
    Pack<8> p;
    for (int i = 0; i < 8; i++) {
        p.x[i] = 0.0f;
        if (first + i < n) {
            int image = int(window / windows), at = int(window % windows), tap = e / 3, c = e % 3;
            int y = at / out_size * stride + tap / side - padding, x = at % out_size * stride + tap % side - padding;
            if (y >= 0 && y < size && x >= 0 && x < size) {
                int column = flips[image] ? size - 1 - x : x;
                int level = levels[image * 256 + pixels[((size_t(positions[image]) * size + y) * size + column) * 3 + c]];
                float mean = c == 0 ? 0.485f : c == 1 ? 0.456f : 0.406f;
                float deviation = c == 0 ? 0.229f : c == 1 ? 0.224f : 0.225f;
                p.x[i] = (float(level) / 255.0f - mean) / deviation;
            }
        }
        if (++e == row) {
            e = 0;
            window++;
        }
    }
    if (first + 8 <= n) {
        store(out + first, p);
    } else {
        for (int i = 0; i < 8; i++) {
            if (first + i < n) out[first + i] = __float2bfloat16_rn(p.x[i]);
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
__device__ void gather_back(const bf16* dout, int images, int height, int width, int channels, int side, int stride,
                            int padding, int out_height, int out_width, bf16* dx, int add) {
    int packs = channels / V;
    size_t i = thread_number();
    if (i >= size_t(images) * height * width * packs) return;
    int c = int(i % packs) * V;
    unsigned token = unsigned(i / packs);
    int x = token % width, y = token / width % height;
    size_t image = token / width / height;
    Pack<V> sum = {};
    for (int ky = 0; ky < side; ky++) {
        int top = y + padding - ky;
        if (top < 0 || top % stride != 0 || top / stride >= out_height) continue;
#pragma unroll 1  // unrolled, it spills
        for (int kx = 0; kx < side; kx++) {
            int left = x + padding - kx;
            if (left < 0 || left % stride != 0 || left / stride >= out_width) continue;
            size_t window = (image * out_height + top / stride) * out_width + left / stride;
            Pack<V> d = load<V>(dout + (window * side * side + ky * side + kx) * channels + c);
            for (int j = 0; j < V; j++) sum.x[j] += d.x[j];
        }
    }
    if (add) {
        Pack<V> old = load<V>(dx + i * V);
        for (int j = 0; j < V; j++) sum.x[j] += old.x[j];
    }
    store(dx + i * V, sum);
}

// Threads: images·height·width·channels/V.
KERNEL(THREADS) patches_backward(const bf16* dout /* (images·windows, side²·channels) */, int images, int height,
                                 int width, int channels, int side, int stride, int padding, int out_height,
                                 int out_width, bf16* dx /* (images, height, width, channels) */, int add) {
    BY_WIDTH(channels, gather_back, dout, images, height, width, channels, side, stride, padding, out_height, out_width,
             dx, add);
}
