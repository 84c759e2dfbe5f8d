// The turn of a block of columns in a round of descent: its groups, which are neighbors here, are
// decided one after the other, each with what those before it changed. The grid is
// [ROWS of an expert][experts]. What the block changes in the gradient of others is for a product.

extern "C" __global__ void __launch_bounds__(ROWS) sweep(
    s8* levels,                 // int8 [experts, rows, columns]
    float* gradient,            // fp32 [experts, rows, columns]
    const float* hessian,       // fp32 [experts, columns, columns]
    const float* factors,       // fp32 [experts, columns / GROUP, GROUP, GROUP]: U of each group's H
    const float* scale,         // fp32 [experts, rows]
    const float* column_scale,  // fp32 [experts, columns]
    const float* first,         // fp32 [experts, rows]: the price of a non-zero
    const float* further,       // fp32 [experts, rows]: of each further level
    const u8* ternary,          // uint8 [experts]: whether levels end at 1
    float* moves,               // fp32 [experts, rows, columns]: the block's get what changes in Q
    int rows, int columns,
    int block) {  // its first column
    __shared__ float tile[BLOCK * STRIDE], h[BLOCK * BLOCK], u[BLOCK * GROUP];
    __shared__ Columns own;
    const int expert = blockIdx.y, from = blockIdx.x * ROWS, mine = threadIdx.x;
    const int count = min(ROWS, rows - from);
    const u64 corner = ((u64)expert * rows + from) * columns + block;
    const float* const factor = factors + ((u64)expert * columns + block) * GROUP;
    load_tile(gradient + corner, count, columns, tile);
    load_square(hessian + ((u64)expert * columns + block) * columns + block, columns, h);
    for (int i = mine; i < BLOCK * GROUP; i += ROWS) u[i] = factor[i];
    for (int i = mine; i < BLOCK; i += ROWS) {
        own.scale[i] = column_scale[(u64)expert * columns + block + i];
        own.inverse[i] = 1.0f / own.scale[i];
        own.inverse_spread[i] = 1.0f / factor[i * GROUP + i % GROUP];
    }
    __syncthreads();
    if (mine < count) {
        const u64 at = (u64)expert * rows + from + mine;
        const Row row(scale[at], first[at], further[at], ternary[expert]);
        s8* const my_levels = levels + corner + (u64)mine * columns;
        float* const my_moves = moves + corner + (u64)mine * columns;
#pragma unroll 1
        for (int group = 0; group < BLOCK; group += GROUP) {
            const float* const of = u + group * GROUP;
            // y = U G, and the best real values x = q + U^T y; they gain y.y.
            float x[GROUP], y[GROUP], before[GROUP], after[GROUP];
            float gain = 0.0f;
#pragma unroll
            for (int i = 0; i < GROUP; i++) x[i] = tile[(group + i) * STRIDE + mine];
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                y[i] = 0.0f;
#pragma unroll
                for (int k = i; k < GROUP; k++) y[i] += x[k] * of[i * GROUP + k];
                gain += y[i] * y[i];
            }
            load_levels(my_levels + group, before);
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                x[i] = before[i] * (row.scale * own.scale[group + i]);
#pragma unroll
                for (int k = 0; k <= i; k++) x[i] += y[k] * of[k * GROUP + i];
            }
            round_group(row, own, group, of, GROUP, x, after);

            float cost = 0.0f;
            bool differ = false, beyond = false;
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const float high = fabsf(after[i]), low = fabsf(before[i]);
                const float nonzero = min(high, 1.0f) - min(low, 1.0f);
                cost += x[i] * x[i] + row.first * nonzero;
                if (!row.ternary) cost += row.further * (high - low - nonzero);
                differ |= after[i] != before[i];
                beyond |= low > 1.0f;
            }
            // Levels beyond 1 are from GPTQ, which may have been allowed them, and have to go.
            const bool better = differ && (gain > cost || (row.ternary && beyond));
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const float change = better ? after[i] - before[i] : 0.0f;
                x[i] = change * (row.scale * own.scale[group + i]);
                if (change != 0.0f) {
#pragma unroll 8
                    for (int k = 0; k < BLOCK; k++) {
                        tile[k * STRIDE + mine] -= x[i] * h[(group + i) * BLOCK + k];
                    }
                }
            }
            if (better) store_levels(after, my_levels + group);
#pragma unroll
            for (int i = 0; i < GROUP; i += 4) {
                *(float4*)(my_moves + group + i) = float4{x[i], x[i + 1], x[i + 2], x[i + 3]};
            }
        }
    }
    __syncthreads();
    store_tile(tile, count, columns, gradient + corner);
}
