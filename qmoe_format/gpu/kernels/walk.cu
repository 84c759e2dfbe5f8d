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
// read more than GUARD bytes (int_dict_packing.py) outside it, and there are no more steps than it
// has bits for.

constexpr int STEP_BITS = 32 * CODEWORDS * WIDTH;  // codeword bits of one step of a warp
constexpr u32 CODEWORD = (1u << WIDTH) - 1;

// A segment about to be walked, as one lane sees it.
struct Segment {
    const u32* words;  // from the aligned word in which the segment begins
    int begin, end;    // its bits, counted from there
    int at;            // the lowest bit of this lane's next codewords
    u32 low, high;     // the 64 bits from there on
    u32 signs;         // word `lane` of the signs
    Values values;     // of its first row
    Refinement refinement;

    Segment() = default;
    __device__ Segment(const Stack& stack, int expert, int number)
        : refinement(stack, expert, number) {
        const Place place = stack.place(expert, MASK, number);
        words = place.words;
        begin = place.begin;
        end = place.end;
        at = end - (int)(threadIdx.x % 32 + 1) * CODEWORDS * WIDTH;
        load();
        signs = sign_word(0);
        values = stack.row_values(expert, number * stack.rows_per_segment);
    }
    __device__ void load() {
        const u32* from = words + (at >> 5);
        const u32 middle = __ldg(from + 1);
        low = __funnelshift_r(__ldg(from), middle, at);
        if (CODEWORDS * WIDTH > 32) high = __funnelshift_r(middle, __ldg(from + 2), at);
    }
    __device__ u32 codeword(int i) const {
        const int shift = (CODEWORDS - 1 - i) * WIDTH;
        if (shift >= 32) return high >> (shift - 32) & CODEWORD;
        return (shift + WIDTH > 32 ? __funnelshift_r(low, high, shift) : low >> shift) & CODEWORD;
    }
    // Word `first + lane` of the signs, but never one after the segment.
    __device__ u32 sign_word(int first) const {
        return __ldg(words + min(first + (int)(threadIdx.x % 32), end >> 5));
    }
};

// What a lane knows of a step.
struct Step {
    MaskEntry entries[CODEWORDS];
    u32 signs[CODEWORDS];  // of each entry's non-zeros, from bit 1 on (from bit 0 is slower)
    u32 nonzero;           // number of the lane's first non-zero in the segment
    u32 start, size;       // first weight of the lane, and weights of the step, in bytes
};

// Show a lane's non-zeros to a visitor. `entry`: offset of the first entry, in the visitor's bytes;
// `inside`: all weights of the step are in the range.
template <bool inside, typename Visitor>
__device__ __forceinline__ void visit_entries(const Step& step, const Magnitudes& magnitudes,
                                              u32 entry, Visitor& visit) {
    u32 nonzero = step.nonzero;
#pragma unroll
    for (int i = 0; i < CODEWORDS; i++) {
#pragma unroll
        for (int j = 0; j < SLOTS; j++) {
            // A dot product of bytes extracts one, scales it and adds it in one instruction.
            const u32 scale = Visitor::BYTES << 8 * (j % 4);
            const u32 byte = __dp4a(step.entries[i].positions(j / 4), scale, entry);
            const bool there = step.entries[i].has(j) && (inside || byte < visit.span);
            const bool minus = (step.signs[i] & 2u << j) != 0;
            visit.nonzero(there, byte, minus, magnitudes[nonzero + j]);
        }
        entry += step.entries[i].length() * Visitor::BYTES;
        nonzero += step.entries[i].ones();
    }
}

// Walk a segment, one range of visit.span bytes after another without gaps, until visit.done():
//     visit.nonzero(there, byte, minus, magnitude)
//                   if `there`, weight byte / BYTES of the range is non-zero; byte < visit.span
//     visit.next()  by all lanes: the range is done, go on to the next one
template <typename Visitor>
__device__ __forceinline__ void walk(Segment s, Magnitudes magnitudes, const MaskEntry* table,
                                     Visitor& visit) {
    Step step;
    step.start = step.size = 0;
    u32 nonzeros = 0;    // before the next step
    u32 place = 0;       // first weight of the step, in bytes from the range's; may wrap
    u32 sign = s.begin;  // first sign of the next step, as a bit of the words in `s.signs`
    int window = 0;      // index of the first of these words
    bool again = false;  // the step continues into the next range
    // One loop over steps and ranges: ahead of an inner loop over ranges, the compiler would do all
    // tests of signs, and it has too few predicates for their results.
    for (int bits = s.end - s.begin; !visit.done();) {
        if (!again) {
            if (bits <= 0) break;
            bits -= STEP_BITS;
            u32 sum = 0;  // weights | non-zeros << 16
#pragma unroll
            for (int i = 0; i < CODEWORDS; i++) {
                step.entries[i] = table[s.codeword(i)];
                sum += step.entries[i].sum();
            }
            s.at -= STEP_BITS;
            s.load();  // the next step's codewords, long before they are needed

            const u32 upto = sum_upto_lane(sum), before = upto - sum;
            const u32 total = __shfl_sync(FULL, upto, 31), more = total >> 16;
            step.start = (before & 0xffffu) * Visitor::BYTES;
            step.size = (total & 0xffffu) * Visitor::BYTES;
            step.nonzero = nonzeros + (before >> 16);
            magnitudes.provide(nonzeros, nonzeros + more);
            nonzeros += more;

            if (sign + more >= 31 * 32) {  // a step's signs must be in 31 words
                window += sign >> 5;
                sign &= 31u;
                s.signs = s.sign_word(window);
                __syncwarp();  // makes this a branch, not a dozen predicated instructions
            }
            const u32 first = sign + (before >> 16);
            const u32 low = __shfl_sync(FULL, s.signs, first >> 5);
            const u32 high = __shfl_sync(FULL, s.signs, (first >> 5) + 1);
            step.signs[0] = __funnelshift_r(low, high, first) << 1;
            sign += more;
#pragma unroll
            for (int i = 1; i < CODEWORDS; i++) {
                step.signs[i] = step.signs[i - 1] >> step.entries[i - 1].ones();
            }
        }
        if (!again && place + step.size <= visit.span) {
            visit_entries<true>(step, magnitudes, place + step.start, visit);
        } else {
            visit_entries<false>(step, magnitudes, place + step.start, visit);
        }
        again = place + step.size >= visit.span;
        if (again) {
            place -= visit.span;
            visit.next();
        } else {
            place += step.size;
        }
    }
    while (!visit.done()) visit.next();
}
