// y = W x for (token, expert) pairs: what products have in common, however W is stored.
//
// The work is all units (segments, or rows) of all tiles (a tile: up to TOKENS pairs with one
// expert), one after another. Each block takes an equal share of it:
//
//     tile 0: units 0 1 2 ... U-1 | tile 1: units 0 1 2 ... U-1 | ...
//     '-- block 0 --''-- block 1 --''-- block 2 --' ...
//
// x of a tile lies in shared memory as [columns][tokens], so that a weight reads one vector.

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

// What the caller gives; for shapes, see the parameters of the kernels.
struct Call {
    const X_TYPE* x;
    Y_TYPE* y;
    const int *listed, *tiles;
    int expert, pairs, pairs_per_x;
};

// One column of a tile: x of TB tokens. A 16-bit type of their own is half the bytes, but column
// scales would have to be rounded; a single token is converted once, not at every weight.
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

// Where a column of x is in shared memory, in columns. LINE: after so many, one is left free.
__device__ inline int place_of(int column) { return LINE ? column + column / max(LINE, 1) : column; }

// The block copies x of a tile to shared memory, times the column scales, and zeros up to column
// `padded`.
template <int TB>
__device__ __forceinline__ void stage_x(const Tile& tile, const Call& call, int columns, int padded,
                                        const bf16* scale, u8* shared) {
    const X_TYPE* from[TB];
#pragma unroll
    for (int t = 0; t < TB; t++) {
        const int pair = tile.pair(t < tile.count ? t : 0);
        from[t] = call.x + (u64)(pair / call.pairs_per_x) * columns;
    }
    Column<TB>* const to = (Column<TB>*)shared;
    for (int c = columns + threadIdx.x; c < padded; c += blockDim.x) to[place_of(c)] = {};
    const int size = 16 / sizeof(X_TYPE);
    if (TB == 1 && !LINE && (u64)from[0] % 16 == 0 && columns % size == 0) {  // 16 bytes at a time
        for (int c = size * threadIdx.x; c < columns; c += size * blockDim.x) {
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
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
        Column<TB> column;
#pragma unroll
        for (int t = 0; t < TB; t++) {
            float value = to_float(from[t][c]);
            if (COLUMN_SCALES) value *= to_float(scale[c]);
            column.x[t] = from_float<typename TileType<TB>::T>(value);
        }
        to[place_of(c)] = column;
    }
}

template <int half, int TB>
__device__ __forceinline__ void share_out(float (&sums)[TB], int lane) {
    if constexpr (half > 0) {
        constexpr int distance = half * 32 / TB;
        const bool upper = lane & distance;
#pragma unroll
        for (int t = 0; t < half; t++) {
            const float keep = upper ? sums[t + half] : sums[t];
            const float give = upper ? sums[t] : sums[t + half];
            sums[t] = keep + __shfl_xor_sync(FULL, give, distance);
        }
        share_out<half / 2>(sums, lane);
    }
}

// Add up a row's sums over the lanes. While several are left, two lanes take half of them each: TB
// sums take TB - 1 + log2(32 / TB) shuffles.
template <int TB>
__device__ __forceinline__ void write_sums(float (&sums)[TB], const Tile& tile, Y_TYPE* y, int rows,
                                           int row) {
    constexpr int sharing = 32 / TB;  // lanes left with the same sum
    const int lane = threadIdx.x % 32;
    share_out<TB / 2>(sums, lane);
#pragma unroll
    for (int distance = sharing / 2; distance > 0; distance /= 2) {
        sums[0] += __shfl_xor_sync(FULL, sums[0], distance);
    }
    if (lane % sharing == 0 && lane / sharing < tile.count) {
        const u64 pair = tile.pair(lane / sharing);
        y[pair * rows + row] = from_float<Y_TYPE>(sums[0]);
    }
}

// The block multiplies a part of an expert's matrix by the x of a tile of TB pairs at most.
template <int TB>
__device__ __forceinline__ void run_tile(const Stack& stack, const Tile& tile, Share::Part part,
                                         const Call& call, u8* shared);

// The block does its share of all pairs.
__device__ __forceinline__ void run_tiles(const Stack& stack, const Call& call, u8* shared) {
    const int tile_count = PAIRS == GROUPS ? call.tiles[0] : (call.pairs - 1) / TOKENS + 1;
    for (Share share(tile_count, stack.units()); share.more();) {
        const Share::Part part = share.next();
        Tile tile = {call.expert, 1, nullptr, part.matrix * TOKENS};
        if (PAIRS == ONE) tile.count = min(TOKENS, call.pairs - tile.first);
        if (PAIRS == LIST) tile.expert = call.listed[part.matrix];
        if (PAIRS == GROUPS) {
            const int* about = call.tiles + 1 + 3 * part.matrix;
            tile = {about[0], about[2], call.listed + about[1], 0};
        }
        if (tile.expert < 0 || tile.expert >= stack.experts) {
            const int first = stack.first_row(part.from), after = stack.first_row(part.to);
            for (int i = 0; i < tile.count; i++) {
                for (int r = first + threadIdx.x; r < after; r += blockDim.x) {
                    const float nan = __uint_as_float(0x7fc00000u);
                    call.y[(u64)tile.pair(i) * stack.rows + r] = from_float<Y_TYPE>(nan);
                }
            }
        } else if (TOKENS > SOME && tile.count > SOME) {
            run_tile<TOKENS>(stack, tile, part, call, shared);
        } else if (TOKENS > 1 && tile.count > 1) {
            run_tile<TOKENS < SOME ? TOKENS : SOME>(stack, tile, part, call, shared);
        } else {
            run_tile<1>(stack, tile, part, call, shared);
        }
        __syncthreads();  // the next tile overwrites what is in shared memory
    }
}
