// What experts make of silu(gate) * up, which each block computes when it stages it: products that
// are still to be weighted and added up. The grid, from z to x, is [tokens][experts of a token]
// [blocks of a matrix].

struct Gated {
    const X_TYPE *gate, *up;

    struct Loaded {
        Quarter<X_TYPE> gate, up;
    };
    static constexpr bool few_registers = false;
    __device__ bool aligned() const { return ((u64)gate | (u64)up) % sizeof(Quarter<X_TYPE>) == 0; }
    __device__ Loaded load(int column, bool sure) const {
        return {{gate, column, sure}, {up, column, sure}};
    }
    __device__ static float value(const Loaded& loaded, int i) {
        return silu_gate(to_float(loaded.gate.x[i]), to_float(loaded.up.x[i]));
    }
    __device__ float at(int column) const {
        return silu_gate(to_float(gate[column]), to_float(up[column]));
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) output(
    const u32* offsets,        // uint32 [experts, groups + 1]: the first code of each group
    const u16* starts,         // uint16 [experts, groups, 32]: 32 * (slot + 1) + bank
    const u16* order,          // uint16 [experts, rows]: the rows, group after group
    const u64* bases,          // uint64 [experts]: the first line of each matrix
    const u32* words,          // uint32 [lines, 32]
    const bf16* row_scale,     // bf16 [experts, rows, SCALES], in that order
    const bf16* column_scale,  // bf16 [experts, COLUMNS] if COLUMN_SCALES
    int experts, int rows,
    const X_TYPE* hidden,  // bf16, fp16 or fp32: gate and up of each pair, [tokens, k, 2, COLUMNS],
                           // or from two STACKS, [2, tokens, k, COLUMNS]
    float* y,              // float32 [tokens, k, rows]
    const INDEX* listed,   // int32 or int64 [tokens, k]: the experts; of others nothing is written
    int groups_per_block,
    u32 ring) {  // as in run_product.cu
    extern __shared__ unsigned char shared[];
    const Stack stack = {offsets, starts, order, bases,
                         words, row_scale, column_scale, experts, rows};
    const int from = blockIdx.x * groups_per_block;
    const int to = min(from + groups_per_block, stack.groups());
    const u64 pair = blockIdx.z * gridDim.y + blockIdx.y, pairs = gridDim.z * gridDim.y;
    const INDEX e = listed[pair];
    if (e < 0 || e >= experts) return;
    const X_TYPE* const gate = hidden + pair * COLUMNS * (STACKS == 1 ? 2 : 1);
    const Gated gated = {gate, gate + COLUMNS * (STACKS == 1 ? 1 : pairs)};
    multiply_groups(stack, (int)e, from, to, gated, y + pair * rows, ring, shared);
}
