// x, times the column scales, in the order of run_order.cu, as a sum of TERMS numbers of 16 bits.
//
// fp16 is one term. Otherwise a term is the first 8 bits of what is left, the rest being exact: one
// term for bf16, two for bf16 times bf16, three for 24 bits. As all have the sign of x, no partial
// sum of them exceeds that of the products themselves [M-2].

__device__ inline void cut(float& rest, fp16& term) { term = from_float<fp16>(rest); }

__device__ inline void cut(float& rest, bf16& term) {
    term = {(u16)(__float_as_uint(rest) >> 16)};
    rest -= to_float(term);
}

extern "C" __global__ void run_terms(
    const X_TYPE* x,           // bf16, fp16 or fp32 [pairs / pairs_per_x, COLUMNS]
    const bf16* column_scale,  // bf16 [experts, COLUMNS] if COLUMN_SCALES
    const int* listed,         // int32 [pairs]: their experts, if `expert` is -1
    TERM_TYPE* terms,          // bf16 or fp16 [count, TERMS, PLACES]
    int experts,               // number of experts
    int expert,                // the expert of all pairs, or -1
    int count,                 // of pairs if COLUMN_SCALES, else of x
    int pairs_per_x) {
    const u64 size = (u64)count * PLACES, step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const int number = (int)(i / PLACES), at = (int)(i % PLACES), column = column_of(at);
        float value = 0.0f;
        if (column < COLUMNS) {
            const int of = COLUMN_SCALES ? number / pairs_per_x : number;
            value = to_float(x[(u64)of * COLUMNS + column]);
            const int e = !COLUMN_SCALES ? -1 : expert < 0 ? listed[number] : expert;
            if (e >= 0 && e < experts) value *= to_float(column_scale[(u64)e * COLUMNS + column]);
        }
#pragma unroll
        for (int t = 0; t < TERMS; t++) {
            TERM_TYPE term;
            cut(value, term);
            terms[((u64)number * TERMS + t) * PLACES + at] = term;
        }
    }
}
