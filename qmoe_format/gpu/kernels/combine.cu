// The weighted sum of each token's k products, in the order of k.

extern "C" __global__ void combine(
    const float* products,       // float32 [tokens, k, rows]
    const WEIGHT_TYPE* weights,  // bf16, fp16 or fp32 [tokens, k]
    Y_TYPE* y,                   // bf16, fp16 or fp32 [tokens, rows]
    const INDEX* listed,         // int32 or int64 [tokens, k] if LEAVE_OUT: products of experts that do
                                 // not exist are left out
    int tokens, int k, int rows, int experts) {
    const u64 size = (u64)tokens * rows, step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const u64 token = i / rows, row = i % rows;
        float sum = 0.0f;
        for (int j = 0; j < k; j++) {
            const u64 pair = token * k + j;
            if (LEAVE_OUT && (listed[pair] < 0 || listed[pair] >= experts)) continue;
            sum += to_float(weights[pair]) * products[pair * rows + row];
        }
        y[i] = from_float<Y_TYPE>(sum);
    }
}
