// Rounding parameters to the storage of products.
//
// y = bf16(x). One pass, 16-byte stores; a model's weights are a few MB, so this is a launch's latency.
#include "common.cuh"

// Threads: ceil(n / 8).
KERNEL(THREADS) cast(const float* x /* (n) */, bf16* y /* (n) */, int n) {
    size_t first = thread_number() * 8;
    if (first + 8 <= size_t(n)) {
        store(y + first, load<8>(x + first));
    } else {
        for (size_t i = first; i < size_t(n); i++) y[i] = __float2bfloat16_rn(x[i]);
    }
}
