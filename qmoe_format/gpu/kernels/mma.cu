// sums += A B on a tensor core, compute capability 8.0 or higher: A [16, 16] and B [16, 8] of bf16 or
// fp16, two of them in a register, sums [16, 8]. Lane 4 g + t of a warp has
//
//     a[0], a[1]   rows g and g + 8 of A, columns 2 t and 2 t + 1
//     a[2], a[3]   the same rows, columns 2 t + 8 and 2 t + 9
//     b0, b1       column g of B, rows 2 t and 2 t + 1; 2 t + 8 and 2 t + 9
//     sums[0, 1]   row g, columns 2 t and 2 t + 1
//     sums[2, 3]   row g + 8, the same columns

#if defined(__CUDA_ARCH__)
#define MMA(type)                                                                          \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                             \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
#define MMA(type) simulated_mma(type, sums, a, b0, b1)
#endif

__device__ __forceinline__ void multiply_add(bf16, float (&sums)[4], const u32 (&a)[4], u32 b0,
                                             u32 b1) {
    MMA("bf16");
}

__device__ __forceinline__ void multiply_add(fp16, float (&sums)[4], const u32 (&a)[4], u32 b0,
                                             u32 b1) {
    MMA("f16");
}
