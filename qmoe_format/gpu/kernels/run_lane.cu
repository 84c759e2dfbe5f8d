// How a warp follows the paths of a group, to multiply by them or to write them out: each lane its
// run, through memory in which a slot takes LINE_BYTES.

constexpr u32 CODE = (1u << BITS) - 1;

constexpr int log2_of(int power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }

// Whether REACH divides a number, found by a product: it is odd.
__device__ constexpr u32 inverse_of(u32 odd) {
    u32 found = odd;
    for (int i = 0; i < 4; i++) found *= 2 - odd * found;
    return found;
}
__device__ inline bool reach_divides(u32 number) {
    return number * inverse_of(REACH) <= ~0u / REACH;
}

// The line of a slot; the path begins a line before the first.
__device__ constexpr int line_of(int slot) { return 1 + slot + slot / (REACH - 1); }

// The arrays and sizes; for shapes, see the parameters of the kernels.
struct Stack {
    const u32* offsets;
    const u16* starts;
    const u16* order;
    const u64* bases;
    const u32* words;
    const bf16 *row_scale, *column_scale;
    int experts, rows;

    __device__ int groups() const { return (rows + ROWS - 1) / ROWS; }
    // Where `order` has the row at a place; beyond the last place, one that is there.
    __device__ u64 at(int expert, int place) const {
        return (u64)expert * rows + min(place, rows - 1);
    }
};

// What a lane needs to know of a group before it walks its run.
struct Group {
    u32 offset, end;  // codes of each run, from the matrix's first on
    u32 start;        // where the run begins
    u32 row;          // the lane's
    float scale;      // of its half row

    Group() = default;
    __device__ Group(const Stack& stack, int expert, int number) {
        const u32* const at = stack.offsets + (u64)expert * (stack.groups() + 1) + number;
        offset = __ldg(at);
        end = __ldg(at + 1);
    }
    __device__ void load_rest(const Stack& stack, int expert, int number) {
        const int lane = threadIdx.x % 32, half = lane / LANES;
        start = __ldg(stack.starts + ((u64)expert * stack.groups() + number) * 32 + lane);
        const u64 at = stack.at(expert, number * ROWS + half / 2);
        row = __ldg(stack.order + at);
        scale = to_float(stack.row_scale[at * SCALES + (half % 2 ? 0 : SCALES - 1)]);
        if (SCALES == 1 && half % 2) scale = negative(scale);
    }
};

// The codes of one lane: 32 of them in BITS words, which begin anywhere in a word.
struct Codes {
    const u32* at;
    u32 phase;
    u32 ahead[BITS + 1];

    Codes() = default;
    __device__ Codes(const u32* words, const Group& group)
        : at(words + (u64)group.offset * BITS / 32 * 32 + threadIdx.x % 32),
          phase(group.offset * BITS % 32) {
        ahead[BITS] = __ldg(at);
        load();
    }
    __device__ void load() {
        ahead[0] = ahead[BITS];
#pragma unroll
        for (int i = 1; i <= BITS; i++) ahead[i] = __ldg(at + 32 * i);
        at += 32 * BITS;
    }
    __device__ void take(u32 (&words)[BITS]) const {
#pragma unroll
        for (int i = 0; i < BITS; i++) {
            words[i] = __funnelshift_r(ahead[i], ahead[i + 1], phase);
        }
    }
};

// Code i in bytes of memory. Shifted once, left or right, wherever it is.
template <int i>
__device__ __forceinline__ u32 bytes_of_code(const u32 (&words)[BITS]) {
    constexpr int at = i * BITS % 32, word = i * BITS / 32, left = log2_of(LINE_BYTES) - at;
    if constexpr (at + BITS <= 32) {
        const u32 code = words[word] & CODE << at;
        return left < 0 ? code >> max(-left, 0) : code << max(left, 0);
    } else {
        return (__funnelshift_r(words[word], words[word + 1], at) & CODE) * LINE_BYTES;
    }
}

// A lane's path. `place` is relative to the end of the memory, so it is negative until the next
// region begins. The way back to the first slot, one region further, is to subtract `ring`, and then
// the result is the greater one of the two as unsigned numbers.
struct Path {
    u32 place, ring;

    // Show codes i to n to visit(code, place, whether it is one of the `left` that are there).
    template <int i, int n, typename Visitor>
    __device__ __forceinline__ void walk(const u32 (&words)[BITS], int left, Visitor& visit) {
        if constexpr (i < n) {
            place += i < left ? bytes_of_code<i>(words) : 0;
            place = max(place, place - ring);
            visit(i, (int)place, i < left);
            walk<i + 1, n>(words, left, visit);
        }
    }
    // The last 1 to 32 codes, eight at a time; after the end the path stays where it is.
    template <int i, typename Visitor>
    __device__ __forceinline__ void finish(const u32 (&words)[BITS], int left, Visitor& visit) {
        if constexpr (i < 32) {
            if (left >= i + 8) {
                walk<i, i + 8>(words, 32, visit);
                finish<i + 8>(words, left, visit);
            } else if (left > i) {
                walk<i, i + 8>(words, left, visit);
            }
        }
    }
    // All codes of a group; `meanwhile` is done when the last ones are in registers.
    template <typename Meanwhile, typename Visitor>
    __device__ __forceinline__ void follow(Codes& codes, const Group& group, Meanwhile meanwhile,
                                           Visitor visit) {
        u32 now[BITS];
        int left = (int)(group.end - group.offset);
        for (;;) {
            codes.take(now);
            if (left <= 32) break;
            left -= 32;
            codes.load();
            walk<0, 32>(now, 32, visit);
        }
        meanwhile();
        finish<0>(now, left, visit);
    }
};
