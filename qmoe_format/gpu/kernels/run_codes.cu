// The codes, and where each run starts: 32 * (slot + 1) + bank of the landing before its first.

struct Writer {
    u32* words;   // of the matrix, 0 at first
    u16* starts;  // of the group
    u32 first, codes;  // of each run of the group
    int bank;     // of the half row's first region
    int slots;

    __device__ void start(int run, int place) {
        const int bank_of = bank + (place < 0 ? 0 : place / slots);
        starts[bank + run] = (u16)(32 * (place < 0 ? 0 : place % slots + 1) + bank_of);
    }
    // Landing `number` of the half row is `distance` after `before`.
    __device__ void put(u32 number, int before, u32 distance) {
        const u32 run = number / codes, code = number % codes;
        if (code == 0) start(run, before);
        if (!distance) return;
        const u64 bit = (u64)(first + code) * BITS;
        u32* const word = words + bit / 32 * 32 + bank + run;
        const int shift = (int)(bit % 32);
        atomicOr(word, distance << shift);
        if (shift + BITS > 32) atomicOr(word + 32, distance >> (32 - shift));
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) run_codes(
    const fp16* levels,  // fp16 [count, rows, columns]
    const u16* order,    // uint16 [count, rows]: the rows, group after group
    const u32* offsets,  // uint32 [count, groups + 1]
    const u64* bases,    // uint64 [count]: the first line of each matrix
    u32* words,          // uint32 [lines, 32], zeros
    u16* starts,         // uint16 [count, groups, 32]
    int count, int rows, int columns) {
    const int lane = threadIdx.x % 32, groups = (rows + ROWS - 1) / ROWS;
    const u64 warps = (u64)gridDim.x * THREADS / 32, all = (u64)count * groups * HALVES;
    for (u64 half = ((u64)blockIdx.x * THREADS + threadIdx.x) / 32; half < all; half += warps) {
        const u64 group = half / HALVES, matrix = group / groups;
        const int place = (int)(group % groups) * ROWS + (int)(half % HALVES) / 2;
        const u64 row = matrix * rows + order[matrix * rows + min(place, rows - 1)];
        const u32* const offset = offsets + group + matrix;
        u32 codes = offset[1] - offset[0];
        Writer writer = {words + bases[matrix] * 32, starts + group * 32, offset[0], codes,
                         (int)(half % HALVES) * LANES, slots_of(columns)};
        const int here = place < rows ? columns : 0;
        const Reached reached =
            walk_half_row(levels + row * columns, here, half % 2 != 0, [&](const Landings& landings) {
                u32 number = landings.number;
                int before = landings.before;
                for (int i = 0; i < landings.jumps; i++) {
                    const int empty = landings.empty + i * REACH;
                    writer.put(number++, before, empty - before);
                    before = empty;
                }
                writer.put(number++, before, landings.place - before);
                for (int i = 1; i < landings.magnitude; i++) writer.put(number++, landings.place, 0);
            });
        // The rest is spent on the next empty place.
        const int empty = reached.place < 0 ? -1 : reached.place / REACH * REACH + REACH - 1;
        const u32 rest = codes * LANES;
        for (u32 number = reached.landings + lane; number < rest; number += 32) {
            const bool next = number == reached.landings;
            writer.put(number, next ? reached.place : empty, next ? empty - reached.place : 0);
        }
    }
}
