// silu(gate) * up of each pair.

extern "C" __global__ void activate(
    const X_TYPE* gate,  // bf16, fp16 or fp32, `columns` of each pair, `stride` apart
    const X_TYPE* up,    // the same
    X_TYPE* y,           // bf16, fp16 or fp32 [pairs, columns]
    int pairs, int columns, int stride) {
    const u64 size = (u64)pairs * columns, step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const u64 at = i / columns * stride + i % columns;
        y[i] = from_float<X_TYPE>(silu_gate(to_float(gate[at]), to_float(up[at])));
    }
}
