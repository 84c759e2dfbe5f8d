// y = W x for (token, expert) pairs from runs of gap codes, one pair after another. The grid is
// [x][pairs of an x][blocks of a pair], so that no thread divides.

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(
    const u32* offsets,        // uint32 [experts, groups + 1]: the first code of each group
    const u16* starts,         // uint16 [experts, groups, 32]: 32 * (slot + 1) + bank
    const u16* order,          // uint16 [experts, rows]: the rows, group after group
    const u64* bases,          // uint64 [experts]: the first line of each matrix
    const u32* words,          // uint32 [lines, 32]
    const bf16* row_scale,     // bf16 [experts, rows, SCALES], in that order
    const bf16* column_scale,  // bf16 [experts, COLUMNS] if COLUMN_SCALES
    int experts, int rows,
    const X_TYPE* x,    // bf16, fp16 or fp32 [x, COLUMNS]
    Y_TYPE* y,          // bf16, fp16 or fp32 [x, pairs of an x, rows]
    const int* listed,  // int32 [x, pairs of an x]. LIST: their experts
    int expert,         // ONE: the expert of all pairs
    int groups_per_block,
    u32 ring) {  // bytes of a region, less 4: an argument, because for a constant the compiler does
                 // not find the instruction that subtracts and takes the maximum
    extern __shared__ unsigned char shared[];
    const Stack stack = {offsets, starts, order, bases,
                         words, row_scale, column_scale, experts, rows};
    const int from = blockIdx.x * groups_per_block;
    const int to = min(from + groups_per_block, stack.groups());
    const int pair = blockIdx.z * gridDim.y + blockIdx.y;
    const int e = PAIRS == LIST ? listed[pair] : expert;
    Y_TYPE* const out = y + (u64)pair * rows;
    if (e >= 0 && e < experts) {
        const Given given = {x + (u64)blockIdx.z * COLUMNS};
        multiply_groups(stack, e, from, to, given, out, ring, shared);
        return;
    }
    for (int r = from * ROWS + threadIdx.x; r < min(to * ROWS, rows); r += THREADS) {
        out[r] = from_float<Y_TYPE>(__uint_as_float(0x7fc00000u));  // NaN
    }
}
