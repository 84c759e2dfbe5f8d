// How `run_batch.cu` keeps ternary matrices: a landing is marked by a bit, in a bank for each
// lane's region as in x of a single token, so that marking has no bank conflicts.
//
//     bank                0 ... LANES-1         LANES ... 2 LANES-1    ...
//     line LINES-1        regions, above zero   the same, below zero   the next row
//       bit 31            the last slot
//       bit 30            the one before
//
// Two marks are cut out of a word at a time, each moved to bit 14 of half a register, which there
// means 2.0, in bf16 and in fp16. Bit 15 is the sign.

constexpr int LINE_WORDS = 32;
constexpr int ROW_WORDS = 2 * LANES, REGION_WORDS = 1;  // from a row or region to the next one
// Four words after each group: so that 8 rows at the same place lie in different banks.
constexpr int GROUP_WORDS = 32 * LINES + 4;
constexpr int EIGHT_ROWS = 8 / ROWS * GROUP_WORDS;  // words from a row to the eighth after it
constexpr u32 UNMARKED = 0;

// Where a run begins, in bytes; slot 0 is in line 1, as in the array `starts`.
__device__ __forceinline__ u32 start_of(const Group& group) { return group.start * 4; }

__device__ __forceinline__ void mark(u32* word, int slot, bool) {
    atomicOr(word, 1u << (slot & 31));
}

// A lane's marks of a unit, in rows g and g + 8 of a tile of A.
template <int scales>
struct Marks;

template <>
struct Marks<2> {
    u32 of[2];

    Marks() = default;
    __device__ explicit Marks(const u32* word) : of{word[0], word[LANES]} {}
    // A pair of slots.
    template <int two>
    __device__ __forceinline__ u32 cut_out(int row) const {
        constexpr int left = 14 - slot_of(two);
        return (left < 0 ? of[row] >> 1 : of[row] << max(left, 0)) & 0x40004000u;
    }
};

// Two bits for each slot: whether there is a mark, and whether it is below zero.
template <>
struct Marks<1> {
    u32 even[2], odd[2];

    Marks() = default;
    __device__ explicit Marks(const u32* word) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const u32 low = word[row * EIGHT_ROWS + LANES], any = word[row * EIGHT_ROWS] | low;
            even[row] = (any & 0x55555555u) | (low << 1 & 0xaaaaaaaau);
            odd[row] = (any >> 1 & 0x55555555u) | (low & 0xaaaaaaaau);
        }
    }
    template <int two>
    __device__ __forceinline__ u32 cut_out(int row) const {
        return (two < 8 ? even[row] : odd[row]) << (14 - two % 8 * 2) & 0xc000c000u;
    }
};
