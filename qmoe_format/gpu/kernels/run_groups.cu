// How a block multiplies groups of a matrix by x from runs of gap codes: it stages x in shared
// memory, then its warps take groups in turn. What takes long is asked for first: offsets, x, and
// words as soon as their offsets are there.

constexpr int X_BYTES = (SLOTS + 1) * LINE_BYTES;

// x is staged 16 bytes at a time, which have so many columns, or the same ones twice or four times.
constexpr int QUARTER = LANES < 4 ? LANES : 4;
constexpr int STEP = THREADS / 8;  // slots that the block writes at a time
constexpr int USED = (COLUMNS + LANES - 1) / LANES;  // slots with columns

struct alignas(16) Four {
    float x[4];
};

template <typename T>
struct alignas(sizeof(T) * QUARTER) Quarter {
    T x[QUARTER];
    __device__ Quarter() = default;
    // `sure`: the columns are there; otherwise some may be beyond the last one.
    __device__ Quarter(const T* from, int column, bool sure) {
        if (sure) {
            *this = *(const Quarter*)(from + column);
        } else {  // all are, or none; no branch, for other loads follow
            *this = *(const Quarter*)(from + (column < COLUMNS ? column : 0));
#pragma unroll
            for (int i = 0; i < QUARTER; i++) {
                if (column >= COLUMNS) x[i] = T{};
            }
        }
    }
};

// Where x comes from: an array. In its place, others say what they load for QUARTER columns, and
// what x is then.
struct Given {
    const X_TYPE* x;

    typedef Quarter<X_TYPE> Loaded;
    static constexpr bool few_registers = true;
    __device__ bool aligned() const { return (u64)x % sizeof(Loaded) == 0; }
    __device__ Loaded load(int column, bool sure) const { return {x, column, sure}; }
    __device__ static float value(const Loaded& loaded, int i) { return to_float(loaded.x[i]); }
    __device__ float at(int column) const { return to_float(x[column]); }
};

// The block copies x to shared memory, times the column scales: a line of zeros, then one for each
// slot, of which every REACH-th is zero. Every warp does this, so each instruction counts.
// `meanwhile` is done while x is on its way, or later if that takes the registers.
template <int first, int parts, typename Source, typename Meanwhile>
__device__ __forceinline__ void stage(const Source& x, const bf16* scale, int column, int slot,
                                      Four* lines, Meanwhile meanwhile) {
    // So many are asked for before one is needed; more would not fit the registers.
    constexpr int AHEAD = 4, NOW = parts < AHEAD ? parts : AHEAD;
    constexpr bool AT_ONCE = Source::few_registers && !COLUMN_SCALES;
    typename Source::Loaded loaded[NOW];
    Quarter<bf16> scales[NOW];
#pragma unroll
    for (int k = 0; k < NOW; k++) {
        const bool sure = (first + k + 1) * STEP * LANES <= COLUMNS;
        const int at = column + (first + k) * STEP * LANES;
        loaded[k] = x.load(at, sure);
        if (COLUMN_SCALES) scales[k] = Quarter<bf16>(scale, at, sure);
    }
    if (first == 0 && AT_ONCE) meanwhile();
#pragma unroll
    for (int k = 0; k < NOW; k++) {
        const int of = slot + (first + k) * STEP;
        Four four;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            four.x[j] = Source::value(loaded[k], j % QUARTER);
            if (COLUMN_SCALES) four.x[j] *= to_float(scales[k].x[j % QUARTER]);
        }
        if ((first + k + 1) * STEP <= USED || of < USED) {
            lines[line_of(of) * 8] = four;
        }
    }
    if constexpr (parts > NOW) {
        stage<first + NOW, parts - NOW>(x, scale, column, slot, lines, meanwhile);
    } else if (!AT_ONCE) {
        meanwhile();
    }
}

// The same if x begins anywhere.
template <typename Source>
__device__ __noinline__ void stage_unaligned(const Source& x, const bf16* scale, float* shared) {
#pragma unroll 1
    for (int i = threadIdx.x; i < COLUMNS * HALVES; i += THREADS) {
        const int column = i / HALVES, slot = column / LANES;
        float value = x.at(column);
        if (COLUMN_SCALES) value *= to_float(scale[column]);
        shared[line_of(slot) * 32 + i % HALVES * LANES + column % LANES] = value;
    }
}

template <typename Source, typename Meanwhile>
__device__ __forceinline__ void stage_x(const Source& x, const bf16* scale, u8* shared,
                                        Meanwhile meanwhile) {
    Four* const lines = (Four*)shared + threadIdx.x % 8;
    const int slot = threadIdx.x / 8;
    if (COLUMNS % QUARTER == 0 && x.aligned()) {
        const int column = slot * LANES + threadIdx.x % 8 * 4 % LANES;
        stage<0, (USED + STEP - 1) / STEP>(x, scale, column, slot, lines, meanwhile);
#pragma unroll 1
        for (int i = REACH * slot; i < line_of(USED); i += REACH * STEP) lines[i * 8] = {};
#pragma unroll 1
        for (int i = line_of(USED) + slot; i <= SLOTS; i += STEP) lines[i * 8] = {};
    } else {
        meanwhile();
#pragma unroll 1
        for (int i = slot; i <= SLOTS; i += STEP) lines[i * 8] = {};
        __syncthreads();
        stage_unaligned(x, scale, (float*)shared);
    }
}

// Groups `from` to `to` of an expert, by the warps of a block.
template <typename Source>
__device__ __forceinline__ void multiply_groups(const Stack& stack, int expert, int from, int to,
                                                const Source& x, Y_TYPE* y, u32 ring, u8* shared) {
    const int lane = threadIdx.x % 32, half = lane / LANES;
    int number = from + threadIdx.x / 32;
    Group next = {};
    if (number < to) next = Group(stack, expert, number);
    const u32* const words = stack.words + stack.bases[expert] * 32;
    const bf16* const scale = stack.column_scale + (u64)expert * COLUMNS;
    Codes codes = {};
    stage_x(x, scale, shared, [&] {
        if (number < to) {
            codes = Codes(words, next);
            next.load_rest(stack, expert, number);
        }
    });
    __syncthreads();
    for (; number < to; number += THREADS / 32) {
        const Group group = next;
        const bool more = number + THREADS / 32 < to;
        if (more) {
            next = Group(stack, expert, number + THREADS / 32);
            next.load_rest(stack, expert, number + THREADS / 32);
        }
        float sums[2] = {};  // in turn: so an addition need not wait for the one before
        Path{group.start * 4 - X_BYTES, ring}.follow(
            codes, group,
            [&] {
                if (more) codes = Codes(words, next);
            },
            [&](int code, int place, bool there) {
                const float x = *(const float*)(shared + X_BYTES + place);
                if (there) sums[code % 2] += x;
            });
        float sum = (sums[0] + sums[1]) * group.scale;
#pragma unroll
        for (int distance = LANES; distance > 0; distance /= 2) {
            sum += __shfl_xor_sync(FULL, sum, distance);
        }
        const bool there = number * ROWS + half / 2 < stack.rows;
        if (lane % (2 * LANES) == 0 && there) y[group.row] = from_float<Y_TYPE>(sum);
    }
}
