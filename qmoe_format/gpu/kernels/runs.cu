// Runs of gap codes: the form in which products read ternary and refined matrices.
//
// A row is two half rows, its levels above zero and its levels below. A half row is a path over
// places, one for each column, that lands on its non-zeros; a code of BITS bits is the distance to
// the next landing, at most REACH. A level of magnitude m is m landings, all but the first of
// distance 0. Where a gap is too long, the path lands on empty places in between: every REACH-th
// place has no column, and x is 0 there.
//
//     places   0 1 2 3 4 5 6 | 7 8 ...        REACH = 7 (3 bits): places 6, 13, ... are empty
//     columns  0 1 2 3 4 5 - | 6 7 ...
//     landings     2       6     8            codes, from place -1: 3 4 2
//
// A half row's codes are cut into LANES runs of equally many codes, one for each lane, and a warp
// walks HALVES half rows, those of ROWS rows, at once: a group. So a lane's codes lie in words
// [line][lane], one after another, and no lane has to ask another where it stands.
//
// Column c is in region c % LANES at slot c / LANES (empty slots not counted); place is region *
// SLOTS + slot. In shared memory x of a slot is a line of 32 banks, and each lane's bank is its own
// until the path comes to the next region:
//
//     banks       0 ... LANES-1        LANES ... 2 LANES-1    ...
//     slot 0      regions 0, 1, ...    the same again: for the next half row
//     slot 1      ...

constexpr int REACH = (1 << BITS) - 1;
constexpr int HALVES = 32 / LANES;  // half rows of a group
constexpr int ROWS = HALVES / 2;    // of a group: high and low of the first row, of the second, ...

__device__ inline int slots_of(int columns) {
    return REACH * (((columns + LANES - 1) / LANES + REACH - 2) / (REACH - 1));
}
