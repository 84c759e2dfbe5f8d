// The order in which products of several tokens go through the places of a row (see runs.cu).
//
// A unit is 32 slots of one region: LINES lines of LANES units, so that the last line ends with the
// last slot. A step is four units, 128 places. Lane 4 g + t of a warp has unit t of the step, and
// multiplies its slots eight at a time, two to a register, which are half a word of marks apart.
// With marks of one bit:
//
//     order    0   1   2   3   ... 7  | 8   9 ... | ... 31 | 32  33 ... | 64  65  66 ... | ...
//     unit     0   0   0   0       0  | 1   1     |      3 | 0   0      | 0   0   0
//     slot     0   16  2   18      22 | 0   16    |     22 | 8   24     | 1   17  3       of the unit

constexpr int MULTIPLE = LANES < 4 ? 4 / LANES : 1;  // of lines, that steps be whole
constexpr int LINES = (SLOTS / 32 + MULTIPLE) / MULTIPLE * MULTIPLE;  // one slot more than SLOTS
constexpr int STEPS = LINES * LANES / 4;
constexpr int PLACES = 128 * STEPS;

constexpr int APART = 16 / PLACE_BITS;  // slots of a pair

// The first one of the unit's `two`-th pair of slots. Of 32 in a word, the even ones come first.
__device__ constexpr int slot_of(int two) {
    return PLACE_BITS == 1 ? two % 8 * 2 + two / 8 : two / APART * 2 * APART + two % APART;
}

// The column at a place in that order, or one from COLUMNS on if it is empty.
__device__ inline int column_of(int at) {
    const int unit = at / 128 * 4 + at / 8 % 4;
    const int two = at / 32 % 4 * 4 + at / 2 % 4;  // of the unit's 16 pairs of slots
    const int slot = SLOTS + 32 * (unit / LANES - LINES) + slot_of(two) + at % 2 * APART;
    if (slot < 0 || slot % REACH == REACH - 1) return COLUMNS;
    return (slot - slot / REACH) * LANES + unit % LANES;
}
