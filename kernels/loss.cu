// Cross-entropy of upsampled logits with its gradient at logit resolution, and confusion counts; the upsampled logits
// never exist in memory.
//
// A thread owns one logit and visits the label pixels that read it (8 x 8 at a quarter of the resolution), recomputing
// each pixel's softmax: arithmetic is cheap here, and gathering needs no atomics. The loss of a pixel is counted by the
// owner of its upper left logit of class 0.
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
                              const unsigned char* truths /* (images, size, size) */,
                              const unsigned char* flips /* (images) */, int size, float scale,
                              float* partial /* (images, gridDim.x): loss per block, unscaled */,
                              bf16* gradient /* as logits, or null */) {
    int image = blockIdx.y, cell = int(thread_number());
    int label = cell % labels, x = cell / labels % width, y = cell / labels / width;
    logits += size_t(image) * height * width * labels;
    truths += size_t(image) * size * size;
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
                          const unsigned char* truths /* (images, size, size) */,
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
        int truth = truths[(size_t(image) * size + oy) * size + (flips[image] ? size - 1 - ox : ox)];
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
