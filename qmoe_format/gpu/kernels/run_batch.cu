// y = W x for tiles of several tokens, from runs of gap codes, on tensor cores.
//
// A block takes as many groups as fit into its shared memory. First each warp follows the paths of
// a group and marks where they land: `run_marks.cu` in ternary matrices, `run_levels.cu` in others.
// Then all warps multiply these rows by up to 16 tokens at a time, sharing out the steps and, if
// there are many, the rows.
//
// What is cut out of marks is twice the levels. If a row has one scale, a tile of A is 16 rows of
// W; otherwise 8, first their halves above zero, then those below. x comes from global memory as
// `run_terms` has left it.

constexpr int WARPS = THREADS / 32;
constexpr int MARK_WORDS = BATCH * GROUP_WORDS;
constexpr int GROUP_END = PLACE_BITS * LINES * LINE_WORDS;  // of its marks
constexpr int TILE_ROWS = SCALES == 1 ? 16 : 8;             // of W, in a tile of A
constexpr int TILE_GROUPS = TILE_ROWS / ROWS;
constexpr int MOST_TILES = WARP_ROWS / TILE_ROWS;

// The matrices, whose units are groups.
struct Matrices : Stack {
    __device__ int units() const { return groups(); }
    __device__ int first_row(int group) const { return min(group * ROWS, rows); }
};

typedef CallOf<TERM_TYPE> Call;

// The rows that are marked: this many, from place `first` on.
struct Rows {
    int first, count;
};

// The scales of a row, which for one beyond the last are not used.
struct Scales {
    float low, high;

    __device__ Scales(const Stack& stack, int expert, int place) {
        const u64 at = stack.at(expert, place);
        high = to_float(stack.row_scale[at * SCALES + SCALES - 1]);
        low = SCALES == 2 ? to_float(stack.row_scale[at * SCALES]) : negative(high);
    }
    // Of sums of 2 x.
    __device__ float of(float sum_high, float sum_low) const {
        return high * (0.5f * sum_high) + low * (0.5f * sum_low);
    }
};

__device__ __forceinline__ void clear_group(u32* marks, int number) {
    uint4* const vectors = (uint4*)(marks + number * GROUP_WORDS);
    for (int i = threadIdx.x % 32; i < GROUP_END / 4; i += 32) {
        vectors[i] = {UNMARKED, UNMARKED, UNMARKED, UNMARKED};
    }
}

// Mark the landings of `count` groups from `first` on.
__device__ __forceinline__ void mark_groups(const Stack& stack, int expert, int first, int count,
                                            u32 ring, int in_line, u32* marks) {
    const u32* const words = stack.words + 32 * stack.bases[expert];
    int number = threadIdx.x / 32;
    Group next = {};
    Codes codes = {};
    if (number < count) {
        next = Group(stack, expert, first + number);
        codes = Codes(words, next);
        next.load_rest(stack, expert, first + number);
    }
    for (; number < count; number += WARPS) {
        const Group group = next;
        const bool more = number + WARPS < count;
        if (more) {
            next = Group(stack, expert, first + number + WARPS);
            next.load_rest(stack, expert, first + number + WARPS);
        }
        clear_group(marks, number);
        __syncwarp();
        u8* const end = (u8*)(marks + number * GROUP_WORDS + GROUP_END);
        // A place counts slots from the end; a word has 32 / PLACE_BITS of them.
        constexpr int log2_slots = log2_of(32 / PLACE_BITS);
        Path{start_of(group) - LINE_BYTES * (SLOTS + 1), ring}.follow(
            codes, group,
            [&] {
                if (more) codes = Codes(words, next);
            },
            [&](int, int place, bool there) {
                u8* const word = end + ((place >> log2_slots & ~in_line) | (place & in_line));
                mark((u32*)word, place >> log2_of(LINE_BYTES), there);
            });
    }
    // The last tile of A may reach beyond the last group.
    for (; number < (count + TILE_GROUPS - 1) / TILE_GROUPS * TILE_GROUPS; number += WARPS) {
        clear_group(marks, number);
    }
}

// A warp's part of the work: `tiles` tiles of A from `first` on, and every `parts`-th step.
struct WarpPart {
    int first, tiles, step, parts;

    __device__ explicit WarpPart(int all) {
        int row_parts = 1;
        while (row_parts * MOST_TILES < all) row_parts *= 2;
        const int warp = threadIdx.x / 32, each = (all + row_parts - 1) / row_parts;
        parts = WARPS / row_parts;
        step = warp % parts;
        first = warp / parts * each;
        tiles = min(each, all - first);
    }
};

// Sums of a warp for 8 TB tokens.
template <int TB>
struct Sums {
    float of[MOST_TILES][TB][4];

    // Add quarters `v` to 3 of a step.
    template <int v>
    __device__ __forceinline__ void add(int tiles, const Marks<SCALES> (&marks)[MOST_TILES],
                                        const TERM_TYPE* const (&x)[TB]) {
        if constexpr (v < 4) {
            uint4 given[TB];
#pragma unroll
            for (int n = 0; n < TB; n++) given[n] = *(const uint4*)(x[n] + 32 * v);
#pragma unroll
            for (int m = 0; m < MOST_TILES; m++) {
                if (m >= tiles) continue;
                const Marks<SCALES>& of_tile = marks[m];
                constexpr int two = 4 * v;
                const u32 a[4] = {of_tile.cut_out<two>(0), of_tile.cut_out<two>(1),
                                  of_tile.cut_out<two + 1>(0), of_tile.cut_out<two + 1>(1)};
                const u32 b[4] = {of_tile.cut_out<two + 2>(0), of_tile.cut_out<two + 2>(1),
                                  of_tile.cut_out<two + 3>(0), of_tile.cut_out<two + 3>(1)};
#pragma unroll
                for (int n = 0; n < TB; n++) {
                    multiply_add(TERM_TYPE(), of[m][n], a, given[n].x, given[n].y);
                    multiply_add(TERM_TYPE(), of[m][n], b, given[n].z, given[n].w);
                }
            }
            add<v + 1>(tiles, marks, x);
        }
    }
};

// Multiply the marked rows by 8 TB tokens of a tile from `token` on.
template <int TB>
__device__ __forceinline__ void multiply(const Stack& stack, const Call& call, const Tile& tile,
                                         int token, Rows rows, const u32* marks, float* partial) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int all = (rows.count + TILE_ROWS - 1) / TILE_ROWS;
    const WarpPart part(all);
    const TERM_TYPE* x[TB];
#pragma unroll
    for (int n = 0; n < TB; n++) {
        // Sums of tokens that are not there are not used.
        const int of = token + 8 * n + g, pair = tile.pair(of < tile.count ? of : token);
        const u64 number = COLUMN_SCALES ? pair : pair / call.pairs_per_x;
        x[n] = call.x + number * TERMS * PLACES + 8 * t;
    }
    const int group = (TILE_ROWS * part.first + g) / ROWS;
    const u32* const lines = marks + group * GROUP_WORDS + g % ROWS * ROW_WORDS;
    Sums<TB> sums = {};
    // The smallest terms first: beside larger ones, tensor cores would cut off bits of them.
#pragma unroll 1
    for (int term = TERMS - 1; term >= 0; term--) {
#pragma unroll 1
        for (int step = part.step; step < STEPS; step += part.parts) {
            const int unit = 4 * step + t;
            const int line = unit / LANES * PLACE_BITS;
            const u32* const word = lines + line * LINE_WORDS + unit % LANES * REGION_WORDS;
            Marks<SCALES> of[MOST_TILES];
#pragma unroll
            for (int m = 0; m < MOST_TILES; m++) {
                // Levels are loaded later, and a test here would only take registers.
                if (PLACE_BITS == 1 && m >= part.tiles) continue;
                of[m] = Marks<SCALES>(word + m * (TILE_ROWS / 8 * EIGHT_ROWS));
            }
            const TERM_TYPE* at[TB];
#pragma unroll
            for (int n = 0; n < TB; n++) at[n] = x[n] + term * PLACES + 128 * step;
            sums.template add<0>(part.tiles, of, at);
        }
    }
    // Partial sums of a row by its warps, [parts][8 tokens][rows]. Enough words between two tokens
    // that a warp's lie in different banks.
    const int stride = TILE_ROWS * all + 4;
#pragma unroll
    for (int n = 0; n < TB; n++) {
#pragma unroll
        for (int m = 0; m < MOST_TILES; m++) {
            if (m >= part.tiles) continue;
            const int row = TILE_ROWS * (part.first + m) + g;
            const float(&four)[4] = sums.of[m][n];
            float* const to = partial + (8 * part.step + 2 * t) * stride + row;
            const Scales scales(stack, tile.expert, rows.first + row);
            if (SCALES == 2) {
                to[0] = scales.of(four[0], four[2]);
                to[stride] = scales.of(four[1], four[3]);
            } else {
                const Scales below(stack, tile.expert, rows.first + row + 8);
                to[0] = scales.high * (0.5f * four[0]);
                to[stride] = scales.high * (0.5f * four[1]);
                to[8] = below.high * (0.5f * four[2]);
                to[stride + 8] = below.high * (0.5f * four[3]);
            }
        }
        __syncthreads();
        const int of = threadIdx.x / 32 % 8, number = token + 8 * n + of;
        for (int r = threadIdx.x / 256 * 32 + lane; r < rows.count; r += THREADS / 8) {
            if (number >= tile.count) break;
            float sum = 0.0f;
            for (int k = 0; k < part.parts; k++) sum += partial[(8 * k + of) * stride + r];
            const u32 row = stack.order[stack.at(tile.expert, rows.first + r)];
            call.y[(u64)tile.pair(number) * stack.rows + row] = from_float<Y_TYPE>(sum);
        }
        __syncthreads();  // the next sums
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(
    const u32* offsets,        // uint32 [experts, groups + 1]: the first code of each group
    const u16* starts,         // uint16 [experts, groups, 32]: 32 * (slot + 1) + bank
    const u16* order,          // uint16 [experts, rows]: the rows, group after group
    const u64* bases,          // uint64 [experts]: the first line of each matrix
    const u32* words,          // uint32 [lines, 32]
    const bf16* row_scale,     // bf16 [experts, rows, SCALES], in that order
    const bf16* column_scale,  // unused: `run_terms` has multiplied x by them
    int experts, int rows,
    const TERM_TYPE* x,  // bf16 or fp16 [pairs if COLUMN_SCALES, else x; TERMS, PLACES]
    Y_TYPE* y,           // bf16, fp16 or fp32 [pairs, rows]
    const int* listed,   // int32 [pairs]. GROUPS: the pairs, sorted by expert
    const int* tiles,    // int32 [1 + 3 tiles]. GROUPS: how many; expert, first and count of each
    int expert,          // ONE: the expert of all pairs
    int pairs, int pairs_per_x,
    u32 ring,       // as in run_product.cu
    int in_line) {  // LINE_BYTES - 1: an argument, because with a register of it, one instruction
                    // does what takes two constants
    extern __shared__ unsigned char shared[];
    const Matrices matrices = {
        {offsets, starts, order, bases, words, row_scale, column_scale, experts, rows}};
    const Call call = {x, y, listed, tiles, expert, pairs, pairs_per_x};
    u32* const marks = (u32*)shared;
    float* const partial = (float*)(marks + MARK_WORDS);
    share_tiles(matrices, call, [&](const Tile& tile, Share::Part part) {
        for (int group = part.from; group < part.to; group += BATCH) {
            const int count = min(BATCH, part.to - group), first = matrices.first_row(group);
            mark_groups(matrices, tile.expert, group, count, ring, in_line, marks);
            __syncthreads();
            const Rows of = {first, matrices.first_row(group + count) - first};
            for (int token = 0; token < tile.count; token += 16) {
                if (tile.count - token > 8) {
                    multiply<2>(matrices, call, tile, token, of, marks, partial);
                } else {
                    multiply<1>(matrices, call, tile, token, of, marks, partial);
                }
            }
        }
    });
}
