// y = W x for (token, expert) pairs, straight from the codes. A block's warps take the rows of a
// tile in turn, a warp's lanes the runs of a row. In shared memory, one column after each run is
// left free: without it, all lanes would read the same bank.

template <int TB>
__device__ void run_tile(const Stack& stack, const Tile& tile, Share::Part part, const Call& call,
                         u8* shared) {
    const int lane = threadIdx.x % 32, runs = stack.runs();
#if X_SHARED
    stage_x<TB>(tile, call, stack.columns, runs * RUN, nullptr, shared);
    __syncthreads();
#else
    const X_TYPE* x = call.x + (u64)(tile.pair(0) / call.pairs_per_x) * stack.columns;
#endif
    for (int r = part.from + threadIdx.x / 32; r < part.to; r += THREADS / 32) {
        const Row row = stack.row(tile.expert, r);
        float sums[TB] = {};
        for (int run = lane; run < runs; run += 32) {
            const Codes codes = ((const Codes*)row.codes)[run];
            const Group group = row.group(run);
            float of_run[TB] = {};
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                const float level = group.level(codes[i]);
#if X_SHARED
                const Column<TB> column = ((const Column<TB>*)shared)[place_of(run * RUN) + i];
#else
                const int c = run * RUN + i;
                const Column<TB> column = {c < stack.columns ? to_float(x[c]) : 0.0f};
#endif
#pragma unroll
                for (int t = 0; t < TB; t++) of_run[t] += level * to_float(column.x[t]);
            }
#pragma unroll
            for (int t = 0; t < TB; t++) sums[t] += group.unit() * of_run[t];
        }
        write_sums(sums, tile, call.y, stack.rows, r);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(
    // The arrays and sizes of a Stack.
    const u8* codes,        // uint8 [experts, rows, bytes of a row] and a guard
    const bf16* scales,     // bf16 [groups of all experts]
    const u8* zero_points,  // uint8 [groups of all experts] if ZERO_POINTS
    const u64* bases,       // uint64 [experts]: an expert's first group
    const int* runs_shift,  // int32 [experts]: a group has 2^runs_shift runs
    int experts, int rows, int columns,
    const X_TYPE* x,    // bf16, fp16 or fp32 [pairs / pairs_per_x, columns]
    Y_TYPE* y,          // bf16, fp16 or fp32 [pairs, rows]
    const int* listed,  // int32 [pairs]. LIST: their experts. GROUPS: the pairs, sorted by expert
    const int* tiles,   // int32 [1 + 3 tiles]. GROUPS: how many; expert, first and count of each
    int expert,         // ONE: the expert of all pairs
    int pairs, int pairs_per_x) {
    extern __shared__ unsigned char shared[];
    run_tiles({codes, scales, zero_points, bases, runs_shift, experts, rows, columns},
              {x, y, listed, tiles, expert, pairs, pairs_per_x}, shared);
}
