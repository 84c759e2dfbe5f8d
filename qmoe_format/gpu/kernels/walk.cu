// One warp walks one segment (SPEC.md section 7.2), CODEWORDS codewords a lane and step:
//
//     high end                                                            low end
//     | lane 0  | lane 1  | ... | lane 31 | lane 0  | ...      |  ... signs 2 1 0 |
//     '-------------- step 0 -------------'------ step 1 ...
//
// Each lane looks its codewords up; one scan over the packed lengths and numbers of non-zeros tells
// it where its first weight is and which sign its first non-zero has. Then there is work for
// non-zeros only. A visitor says what to do with one, range of weights by range (a row, or what of
// it fits a window).
//
// Whatever bytes a segment holds, nothing is read further than 64 bytes outside of it, no more steps
// are made than it has codewords, and weights beyond its last one are left out.

// One entry of a dictionary. `meta`: length | non-zeros << 16, so that metas can be added up; where
// signs are part of the codeword, length | non-zeros << 8 | signs << 16. `positions`: one byte each.
struct alignas(POSITION_WORDS == 1 ? 8 : 16) Entry {
    u32 meta;
    u32 positions[POSITION_WORDS];
};

static const int STEP = 32 * CODEWORDS;  // codewords a warp takes at a time

struct Stack {
    const u8* segments;
    const u32* offsets;  // [experts, segments + 1]
    const u64* bases;    // [experts]
    const SCALE_TYPE* row_scale;     // [experts, rows, groups, SCALES]
    const SCALE_TYPE* column_scale;  // [experts, columns], or anything
    const int* table_of;             // [experts]
    const Entry* tables;             // [tables, 2^width]
    int experts, rows, columns, rows_per_segment, width, group_size;

    __device__ int segments_of() const { return (rows - 1) / rows_per_segment + 1; }
    __device__ int groups() const { return GROUPED ? (int)(((u32)columns + group_size - 1) / group_size) : 1; }
};

// A segment about to be walked, as one lane sees it.
struct Segment {
    const u32* words;  // from the aligned word in which the segment begins
    int begin, end;    // its bits, counted from there
    int at;            // the lowest bit of this lane's next codewords
    u32 codewords;     // these, in the lowest bits
    u32 signs;         // word number `lane` of the signs

    // The 32 bits from bit `at` on.
    __device__ u32 bits() const {
        const u32* from = words + (at >> 5);
        return __funnelshift_r(from[0], from[1], (u32)at & 31u);
    }
    __device__ bool has(int codeword, int width) const {
        return at + (CODEWORDS - 1 - codeword) * width >= begin;
    }
    // Signs number 32 * (first + lane) and on, but no word after the segment.
    __device__ u32 sign_word(int first) const {
        int word = first + (int)(threadIdx.x & 31u);
        int last = (end - 1) >> 5;
        return words[word < last ? word : last];
    }
};

__device__ inline Segment open_segment(const Stack& stack, int expert, int segment) {
    const u32* offset = stack.offsets + (u64)expert * (stack.segments_of() + 1) + segment;
    u64 first = stack.bases[expert] + offset[0];
    Segment s;
    s.words = (const u32*)(stack.segments + (first & ~3ull));
    s.begin = 8 * (int)(first & 3u);
    s.end = s.begin + 8 * (int)(offset[1] - offset[0]);
    s.at = s.end - (int)(threadIdx.x % 32 + 1) * CODEWORDS * stack.width;
    s.codewords = s.has(0, stack.width) ? s.bits() : 0u;
    s.signs = !SIGNS_IN_CODEWORD && s.end > s.begin ? s.sign_word(0) : 0u;
    return s;
}

// Calls, for the non-zeros of a segment:
//     visit.nonzero(byte, minus)  weight `begin + byte / BYTES`, from begin to end - 1
//     visit.next()                by all lanes: done with that range, go on to the next one
// until visit.done(). Ranges ascend without gaps; `begin` and `end` count from the segment's first.
template <typename Visitor>
__device__ inline void walk(Segment s, const Entry* table, int width, u32 weights, Visitor& visit) {
    const u32 lane = threadIdx.x % 32, mask = (1u << width) - 1;
    u32 place = 0;           // weights before this step
    u32 sign = s.begin;      // number of this step's first sign bit, from s.words on
    int window = 0;          // s.signs holds the 32 words from this one on
    for (int top = s.end; top - width >= s.begin && place < weights; top -= STEP * width) {
        Entry entries[CODEWORDS];
        u32 sum = 0;
#pragma unroll
        for (int i = 0; i < CODEWORDS; i++) {
            entries[i].meta = 0;
            if (s.has(i, width)) {
                entries[i] = table[s.codewords >> (CODEWORDS - 1 - i) * width & mask];
            }
            sum += SIGNS_IN_CODEWORD ? entries[i].meta & 0xffu : entries[i].meta;
        }
        s.at -= STEP * width;
        s.codewords = s.has(0, width) ? s.bits() : 0u;  // of the next step, long before it is needed

        u32 upto = sum;  // inclusive scan
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            u32 before = __shfl_up_sync(FULL, upto, distance);
            if (lane >= distance) upto += before;
        }
        const u32 total = __shfl_sync(FULL, upto, 31);
        const u32 before = upto - sum;

        u32 signs = 0;  // of this lane's non-zeros, the first one in bit 0
        if (!SIGNS_IN_CODEWORD) {
            int last = (int)((sign + (total >> 16)) >> 5);
            if (last + 1 - window >= 32) {
                window = (int)(sign >> 5);
                s.signs = s.sign_word(window);
            }
            u32 first = sign + (before >> 16);
            int word = (int)(first >> 5) - window;
            u32 low = __shfl_sync(FULL, s.signs, word), high = __shfl_sync(FULL, s.signs, word + 1);
            signs = __funnelshift_r(low, high, first & 31u);
            sign += total >> 16;
        }

        const u32 stop = place + (total & 0xffffu);
        do {  // ranges that this step reaches
            const u32 span = (visit.end - visit.begin) * Visitor::BYTES;
            u32 start = (place + (before & 0xffffu) - visit.begin) * Visitor::BYTES;
            u32 bits = signs;
#pragma unroll
            for (int i = 0; i < CODEWORDS; i++) {
                const u32 meta = entries[i].meta;
                const u32 nonzeros = SIGNS_IN_CODEWORD ? meta >> 8 & 0xffu : meta >> 16;
                if (SIGNS_IN_CODEWORD) bits = meta >> 16;
#pragma unroll
                for (int j = 0; j < 4 * POSITION_WORDS; j++) {
                    const u32 scale = (u32)Visitor::BYTES << 8 * (j % 4);
                    const u32 byte = __dp4a(entries[i].positions[j / 4], scale, start);
                    if ((u32)j < nonzeros && byte < span) visit.nonzero(byte, bits >> j & 1u);
                }
                start += (meta & 0xffu) * Visitor::BYTES;
                bits >>= nonzeros;
            }
            if (stop < visit.end) break;
            visit.next();
        } while (!visit.done());
        place = stop;
    }
    while (!visit.done()) visit.next();
}
