// Kernels with planted bugs. Each must be caught.
#include "common.cuh"
#include "mma.cuh"

// A barrier is missing between writing and reading.
KERNEL(256) missing_barrier(float* y /* (256) */) {
    SHARED(float, values, [256]);
    values[threadIdx.x] = float(threadIdx.x);
    y[threadIdx.x] = values[(threadIdx.x + 37) % 256];
}

// A barrier is missing between reading and writing anew, which shows where a warp runs ahead of another; 3 is right.
KERNEL(256) reused_shared(float* y /* (256) */) {
    SHARED(float, values, [256]);
    float sum = 0;
    for (int round = 0; round < 3; round++) {
        values[threadIdx.x] = float(round);
        __syncthreads();
        float x = values[(threadIdx.x + 37) % 256];
        sum += __shfl_xor_sync(ALL_LANES, x, 1);
    }
    y[threadIdx.x] = sum;
}

// What is copied past the registers is read after a barrier, but nobody has waited for it.
KERNEL(256) missing_wait(float* y /* (256), read and written */) {
    SHARED(float, values, [256]);
    copy_async<4>(&values[threadIdx.x], &y[threadIdx.x], 4);
    __syncthreads();
    y[threadIdx.x] = values[(threadIdx.x + 37) % 256];
}

// As above, but a group too few is waited for.
KERNEL(256) early_wait(float* y /* (256), read and written */) {
    SHARED(float, values, [256]);
    copy_async<4>(&values[threadIdx.x], &y[threadIdx.x], 4);
    copies_end_group();
    copies_done_but<1>();
    __syncthreads();
    y[threadIdx.x] = values[(threadIdx.x + 37) % 256];
}

// What is being copied is written over before it has been waited for.
KERNEL(256) changed_source(float* y /* (256), read and written */) {
    SHARED(float, values, [256]);
    copy_async<4>(&values[threadIdx.x], &y[threadIdx.x], 4);
    y[threadIdx.x] = 5.0f;
    copies_done();
    y[threadIdx.x] = values[threadIdx.x];
}

// Sixteen bytes are copied from where they are not aligned.
KERNEL(256) misaligned_copy(float* y /* (256), read and written */) {
    SHARED(float4, values, [256]);
    copy_async<16>(&values[threadIdx.x], &y[1], 16);
    copies_done();
    y[threadIdx.x] = values[threadIdx.x].x;
}

// Half of the block passes by the barrier.
KERNEL(256) partial_barrier(float* y /* (256) */) {
    if (threadIdx.x < 128) __syncthreads();
    y[threadIdx.x] = 1.0f;
}

// Half of a warp takes part in a shuffle.
KERNEL(256) partial_shuffle(float* y /* (256) */) {
    float v = 1.0f;
    if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(ALL_LANES, v, 1);
    y[threadIdx.x] = v;
}

// Shared memory is read where nothing was written.
KERNEL(256) unwritten_shared(float* y /* (256) */) {
    DYNAMIC_SHARED(float, values);
    if (threadIdx.x > 0) values[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x];
}

// The rows are one number too far apart.
KERNEL(256) wrong_stride(const float* x /* (16, 16) */, float* y /* (16, 16) */) {
    int row = threadIdx.x / 16, column = threadIdx.x % 16;
    y[threadIdx.x] = x[min(row * 17 + column, 255)];
}

// The last thread writes past the end: for AddressSanitizer.
KERNEL(256) past_the_end(float* y /* (256) */) { y[threadIdx.x + 1] = 1.0f; }

// The same in shared memory: for AddressSanitizer.
KERNEL(256) past_shared(float* y /* (256) */) {
    SHARED(float, values, [256]);
    values[threadIdx.x + 1] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x];
}
