// A stack of int-dict matrices in the GPU's memory, as int_dict_packing.py lays it out.

typedef Entry<ENTRY, SLOTS> MaskEntry;

enum { MASK, REFINEMENT };  // the strings of a segment
constexpr int STRINGS = REFINED ? 2 : 1;

// Shared memory: the tables of both dictionaries, RING bytes for each warp's magnitudes, and what
// else a kernel needs.
constexpr int RINGS_AT = TABLE_SHARED + REFINEMENT_TABLE_SHARED;
constexpr int REST_AT = RINGS_AT + THREADS / 32 * RING;

// The values of levels -1 and +1 [V-1].
struct Values {
    float low, high;
};

// Where one string of a segment is: bits `begin` to `end` of `words`.
struct Place {
    const u32* words;
    int begin, end;
};

// The tables of an expert's dictionaries.
struct Tables {
    const MaskEntry* mask;
    const void* refinement;
};

// The arrays and sizes; for shapes, see the parameters of the kernels.
struct Stack {
    const u8* segments;
    const u32* offsets;
    const u64* bases;
    const bf16 *row_scale, *column_scale;
    const int* table_of;
    const uint4* tables;
    int experts, rows, columns, rows_per_segment;

    __device__ int units() const { return (rows - 1) / rows_per_segment + 1; }
    __device__ int first_row(int segment) const {
        return segment < units() ? segment * rows_per_segment : rows;
    }
    __device__ Values row_values(int expert, int row) const {
        const bf16* scales = row_scale + ((u64)expert * rows + row) * SCALES;
        const float high = to_float(scales[SCALES - 1]);
        return {SCALES == 2 ? to_float(scales[0]) : negative(high), high};
    }
    __device__ const bf16* column_scales(int expert) const {
        return column_scale + (u64)expert * columns;
    }
    __device__ Place place(int expert, int string, int segment) const {
        const u64 which = (u64)expert * STRINGS + string;
        const u32* offset = offsets + which * (units() + 1) + segment;
        const u64 first = bases[which] + offset[0];
        const int begin = 8 * (int)(first & 3u);
        const int end = begin + 8 * (int)(offset[1] - offset[0]);
        return {(const u32*)(segments + (first & ~3ull)), begin, end};
    }
    // The block copies a table to shared memory, or leaves it where it is. A barrier has to follow.
    template <int bytes>
    __device__ const uint4* stage_table(int expert, int string, u8* shared) const {
        const uint4* table = tables + (u64)table_of[(u64)expert * STRINGS + string] * 64;
        if constexpr (bytes > 0) {
#pragma unroll 4
            for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
                ((uint4*)shared)[i] = table[i];
            }
            table = (const uint4*)shared;
        }
        return table;
    }
    __device__ Tables stage_tables(int expert, u8* shared) const {
        const uint4* mask = stage_table<TABLE_SHARED>(expert, MASK, shared);
        if (!REFINED) return {(const MaskEntry*)mask, nullptr};
        shared += TABLE_SHARED;
        return {(const MaskEntry*)mask,
                stage_table<REFINEMENT_TABLE_SHARED>(expert, REFINEMENT, shared)};
    }
};
