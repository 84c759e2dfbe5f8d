// A stack of int-group matrices (SPEC.md section 8) in the GPU's memory, as int_group_packing.py
// lays it out.

constexpr int RUN = 32;  // columns that a lane takes at a time; they share a scale
constexpr int HALF = 1 << (BITS - 1);

// The codes of a run. A row's last run may end after the row: with codes of the next row, or with
// bytes of the guard.
struct alignas(BITS == 3 ? 4 : BITS == 2 ? 8 : 16) Codes {
    u32 words[BITS];
    __device__ u32 operator[](int i) const {
        const int word = i * BITS / 32, shift = i * BITS % 32;
        const u32 bits = shift + BITS > 32 ? __funnelshift_r(words[word], words[word + 1], shift)
                                           : words[word] >> shift;
        return bits & ((1u << BITS) - 1);
    }
};

// What the columns of a group share. The weight of code u is level(u) times unit().
struct Group {
    float scale;
    u32 zero;
    __device__ float level(u32 u) const {
        if (!LOG) return __uint_as_float(0x4b000000u | u) - __uint_as_float(0x4b000000u | zero);
        const u32 exponent = u % HALF;  // [G-7]; 2^-127 is subnormal
        const u32 power = exponent < 127 ? (127 - exponent) << 23 : 1u << 22;
        return multiply(scale, __uint_as_float(power | u / HALF << 31));
    }
    __device__ float unit() const { return LOG ? 1.0f : scale; }
    __device__ float weight(u32 u) const {
        if (LOG) return level(u);
        return u == zero ? 0.0f : multiply(level(u), scale);  // [G-6]
    }
};

struct Row {
    const u8* codes;
    const bf16* scales;
    const u8* zero_points;
    int runs_shift;
    __device__ Group group(int run) const {
        const int number = run >> runs_shift;
        return {to_float(scales[number]), ZERO_POINTS ? zero_points[number] : (u32)HALF};
    }
};

// The arrays and sizes; for shapes, see the parameters of the kernels.
struct Stack {
    const u8* codes;
    const bf16* scales;
    const u8* zero_points;
    const u64* bases;
    const int* runs_shift;
    int experts, rows, columns;

    __device__ int units() const { return rows; }
    __device__ int first_row(int unit) const { return unit; }
    __device__ int runs() const { return (columns + RUN - 1) / RUN; }
    __device__ Row row(int expert, int number) const {
        const int shift = runs_shift[expert], groups = (runs() - 1 >> shift) + 1;
        const u64 group = bases[expert] + (u64)number * groups;
        const u64 bytes = ((u64)columns * BITS + 127) / 128 * 16;
        return {codes + ((u64)expert * rows + number) * bytes, scales + group, zero_points + group,
                shift};
    }
};
