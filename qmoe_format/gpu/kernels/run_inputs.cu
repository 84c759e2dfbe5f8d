// What the experts of each token make of its x: products with gate and up, from one stack, in which
// gate is above up, or from two. The grid, from z to x, is [tokens][experts of a token][blocks of a
// matrix, first those of the first stack].

extern "C" __global__ void __launch_bounds__(THREADS, 1) inputs(
    const u32* offsets,        // uint32 [experts, groups + 1]: the first code of each group
    const u16* starts,         // uint16 [experts, groups, 32]: 32 * (slot + 1) + bank
    const u16* order,          // uint16 [experts, rows]: the rows, group after group
    const u64* bases,          // uint64 [experts]: the first line of each matrix
    const u32* words,          // uint32 [lines, 32]
    const bf16* row_scale,     // bf16 [experts, rows, SCALES], in that order
    const bf16* column_scale,  // bf16 [experts, COLUMNS] if COLUMN_SCALES
    const u32* offsets_2,      // the same of the second stack; not used if STACKS is 1
    const u16* starts_2,
    const u16* order_2,
    const u64* bases_2,
    const u32* words_2,
    const bf16* row_scale_2,
    const bf16* column_scale_2,
    int experts, int rows,
    const X_TYPE* x,      // bf16, fp16 or fp32 [tokens, COLUMNS]
    Y_TYPE* y,            // bf16, fp16 or fp32 [STACKS, tokens, k, rows]
    const INDEX* listed,  // int32 or int64 [tokens, k]: the experts; of others nothing is written
    int groups_per_block,
    u32 ring) {  // as in run_product.cu
    extern __shared__ unsigned char shared[];
    const int blocks = gridDim.x / STACKS, stack_number = (int)blockIdx.x >= blocks;
    Stack stack = {offsets, starts, order, bases, words, row_scale, column_scale, experts, rows};
    if (STACKS == 2 && stack_number == 1) {
        stack = {offsets_2, starts_2, order_2, bases_2,
                 words_2, row_scale_2, column_scale_2, experts, rows};
    }
    const int from = ((int)blockIdx.x - stack_number * blocks) * groups_per_block;
    const int to = min(from + groups_per_block, stack.groups());
    const int pair = blockIdx.z * gridDim.y + blockIdx.y, pairs = gridDim.z * gridDim.y;
    const INDEX e = listed[pair];
    if (e < 0 || e >= experts) return;
    const Given given = {x + (u64)blockIdx.z * COLUMNS};
    Y_TYPE* const out = y + ((u64)stack_number * pairs + pair) * rows;
    multiply_groups(stack, (int)e, from, to, given, out, ring, shared);
}
