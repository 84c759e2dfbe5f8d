// As much of CUDA C++ as the kernels use, for g++. Included before the first line of a kernel.
#pragma once
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline  // forcing it takes g++ much longer
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __constant__ static const
#define __shared__ static __attribute__((section("cuda_shared")))  // dynamic: see __init__.py

// -- Indices ---------------------------------------------------------------------------------------

struct uint3 { unsigned x, y, z; };
using dim3 = uint3;
extern "C" {
extern const uint3 threadIdx, blockIdx;  // const for a thread, as on a GPU
extern const dim3 blockDim, gridDim;
extern unsigned char* const shim_shared;  // the block's dynamic shared memory
}
constexpr int warpSize = 32;

// -- Vectors ---------------------------------------------------------------------------------------

#define SHIM_VECTOR(T, name)                                                                    \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                          \
    struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };               \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                  \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SHIM_VECTOR(int, int)
SHIM_VECTOR(unsigned, uint)
SHIM_VECTOR(float, float)
SHIM_VECTOR(unsigned short, ushort)
SHIM_VECTOR(unsigned char, uchar)

// -- Warps and blocks ------------------------------------------------------------------------------

#define SHIM_WHERE shim::Where where = {__builtin_FILE(), __builtin_LINE()}

namespace shim {

template <class To, class From>
inline To bits(From from) {
    To to{};
    __builtin_memcpy(&to, &from, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
    return to;
}

template <class T>
inline T shuffle(Operation operation, unsigned mask, T value, int argument, int width, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    return bits<T>(warp(operation, mask, bits<unsigned long long>(value), argument, width, where));
}

}  // namespace shim

inline void __syncwarp(unsigned mask = ~0u, SHIM_WHERE) {
    shim::warp(shim::SYNCWARP, mask, 0, 0, 32, where);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SHIM_WHERE) {
    return shim::shuffle(shim::SHFL, mask, value, lane, width, where);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_WHERE) {
    return shim::shuffle(shim::SHFL_UP, mask, value, int(delta), width, where);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_WHERE) {
    return shim::shuffle(shim::SHFL_DOWN, mask, value, int(delta), width, where);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SHIM_WHERE) {
    return shim::shuffle(shim::SHFL_XOR, mask, value, lanes, width, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_WHERE) {
    return unsigned(shim::warp(shim::BALLOT, mask, predicate != 0, 0, 32, where));
}
inline int __any_sync(unsigned mask, int predicate, SHIM_WHERE) {
    return int(shim::warp(shim::ANY, mask, predicate != 0, 0, 32, where));
}
inline int __all_sync(unsigned mask, int predicate, SHIM_WHERE) {
    return int(shim::warp(shim::ALL, mask, predicate != 0, 0, 32, where));
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, SHIM_WHERE) {
    return shim::warp(shim::MATCH_ANY, mask, shim::bits<unsigned long long>(value), 0, 32, where);
}
// As mma.sync of type bf16 or f16, see kernels/mma.cu.
__attribute__((noinline, no_sanitize("thread")))
inline void simulated_mma(const char* type, float* sums, const unsigned (&a)[4], unsigned b0,
                          unsigned b1, SHIM_WHERE) {
    float own[4] = {sums[0], sums[1], sums[2], sums[3]};
    shim::Mma mma = {type[0] == 'b', own, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    shim::warp(shim::MMA, ~0u, (unsigned long long)&mma, 0, 32, where);
    for (int i = 0; i < 4; i++) sums[i] = own[i];
}
inline void __syncthreads(SHIM_WHERE) { shim::block(shim::SYNCTHREADS, 0, where); }
inline int __syncthreads_count(int predicate, SHIM_WHERE) {
    return shim::block(shim::SYNCTHREADS_COUNT, predicate, where);
}
inline int __syncthreads_and(int predicate, SHIM_WHERE) {
    return shim::block(shim::SYNCTHREADS_AND, predicate, where);
}
inline int __syncthreads_or(int predicate, SHIM_WHERE) {
    return shim::block(shim::SYNCTHREADS_OR, predicate, where);
}

// -- Memory ----------------------------------------------------------------------------------------

template <class T>
inline T __ldg(const T* address) { return *address; }

// For integers only: the order of floating-point additions would change the result.
#define SHIM_ATOMIC(name, expression)                                                           \
    template <class T>                                                                          \
    __attribute__((noinline, no_sanitize("thread", "undefined")))                               \
    T name(T* address, decltype(T() | T()) value) {  /* no | for floats */                      \
        shim::atomic(address, sizeof(T), __builtin_return_address(0));                          \
        T old = *address;                                                                       \
        *address = T(expression);                                                               \
        return old;                                                                             \
    }
SHIM_ATOMIC(atomicAdd, old + value)
SHIM_ATOMIC(atomicSub, old - value)
SHIM_ATOMIC(atomicMin, old < T(value) ? old : T(value))
SHIM_ATOMIC(atomicMax, old > T(value) ? old : T(value))
SHIM_ATOMIC(atomicOr, old | value)
SHIM_ATOMIC(atomicAnd, old & value)
SHIM_ATOMIC(atomicXor, old ^ value)
SHIM_ATOMIC(atomicExch, value)

// -- Numbers ---------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
    x = __builtin_bswap32(x);
    x = (x >> 4 & 0x0F0F0F0Fu) | (x & 0x0F0F0F0Fu) << 4;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    return (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned chosen = selector >> 4 * i & 15, byte = unsigned(both >> 8 * (chosen & 7)) & 255;
        result |= (chosen & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;  // 8: the sign, repeated
    }
    return result;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
    return c;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned((unsigned long long)a * b >> 32);
}

inline unsigned __float_as_uint(float x) { return shim::bits<unsigned>(x); }
inline int __float_as_int(float x) { return shim::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return shim::bits<float>(x); }
inline float __int_as_float(int x) { return shim::bits<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmaf_ieee_rn(float a, float b, float c) { return shim::fma_ieee(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __double2float_rn(double x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return __builtin_expf(x); }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fabsf(float x) { return __builtin_fabsf(x); }
inline float floorf(float x) { return __builtin_floorf(x); }
inline float copysignf(float x, float sign) { return __builtin_copysignf(x, sign); }

#define SHIM_LEAST(T)                                                                           \
    inline T min(T a, T b) { return b < a ? b : a; }                                            \
    inline T max(T a, T b) { return a < b ? b : a; }
SHIM_LEAST(int)
SHIM_LEAST(unsigned)
SHIM_LEAST(long long)
SHIM_LEAST(unsigned long long)
SHIM_LEAST(float)

// -- A kernel from Python --------------------------------------------------------------------------

namespace shim {

// A parameter's type: size, kind (float, int, unsigned, of another class), pointer, const.
template <class T>
constexpr unsigned kind() {
    if constexpr (__is_class(T))
        return 'c';
    else
        return T(0.5) != T(0) ? 'f' : T(-1) < T(0) ? 'i' : 'u';
}
template <class T> struct Type { static constexpr unsigned code = kind<T>() << 8 | sizeof(T); };
template <class T> struct Type<T*> { static constexpr unsigned code = 1 << 16 | Type<T>::code; };
template <class T> struct Type<const T> {
    static constexpr unsigned code = 1 << 17 | Type<T>::code;
};

template <class... P>
__attribute__((no_sanitize("thread"))) int signature(void (*)(P...), unsigned* codes) {
    (void)((*codes++ = Type<P>::code), ...);
    return sizeof...(P);
}

template <unsigned...> struct Indices {};
template <class... P, unsigned... I>
__attribute__((noinline, no_sanitize("thread")))
void call(void (*kernel)(P...), void** arguments, Indices<I...>) {
    kernel(*(P*)arguments[I]...);
}
template <class... P>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, Indices<__integer_pack(sizeof...(P))...>());
}

}  // namespace shim

#define SHIM_KERNEL(name)                                                                       \
    extern "C" __attribute__((no_sanitize("thread")))                                           \
    int shim_signature_##name(unsigned* codes) {                                                \
        return shim::signature(name, codes);                                                    \
    }                                                                                           \
    extern "C" __attribute__((no_sanitize("thread"))) void shim_call_##name(void** arguments) { \
        shim::call(name, arguments);                                                            \
    }

extern "C" __attribute__((weak)) char __start_cuda_shared[], __stop_cuda_shared[];
extern "C" __attribute__((no_sanitize("thread")))
void shim_static_shared(char** begin, char** end) {
    *begin = __start_cuda_shared;
    *end = __stop_cuda_shared;
}
