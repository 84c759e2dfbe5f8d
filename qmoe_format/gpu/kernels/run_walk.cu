// A warp follows the path of half a row over its levels, to count or to write codes.

// A lane's non-zero and the landings up to it: `jumps` on empty places, then `magnitude` on its own.
struct Landings {
    u32 number;   // of landings before these
    int before;   // the landing before these, or -1
    int empty;    // the first empty place that is landed on
    int jumps;
    int place;
    int magnitude;
};

// Where a path has come to: number of landings, and the last of them.
struct Reached {
    u32 landings;
    int place;
};

template <typename Visitor>
__device__ __forceinline__ Reached walk_half_row(const fp16* levels, int columns, bool low,
                                                 Visitor visit) {
    const int lane = threadIdx.x % 32, slots = slots_of(columns);
    Reached reached = {0, -1};
    for (int region = 0; region < LANES; region++) {
        for (int first = 0; first * LANES + region < columns; first += 32) {
            const int at = first + lane, column = at * LANES + region;
            int level = column < columns ? (int)to_float(levels[column]) : 0;
            if (low) level = -level;
            Landings here = {0, reached.place, 0, 0, region * slots + at + at / (REACH - 1),
                             max(level, 0)};
            const u32 all = __ballot_sync(FULL, level > 0), below = all & ((1u << lane) - 1);
            const int other = __shfl_sync(FULL, here.place, below ? 31 - __clz(below) : 0);
            if (below) here.before = other;
            here.empty = (here.before + REACH + 1) / REACH * REACH - 1;
            if (here.place - here.before > REACH) {
                here.jumps = 1 + max(0, (here.place - here.empty - 1) / REACH);
            }
            const u32 mine = level > 0 ? here.jumps + level : 0;
            const u32 upto = sum_upto_lane(mine);
            here.number = reached.landings + upto - mine;
            if (level > 0) visit(here);
            reached.landings += __shfl_sync(FULL, upto, 31);
            const int last = __shfl_sync(FULL, here.place, all ? 31 - __clz(all) : 0);
            if (all) reached.place = last;
        }
    }
    return reached;
}
