// Bilinear interpolation of tokens, and its transpose.
//
// The transpose gathers: an input sums over the outputs that read it, in a fixed order, instead of outputs adding to
// inputs. Neighbouring threads read the same outputs, which the caches serve.
#include "interpolate.cuh"

template <int V>
__device__ void interpolate(const bf16* x, int images, int from_height, int from_width, int to_height, int to_width,
                            int channels, bf16* y, int add) {
    int packs = channels / V;
    size_t i = thread_number();
    if (i >= size_t(images) * to_height * to_width * packs) return;
    int c = int(i % packs) * V;
    size_t token = i / packs;
    Source column = source(int(token % to_width), from_width, to_width);
    Source line = source(int(token / to_width % to_height), from_height, to_height);
    size_t image = token / to_width / to_height;
    auto at = [&](int yy, int xx) { return load<V>(x + ((image * from_height + yy) * from_width + xx) * channels + c); };
    Pack<V> a = at(line.low, column.low), b = at(line.low, column.high);
    Pack<V> d = at(line.high, column.low), e = at(line.high, column.high);
    Pack<V> sum = {};
    if (add) sum = load<V>(y + i * V);
    for (int j = 0; j < V; j++) {
        float upper = (1.0f - column.weight) * a.x[j] + column.weight * b.x[j];
        float lower = (1.0f - column.weight) * d.x[j] + column.weight * e.x[j];
        sum.x[j] += (1.0f - line.weight) * upper + line.weight * lower;
    }
    store(y + i * V, sum);
}

// Threads: images·to_height·to_width·channels/V.
KERNEL(THREADS) upsample(const bf16* x /* (images, from_height, from_width, channels) */, int images, int from_height,
                         int from_width, int to_height, int to_width, int channels,
                         bf16* y /* (images, to_height, to_width, channels) */, int add) {
    BY_WIDTH(channels, interpolate, x, images, from_height, from_width, to_height, to_width, channels, y, add);
}

template <int V>
__device__ void interpolate_back(const bf16* dy, int images, int from_height, int from_width, int to_height, int to_width,
                                 int channels, bf16* dx) {
    int packs = channels / V;
    size_t i = thread_number();
    if (i >= size_t(images) * from_height * from_width * packs) return;
    int c = int(i % packs) * V;
    size_t token = i / packs;
    int x = int(token % from_width), y = int(token / from_width % from_height);
    size_t image = token / from_width / from_height;
    int top, bottom, left, right;
    reach(y, from_height, to_height, top, bottom);
    reach(x, from_width, to_width, left, right);
    Pack<V> sum = {};
    for (int oy = top; oy < bottom; oy++) {
        float line = weight_of(source(oy, from_height, to_height), y);
        if (line == 0.0f) continue;
        for (int ox = left; ox < right; ox++) {
            float weight = line * weight_of(source(ox, from_width, to_width), x);
            if (weight == 0.0f) continue;
            Pack<V> d = load<V>(dy + ((image * to_height + oy) * to_width + ox) * channels + c);
            for (int j = 0; j < V; j++) sum.x[j] += weight * d.x[j];
        }
    }
    store(dx + i * V, sum);
}

// Threads: images·from_height·from_width·channels/V.
KERNEL(THREADS) upsample_backward(const bf16* dy /* (images, to_height, to_width, channels) */, int images,
                                  int from_height, int from_width, int to_height, int to_width, int channels,
                                  bf16* dx /* (images, from_height, from_width, channels) */) {
    BY_WIDTH(channels, interpolate_back, dy, images, from_height, from_width, to_height, to_width, channels, dx);
}
