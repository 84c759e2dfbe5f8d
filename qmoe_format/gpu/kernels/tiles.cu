// Tiles of (token, expert) pairs, and a block's share of them, however W is stored.
//
// The work is all units (segments, rows or groups of rows) of all tiles (a tile: up to TOKENS pairs
// with one expert), one after another. Each block takes an equal share of it:
//
//     tile 0: units 0 1 2 ... U-1 | tile 1: units 0 1 2 ... U-1 | ...
//     '-- block 0 --''-- block 1 --''-- block 2 --' ...

struct Tile {
    int expert, count;
    const int* order;  // GROUPS: its pairs
    int first;         // otherwise: the first of its pairs, which are consecutive
    __device__ int pair(int i) const { return PAIRS == GROUPS ? order[i] : first + i; }
};

// What the caller gives; for shapes, see the parameters of the kernels.
template <typename X>
struct CallOf {
    const X* x;
    Y_TYPE* y;
    const int *listed, *tiles;
    int expert, pairs, pairs_per_x;
};

// The block's share: run(tile, part) for each part of it. Where there is no such expert, y is NaN.
template <typename Matrices, typename X, typename Run>
__device__ __forceinline__ void share_tiles(const Matrices& matrices, const CallOf<X>& call,
                                            Run run) {
    const int tile_count = PAIRS == GROUPS ? call.tiles[0] : (call.pairs - 1) / TOKENS + 1;
    for (Share share(tile_count, matrices.units()); share.more();) {
        const Share::Part part = share.next();
        Tile tile = {call.expert, 1, nullptr, part.matrix * TOKENS};
        if (PAIRS == ONE) tile.count = min(TOKENS, call.pairs - tile.first);
        if (PAIRS == LIST) tile.expert = call.listed[part.matrix];
        if (PAIRS == GROUPS) {
            const int* about = call.tiles + 1 + 3 * part.matrix;
            tile = {about[0], about[2], call.listed + about[1], 0};
        }
        if (tile.expert < 0 || tile.expert >= matrices.experts) {
            const int first = matrices.first_row(part.from), after = matrices.first_row(part.to);
            for (int i = 0; i < tile.count; i++) {
                for (int r = first + threadIdx.x; r < after; r += blockDim.x) {
                    const float nan = __uint_as_float(0x7fc00000u);
                    call.y[(u64)tile.pair(i) * matrices.rows + r] = from_float<Y_TYPE>(nan);
                }
            }
        } else {
            run(tile, part);
        }
        __syncthreads();  // the next tile overwrites what is in shared memory
    }
}
