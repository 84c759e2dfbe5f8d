// y = W x for (token, expert) pairs, straight from the codewords.
//
// The work is all segments of all tiles (a tile: up to TOKENS pairs with one expert), one after
// another. Each block takes an equal share of it, and its warps take segments in turn:
//
//     tile 0: segments 0 1 2 ... S-1 | tile 1: segments 0 1 2 ... S-1 | ...
//     '-- block 0 --''-- block 1 --''-- block 2 --' ...
//
// x of a tile lies in shared memory as [columns][tokens], so that a non-zero reads one vector.

// PAIRS: tokens of ONE matrix, a LIST of experts, or GROUPS of pairs with the same expert.
#define ONE 0
#define LIST 1
#define GROUPS 2

struct Tile {
    int expert, count;
    const int* order;  // GROUPS: its pairs
    int first;         // otherwise: the first of its pairs, which are consecutive
    __device__ int pair(int i) const { return PAIRS == GROUPS ? order[i] : first + i; }
};

// One column of a tile: x of TB tokens. A 16-bit type of their own is half the bytes, but column
// scales would have to be rounded; a single token is converted once, not at every non-zero.
template <int TB>
struct TileType {
    typedef TILE_TYPE T;
};
template <>
struct TileType<1> {
    typedef float T;
};
template <int TB>
struct alignas(sizeof(typename TileType<TB>::T) * TB < 16 ? sizeof(typename TileType<TB>::T) * TB
                                                          : 16) Column {
    typename TileType<TB>::T x[TB];
};

template <typename T>
struct alignas(16) Vector {
    T x[16 / sizeof(T)];
};

// A visitor of a walk: sums row after row. Each lane has sums of its own until the row ends.
template <int TB>
struct Rows {
    static constexpr u32 BYTES = sizeof(Column<TB>);
    const PackedStack& stack;
    const Tile& tile;
    const u8* x;
    Y_TYPE* y;
    int row, after;
    u32 span;
    Values values;
    // Of values times x. For one token and no groups: of x over the plus ones, and separately over
    // the minus ones; the values come in at the end of the row.
    float sums[TB];
    float sum_minus;

    __device__ Rows(const PackedStack& stack, const Tile& tile, const u8* x, Y_TYPE* y, int number,
                    Values first)
        : stack(stack), tile(tile), x(x), y(y), row(number * stack.rows_per_segment),
          after(stack.row_after(number)), span(stack.columns * BYTES), values(first), sums{},
          sum_minus(0.0f) {}
    __device__ bool done() const { return row == after; }

    // No branches: they would keep the loads of other non-zeros waiting. A non-zero that is not
    // there reads the zero after the last column.
    __device__ void nonzero(bool there, u32 byte, bool minus) {
        const Column<TB> column = *(const Column<TB>*)(x + (there ? byte : span));
        if (TB == 1 && !GROUPED) {
            const float value = to_float(column.x[0]);
            if (minus) {
                sum_minus += value;
            } else {
                sums[0] += value;
            }
            return;
        }
        float value = minus ? values.low : values.high;
        if (GROUPED && there) {
            const u32 group = byte / BYTES / (u32)stack.group_size;
            const Values v = values_at(stack.row_scales(tile.expert, row) + group * SCALES);
            value = minus ? v.low : v.high;
        }
#pragma unroll
        for (int t = 0; t < TB; t++) sums[t] += value * to_float(column.x[t]);
    }

    __device__ void next() {
        if (TB == 1 && !GROUPED) sums[0] = values.high * sums[0] + values.low * sum_minus;
        write();
        sum_minus = 0.0f;
#pragma unroll
        for (int t = 0; t < TB; t++) sums[t] = 0.0f;
        row++;
        if (!GROUPED && !done()) values = stack.row_values(tile.expert, row);
    }

    // Add up over the lanes. While several sums are left, two lanes take half of them each: TB sums
    // take TB - 1 + log2(32 / TB) shuffles.
    __device__ void write() {
        constexpr int sharing = 32 / TB;  // lanes left with the same sum
        const int lane = threadIdx.x % 32;
        share_out<TB / 2>(lane);
#pragma unroll
        for (int distance = sharing / 2; distance > 0; distance /= 2) {
            sums[0] += __shfl_xor_sync(FULL, sums[0], distance);
        }
        if (lane % sharing == 0 && lane / sharing < tile.count) {
            const u64 pair = tile.pair(lane / sharing);
            y[pair * stack.rows + row] = from_float<Y_TYPE>(sums[0]);
        }
    }

    template <int half>
    __device__ __forceinline__ void share_out(int lane) {
        if constexpr (half > 0) {
            constexpr int distance = half * 32 / TB;
            const bool upper = lane & distance;
#pragma unroll
            for (int t = 0; t < half; t++) {
                const float keep = upper ? sums[t + half] : sums[t];
                const float give = upper ? sums[t] : sums[t + half];
                sums[t] = keep + __shfl_xor_sync(FULL, give, distance);
            }
            share_out<half / 2>(lane);
        }
    }
};

// The block copies x of a tile to shared memory, times the column scales, and adds a zero column.
template <int TB>
__device__ __forceinline__ void stage_x(const PackedStack& stack, const Tile& tile, const X_TYPE* x,
                                        int pairs_per_x, u8* shared) {
    const X_TYPE* from[TB];
#pragma unroll
    for (int t = 0; t < TB; t++) {
        const int pair = tile.pair(t < tile.count ? t : 0);
        from[t] = x + (u64)(pair / pairs_per_x) * stack.columns;
    }
    const SCALE_TYPE* scale = stack.column_scale + (u64)tile.expert * stack.columns;
    if (threadIdx.x == 0) ((Column<TB>*)shared)[stack.columns] = {};
    const int size = 16 / sizeof(X_TYPE);
    if (TB == 1 && (u64)from[0] % 16 == 0 && stack.columns % size == 0) {  // 16 bytes at a time
        for (int c = size * threadIdx.x; c < stack.columns; c += size * blockDim.x) {
            const Vector<X_TYPE> given = *(const Vector<X_TYPE>*)(from[0] + c);
            Vector<float> four;
#pragma unroll
            for (int i = 0; i < size; i++) {
                four.x[i % 4] = to_float(given.x[i]);
                if (COLUMN_SCALES) four.x[i % 4] *= to_float(scale[c + i]);
                if (i % 4 == 3) ((Vector<float>*)shared)[(c + i) / 4] = four;
            }
        }
        return;
    }
#pragma unroll(TB > 4 ? 1 : 4)
    for (int c = threadIdx.x; c < stack.columns; c += blockDim.x) {
        Column<TB> column;
#pragma unroll
        for (int t = 0; t < TB; t++) {
            float value = to_float(from[t][c]);
            if (COLUMN_SCALES) value *= to_float(scale[c]);
            column.x[t] = from_float<typename TileType<TB>::T>(value);
        }
        ((Column<TB>*)shared)[c] = column;
    }
}

template <int TB>
__device__ __forceinline__ void run_tile(const PackedStack& stack, const Tile& tile,
                                         Share::Part part, const X_TYPE* x, int pairs_per_x,
                                         Y_TYPE* y, u8* shared) {
    const int warps = blockDim.x / 32;
    int number = part.from + threadIdx.x / 32;
    Segment ahead = {};
    if (number < part.to) ahead = open_segment(stack, tile.expert, number);
    const Entry* table = stage_table(stack, tile.expert, shared);
#if X_SHARED
    const u8* columns = shared + TABLE_SHARED;
    stage_x<TB>(stack, tile, x, pairs_per_x, shared + TABLE_SHARED);
#else
    const u8* columns = (const u8*)(x + (u64)tile.pair(0) * (stack.columns + 1));
#endif
    __syncthreads();
    for (; number < part.to; number += warps) {
        const Segment segment = ahead;
        if (number + warps < part.to) ahead = open_segment(stack, tile.expert, number + warps);
        Rows<TB> rows(stack, tile, columns, y, number, segment.values);
        walk(segment, table, rows);
    }
    __syncthreads();  // the next tile overwrites what is in shared memory
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(
    // The arrays and sizes of a PackedStack.
    const u8* segments,              // uint8 [bytes]
    const u32* offsets,              // uint32 [experts, segments + 1]
    const u64* bases,                // uint64 [experts]
    const SCALE_TYPE* row_scale,     // bf16, fp16 or fp32 [experts, rows, groups, SCALES]
    const SCALE_TYPE* column_scale,  // of the same dtype [experts, columns] if COLUMN_SCALES
    const int* table_of,             // int32 [experts]
    const Entry* tables,             // [dictionaries, 2^WIDTH]
    int experts, int rows, int columns, int rows_per_segment, int group_size,
    const X_TYPE* x,    // bf16, fp16 or fp32 [pairs / pairs_per_x, columns];
                        // if not X_SHARED, float32 [pairs, columns + 1] from `prepare`
    Y_TYPE* y,          // bf16, fp16 or fp32 [pairs, rows]
    const int* listed,  // int32 [pairs]. LIST: their experts. GROUPS: the pairs, sorted by expert
    const int* tiles,   // int32 [1 + 3 tiles]. GROUPS: how many; expert, first and count of each
    int expert,         // ONE: the expert of all pairs
    int pairs, int pairs_per_x) {
    extern __shared__ unsigned char shared[];
    const PackedStack stack = {segments, offsets, bases, row_scale, column_scale,     table_of,
                               tables,   experts, rows,  columns,   rows_per_segment, group_size};
    const int tile_count = PAIRS == GROUPS ? tiles[0] : (pairs - 1) / TOKENS + 1;
    for (Share share(tile_count, stack.segment_count()); share.more();) {
        const Share::Part part = share.next();
        Tile tile = {expert, 1, nullptr, part.matrix * TOKENS};
        if (PAIRS == ONE) tile.count = min(TOKENS, pairs - tile.first);
        if (PAIRS == LIST) tile.expert = listed[part.matrix];
        if (PAIRS == GROUPS) {
            const int* about = tiles + 1 + 3 * part.matrix;
            tile = {about[0], about[2], listed + about[1], 0};
        }
        if (tile.expert < 0 || tile.expert >= experts) {
            const int first = part.from * rows_per_segment, after = stack.row_after(part.to - 1);
            for (int i = 0; i < tile.count; i++) {
                for (int r = first + threadIdx.x; r < after; r += blockDim.x) {
                    const float nan = __uint_as_float(0x7fc00000u);
                    y[(u64)tile.pair(i) * rows + r] = from_float<Y_TYPE>(nan);
                }
            }
        } else if (TOKENS > SOME && tile.count > SOME) {
            run_tile<TOKENS>(stack, tile, part, x, pairs_per_x, y, shared);
        } else if (TOKENS > 1 && tile.count > 1) {
            run_tile<TOKENS < SOME ? TOKENS : SOME>(stack, tile, part, x, pairs_per_x, y, shared);
        } else {
            run_tile<1>(stack, tile, part, x, pairs_per_x, y, shared);
        }
    }
}
