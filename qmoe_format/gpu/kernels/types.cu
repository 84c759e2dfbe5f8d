// Element types and their conversions. NVRTC finds no headers, so nothing is included.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int int32;
typedef long long int64;

struct bf16 {
    u16 bits;
};
struct fp16 {
    u16 bits;
};
typedef float fp32;

// PAIRS: tokens of ONE matrix, a LIST of experts, or GROUPS of pairs with the same expert.
#define ONE 0
#define LIST 1
#define GROUPS 2

constexpr u32 FULL = 0xffffffffu;  // all lanes of a warp

__device__ inline float negative(float value) {
    return __uint_as_float(__float_as_uint(value) ^ 0x80000000u);
}

// A product that keeps subnormal numbers even where the compiler is told to flush them.
__device__ inline float multiply(float a, float b) { return __fmaf_ieee_rn(a, b, -0.0f); }

__device__ inline float to_float(fp32 value) { return value; }

__device__ inline float to_float(bf16 value) { return __uint_as_float((u32)value.bits << 16); }

__device__ inline float to_float(fp16 value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    u32 magnitude = (u32)(value.bits & 0x7fffu) << 13;
    float result = multiply(__uint_as_float(magnitude), 0x1p112f);  // exact
    if (magnitude >= 0x7c00u << 13) result = __uint_as_float(magnitude | 0x7f800000u);
    return __uint_as_float(__float_as_uint(result) | (u32)(value.bits & 0x8000u) << 16);
#endif
}

// Round to nearest, ties to even, subnormal numbers kept [V-3].
template <typename T>
__device__ inline T from_float(float value);

template <>
__device__ inline fp32 from_float<fp32>(float value) {
    return value;
}

template <>
__device__ inline bf16 from_float<bf16>(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {(u16)(bits >> 16 | 0x40u)};
    return {(u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
__device__ inline fp16 from_float<fp16>(float value) {
#if defined(__CUDA_ARCH__)
    fp16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    u32 bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return {(u16)(sign | 0x7e00u)};
    if (bits >= 0x477ff000u) return {(u16)(sign | 0x7c00u)};  // 65520 and above are infinite
    if (bits < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to a multiple of 2^-24
        u32 steps = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
        return {(u16)(sign | steps)};
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return {(u16)(sign | (bits - (112u << 23)) >> 13)};
#endif
}

// The bits to store: a number must not pass through arithmetic, which flushes subnormal ones.
__device__ inline u16 bits_of(bf16 value) { return value.bits; }
__device__ inline u16 bits_of(fp16 value) { return value.bits; }
__device__ inline u32 bits_of(fp32 value) { return __float_as_uint(value); }
