// The weighted sum of each token's k products, in the order of k. The grid is [tokens][rows], so that
// no thread divides.

extern "C" __global__ void combine(
    const float* products,       // float32 [tokens, k, rows]
    const WEIGHT_TYPE* weights,  // bf16, fp16 or fp32 [tokens, k]
    Y_TYPE* y,                   // bf16, fp16 or fp32 [tokens, rows]
    const INDEX* listed,         // int32 or int64 [tokens, k] if LEAVE_OUT: products of experts
                                 // that do not exist are left out
    int tokens, int k, int rows, int experts) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    for (u64 token = blockIdx.y; token < tokens; token += gridDim.y) {
        float sum = 0.0f;
#pragma unroll 8
        for (int j = 0; j < k; j++) {
            const u64 pair = token * k + j;
            const bool there = !LEAVE_OUT || (listed[pair] >= 0 && listed[pair] < experts);
            const float weight = there ? to_float(weights[pair]) : 0.0f;
            sum += weight * (there ? products[pair * rows + row] : 0.0f);
        }
        y[token * rows + row] = from_float<Y_TYPE>(sum);
    }
}
