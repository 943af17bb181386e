// The entry for other languages.
#include "cuda_bf16.h"

#include <cstdio>

std::string host_call(const std::string& name, const host::Launch& launch, const host::Kind* kinds,
                      const void* const* values, size_t count);

// Launches a kernel by name; 0, or 1 and a message of up to `capacity` bytes, terminated.
extern "C" int host_launch(const char* name, const unsigned* grid, const unsigned* block, size_t shared, int order,
                           unsigned long long seed, const unsigned char* kinds, const void* const* values, size_t count,
                           char* message, size_t capacity) {
    host::Launch launch{{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared,
                        static_cast<host::Order>(order), seed};
    std::string problem = host_call(name, launch, reinterpret_cast<const host::Kind*>(kinds), values, count);
    if (problem.empty()) return 0;
    std::snprintf(message, capacity, "%s", problem.c_str());
    return 1;
}

// The bf16 of a number, for the test of the rounding.
extern "C" unsigned short host_bf16(float x) { return __float2bfloat16_rn(x).bits; }
