// x, times the column scales, in the order of run_order.cu, as a sum of TERMS numbers of 16 bits.
//
// fp16 is one term. Otherwise a term is the first 8 bits of what is left, the rest being exact: one
// term for bf16, two for bf16 times bf16, three for 24 bits. As all have the sign of x, no partial
// sum of them exceeds that of the products themselves [M-2].
//
// If there are several experts, another block sorts the pairs meanwhile: a launch less.

__device__ inline void cut(float& rest, fp16& term) { term = from_float<fp16>(rest); }

__device__ inline void cut(float& rest, bf16& term) {
    term = {(u16)(__float_as_uint(rest) >> 16)};
    rest -= to_float(term);
}

extern "C" __global__ void __launch_bounds__(THREADS) run_terms(
    const X_TYPE* x,           // bf16, fp16 or fp32 [pairs / pairs_per_x, COLUMNS]
    const bf16* column_scale,  // bf16 [experts, COLUMNS] if COLUMN_SCALES
    TERM_TYPE* terms,          // bf16 or fp16 [pairs if COLUMN_SCALES, else x; TERMS, PLACES]
    const int* listed,         // int32 [pairs]. GROUPS: their experts
    int* order, int* tiles, int* ranks, int* counts,  // GROUPS: as in sort.cu
    int experts,                                      // number of experts
    int expert,                                       // ONE: the expert of all pairs
    int pairs, int pairs_per_x) {
    if (PAIRS == GROUPS && blockIdx.x == 0) {
        sort_pairs(listed, order, tiles, ranks, counts, pairs, experts);
        return;
    }
    const u64 size = (u64)(COLUMN_SCALES ? pairs : pairs / pairs_per_x) * PLACES;
    const int first = PAIRS == GROUPS ? 1 : 0, blocks = gridDim.x - first;
    for (u64 i = (u64)(blockIdx.x - first) * THREADS + threadIdx.x; i < size; i += blocks * THREADS) {
        const int number = (int)(i / PLACES), at = (int)(i % PLACES), column = column_of(at);
        float value = 0.0f;
        if (column < COLUMNS) {
            const int of = COLUMN_SCALES ? number / pairs_per_x : number;
            value = to_float(x[(u64)of * COLUMNS + column]);
        }
        if (COLUMN_SCALES && column < COLUMNS) {
            const int e = PAIRS == GROUPS ? listed[number] : expert;
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
