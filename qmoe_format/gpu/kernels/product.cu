// y = W x for (token, expert) pairs, straight from the codewords. A block's warps take the segments
// of a tile in turn.

// A visitor of a walk: sums row after row. Each lane has sums of its own until the row ends.
template <int TB>
struct Rows {
    static constexpr u32 BYTES = sizeof(Column<TB>);
    const Stack& stack;
    const Tile& tile;
    const u8* x;
    Y_TYPE* y;
    int row, after;
    u32 span;
    Values values;
    // Of values times x. For one token: of magnitudes times x over the plus ones, and separately
    // over the minus ones; the values of +1 and -1 come in at the end of the row.
    float sums[TB];
    float sum_minus;

    __device__ Rows(const Stack& stack, const Tile& tile, const u8* x, Y_TYPE* y, int number,
                    Values first)
        : stack(stack), tile(tile), x(x), y(y), row(stack.first_row(number)),
          after(stack.first_row(number + 1)), span(stack.columns * BYTES), values(first), sums{},
          sum_minus(0.0f) {}
    __device__ bool done() const { return row == after; }

    // No branches: they would keep the loads of other non-zeros waiting. A non-zero that is not
    // there reads the zero after the last column.
    __device__ void nonzero(bool there, u32 byte, bool minus, float magnitude) {
        const Column<TB> column = *(const Column<TB>*)(x + (there ? byte : span));
        if (TB == 1) {
            const float product = magnitude * to_float(column.x[0]);
            if (minus) {
                sum_minus += product;
            } else {
                sums[0] += product;
            }
            return;
        }
        const float value = magnitude * (minus ? values.low : values.high);
#pragma unroll
        for (int t = 0; t < TB; t++) sums[t] += value * to_float(column.x[t]);
    }

    __device__ void next() {
        if (TB == 1) sums[0] = values.high * sums[0] + values.low * sum_minus;
        write_sums(sums, tile, y, stack.rows, row);
        sum_minus = 0.0f;
#pragma unroll
        for (int t = 0; t < TB; t++) sums[t] = 0.0f;
        row++;
        if (!done()) values = stack.row_values(tile.expert, row);
    }
};

template <int TB>
__device__ void run_tile(const Stack& stack, const Tile& tile, Share::Part part, const Call& call,
                         u8* shared) {
    const int warps = blockDim.x / 32;
    int number = part.from + threadIdx.x / 32;
    Segment ahead = {};
    if (number < part.to) ahead = Segment(stack, tile.expert, number);
    const Tables tables = stack.stage_tables(tile.expert, shared);
#if X_SHARED
    const u8* columns = shared + REST_AT;
    stage_x<TB>(tile, call, stack.columns, stack.columns + 1, stack.column_scales(tile.expert),
                shared + REST_AT);
#else
    const u8* columns = (const u8*)(call.x + (u64)tile.pair(0) * (stack.columns + 1));
#endif
    __syncthreads();
    for (; number < part.to; number += warps) {
        const Segment segment = ahead;
        if (number + warps < part.to) ahead = Segment(stack, tile.expert, number + warps);
        Rows<TB> rows(stack, tile, columns, call.y, number, segment.values);
        walk(segment, Magnitudes(segment.refinement, tables, shared), tables.mask, rows);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(
    // The arrays and sizes of a Stack.
    const u8* segments,        // uint8 [bytes]
    const u32* offsets,        // uint32 [experts, STRINGS, segments + 1]
    const u64* bases,          // uint64 [experts, STRINGS]
    const bf16* row_scale,     // bf16 [experts, rows, SCALES]
    const bf16* column_scale,  // bf16 [experts, columns] if COLUMN_SCALES
    const int* table_of,       // int32 [experts, STRINGS]: where in `tables`, in KiB
    const uint4* tables,       // [KiB, 64]
    int experts, int rows, int columns, int rows_per_segment,
    const X_TYPE* x,    // bf16, fp16 or fp32 [pairs / pairs_per_x, columns];
                        // if not X_SHARED, float32 [pairs, columns + 1] from `prepare`
    Y_TYPE* y,          // bf16, fp16 or fp32 [pairs, rows]
    const int* listed,  // int32 [pairs]. LIST: their experts. GROUPS: the pairs, sorted by expert
    const int* tiles,   // int32 [1 + 3 tiles]. GROUPS: how many; expert, first and count of each
    int expert,         // ONE: the expert of all pairs
    int pairs, int pairs_per_x) {
    extern __shared__ unsigned char shared[];
    Magnitudes::clear_ring(shared);
    run_tiles({segments, offsets, bases, row_scale, column_scale, table_of, tables, experts, rows,
               columns, rows_per_segment},
              {x, y, listed, tiles, expert, pairs, pairs_per_x}, shared);
}
