// y = W x for pairs of a token and an expert, straight from the codewords.
//
// The work is all segments of all tiles (a tile: up to TOKENS pairs of one expert), one after
// another. Each block takes an equal share of it, and its warps take segments in turn:
//
//     tile 0: segments 0 1 2 ... S-1 | tile 1: segments 0 1 2 ... S-1 | ...
//     '-- block 0 --''-- block 1 --''-- block 2 --' ...
//
// x of a tile lies in shared memory as [columns][tokens], so that a non-zero reads one vector.

// PAIRS: all of one matrix, a list of experts, or grouped by expert.
#define ONE 0
#define LIST 1
#define GROUPS 2

// x of one weight's column for TB tokens.
template <typename T, int TB>
struct alignas(sizeof(T) * TB < 16 ? sizeof(T) * TB : 16) Column {
    T x[TB];
};

// Element type of x in shared memory: x's own is half the traffic, where nothing has to be rounded.
template <int TB>
struct TileType {
    typedef TILE_TYPE T;
};
template <>
struct TileType<1> {
    typedef float T;
};

// What a tile is: up to TOKENS pairs of one expert.
struct Tile {
    int expert, count;
#if PAIRS == GROUPS
    const int* order;
    __device__ int pair(int i) const { return order[i]; }
#else
    int first;
    __device__ int pair(int i) const { return first + i; }
#endif
};

__device__ inline float nan_value() { return __uint_as_float(0x7fc00000u); }

// Sums of one row at a time; each lane has its own, until the row is done.
template <int TB>
struct Rows {
    typedef Column<typename TileType<TB>::T, TB> X;
    static const u32 BYTES = sizeof(X);
    const Stack& stack;
    const Tile& tile;
    const u8* x;
    Y_TYPE* y;
    u32 begin, end;
    int row, last;  // last: the segment's last row
    float low, high;
    const SCALE_TYPE* scales;
    float sums[TB];

    __device__ Rows(const Stack& stack, const Tile& tile, const u8* x, Y_TYPE* y, int segment)
        : stack(stack), tile(tile), x(x), y(y), begin(0), end(stack.columns) {
        row = segment * stack.rows_per_segment;
        last = min(stack.rows - row, stack.rows_per_segment) + row - 1;
        start();
    }
    __device__ bool done() const { return row > last; }

    __device__ void nonzero(u32 byte, bool minus) {
        float value = minus ? low : high;
        if (GROUPED) {
            const SCALE_TYPE* scale = scales + byte / BYTES / (u32)stack.group_size * SCALES;
            value = to_float(scale[SCALES == 2 && !minus ? 1 : 0]);
            if (SCALES == 1 && minus) value = -value;
        }
        const X column = *(const X*)(x + byte);
#pragma unroll
        for (int t = 0; t < TB; t++) sums[t] += value * to_float(column.x[t]);
    }

    __device__ void next() {
        write(sums);
        row++;
        begin = end;
        end += stack.columns;
        if (!done()) start();
    }

    __device__ void start() {
        u64 number = (u64)tile.expert * stack.rows + row;
        scales = stack.row_scale + number * stack.groups() * SCALES;
        high = to_float(scales[SCALES - 1]);
        low = SCALES == 2 ? to_float(scales[0]) : -high;
#pragma unroll
        for (int t = 0; t < TB; t++) sums[t] = 0.0f;
    }

    // Add up over the lanes. While several sums are left, lanes that differ in one bit of their
    // number share them out: TB sums take TB - 1 + 5 - log2(TB) shuffles.
    __device__ void write(float (&values)[TB]) {
        const int lane = threadIdx.x % 32;
        int distance = 16;
#pragma unroll
        for (int count = TB; count > 1; count /= 2, distance /= 2) {
            const bool upper = lane & distance;
#pragma unroll
            for (int t = 0; t < count / 2; t++) {
                float keep = upper ? values[t + count / 2] : values[t];
                float give = upper ? values[t] : values[t + count / 2];
                values[t] = keep + __shfl_xor_sync(FULL, give, distance);
            }
        }
        const int sharing = 2 * distance;  // lanes that now hold parts of one token's sum
#pragma unroll
        for (; distance > 0; distance /= 2) {
            values[0] += __shfl_xor_sync(FULL, values[0], distance);
        }
        const int token = lane / sharing;
        if (lane % sharing == 0 && token < tile.count) {
            y[(u64)tile.pair(token) * stack.rows + row] = from_float<Y_TYPE>(values[0]);
        }
    }
};

// x of the tile's pairs into shared memory: [columns][TB], times the column scales.
template <int TB>
__device__ inline void stage_x(const Stack& stack, const Tile& tile, const X_TYPE* x,
                               int pairs_per_x, u8* shared_x) {
    typedef typename TileType<TB>::T T;
    typedef Column<T, TB> X;
    const X_TYPE* from[TB];
#pragma unroll
    for (int t = 0; t < TB; t++) {
        int pair = tile.pair(t < tile.count ? t : 0);
        from[t] = x + (u64)(pair / pairs_per_x) * stack.columns;
    }
    const SCALE_TYPE* scale = stack.column_scale + (u64)tile.expert * stack.columns;
#pragma unroll 4
    for (int c = threadIdx.x; c < stack.columns; c += blockDim.x) {
        X column;
#pragma unroll
        for (int t = 0; t < TB; t++) {
            float value = to_float(from[t][c]);
            if (COLUMN_SCALES) value *= to_float(scale[c]);
            column.x[t] = from_float<T>(value);
        }
        ((X*)shared_x)[c] = column;
    }
}

template <int TB>
__device__ inline void run_tile(const Stack& stack, const Tile& tile, int from, int to,
                                const X_TYPE* x, int pairs_per_x, Y_TYPE* y, const Entry* table,
                                u8* shared_x) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int s = from + warp;
    Segment ahead;
    if (s < to) ahead = open_segment(stack, tile.expert, s);
#if X_SHARED
    stage_x<TB>(stack, tile, x, pairs_per_x, shared_x);
    const u8* columns = shared_x;
#else
    const u8* columns = (const u8*)(x + (u64)(tile.pair(0) / pairs_per_x) * stack.columns);
#endif
    __syncthreads();
    for (; s < to; s += warps) {
        Segment segment = ahead;
        if (s + warps < to) ahead = open_segment(stack, tile.expert, s + warps);
        Rows<TB> rows(stack, tile, columns, y, s);
        u32 weights = (u32)(rows.last - rows.row + 1) * (u32)stack.columns;
        walk(segment, table, stack.width, weights, rows);
    }
}

extern "C" __global__ void __launch_bounds__(1024) product(
    const u8* segments, const u32* offsets, const u64* bases, const SCALE_TYPE* row_scale,
    const SCALE_TYPE* column_scale, const int* table_of, const Entry* tables, int experts, int rows,
    int columns, int rows_per_segment, int width, int group_size,
    const X_TYPE* x,     // [pairs / pairs_per_x, columns]
    Y_TYPE* y,           // [pairs, rows]
    const int* listed,   // LIST: the pairs' experts. GROUPS: their numbers, ordered by expert
    const int* tiles,    // GROUPS: number of tiles, then expert, first, count of each
    int expert,          // ONE: the only expert
    int pairs, int pairs_per_x) {
    extern __shared__ unsigned char shared[];
    const Stack stack = {segments, offsets, bases, row_scale, column_scale, table_of, tables,
                         experts, rows, columns, rows_per_segment, width, group_size};
    const int count = stack.segments_of();
#if PAIRS == GROUPS
    const u64 work = (u64)tiles[0] * count;
#else
    const u64 work = (u64)((pairs - 1) / TOKENS + 1) * count;
#endif
    u64 begin = work * blockIdx.x / gridDim.x;
    const u64 end = work * (blockIdx.x + 1) / gridDim.x;
    int table_expert = -1;
    while (begin < end) {
        const int number = (int)(begin / count), from = (int)(begin % count);
        const int to = (int)(end - begin < (u64)(count - from) ? from + (end - begin) : count);
        begin += to - from;
#if PAIRS == GROUPS
        const int* about = tiles + 1 + 3 * number;
        const Tile tile = {about[0], about[2], listed + about[1]};
#elif PAIRS == LIST
        const Tile tile = {listed[number], 1, number};
#else
        const Tile tile = {expert, min(TOKENS, pairs - number * TOKENS), number * TOKENS};
#endif
        if (tile.expert < 0 || tile.expert >= experts) {
            const int first = from * rows_per_segment;
            const int stop = to == count ? rows : to * rows_per_segment;
            for (int i = 0; i < tile.count; i++) {
                for (int r = first + threadIdx.x; r < stop; r += blockDim.x) {
                    y[(u64)tile.pair(i) * rows + r] = from_float<Y_TYPE>(nan_value());
                }
            }
            continue;
        }
        const Entry* table = tables + ((u64)table_of[tile.expert] << width);
#if TABLE_SHARED
        const int vectors = (int)(sizeof(Entry) << width) / 16;
        if (table_of[tile.expert] != table_expert) {
            table_expert = table_of[tile.expert];
            for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
                ((uint4*)shared)[i] = ((const uint4*)table)[i];
            }
        }
        table = (const Entry*)shared;
        u8* shared_x = shared + 16 * vectors;
#else
        u8* shared_x = shared;
#endif
        if (TOKENS > 4 && tile.count > 4) {
            run_tile<TOKENS>(stack, tile, from, to, x, pairs_per_x, y, table, shared_x);
        } else if (TOKENS > 1 && tile.count > 1) {
            run_tile<TOKENS < 4 ? TOKENS : 4>(stack, tile, from, to, x, pairs_per_x, y, table,
                                              shared_x);
        } else {
            run_tile<1>(stack, tile, from, to, x, pairs_per_x, y, table, shared_x);
        }
        __syncthreads();  // the next tile overwrites what is in shared memory
    }
}
