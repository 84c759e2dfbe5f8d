// One warp walks one segment (SPEC.md section 7.2), CODEWORDS codewords a lane and step:
//
//     high end                                                            low end
//     | lane 0  | lane 1  | ... | lane 31 | lane 0  | ...      |  ... signs 2 1 0 |
//     '-------------- step 0 -------------'------ step 1 ...
//
// Each lane looks its codewords up; one scan over packed lengths and numbers of non-zeros tells it
// where its first weight is and which sign its first non-zero has. From there on there is work for
// non-zeros only. A visitor says what to do with one, range of weights by range (a row, or what of
// it fits a window).
//
// Lanes that have no codeword left read what lies before the segment as if it were codewords: these
// come after the segment's last weight, and such weights are left out. So whatever bytes a segment
// holds, nothing is read further than GUARD bytes (packing.py) outside of it, and no more steps are
// made than it has bits for.

constexpr int STEP_BITS = 32 * CODEWORDS * WIDTH;  // bits of codewords that a warp takes at a time
constexpr u32 MASK = (1u << WIDTH) - 1;

// The values of trits -1 and +1 [V-1].
struct Values {
    float low, high;
};

__device__ inline Values values_at(const SCALE_TYPE* scales) {
    float high = to_float(scales[SCALES - 1]);
    return {SCALES == 2 ? to_float(scales[0]) : negative(high), high};
}

struct Stack {
    const u8* segments;
    const u32* offsets;              // [experts, segments + 1]
    const u64* bases;                // [experts]
    const SCALE_TYPE* row_scale;     // [experts, rows, groups, SCALES]
    const SCALE_TYPE* column_scale;  // [experts, columns] if COLUMN_SCALES
    const int* table_of;             // [experts]
    const Entry* tables;             // [tables, 2^WIDTH]
    int experts, rows, columns, rows_per_segment, group_size;

    __device__ int segment_count() const { return (rows - 1) / rows_per_segment + 1; }
    __device__ int groups() const {
        return GROUPED ? (int)(((u32)columns + group_size - 1) / (u32)group_size) : 1;
    }
    __device__ const SCALE_TYPE* row_scales(int expert, int row) const {
        return row_scale + ((u64)expert * rows + row) * groups() * SCALES;
    }
    __device__ Values row_values(int expert, int row) const {
        return values_at(row_scales(expert, row));
    }
    __device__ int row_after(int segment) const {
        return segment + 1 < segment_count() ? (segment + 1) * rows_per_segment : rows;
    }
};

// A block's share of the segments of `all` matrices, one after another; parts of one matrix each.
struct Share {
    u64 begin, end;
    int count;  // segments of a matrix
    struct Part {
        int matrix, from, to;
    };
    __device__ Share(int all, int count) : count(count) {
        const u64 work = (u64)all * count;
        begin = work * blockIdx.x / gridDim.x;
        end = work * (blockIdx.x + 1) / gridDim.x;
    }
    __device__ bool more() const { return begin < end; }
    __device__ Part next() {
        const int from = (int)(begin % count), matrix = (int)(begin / count);
        const int to = (int)min(end - begin + from, (u64)count);
        begin += to - from;
        return {matrix, from, to};
    }
};

// The block copies a table to shared memory, or leaves it where it is. To be followed by a barrier.
__device__ inline const Entry* stage_table(const Stack& stack, int expert, u8* shared) {
    const Entry* table = stack.tables + ((u64)stack.table_of[expert] << WIDTH);
#if TABLE_SHARED
#pragma unroll 4
    for (int i = threadIdx.x; i < TABLE_SHARED / 16; i += blockDim.x) {
        ((uint4*)shared)[i] = ((const uint4*)table)[i];
    }
    return (const Entry*)shared;
#else
    return table;
#endif
}

// A segment about to be walked, as one lane sees it.
struct Segment {
    const u32* words;  // from the aligned word in which the segment begins
    int begin, end;    // its bits, counted from there
    int at;            // the lowest bit of this lane's next codewords
    u32 low, high;     // these: 64 bits from there on
    u32 signs;         // word number `lane` of the signs
    Values values;     // of its first row; if GROUPED, 0

    __device__ void load() {
        const u32* from = words + (at >> 5);
        const u32 middle = __ldg(from + 1);
        low = __funnelshift_r(__ldg(from), middle, at);
        if (CODEWORDS * WIDTH > 32) high = __funnelshift_r(middle, __ldg(from + 2), at);
    }
    __device__ u32 codeword(int i) const {
        const int shift = (CODEWORDS - 1 - i) * WIDTH;
        if (shift >= 32) return high >> (shift - 32) & MASK;
        return (shift + WIDTH > 32 ? __funnelshift_r(low, high, shift) : low >> shift) & MASK;
    }
    // Word `first + lane` of the signs, but none after the segment.
    __device__ u32 sign_word(int first) const {
        return __ldg(words + min(first + (int)(threadIdx.x % 32), end >> 5));
    }
};

__device__ __forceinline__ Segment open_segment(const Stack& stack, int expert, int segment) {
    const u32* offset = stack.offsets + (u64)expert * (stack.segment_count() + 1) + segment;
    const u64 first = stack.bases[expert] + offset[0];
    Segment s;
    s.words = (const u32*)(stack.segments + (first & ~3ull));
    s.begin = 8 * (int)(first & 3u);
    s.end = s.begin + 8 * (int)(offset[1] - offset[0]);
    s.at = s.end - (int)(threadIdx.x % 32 + 1) * CODEWORDS * WIDTH;
    s.load();
    if (!SIGNS_IN_CODEWORD) s.signs = s.sign_word(0);
    s.values = GROUPED ? Values{} : stack.row_values(expert, segment * stack.rows_per_segment);
    return s;
}

// `value` plus that of the lane `distance` below, where there is one. The compiler does not find
// out that the shuffle says whether there is.
template <int distance>
__device__ inline u32 add_lane_below(u32 value) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "{ .reg .pred there; .reg .u32 other;\n"
        "shfl.sync.up.b32 other|there, %0, %1, 0, -1;\n"
        "@there add.u32 %0, %0, other; }"
        : "+r"(value)
        : "n"(distance));
    return value;
#else
    u32 other = __shfl_up_sync(FULL, value, distance);
    return value + (threadIdx.x % 32 >= distance ? other : 0u);
#endif
}

// Show a lane's non-zeros to a visitor. `entry`: where the first entry is, in the visitor's bytes;
// `inside`: all weights of the step are in the range.
template <bool inside, typename Visitor>
__device__ __forceinline__ void visit_entries(const Entry (&entries)[CODEWORDS],
                                              const u32 (&signs)[CODEWORDS], u32 entry,
                                              Visitor& visit) {
#pragma unroll
    for (int i = 0; i < CODEWORDS; i++) {
#pragma unroll
        for (int j = 0; j < SLOTS; j++) {
            // A dot product of bytes takes one out, scales and adds it in one instruction.
            const u32 scale = Visitor::BYTES << 8 * (j % 4);
            const u32 byte = __dp4a(entries[i].places(j / 4), scale, entry);
            const bool there = entries[i].has(j) && (inside || byte < visit.span);
            visit.nonzero(there, byte, (signs[i] & 2u << j) != 0);
        }
        entry += entries[i].length() * Visitor::BYTES;
    }
}

// Calls, for the non-zeros of a segment,
//     visit.nonzero(there, byte, minus)  if there is one: weight number byte / BYTES of the range,
//                                        byte < visit.span
//     visit.next()                       by all lanes: that range is done, go on to the next one
// until visit.done(). Ranges follow each other without gaps.
template <typename Visitor>
__device__ __forceinline__ void walk(Segment s, const Entry* table, Visitor& visit) {
    Entry entries[CODEWORDS];
    u32 signs[CODEWORDS];     // of each entry's non-zeros, from bit 1 on: bit 0 is slower
    u32 start = 0, step = 0;  // first weight of this lane and weights of the step, in bytes
    u32 place = 0;            // first weight of the step in bytes from the range's; may wrap around
    u32 sign = s.begin;       // first sign of the step to come: a bit of the words in `s.signs`
    int window = 0;           // number of the first of these words
    bool again = false;       // this step goes on into the next range
    // One loop over steps and ranges: of an inner one over ranges, the compiler would do all tests
    // of signs ahead, and has not enough predicates to keep their results.
    for (int bits = s.end - s.begin; !visit.done();) {
        if (!again) {
            if (bits <= 0) break;
            bits -= STEP_BITS;
            u32 sum = 0;  // weights | non-zeros << 16
#pragma unroll
            for (int i = 0; i < CODEWORDS; i++) {
                entries[i] = table[s.codeword(i)];
                sum += entries[i].sum();
            }
            s.at -= STEP_BITS;
            s.load();  // the next step's codewords, long before they are needed

            u32 upto = add_lane_below<1>(sum);
            upto = add_lane_below<2>(upto);
            upto = add_lane_below<4>(upto);
            upto = add_lane_below<8>(upto);
            upto = add_lane_below<16>(upto);
            const u32 total = __shfl_sync(FULL, upto, 31), before = upto - sum;
            start = (before & 0xffffu) * Visitor::BYTES;
            step = (total & 0xffffu) * Visitor::BYTES;

            if (!SIGNS_IN_CODEWORD) {
                if (sign + (total >> 16) >= 31 * 32) {  // a step's signs have to be in 31 words
                    window += sign >> 5;
                    sign &= 31u;
                    s.signs = s.sign_word(window);
                    __syncwarp();  // so that it is a branch, not a dozen predicated instructions
                }
                const u32 first = sign + (before >> 16);
                const u32 low = __shfl_sync(FULL, s.signs, first >> 5);
                const u32 high = __shfl_sync(FULL, s.signs, (first >> 5) + 1);
                signs[0] = __funnelshift_r(low, high, first) << 1;
                sign += total >> 16;
            }
#pragma unroll
            for (int i = 0; i < CODEWORDS; i++) {
                if (SIGNS_IN_CODEWORD) {
                    signs[i] = entries[i].signs() << 1;
                } else if (i > 0) {
                    signs[i] = signs[i - 1] >> entries[i - 1].nonzeros();
                }
            }
        }
        if (!again && place + step <= visit.span) {
            visit_entries<true>(entries, signs, place + start, visit);
        } else {
            visit_entries<false>(entries, signs, place + start, visit);
        }
        again = place + step >= visit.span;
        if (again) {
            place -= visit.span;
            visit.next();
        } else {
            place += step;
        }
    }
    while (!visit.done()) visit.next();
}
