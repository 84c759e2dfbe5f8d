// The grid Multiples (quantize/grids.py), and GPTQ with it in a group of columns. A thread has a row,
// and a block of threads has ROWS of one expert.

typedef signed char s8;

constexpr int STRIDE = ROWS + 1;  // of a column of a tile: rows are loaded and stored along columns

// What a row needs.
struct Row {
    float scale, inverse, first, further;
    bool ternary;

    __device__ Row(float scale, float first, float further, bool ternary)
        : scale(scale), inverse(1.0f / scale), first(first), further(further), ternary(ternary) {}
};

// Uniform values of BLOCK columns, in shared memory.
struct Columns {
    float scale[BLOCK], inverse[BLOCK];
    float inverse_spread[BLOCK];  // of U_ii
};

// The level of x; inverse is 1 / value, squared is U_ii^2. Comparisons are false for NaN, which comes
// of a scale of 0.
__device__ __forceinline__ float rounded(float x, float value, float inverse, float squared,
                                         const Row& row) {
    const float size = fabsf(x), least_reward = row.first * inverse * squared;
    float threshold = value + least_reward, level = 1.0f;
    if (!row.ternary) {
        const float step = row.further * inverse * squared;
#pragma unroll
        for (int q = 2; q <= SKIPPED; q++) {
            const float one = value * q + (least_reward + step * (q - 1)) * (1.0f / q);
            threshold = one < threshold ? one : threshold;
        }
        level = floorf(size * inverse + (0.5f - step * inverse * 0.5f));
        level = level > 1.0f ? level : 1.0f;
        level = level < MOST ? level : MOST;
    }
    return copysignf(size * 2.0f > threshold ? level : 0.0f, x);
}

// Round x of a group one after the other; x becomes the errors over U_ii. `u` is the group's U, with
// rows `stride` apart.
__device__ __forceinline__ void round_group(const Row& row, const Columns& columns, int group,
                                            const float* u, int stride, float (&x)[GROUP],
                                            float (&levels)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        const float spread = u[i * stride + i], value = row.scale * columns.scale[group + i];
        const float inverse = row.inverse * columns.inverse[group + i];
        const float level = rounded(x[i], value, inverse, spread * spread, row);
        x[i] = (x[i] - level * value) * columns.inverse_spread[group + i];
        levels[i] = level;
#pragma unroll
        for (int k = i + 1; k < GROUP; k++) x[k] -= x[i] * u[i * stride + k];
    }
}

// A tile is [BLOCK][STRIDE] in shared memory, and of `rows` rows in global memory, `columns` apart.
__device__ __forceinline__ void load_tile(const float* from, int rows, int columns, float* tile) {
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * BLOCK; i += ROWS) {
        const int row = i / BLOCK, column = i % BLOCK;
        tile[column * STRIDE + row] = from[(u64)row * columns + column];
    }
}

__device__ __forceinline__ void store_tile(const float* tile, int rows, int columns, float* to) {
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * BLOCK; i += ROWS) {
        const int row = i / BLOCK, column = i % BLOCK;
        to[(u64)row * columns + column] = tile[column * STRIDE + row];
    }
}

// The part of a square matrix that belongs to a block: [BLOCK][BLOCK].
__device__ __forceinline__ void load_square(const float* from, int columns, float* square) {
#pragma unroll 4
    for (int i = threadIdx.x; i < BLOCK * BLOCK; i += ROWS) {
        square[i] = from[(u64)(i / BLOCK) * columns + i % BLOCK];
    }
}

// A group's levels of a row are 16 bytes.
__device__ __forceinline__ void load_levels(const s8* from, float (&levels)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP; i += 16) {
        const uint4 four = *(const uint4*)(from + i);
        const u32 words[] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 16; k++) levels[i + k] = (s8)(words[k / 4] >> k % 4 * 8 & 255);
    }
}

__device__ __forceinline__ void store_levels(const float (&levels)[GROUP], s8* to) {
#pragma unroll
    for (int i = 0; i < GROUP; i += 16) {
        u32 words[4] = {};
#pragma unroll
        for (int k = 0; k < 16; k++) words[k / 4] |= ((u32)(int)levels[i + k] & 255) << k % 4 * 8;
        *(uint4*)(to + i) = uint4{words[0], words[1], words[2], words[3]};
    }
}
