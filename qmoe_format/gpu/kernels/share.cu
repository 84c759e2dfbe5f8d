// A block's share of the work: `units` (segments, or rows) of each of `matrices`, one after
// another. Every block has equally much, in parts that belong to one matrix each.
struct Share {
    u64 begin, end;
    int units;
    struct Part {
        int matrix, from, to;
    };
    __device__ Share(int matrices, int units) : units(units) {
        const u64 work = (u64)matrices * units;
        begin = work * blockIdx.x / gridDim.x;
        end = work * (blockIdx.x + 1) / gridDim.x;
    }
    __device__ bool more() const { return begin < end; }
    __device__ Part next() {
        const int from = (int)(begin % units), matrix = (int)(begin / units);
        const int to = (int)min(end - begin + from, (u64)units);
        begin += to - from;
        return {matrix, from, to};
    }
};
