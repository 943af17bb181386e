// Rounding parameters to the storage of products, and clearing gradients.
//
// One pass with 16-byte accesses; a model's weights are a few MB, so a launch's latency is what counts.
#include "tables.cuh"

// y = bf16(x). Threads: ceil(n / 8).
KERNEL(THREADS) cast(const float* x /* (n) */, bf16* y /* (n) */, int n) {
    size_t first = thread_number() * 8;
    if (first + 8 <= size_t(n)) {
        store(y + first, load<8>(x + first));
    } else {
        for (size_t i = first; i < size_t(n); i++) y[i] = __float2bfloat16_rn(x[i]);
    }
}

// Sets all tensors of a table to zero. Grid: the pieces.
KERNEL(THREADS) zero_all(const Piece* pieces /* (gridDim.x) */, const Span* tensors /* (tensors) */) {
    Piece piece = pieces[blockIdx.x];
    Span tensor = tensors[piece.tensor];
    each_of_part(piece.part, tensor.n, [&](u64 at, auto width) {
        store(tensor.x + at, Pack<decltype(width)::value>{});
    });
}
