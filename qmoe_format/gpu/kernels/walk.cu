// One warp walks one segment (SPEC.md section 7.2), CODEWORDS codewords per lane and step:
//
//     high end                                                            low end
//     | lane 0  | lane 1  | ... | lane 31 | lane 0  | ...      |  ... signs 2 1 0 |
//     '-------------- step 0 -------------'------ step 1 ...
//
// Each lane looks up its codewords; one scan over packed lengths and numbers of non-zeros tells it
// the index of its first weight and of its first sign. From there on there is work for non-zeros
// only. A visitor says what to do with each, one range of weights after another (a row, or the part
// of it that fits a window).
//
// Lanes that have no codeword left take what lies before the segment for codewords. Their weights
// come after the segment's last one and are left out. So whatever bytes a segment holds, nothing is
// read more than GUARD bytes (packing.py) outside it, and there are no more steps than it has bits
// for.

constexpr int STEP_BITS = 32 * CODEWORDS * WIDTH;  // codeword bits of one step of a warp
constexpr u32 MASK = (1u << WIDTH) - 1;

// The values of levels -1 and +1 [V-1].
struct Values {
    float low, high;
};

__device__ inline Values values_at(const SCALE_TYPE* scales) {
    float high = to_float(scales[SCALES - 1]);
    return {SCALES == 2 ? to_float(scales[0]) : negative(high), high};
}

// The arrays of packing.py; for shapes, see the parameters of the kernels.
struct PackedStack {
    const u8* segments;
    const u32* offsets;
    const u64* bases;
    const SCALE_TYPE *row_scale, *column_scale;
    const int* table_of;
    const Entry* tables;
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

// A block's share of the segments of `all` matrices, in parts that belong to one matrix each.
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

// The block copies a table to shared memory, or leaves it where it is. A barrier has to follow.
__device__ inline const Entry* stage_table(const PackedStack& stack, int expert, u8* shared) {
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
    u32 low, high;     // the 64 bits from there on
    u32 signs;         // word `lane` of the signs
    Values values;     // of its first row; 0 if GROUPED

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
    // Word `first + lane` of the signs, but never one after the segment.
    __device__ u32 sign_word(int first) const {
        return __ldg(words + min(first + (int)(threadIdx.x % 32), end >> 5));
    }
};

__device__ __forceinline__ Segment open_segment(const PackedStack& stack, int expert,
                                                int segment) {
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

// `value` plus that of the lane `distance` below, if there is one. In assembly, because the shuffle
// itself says whether there is, which the compiler does not use.
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

// Show a lane's non-zeros to a visitor. `entry`: offset of the first entry, in the visitor's bytes;
// `inside`: all weights of the step are in the range.
template <bool inside, typename Visitor>
__device__ __forceinline__ void visit_entries(const Entry (&entries)[CODEWORDS],
                                              const u32 (&signs)[CODEWORDS], u32 entry,
                                              Visitor& visit) {
#pragma unroll
    for (int i = 0; i < CODEWORDS; i++) {
#pragma unroll
        for (int j = 0; j < SLOTS; j++) {
            // A dot product of bytes extracts one, scales it and adds it in one instruction.
            const u32 scale = Visitor::BYTES << 8 * (j % 4);
            const u32 byte = __dp4a(entries[i].positions(j / 4), scale, entry);
            const bool there = entries[i].has(j) && (inside || byte < visit.span);
            visit.nonzero(there, byte, (signs[i] & 2u << j) != 0);
        }
        entry += entries[i].length() * Visitor::BYTES;
    }
}

// Walk a segment, one range of visit.span bytes after another without gaps, until visit.done():
//     visit.nonzero(there, byte, minus)  if `there`, weight byte / BYTES of the range is non-zero;
//                                        byte < visit.span
//     visit.next()                       by all lanes: the range is done, go on to the next one
template <typename Visitor>
__device__ __forceinline__ void walk(Segment s, const Entry* table, Visitor& visit) {
    Entry entries[CODEWORDS];
    u32 signs[CODEWORDS];     // of each entry's non-zeros, from bit 1 on (from bit 0 is slower)
    u32 start = 0, step = 0;  // first weight of this lane and weights of the step, in bytes
    u32 place = 0;            // first weight of the step, in bytes from the range's; may wrap
    u32 sign = s.begin;       // first sign of the next step, as a bit of the words in `s.signs`
    int window = 0;           // index of the first of these words
    bool again = false;       // the step continues into the next range
    // One loop over steps and ranges: ahead of an inner loop over ranges, the compiler would do all
    // tests of signs, and it has too few predicates for their results.
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
                if (sign + (total >> 16) >= 31 * 32) {  // a step's signs must be in 31 words
                    window += sign >> 5;
                    sign &= 31u;
                    s.signs = s.sign_word(window);
                    __syncwarp();  // makes this a branch, not a dozen predicated instructions
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
