// The number of landings of each half row, high first, and the highest magnitude of all.

extern "C" __global__ void __launch_bounds__(THREADS) run_sizes(
    const fp16* levels,  // fp16 [count, rows, columns]
    u32* sizes,          // uint32 [count, rows, 2]
    int* highest,        // int32 [1], 0 at first
    int count, int rows, int columns) {
    const u32 warps = gridDim.x * THREADS / 32, all = (u32)count * rows * 2;  // at most 2^30
    int most = 0;
    for (u32 half = (blockIdx.x * THREADS + threadIdx.x) / 32; half < all; half += warps) {
        const Reached reached =
            walk_half_row(levels + (u64)(half / 2) * columns, columns, half % 2 != 0,
                          [&](const Landings& of) { most = max(most, of.magnitude); });
        if (threadIdx.x % 32 == 0) sizes[half] = reached.landings;
    }
    if (most) atomicMax(highest, most);
}
