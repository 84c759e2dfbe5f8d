// The first code of each group, and after the last one the number of codes: as many for every lane
// as the longest of the group's runs has. A matrix ends with a whole number of words.

extern "C" __global__ void __launch_bounds__(32) run_offsets(
    const u32* sizes,  // uint32 [count, rows, 2]
    const u16* order,  // uint16 [count, rows]: the rows, group after group
    u32* offsets,      // uint32 [count, groups + 1]
    int count, int rows) {
    const int lane = threadIdx.x % 32, groups = (rows + ROWS - 1) / ROWS;
    for (int matrix = blockIdx.x; matrix < count; matrix += gridDim.x) {
        u32* const out = offsets + (u64)matrix * (groups + 1);
        u32 before = 0;
        for (int first = 0; first <= groups; first += 32) {
            const int group = first + lane;
            u32 longest = group < groups ? 1 : 0;
            for (int h = 0; h < HALVES; h++) {
                const int place = group * ROWS + h / 2;
                if (place >= rows) break;
                const u64 first_row = (u64)matrix * rows;
                const u32 size = sizes[(first_row + order[first_row + place]) * 2 + h % 2];
                longest = max(longest, (size + LANES - 1) / LANES);
            }
            const u32 upto = sum_upto_lane(longest);
            u32 at = before + upto - longest;
            if (group == groups) at = (at + 31) / 32 * 32;
            if (group <= groups) out[group] = at;
            before += __shfl_sync(FULL, upto, 31);
        }
    }
}
