// silu(gate) * up of each pair. The grid is [pairs][columns].

extern "C" __global__ void activate(
    const X_TYPE* hidden,  // bf16, fp16 or fp32, as in run_output.cu
    X_TYPE* y,             // bf16, fp16 or fp32 [pairs, columns]
    int pairs, int columns) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    const u64 step = STACKS == 1 ? 2 * columns : columns;
    const u64 apart = STACKS == 1 ? columns : (u64)pairs * columns;
    for (u64 pair = blockIdx.y; pair < pairs; pair += gridDim.y) {
        const X_TYPE* const gate = hidden + pair * step + column;
        const float value = silu_gate(to_float(gate[0]), to_float(gate[apart]));
        y[pair * columns + column] = from_float<X_TYPE>(value);
    }
}
