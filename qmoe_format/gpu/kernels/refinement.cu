// The magnitudes of a segment's non-zeros, decoded from its refinement ahead of the walk over its
// mask (SPEC.md section 7.2):
//
//     refinement    0   1 1 0   0   1 0 ...
//     ring          0     2     0    1  ...     |q| - 1 of non-zeros 0, 1, 2 ...
//
// The warp's ring in shared memory has a byte for each of RING non-zeros. A one in the refinement
// adds 1 to the byte of the next zero, which has as many zeros before it; so there is work for ones
// only. Each lane takes one codeword at a time, as far as the ring has room for their zeros.
//
// Whatever bytes a refinement holds, a non-zero has some magnitude: 1 after the refinement's end,
// and where there is none.

typedef Entry<REFINEMENT_ENTRY, REFINEMENT_SLOTS> RefinementEntry;

// Besides a step's non-zeros, the ring has room for at least one entry of 255 zeros.
static_assert(32 * CODEWORDS * SLOTS + 255 + 16 <= RING, "too many non-zeros in a step");

// A segment's refinement that is about to be read, as one lane sees it.
struct Refinement {
    const u32* words;
    int at;        // the lowest bit of this lane's next codeword
    int bits;      // of the codewords that are left
    u32 codeword;  // the next one, and higher bits

    Refinement() = default;
    __device__ Refinement(const Stack& stack, int expert, int segment) {
        const Place place = stack.place(expert, REFINEMENT, segment);
        words = place.words;
        bits = place.end - place.begin;
        at = place.end - (int)(threadIdx.x % 32 + 1) * REFINEMENT_WIDTH;
        load();
    }
    __device__ void load() {
        const u32* from = words + (at >> 5);
        codeword = __funnelshift_r(__ldg(from), __ldg(from + 1), at);
    }
    __device__ void skip(int codewords) {
        at -= codewords * REFINEMENT_WIDTH;
        bits -= codewords * REFINEMENT_WIDTH;
        load();
    }
};

struct Magnitudes {
    Refinement refinement;
    const RefinementEntry* table;
    u8* ring;
    u32 made;   // non-zeros whose magnitudes are in the ring
    u32 clear;  // non-zeros whose bytes are made or cleared, a multiple of 16

    __device__ Magnitudes(const Refinement& refinement, const Tables& tables, u8* shared)
        : refinement(refinement), table((const RefinementEntry*)tables.refinement),
          ring(shared + RINGS_AT + threadIdx.x / 32 * RING), made(0), clear(0) {}

    // By all warps before the first walk: bytes of non-zeros that are not there are read, too.
    __device__ static void clear_ring(u8* shared) {
        for (int v = threadIdx.x % 32; v < RING / 16; v += 32) {
            ((uint4*)(shared + RINGS_AT + threadIdx.x / 32 * RING))[v] = uint4{0, 0, 0, 0};
        }
        __syncwarp();
    }

    // |q| of the segment's non-zero `number`; any number if it was not provided for.
    __device__ float operator[](u32 number) const {
        return __uint_as_float(0x4b000000u | ring[number % RING]) - 8388607.0f;  // 2^23 - 1
    }

    // Decode the magnitudes of non-zeros before `after`, when those before `from` are no longer
    // needed. By all lanes.
    __device__ void provide(u32 from, u32 after) {
        while (made < after) {
            const u32 codeword = refinement.codeword & ((1u << REFINEMENT_WIDTH) - 1);
            const RefinementEntry entry = table[codeword];
            const u32 zeros = entry.length() - entry.ones(), upto = sum_upto_lane(zeros);
            const u32 before = made + upto - zeros;
            // The next zero's byte is cleared, too, in a vector of 16.
            const bool taken = refinement.bits > 0 && made + upto + 16 <= from + RING;
            const int codewords = __popc(__ballot_sync(FULL, taken));
            const u32 all = __shfl_sync(FULL, upto, max(codewords, 1) - 1);
            made = codewords ? made + all : after;

            __syncwarp();  // what is cleared has been read
            for (u32 v = clear + threadIdx.x % 32 * 16; v <= made; v += 32 * 16) {
                *(uint4*)(ring + v % RING) = uint4{0, 0, 0, 0};
            }
            clear = (made | 15u) + 1;
            __syncwarp();
#pragma unroll
            for (int j = 0; j < REFINEMENT_SLOTS; j++) {
                if (taken && entry.has(j)) {
                    const u32 zero = __dp4a(entry.positions(j / 4), 1u << 8 * (j % 4), before - j);
                    atomicAdd((u32*)ring + zero % RING / 4, 1u << 8 * (zero % 4));
                }
            }
            if (codewords) refinement.skip(codewords);
        }
        __syncwarp();
    }
};
