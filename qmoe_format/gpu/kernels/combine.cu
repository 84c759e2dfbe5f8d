// The weighted sum of each token's k products, in the order of k. The grid is [tokens][rows], so that
// no thread divides.

constexpr int AHEAD = 8;  // numbers, then products, that are asked for before the first is used

extern "C" __global__ void combine(
    const float* products,       // float32 [tokens, k, rows]
    const WEIGHT_TYPE* weights,  // bf16, fp16 or fp32 [tokens, k]
    Y_TYPE* y,                   // bf16, fp16 or fp32 [tokens, rows]
    const INDEX* listed,         // int32 or int64 [tokens, k] if LEAVE_OUT: products of experts
                                 // that do not exist are left out
    int tokens, int k, int rows,
    int experts) {  // how many exist, 1 without LEAVE_OUT
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    for (u64 token = blockIdx.y; token < tokens; token += gridDim.y) {
        float sum = 0.0f;
        for (int first = 0; first < k; first += AHEAD) {
            INDEX number[AHEAD];
            WEIGHT_TYPE weight[AHEAD] = {};
            float product[AHEAD] = {};
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                number[i] = -1;
                if (first + i < k) number[i] = LEAVE_OUT ? listed[token * k + first + i] : 0;
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const u64 pair = token * k + first + i;
                if (number[i] < 0 || number[i] >= experts) continue;
                weight[i] = weights[pair];
                product[i] = products[pair * rows + row];
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) sum += to_float(weight[i]) * product[i];
        }
        y[token * rows + row] = from_float<Y_TYPE>(sum);
    }
}
