// In which order a matrix's rows lie in runs, and their scales in that order. A row's rank is the
// number of those that are shorter, or as long and before it; a row is as long as the longer of its
// halves.

constexpr u32 BEYOND = 0xffffffffu;  // no row is as long

extern "C" __global__ void __launch_bounds__(THREADS) run_rows(
    const u32* sizes,       // uint32 [count, rows, 2]
    const int* places,      // int32 [rows]: where the shortest row goes, the next one, ...
    const bf16* row_scale,  // bf16 [count, rows, SCALES]
    u16* order,             // uint16 [count, rows]: the rows, group after group
    bf16* ordered_scale,    // bf16 [count, rows, SCALES], in that order
    int count, int rows) {
    __shared__ u32 lengths[THREADS];
    const int parts = (rows + THREADS - 1) / THREADS;
    for (int part = blockIdx.x; part < count * parts; part += gridDim.x) {
        const u64 matrix = (u64)(part / parts) * rows;
        const auto length_of = [&](int row) {
            if (row >= rows) return BEYOND;
            return max(sizes[(matrix + row) * 2], sizes[(matrix + row) * 2 + 1]);
        };
        const int row = part % parts * THREADS + threadIdx.x;
        const u32 length = length_of(row);
        int rank = 0;
        for (int first = 0; first < rows; first += THREADS) {
            lengths[threadIdx.x] = length_of(first + threadIdx.x);
            __syncthreads();
            for (int i = 0; i < THREADS; i++) {
                rank += lengths[i] < length || (lengths[i] == length && first + i < row);
            }
            __syncthreads();
        }
        if (row >= rows) continue;
        const u64 place = matrix + places[rank];
        order[place] = (u16)row;
        for (int s = 0; s < SCALES; s++) {
            ordered_scale[place * SCALES + s] = row_scale[(matrix + row) * SCALES + s];
        }
    }
}
