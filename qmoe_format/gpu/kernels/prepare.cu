// x times the column scales of each pair's expert, followed by a zero, as float32 in global memory:
// for matrices with so many columns that x does not fit into shared memory.

extern "C" __global__ void prepare(
    const X_TYPE* x,           // bf16, fp16 or fp32 [pairs / pairs_per_x, columns]
    const bf16* column_scale,  // bf16 [experts, columns] if COLUMN_SCALES
    const int* listed,         // int32 [pairs]: their experts, if `expert` is -1
    float* scaled,             // float32 [pairs, columns + 1]
    int experts,               // number of experts
    int expert,                // the expert of all pairs, or -1
    int pairs, int pairs_per_x, int columns) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column > columns) return;
    for (int pair = blockIdx.y; pair < pairs; pair += gridDim.y) {
        const int e = expert < 0 ? listed[pair] : expert;
        float value = 0.0f;
        if (column < columns) value = to_float(x[(u64)(pair / pairs_per_x) * columns + column]);
        if (COLUMN_SCALES && column < columns && e >= 0 && e < experts) {
            value *= to_float(column_scale[(u64)e * columns + column]);
        }
        scaled[(u64)pair * (columns + 1) + column] = value;
    }
}
