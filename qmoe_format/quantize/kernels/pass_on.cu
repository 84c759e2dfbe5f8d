// Pass what changed in a few columns on to others: gradient -= moves H, in float32. In place of
// products that would be too small, for all experts at once. The grid is
// [ROWS of an expert][experts][64 of the other columns]; a thread has 4 rows and 4 columns.

constexpr int DEPTH = 32;  // columns of moves at a time
constexpr int EACH = 4;

extern "C" __global__ void __launch_bounds__(THREADS) pass_on(
    const float* moves,    // fp32 [experts, rows, columns]: what changed in Q
    float* gradient,       // fp32 [experts, rows, columns]
    const float* hessian,  // fp32 [experts, columns, columns]
    int rows, int columns,
    int own,      // the first column that changed
    int width,    // how many did
    int others) {  // the first of the other columns
    __shared__ float a[DEPTH * STRIDE];  // moves, by columns
    __shared__ float4 b[DEPTH * BLOCK / EACH];
    const int expert = blockIdx.y, from = blockIdx.x * ROWS, there = others + blockIdx.z * BLOCK;
    const int count = min(ROWS, rows - from);
    const int mine = threadIdx.x / (BLOCK / EACH) * EACH, at = threadIdx.x % (BLOCK / EACH);
    const float* const given = moves + ((u64)expert * rows + from) * columns + own;
    const float* const square = hessian + ((u64)expert * columns + own) * columns + there;
    float sums[EACH][EACH] = {};
    for (int first = 0; first < width; first += DEPTH) {
        for (int i = threadIdx.x; i < ROWS * DEPTH; i += THREADS) {
            const int row = i / DEPTH, k = i % DEPTH;
            a[k * STRIDE + row] = row < count ? given[(u64)row * columns + first + k] : 0.0f;
        }
        for (int i = threadIdx.x; i < DEPTH * BLOCK / EACH; i += THREADS) {
            const int k = i / (BLOCK / EACH), column = i % (BLOCK / EACH) * EACH;
            b[i] = *(const float4*)(square + (u64)(first + k) * columns + column);
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < DEPTH; k++) {
            const float4 h = b[k * (BLOCK / EACH) + at];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const float move = a[k * STRIDE + mine + i];
                sums[i][0] += move * h.x;
                sums[i][1] += move * h.y;
                sums[i][2] += move * h.z;
                sums[i][3] += move * h.w;
            }
        }
        __syncthreads();  // the next columns
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (mine + i >= count) break;
        float4* const to =
            (float4*)(gradient + ((u64)expert * rows + from + mine + i) * columns + there) + at;
        const float4 g = *to;
        *to = float4{g.x - sums[i][0], g.y - sums[i][1], g.z - sums[i][2], g.w - sums[i][3]};
    }
}
