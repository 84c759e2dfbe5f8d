// GPTQ within a block of columns. The grid is [ROWS of an expert][experts].

extern "C" __global__ void __launch_bounds__(ROWS) gptq_block(
    const float* rest,          // fp32 [experts, rows, columns]: what is to be rounded
    const float* factor,        // fp32 [experts, columns, columns]: U
    s8* levels,                 // int8 [experts, rows, columns]: the result
    float* errors,              // fp32 [experts, rows, columns]: the result, errors over U_ii
    const float* scale,         // fp32 [experts, rows]
    const float* column_scale,  // fp32 [experts, columns]
    const float* first,         // fp32 [experts, rows]: the price of a non-zero
    const float* further,       // fp32 [experts, rows]: of each further level
    const u8* ternary,          // uint8 [experts]: whether levels end at 1
    int rows, int columns,
    int block) {  // its first column
    __shared__ float tile[BLOCK * STRIDE], u[BLOCK * BLOCK];
    __shared__ Columns own;
    const int expert = blockIdx.y, from = blockIdx.x * ROWS, mine = threadIdx.x;
    const int count = min(ROWS, rows - from);
    const u64 corner = ((u64)expert * rows + from) * columns + block;
    const float* const square = factor + ((u64)expert * columns + block) * columns + block;
    load_tile(rest + corner, count, columns, tile);
    load_square(square, columns, u);
    for (int i = mine; i < BLOCK; i += ROWS) {
        own.scale[i] = column_scale[(u64)expert * columns + block + i];
        own.inverse[i] = 1.0f / own.scale[i];
        own.inverse_spread[i] = 1.0f / square[(u64)i * columns + i];
    }
    __syncthreads();
    if (mine < count) {
        const u64 at = (u64)expert * rows + from + mine;
        const Row row(scale[at], first[at], further[at], ternary[expert]);
#pragma unroll 1
        for (int group = 0; group < BLOCK; group += GROUP) {
            float x[GROUP], chosen[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; i++) x[i] = tile[(group + i) * STRIDE + mine];
            round_group(row, own, group, u + group * BLOCK + group, BLOCK, x, chosen);
            store_levels(chosen, levels + corner + (u64)mine * columns + group);
#pragma unroll
            for (int i = 0; i < GROUP; i++) tile[(group + i) * STRIDE + mine] = x[i];
#pragma unroll 1
            for (int k = group + GROUP; k < BLOCK; k++) {
                float later = tile[k * STRIDE + mine];
#pragma unroll
                for (int i = 0; i < GROUP; i++) later -= x[i] * u[(group + i) * BLOCK + k];
                tile[k * STRIDE + mine] = later;
            }
        }
    }
    __syncthreads();
    store_tile(tile, count, columns, errors + corner);
}
