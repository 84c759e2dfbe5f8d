// y = W x for (token, expert) pairs: x of a tile and sums, however W is stored.
//
// x lies in shared memory as [columns][tokens], so that a weight reads one vector.

typedef CallOf<X_TYPE> Call;

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
    share_tiles(stack, call, [&](const Tile& tile, Share::Part part) {
        if (TOKENS > SOME && tile.count > SOME) {
            run_tile<TOKENS>(stack, tile, part, call, shared);
        } else if (TOKENS > 1 && tile.count > 1) {
            run_tile<TOKENS < SOME ? TOKENS : SOME>(stack, tile, part, call, shared);
        } else {
            run_tile<1>(stack, tile, part, call, shared);
        }
    });
}
