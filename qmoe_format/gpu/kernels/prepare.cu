// x times the column scales of each pair's expert, and a zero after it, as float32 in global
// memory: for matrices of so many columns that x does not fit into shared memory.

extern "C" __global__ void prepare(
    const X_TYPE* x,                 // [pairs / pairs_per_x, columns]
    const SCALE_TYPE* column_scale,  // [experts, columns] if COLUMN_SCALES
    const int* listed,               // [pairs] experts, unless `expert` is that of all
    float* scaled,                   // [pairs, columns + 1]
    int experts, int expert, int pairs, int pairs_per_x, int columns) {
    const u64 size = (u64)pairs * (columns + 1), step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const int pair = (int)(i / (columns + 1)), column = (int)(i % (columns + 1));
        const int e = expert < 0 ? listed[pair] : expert;
        float value = 0.0f;
        if (column < columns) value = to_float(x[(u64)(pair / pairs_per_x) * columns + column]);
        if (COLUMN_SCALES && column < columns && e >= 0 && e < experts) {
            value *= to_float(column_scale[(u64)e * columns + column]);
        }
        scaled[i] = value;
    }
}
