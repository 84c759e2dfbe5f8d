// The weights as bf16, fp16 or fp32, exact to the bit [G-6] to [G-8]. A warp takes a row, each of
// its lanes PART columns at a time.

constexpr int PART = 8;

struct alignas(16) Weights {
    Y_TYPE y[PART];
};

extern "C" __global__ void __launch_bounds__(THREADS) decode(
    // The arrays and sizes of a Stack.
    const u8* codes,        // uint8 [experts, rows, bytes of a row] and a guard
    const bf16* scales,     // bf16 [groups of all experts]
    const u8* zero_points,  // uint8 [groups of all experts] if ZERO_POINTS
    const u64* bases,       // uint64 [experts]: an expert's first group
    const int* runs_shift,  // int32 [experts]: a group has 2^runs_shift runs
    int experts, int rows, int columns,
    Y_TYPE* y,    // bf16, fp16 or fp32 [count, rows, columns]
    int first,    // matrix to begin with
    int count) {  // number of matrices
    const Stack stack = {codes, scales, zero_points, bases, runs_shift, experts, rows, columns};
    const u64 warps = (u64)gridDim.x * THREADS / 32, all = (u64)count * rows;
    for (u64 r = ((u64)blockIdx.x * THREADS + threadIdx.x) / 32; r < all; r += warps) {
        const Row row = stack.row(first + (int)(r / rows), (int)(r % rows));
        Y_TYPE* out = y + r * columns;
        for (int c = PART * (threadIdx.x % 32); c < columns; c += PART * 32) {
            const u64 bit = (u64)c * BITS;
            const u32* words = (const u32*)row.codes + bit / 32;
            Codes part = {};
            part.words[0] = __funnelshift_r(words[0], words[1], bit % 32);
            if (BITS == 8) part.words[1] = words[1];
            const Group group = row.group(c / RUN);
            Weights weights;
#pragma unroll
            for (int i = 0; i < PART; i++) weights.y[i] = from_float<Y_TYPE>(group.weight(part[i]));
            if (c + PART <= columns && (u64)(out + c) % 16 == 0) {
                *(Weights*)(out + c) = weights;
            } else {
                for (int i = 0; i < min(PART, columns - c); i++) out[c + i] = weights.y[i];
            }
        }
    }
}
