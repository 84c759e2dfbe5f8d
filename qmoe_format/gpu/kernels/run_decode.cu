// The weights as bf16, fp16 or fp32, exact to the bit [V-1] to [V-3], from runs of gap codes. A warp
// follows the paths of its group through levels in shared memory, then writes out the rows that they
// make. A level is a byte; a row has lines of LANES:
//
//     lines 0, 1   a byte for each lane: there it stores in place of landings on empty places
//     line 2       slot 0: columns 0, 1, ... LANES - 1
//     line 3       slot 1: the next ones; as in x, every REACH-th slot is one of empty places
//
// In a ternary matrix a place has one landing, so all that a lane does is to store a byte. In others
// it has as many as its magnitude, perhaps by two lanes: each adds 1 to the byte, or takes 1 away.
// A lane does so for all of its codes, wherever they land: it would wait for each branch.

typedef decltype(bits_of(Y_TYPE())) Bits;

constexpr int VECTOR = 16 / sizeof(Bits);             // weights that a lane writes at a time
constexpr int PART = LANES < VECTOR ? LANES : VECTOR;  // of them, levels that lie together
// Weights of 16 bits that depend on nothing but a ternary level are made two at a time: the digits of
// a level choose from the bytes 0, high's two and low's two.
constexpr bool CHOSEN = !REFINED && !COLUMN_SCALES && sizeof(Bits) == 2 && PART > 1;
constexpr u8 ZERO = REFINED ? 128 : 0x00, PLUS = REFINED ? 129 : 0x21, MINUS = REFINED ? 127 : 0x43;

template <typename T, int size>
struct alignas(sizeof(T) * size) Several {
    T of[size];
};

constexpr auto word() {
    if constexpr (PART >= 4) return u32();
    else if constexpr (PART == 2) return u16();
    else return u8();
}
typedef decltype(word()) Word;
typedef Several<Word, PART / sizeof(Word)> Part;

// What a row's weights have in common.
struct Row {
    const u8* levels;
    float low, high;           // the weights of levels -1 and +1
    const bf16* column_scale;  // of the expert

    // Of level `i` in a word. The zero is chosen before rounding: after it, the compiler would make a
    // branch of that.
    __device__ Bits weight(u32 word, int i, bf16 scale) const {
        const u32 level = word >> 8 * i & 0xffu;
        bool zero = level == ZERO;
        float value = level == MINUS ? low : high;
        if (REFINED) {
            // 2^23 plus the byte, less 2^23 + 128.
            const u32 bits = __byte_perm(word, 0x4b000000u, 0x7440u | i);
            const float number = __uint_as_float(bits) - 8388736.0f;
            zero = number == 0.0f;
            value = multiply(number < 0.0f ? negative(low) : high, number);
        }
        if (COLUMN_SCALES) value = multiply(value, to_float(scale));
        return bits_of(from_float<Y_TYPE>(zero ? 0.0f : value));
    }
    // The levels of columns from `column` on.
    template <typename T>
    __device__ T load(int column) const {
        const int at = (1 + line_of(column / LANES)) * LANES + column % LANES;
        return *(const T*)(levels + at);
    }
    // By all lanes.
    __device__ void write(Bits* out, int columns) const {
        const int lane = threadIdx.x % 32;
        if (columns % VECTOR || (u64)out % 16) {
            for (int c = lane; c < columns; c += 32) {
                out[c] = weight(load<u8>(c), 0, COLUMN_SCALES ? column_scale[c] : bf16{});
            }
            return;
        }
        const u32 both = (u32)bits_of(from_float<Y_TYPE>(low)) << 16 |
                         (u32)bits_of(from_float<Y_TYPE>(high));
        for (int c = VECTOR * lane; c < columns; c += VECTOR * 32) {
            Several<Bits, VECTOR> vector;
            Several<bf16, VECTOR> scales = {};
            if (COLUMN_SCALES) scales = *(const Several<bf16, VECTOR>*)(column_scale + c);
#pragma unroll
            for (int p = 0; p < VECTOR; p += PART) {
                const Part part = load<Part>(c + p);
#pragma unroll
                for (int i = 0; i < PART; i++) {
                    const u32 word = part.of[i / sizeof(Word)];
                    const int at = i % sizeof(Word);
                    if (!CHOSEN) {
                        vector.of[p + i] = weight(word, at, scales.of[p + i]);
                    } else if (i % 2 == 0) {
                        const u32 choice = word >> 8 * at;
                        ((u32*)vector.of)[(p + i) / 2] = __byte_perm(both << 8, both >> 24, choice);
                    }
                }
            }
            *(Several<Bits, VECTOR>*)(out + c) = vector;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) decode(
    const u32* offsets,        // uint32 [experts, groups + 1]: the first code of each group
    const u16* starts,         // uint16 [experts, groups, 32]: 32 * (slot + 1) + bank
    const u16* order,          // uint16 [experts, rows]: the rows, group after group
    const u64* bases,          // uint64 [experts]: the first line of each matrix
    const u32* words,          // uint32 [lines, 32]
    const bf16* row_scale,     // bf16 [experts, rows, SCALES], in that order
    const bf16* column_scale,  // bf16 [experts, columns] if COLUMN_SCALES
    int experts, int rows, int columns,
    Y_TYPE* y,    // bf16, fp16 or fp32 [count, rows, columns]
    int first,    // matrix to begin with
    int count) {  // number of matrices
    extern __shared__ unsigned char shared[];
    const Stack stack = {offsets, starts, order, bases,
                         words, row_scale, column_scale, experts, rows};
    const int lane = threadIdx.x % 32, half = lane / LANES, groups = stack.groups();
    const u64 warp = ((u64)blockIdx.x * THREADS + threadIdx.x) / 32;
    if (warp >= (u64)count * groups) return;
    const int matrix = (int)(warp / groups), number = (int)(warp % groups), expert = first + matrix;
    Group group(stack, expert, number);
    group.load_rest(stack, expert, number);
    Codes codes(words + bases[expert] * 32, group);

    const int lines = slots_of(columns) + 1, row_bytes = (1 + lines) * LANES;
    u8* const levels = shared + threadIdx.x / 32 * ROWS * row_bytes;
    for (int v = lane; v < ROWS * row_bytes / 16; v += 32) {
        const u32 four = ZERO * 0x01010101u;
        ((uint4*)levels)[v] = uint4{four, four, four, four};
    }
    __syncwarp();
    const int end = (half / 2 + 1) * row_bytes;  // of the lane's row; places are relative to it
    const int spare = half % 2 * LANES + lane % LANES - row_bytes;
    const u32 start = group.start / 32 * LANES + group.start % LANES, one = half % 2 ? -1 : 1;
    Path{start - lines * LANES, (u32)((lines - 1) * LANES - 1)}.follow(
        codes, group, [] {},
        [&](int, int place, bool there) {
            const bool level = there && !reach_divides((u32)(place + lines * LANES) / LANES);
            const int at = end + (REFINED || level ? place : spare);
            if (REFINED) {
                atomicAdd((u32*)(levels + (at & ~3)), level ? one << 8 * (at & 3) : 0);
            } else {
                levels[at] = half % 2 ? MINUS : PLUS;
            }
        });
    __syncwarp();
    Bits* const out = (Bits*)y + (u64)matrix * rows * columns;
    for (int r = 0; r < ROWS && number * ROWS + r < rows; r++) {
        const Row row = {levels + r * row_bytes,
                         __shfl_sync(FULL, group.scale, (2 * r + 1) * LANES),
                         __shfl_sync(FULL, group.scale, 2 * r * LANES),
                         column_scale + (u64)expert * columns};
        row.write(out + (u64)__shfl_sync(FULL, group.row, 2 * r * LANES) * columns, columns);
    }
}
