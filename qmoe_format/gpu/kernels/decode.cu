// The weights as bf16, fp16 or fp32, exact to the bit [V-1] to [V-3].
//
// A warp decodes its segment through a window of WINDOW bytes in shared memory: zeros first, then
// the non-zeros, then out to global memory 16 bytes per lane. Windows begin at multiples of 16
// bytes in global memory, wherever the segment begins:
//
//     global   . . . . | . . s s | s s s s | s s . .        s: the segment's weights
//     windows          '-- first ---------'-- last --       (here of two vectors of 16 bytes)

typedef decltype(bits_of(Y_TYPE())) Bits;

constexpr int VECTOR = 16 / sizeof(Bits), LENGTH = WINDOW / sizeof(Bits);  // in weights

// A visitor of a walk. A range is the part of one row that is in the window.
struct Window {
    static constexpr u32 BYTES = sizeof(Bits);
    const Stack& stack;
    Bits* window;
    Bits* out;     // where the window's first weight goes, perhaps before the segment's first
    int expert, row, after;
    int column;    // of the range's first weight
    int skip;      // weights of the window before the segment
    int filled;    // weights of the window before the range
    u32 span;
    Values values;
    Bits low, high;  // the row's weights of magnitude 1

    __device__ Window(const Stack& stack, int expert, int number, Values first, u8* shared, Bits* y)
        : stack(stack), window((Bits*)shared), expert(expert), row(number * stack.rows_per_segment),
          after(stack.first_row(number + 1)), column(0) {
        out = y + (u64)row * stack.columns;
        skip = filled = (int)((u64)out % 16) / (int)sizeof(Bits);
        out -= skip;
        start_row(first);
        start();
    }
    __device__ bool done() const { return row == after; }

    __device__ void start_row(Values of_row) {
        values = of_row;
        low = bits_of(from_float<Y_TYPE>(values.low));
        high = bits_of(from_float<Y_TYPE>(values.high));
    }
    __device__ void start() {
        span = BYTES * (u32)min(stack.columns - column, LENGTH - filled);
    }

    __device__ void nonzero(bool there, u32 byte, bool minus, float magnitude) {
        if (!there) return;
        Bits bits = minus ? low : high;
        if (REFINED || COLUMN_SCALES) {
            float value = minus ? values.low : values.high;
            if (REFINED) value = multiply(value, magnitude);
            if (COLUMN_SCALES) {
                const bf16* scales = stack.column_scales(expert) + column;
                value = multiply(value, to_float(scales[byte / BYTES]));
            }
            bits = bits_of(from_float<Y_TYPE>(value));
        }
        window[filled + byte / BYTES] = bits;
    }

    __device__ void next() {
        filled += (int)(span / BYTES);
        column += (int)(span / BYTES);
        if (column == stack.columns) {
            column = 0;
            row++;
            if (!done()) start_row(stack.row_values(expert, row));
        }
        if (filled == LENGTH || done()) write();
        start();
    }

    __device__ void write() {
        __syncwarp();
        for (int v = threadIdx.x % 32; v * VECTOR < filled; v += 32) {
            const int first = v * VECTOR;
            uint4* vector = (uint4*)(window + first);
            if (first >= skip && first + VECTOR <= filled) {
                *(uint4*)(out + first) = *vector;
            } else {
                for (int i = max(first, skip); i < min(first + VECTOR, filled); i++) {
                    out[i] = window[i];
                }
            }
            *vector = uint4{0, 0, 0, 0};
        }
        __syncwarp();
        out += LENGTH;
        skip = filled = 0;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 3) decode(
    // The arrays and sizes of a Stack.
    const u8* segments,        // uint8 [bytes]
    const u32* offsets,        // uint32 [experts, STRINGS, segments + 1]
    const u64* bases,          // uint64 [experts, STRINGS]
    const bf16* row_scale,     // bf16 [experts, rows, SCALES]
    const bf16* column_scale,  // bf16 [experts, columns] if COLUMN_SCALES
    const int* table_of,       // int32 [experts, STRINGS]: where in `tables`, in KiB
    const uint4* tables,       // [KiB, 64]
    int experts, int rows, int columns, int rows_per_segment,
    Y_TYPE* y,    // bf16, fp16 or fp32 [count, rows, columns]
    int first,    // matrix to begin with
    int count) {  // number of matrices
    extern __shared__ unsigned char shared[];
    const Stack stack = {segments, offsets, bases,   row_scale, column_scale,    table_of,
                         tables,   experts, rows,    columns,   rows_per_segment};
    const int warp = threadIdx.x / 32, warps = THREADS / 32;
    u8* window = shared + REST_AT + warp * WINDOW;
    for (int v = threadIdx.x % 32; v < WINDOW / 16; v += 32) {
        ((uint4*)window)[v] = uint4{0, 0, 0, 0};
    }
    Magnitudes::clear_ring(shared);
    for (Share share(count, stack.units()); share.more();) {
        const Share::Part part = share.next();
        const int expert = first + part.matrix;
        const Tables tables = stack.stage_tables(expert, shared);
        __syncthreads();
        Bits* out = (Bits*)y + (u64)part.matrix * rows * columns;
        for (int number = part.from + warp; number < part.to; number += warps) {
            const Segment segment(stack, expert, number);
            Window rows_of(stack, expert, number, segment.values, window, out);
            walk(segment, Magnitudes(segment.refinement, tables, shared), tables.mask, rows_of);
        }
        __syncthreads();  // the next table overwrites this one
    }
}
