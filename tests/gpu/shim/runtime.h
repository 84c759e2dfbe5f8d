// What kernels (cuda.h) and the code that runs them (runtime.cpp) have in common.
#pragma once

namespace shim {

enum Operation {
    SYNCWARP, SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, MATCH_ANY, MMA,
    SYNCTHREADS, SYNCTHREADS_COUNT, SYNCTHREADS_AND, SYNCTHREADS_OR
};

struct Where { const char* file; int line; };

// A lane's registers of mma.m16n8k16, two numbers of 16 bits in each of a and b.
struct Mma { bool bf16; float* sums; unsigned a[4], b[2]; };

// Called by every lane of `mask`; returns once all have called it.
unsigned long long warp(Operation operation, unsigned mask, unsigned long long value,
                        int argument, int width, Where where);

// Called by every thread of the block.
int block(Operation operation, int predicate, Where where);

// Announces an atomic operation; `code` is the address of the instruction after it.
void atomic(const void* address, unsigned size, const void* code);

// a * b + c without flushing subnormal numbers.
float fma_ieee(float a, float b, float c);

}  // namespace shim
