// A sum over the lanes of a warp, for each of them.

// `value` plus that of the lane `distance` below, if there is one. In assembly, because the shuffle
// itself says whether there is, which the compiler does not use.
template <int distance>
__device__ inline u32 add_lane_below(u32 value) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "{ .reg .pred there; .reg .u32 other;\n"
        "shfl.sync.up.b32 other|there, %0, %1, 0, -1;\n"
        "@there add.u32 %0, %0, other; }"
        : "+r"(value)
        : "n"(distance));
    return value;
#else
    u32 other = __shfl_up_sync(FULL, value, distance);
    return value + (threadIdx.x % 32 >= distance ? other : 0u);
#endif
}

// The sum of this lane's value and those of all lanes below.
__device__ inline u32 sum_upto_lane(u32 value) {
    value = add_lane_below<1>(value);
    value = add_lane_below<2>(value);
    value = add_lane_below<4>(value);
    value = add_lane_below<8>(value);
    return add_lane_below<16>(value);
}
