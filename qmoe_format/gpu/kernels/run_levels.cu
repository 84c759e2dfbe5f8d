// How `run_batch.cu` keeps matrices with levels beyond +-1: a place has PLACE_BITS bits, in which
// is its level plus BIAS. Each landing adds 1 or takes 1 away, so lanes that have parts of one level
// need not know of each other. As both signs have the same place, twice as many rows fit, but lanes
// above zero and below share banks, two to each.
//
//     bank            0 ... ROWS-1         ROWS ... 2 ROWS-1     ...     15
//     the last line   rows, first region   rows, second region
//       upper bits    the last slot
//       lower ones    those before
//
// Two levels are cut out of a word at a time and put into the mantissas of 2^8 in bf16 or 2^11 in
// fp16, where 1 counts 2. What that is too much is subtracted, which is exact.

constexpr int LINE_WORDS = 16;
constexpr int ROW_WORDS = 1, REGION_WORDS = ROWS;  // from a row or region to the next one
// Enough words after each group that 8 rows at the same place lie in different banks.
constexpr int GROUP_WORDS = PLACE_BITS * LINES * LINE_WORDS + 4 * ROWS;
constexpr int EIGHT_ROWS = 8 / ROWS * GROUP_WORDS;  // words from a row to the eighth after it
constexpr u32 BIAS = PLACE_BITS == 4 ? 8 : 64;      // the mantissa of bf16 has no more than 7 bits
constexpr u32 UNMARKED = FULL / ((1u << PLACE_BITS) - 1) * BIAS;

// Where a run begins, in bytes; slot 0 is in line 1, as in the array `starts`.
__device__ __forceinline__ u32 start_of(const Group& group) {
    const u32 row = threadIdx.x % 32 / (2 * LANES), region = group.start % LANES;
    return group.start / 32 * LINE_BYTES + 4 * (region * ROWS + row);
}

// Not on empty places: a path that has come to its end stays on one, and lands there many times.
__device__ __forceinline__ void mark(u32* word, int slot, bool there) {
    const bool level = there && !reach_divides((u32)(slot + 1 + SLOTS));
    const u32 one = threadIdx.x / LANES % 2 ? ~0u : 1u;
    atomicAdd(word, level ? __funnelshift_l(0, one, slot * PLACE_BITS) : 0);  // a shift modulo 32
}

// Two numbers, 1 or a power of two whose last bit counts 2, in a register.
__device__ constexpr u32 ones(bf16) { return 0x3f803f80u; }
__device__ constexpr u32 ones(fp16) { return 0x3c003c00u; }
__device__ constexpr u32 powers(bf16) { return 0x43804380u; }
__device__ constexpr u32 powers(fp16) { return 0x68006800u; }

// A lane's levels of a unit. If a row has one scale, in rows g and g + 8 of a tile of A; otherwise,
// what is above zero in row g, and what is below in row g + 8.
template <int scales>
struct Marks {
    const u32* word;

    Marks() = default;
    __device__ explicit Marks(const u32* word) : word(word) {}
    // A pair of slots.
    template <int two>
    __device__ __forceinline__ u32 cut_out(int row) const {
        constexpr u32 one = ones(TERM_TYPE()), power = powers(TERM_TYPE()), minus = 0x80008000u;
        constexpr u32 zero = power | BIAS * 0x00010001u, bits = (2 * BIAS - 1) * 0x00010001u;
        const u32* const of = word + two * PLACE_BITS / 16 * LINE_WORDS;
        const u32 given = of[scales == 1 ? row * EIGHT_ROWS : 0] >> two * PLACE_BITS % 16;
        // One instruction, or two if the compiler saw that `power` is a constant. z is 1.
        const u32 number = (given & bits) | power * blockDim.z;
        if (scales == 1) return multiply_add<false>(TERM_TYPE(), number, one, zero ^ minus);
        if (row == 0) return multiply_add<true>(TERM_TYPE(), number, one, zero ^ minus);
        return multiply_add<true>(TERM_TYPE(), number, one ^ minus, zero);
    }
};
