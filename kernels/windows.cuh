// Windows of tokens that are as far apart as they are wide.
#pragma once
#include "common.cuh"

// The first token of window `key`; -1 past the last one.
__device__ __forceinline__ int origin_of(int key, int keys, int width, int side) {
    int across = width / side, line = key / across;
    return key < keys ? (line * width + key % across) * side : -1;
}
