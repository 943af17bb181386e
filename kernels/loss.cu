// Cross-entropy of upsampled logits with its gradient at logit resolution, and confusion counts; the upsampled logits
// never exist in memory.
//
// A thread owns one logit and visits the label pixels that read it (8 x 8 at a quarter of the resolution), recomputing
// each pixel's softmax: gathering needs no atomics. The loss of a pixel is counted by the owner of its upper left logit of
// class 0. Two classes at a quarter of the resolution, the common case, have a kernel that visits each pixel once.
#include "interpolate.cuh"

// Four logits around a pixel and their weights.
struct Corners {
    const bf16 *a, *b, *c, *d;
    float wa, wb, wc, wd;

    __device__ __forceinline__ Corners(const bf16* logits, int width, int labels, Source y, Source x) {
        a = logits + (size_t(y.low) * width + x.low) * labels;
        b = logits + (size_t(y.low) * width + x.high) * labels;
        c = logits + (size_t(y.high) * width + x.low) * labels;
        d = logits + (size_t(y.high) * width + x.high) * labels;
        wa = (1.0f - y.weight) * (1.0f - x.weight);
        wb = (1.0f - y.weight) * x.weight;
        wc = y.weight * (1.0f - x.weight);
        wd = y.weight * x.weight;
    }

    __device__ __forceinline__ float logit(int label) const {
        return wa * __bfloat162float(a[label]) + wb * __bfloat162float(b[label]) + wc * __bfloat162float(c[label]) +
               wd * __bfloat162float(d[label]);
    }
};

// Grid: (ceil(height·width·labels / THREADS), images).
KERNEL(THREADS) cross_entropy(const bf16* logits /* (images, height, width, labels) */, int height, int width, int labels,
                              const unsigned char* truths /* (pictures, size, size) */,
                              const int* positions /* (images): which picture */,
                              const unsigned char* flips /* (images) */, int size, float scale,
                              float* partial /* (images, gridDim.x): loss per block, unscaled */,
                              bf16* gradient /* as logits, or null */) {
    int image = blockIdx.y, cell = int(thread_number());
    int label = cell % labels, x = cell / labels % width, y = cell / labels / width;
    logits += size_t(image) * height * width * labels;
    truths += size_t(positions[image]) * size * size;
    float loss = 0, slope = 0;
    if (cell < height * width * labels) {
        int top, bottom, left, right;
        reach(y, height, size, top, bottom);
        reach(x, width, size, left, right);
        for (int oy = top; oy < bottom; oy++) {
            Source line = source(oy, height, size);
            float line_weight = weight_of(line, y);
            for (int ox = left; ox < right; ox++) {
                Source column = source(ox, width, size);
                float weight = line_weight * weight_of(column, x);
                bool owner = label == 0 && line.low == y && column.low == x;
                if (weight == 0.0f && !owner) continue;
                int truth = truths[size_t(oy) * size + (flips[image] ? size - 1 - ox : ox)];
                if (truth >= labels) continue;
                Corners corners(logits, width, labels, line, column);
                float most = corners.logit(0);
                for (int l = 1; l < labels; l++) {
                    float value = corners.logit(l);
                    most = value > most ? value : most;
                }
                float sum = 0;
                for (int l = 0; l < labels; l++) sum += __expf(corners.logit(l) - most);
                float share = __expf(corners.logit(label) - most) / sum;
                slope += weight * (share - (truth == label ? 1.0f : 0.0f));
                if (owner) loss += __logf(sum) + most - corners.logit(truth);
            }
        }
        if (gradient != nullptr) {
            gradient[size_t(image) * height * width * labels + cell] = __float2bfloat16_rn(scale * slope);
        }
    }
    float total = block_sum(loss);
    if (threadIdx.x == 0) partial[size_t(image) * gridDim.x + blockIdx.x] = total;
}

// Two classes, labels at four times the logits' resolution. A block owns TILE x TILE cells: it brings their difference of
// logits, on which alone softmax depends, to shared memory, makes each pixel's gradient once, and gathers.
// Grid: (ceil(width / TILE), ceil(height / TILE), images).
KERNEL(THREADS) cross_entropy_two(const bf16* logits /* (images, height, width, 2) */, int height, int width,
                                  const unsigned char* truths /* (pictures, 4·height, 4·width) */,
                                  const int* positions /* (images): which picture */,
                                  const unsigned char* flips /* (images) */, float scale,
                                  float* partial /* (images, tiles): loss per block, unscaled */,
                                  bf16* gradient /* as logits, or null */) {
    constexpr int TILE = 16, RATIO = 4, CELLS = TILE + 2, PIXELS = TILE * RATIO + RATIO;
    SHARED(float, differences, [CELLS][CELLS + 1]);
    SHARED(float, slopes, [PIXELS][PIXELS + 1]);
    int image = blockIdx.z, top = blockIdx.y * TILE, left = blockIdx.x * TILE;
    int tall = RATIO * height, wide = RATIO * width;
    logits += size_t(image) * height * width * 2;
    truths += size_t(positions[image]) * tall * wide;
    bool flipped = flips[image] != 0;
    for (int i = threadIdx.x; i < CELLS * CELLS; i += THREADS) {
        int y = min(max(top - 1 + i / CELLS, 0), height - 1), x = min(max(left - 1 + i % CELLS, 0), width - 1);
        unsigned pair = *reinterpret_cast<const unsigned*>(logits + (size_t(y) * width + x) * 2);
        differences[i / CELLS][i % CELLS] = __uint_as_float(pair & 0xffff0000u) - __uint_as_float(pair << 16);
    }
    __syncthreads();
    // The pixels that read the tile's cells: RATIO / 2 more on every side than lie over them.
    int first_row = top * RATIO - RATIO / 2, first_column = left * RATIO - RATIO / 2;
    float loss = 0;
    for (int i = threadIdx.x; i < PIXELS * PIXELS; i += THREADS) {
        int y = first_row + i / PIXELS, x = first_column + i % PIXELS;
        float slope = 0;
        if (y >= 0 && y < tall && x >= 0 && x < wide) {
            int truth = truths[size_t(y) * wide + (flipped ? wide - 1 - x : x)];
            if (truth < 2) {
                Source line = source(y, height, tall), column = source(x, width, wide);
                int low = line.low - top + 1, high = line.high - top + 1;
                int near = column.low - left + 1, far = column.high - left + 1;
                float above = (1.0f - column.weight) * differences[low][near] + column.weight * differences[low][far];
                float below = (1.0f - column.weight) * differences[high][near] + column.weight * differences[high][far];
                float difference = (1.0f - line.weight) * above + line.weight * below;
                float small = __expf(difference > 0.0f ? -difference : difference), share = 1.0f / (1.0f + small);
                slope = (difference > 0.0f ? share : small * share) - float(truth);
                bool owned = y >= top * RATIO && y < (top + TILE) * RATIO && x >= left * RATIO && x < (left + TILE) * RATIO;
                float wrong = truth == 1 ? -difference : difference;
                if (owned) loss += (wrong < 0.0f ? 0.0f : wrong) + log1pf(small);
            }
        }
        slopes[i / PIXELS][i % PIXELS] = slope;
    }
    float total = block_sum(loss);
    if (threadIdx.x == 0) partial[(size_t(image) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = total;
    int y = top + int(threadIdx.x) / TILE, x = left + int(threadIdx.x) % TILE;
    if (gradient == nullptr || y >= height || x >= width) return;
    constexpr int REACH = 2 * RATIO;
    int row = (y - top) * RATIO, column = (x - left) * RATIO;
    float weights[REACH];
    for (int i = 0; i < REACH; i++) {
        int pixel = first_column + column + i;
        weights[i] = pixel >= 0 && pixel < wide ? weight_of(source(pixel, width, wide), x) : 0.0f;
    }
    float slope = 0;
    for (int i = 0; i < REACH; i++) {
        int pixel = first_row + row + i;
        float line = pixel >= 0 && pixel < tall ? weight_of(source(pixel, height, tall), y) : 0.0f, along = 0;
        for (int j = 0; j < REACH; j++) along += weights[j] * slopes[row + i][column + j];
        slope += line * along;
    }
    unsigned pair = pair_of(-scale * slope, scale * slope);
    *reinterpret_cast<unsigned*>(gradient + ((size_t(image) * height + y) * width + x) * 2) = pair;
}

// out[image] += scale·Σ partial[image]. Grid: images blocks.
KERNEL(THREADS) sum_losses(const float* partial /* (images, blocks) */, int blocks, float scale,
                           float* out /* (images) */) {
    float sum = 0;
    for (int i = threadIdx.x; i < blocks; i += THREADS) sum += partial[size_t(blockIdx.x) * blocks + i];
    float total = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] += scale * total;
}

// Adds to counts[image][truth·labels + prediction] for the first largest class. Integer atomics: any order gives the same
// counts; with few labels a block counts in shared memory first. Grid: (ceil(size² / THREADS), images).
KERNEL(THREADS) confusion(const bf16* logits /* (images, height, width, labels) */, int height, int width, int labels,
                          const unsigned char* truths /* (pictures, size, size) */,
                          const int* positions /* (images): which picture */,
                          const unsigned char* flips /* (images) */, int size, u64* counts /* (images, labels²) */) {
    constexpr int SHARED_COUNTS = 1024;
    SHARED(unsigned, block_counts, [SHARED_COUNTS]);
    int image = blockIdx.y, pixel = int(thread_number()), squares = labels * labels;
    logits += size_t(image) * height * width * labels;
    counts += size_t(image) * squares;
    for (int i = threadIdx.x; i < min(squares, SHARED_COUNTS); i += THREADS) block_counts[i] = 0;
    __syncthreads();
    if (pixel < size * size) {
        int oy = pixel / size, ox = pixel % size;
        int truth = truths[(size_t(positions[image]) * size + oy) * size + (flips[image] ? size - 1 - ox : ox)];
        if (truth < labels) {
            Corners corners(logits, width, labels, source(oy, height, size), source(ox, width, size));
            int best = 0;
            float most = corners.logit(0);
            for (int l = 1; l < labels; l++) {
                float value = corners.logit(l);
                if (value > most) {
                    most = value;
                    best = l;
                }
            }
            int at = truth * labels + best;
            if (squares <= SHARED_COUNTS) atomicAdd(&block_counts[at], 1u);
            else atomicAdd(&counts[at], 1ull);
        }
    }
    __syncthreads();
    if (squares > SHARED_COUNTS) return;
    for (int i = threadIdx.x; i < squares; i += THREADS) {
        if (block_counts[i] > 0) atomicAdd(&counts[i], u64(block_counts[i]));
    }
}

// The same for two classes, where labels have four times the logits' resolution. A thread walks down ROWS pixels of a column and
// interpolates the difference of logits along x once per line of logits. Grid: (ceil(4·width / THREADS), ceil(4·height / ROWS), images).
KERNEL(THREADS) confusion_two(const bf16* logits /* (images, height, width, 2) */, int height, int width,
                              const unsigned char* truths /* (pictures, 4·height, 4·width) */,
                              const int* positions /* (images): which picture */,
                              const unsigned char* flips /* (images) */, u64* counts /* (images, 4) */) {
    constexpr int ROWS = 32, SQUARES = 4;
    SHARED(unsigned, block_counts, [SQUARES]);
    int image = blockIdx.z, tall = 4 * height, wide = 4 * width;
    int x = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * ROWS, end = min(first + ROWS, tall);
    logits += size_t(image) * height * width * 2;
    truths += size_t(positions[image]) * tall * wide + (flips[image] ? wide - 1 - x : x);
    if (threadIdx.x < SQUARES) block_counts[threadIdx.x] = 0;
    __syncthreads();
    if (x < wide) {
        Source column = source(x, width, wide);
        auto difference = [&](int line, int at) {
            unsigned pair = *reinterpret_cast<const unsigned*>(logits + (size_t(line) * width + at) * 2);
            return __uint_as_float(pair & 0xffff0000u) - __uint_as_float(pair << 16);
        };
        auto along = [&](int line) {
            return (1.0f - column.weight) * difference(line, column.low) + column.weight * difference(line, column.high);
        };
        unsigned found = 0;  // 8 bits for each count, of up to ROWS
        int low = -2;
        float above = 0, below = 0;
        for (int y = first; y < end; y++) {
            Source line = source(y, height, tall);
            if (line.low != low) {
                above = line.low == low + 1 ? below : along(line.low);
                below = along(line.high);
                low = line.low;
            }
            int truth = truths[size_t(y) * wide];
            bool one = (1.0f - line.weight) * above + line.weight * below > 0.0f;
            if (truth < 2) found += 1u << 8 * (2 * truth + one);
        }
        for (int i = 0; i < SQUARES; i++) {
            if (found >> 8 * i & 255) atomicAdd(&block_counts[i], found >> 8 * i & 255);
        }
    }
    __syncthreads();
    if (threadIdx.x < SQUARES && block_counts[threadIdx.x] > 0) {
        atomicAdd(&counts[image * SQUARES + threadIdx.x], u64(block_counts[threadIdx.x]));
    }
}

// Copies what a batch left to a log of many, from image `at` on. Threads: images·squares.
KERNEL(THREADS) note(const float* loss /* (images) */, const u64* counts /* (images, squares) */, int images, int squares,
                     int at, float* all_losses /* (at + images) */, u64* all_counts /* (at + images, squares) */) {
    size_t i = thread_number();
    if (i < size_t(images)) all_losses[at + i] = loss[i];
    if (i < size_t(images) * squares) all_counts[size_t(at) * squares + i] = counts[i];
}
