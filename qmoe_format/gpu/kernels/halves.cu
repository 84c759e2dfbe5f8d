// a b + c for the two numbers in a register, bf16 or fp16; `positive`: 0 where that is below 0.
// Compute capability 8.0 or higher.

#if defined(__CUDA_ARCH__)
#define HALVES(T, type)                                                                        \
    template <bool positive>                                                                   \
    __device__ __forceinline__ u32 multiply_add(T, u32 a, u32 b, u32 c) {                      \
        u32 result;                                                                            \
        if (positive) {                                                                        \
            asm("fma.rn.relu." type " %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c)); \
        } else {                                                                               \
            asm("fma.rn." type " %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));    \
        }                                                                                      \
        return result;                                                                         \
    }
HALVES(bf16, "bf16x2")
HALVES(fp16, "f16x2")
#else
template <bool positive, typename T>
u32 multiply_add(T, u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        auto half = [&](u32 of) { return to_float(T{(u16)(of >> shift)}); };
        const float sum = half(a) * half(b) + half(c);
        result |= (u32)from_float<T>(positive ? max(sum, 0.0f) : sum).bits << shift;
    }
    return result;
}
#endif
