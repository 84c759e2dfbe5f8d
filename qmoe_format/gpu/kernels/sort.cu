// Sort (token, expert) pairs by expert and cut each expert's into tiles: one block, no host.
//
//     experts  2 0 2 9 2        the pairs' experts; all those outside the stack count as one
//     order    1 0 2 4 3        the pairs by expert, otherwise in their order (a stable sort)
//     tiles    3 | 0 0 1 | 2 1 3 | 9 4 1        count; then expert, first index in order, pairs
//
// A tile has up to TOKENS pairs; when at most half of that is left of an expert, the rest is cut
// into tiles of SOME. The warps take turns, so no atomics are needed and the result is always the
// same.

__device__ inline int tile_size(int left) {
    return left > TOKENS / 2 ? min(left, TOKENS) : min(left, SOME);
}

// By a block of THREADS threads; for shapes, see the parameters of the kernel.
__device__ void sort_pairs(const int* experts, int* order, int* tiles, int* ranks, int* counts,
                           int pairs, int count) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    for (int e = thread; e <= count; e += THREADS) counts[e] = 0;
    __syncthreads();

    for (int first = 0; first < pairs; first += THREADS) {
        const int pair = first + thread;
        int expert = pair < pairs ? experts[pair] : -1;
        if (expert < 0 || expert >= count) expert = count;
        const int key = pair < pairs ? expert : -1;
        const u32 same = __match_any_sync(FULL, key);
        for (int turn = 0; turn < THREADS / 32 && first + 32 * turn < pairs; turn++) {
            if (turn == warp && pair < pairs) {
                ranks[pair] = counts[expert] + __popc(same & ((1u << lane) - 1));
            }
            __syncthreads();
            if (turn == warp && pair < pairs && same >> lane == 1u) {  // the last of its expert
                counts[expert] = ranks[pair] + 1;
            }
            __syncthreads();
        }
    }

    // Each thread has a few consecutive experts; a scan over their numbers of pairs and of tiles.
    __shared__ int pairs_before[THREADS], tiles_before[THREADS];
    const int each = count / THREADS + 1, from = min(thread * each, count + 1);
    const int to = min(from + each, count + 1);
    int my_pairs = 0, my_tiles = 0;
    for (int e = from; e < to; e++) {
        my_pairs += counts[e];
        for (int left = counts[e]; left > 0; left -= tile_size(left)) my_tiles++;
    }
    pairs_before[thread] = my_pairs;
    tiles_before[thread] = my_tiles;
    __syncthreads();
    for (int distance = 1; distance < THREADS; distance *= 2) {
        const int more = thread >= distance ? pairs_before[thread - distance] : 0;
        const int more_tiles = thread >= distance ? tiles_before[thread - distance] : 0;
        __syncthreads();
        pairs_before[thread] += more;
        tiles_before[thread] += more_tiles;
        __syncthreads();
    }
    if (thread == THREADS - 1) tiles[0] = tiles_before[thread];
    int place = pairs_before[thread] - my_pairs;
    int* tile = tiles + 1 + 3 * (tiles_before[thread] - my_tiles);
    for (int e = from; e < to; e++) {
        const int all = counts[e];
        counts[e] = place;
        for (int left = all; left > 0; left -= tile[2], tile += 3) {
            tile[0] = e;
            tile[1] = place + all - left;
            tile[2] = tile_size(left);
        }
        place += all;
    }
    __syncthreads();
    for (int pair = thread; pair < pairs; pair += THREADS) {
        const int expert = experts[pair];
        order[counts[expert < 0 || expert >= count ? count : expert] + ranks[pair]] = pair;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) sort(
    const int* experts,  // int32 [pairs]
    int* order,          // int32 [pairs]
    int* tiles,          // int32 [1 + 3 pairs]
    int* ranks,          // int32 [pairs], scratch: earlier pairs with the same expert
    int* counts,         // int32 [count + 1], scratch: an expert's pairs, then its first in order
    int pairs,           // number of pairs
    int count) {         // number of experts
    sort_pairs(experts, order, tiles, ranks, counts, pairs, count);
}
