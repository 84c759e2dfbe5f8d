// y = W x as QMoE's authors published it (arXiv 2310.16795, section 4), written from the paper:
// one warp per row takes the row's 16-bit codewords one after another; 28 lanes unpack and multiply
// the up to 28 levels of one codeword, while lanes 28 to 31 only help with loading.
//
//   dictionary[2 c], [2 c + 1]: codeword c, levels 0 to 13 and 14 to 27
//       bit 31                                                   4 3     0
//       | level 13 (27) | ... | level 1 (15) | level 0 (14), 2 bits  | pairs |    level: 0 zero, 1 low, 2 high
//
// Its 512 KB stay in the L2 cache. WARPS, rows per block, is defined by gpu_anchor.py.

extern "C" __global__ void __launch_bounds__(32 * WARPS) anchor_matvec(
    const unsigned int *__restrict__ dictionary,    // uint32 [2 * 65536]
    const unsigned short *__restrict__ codewords,   // uint16 [offsets[rows]], row after row
    const unsigned int *__restrict__ offsets,       // uint32 [rows + 1]: each row's first codeword
    const unsigned int *__restrict__ low_high,      // uint32 [rows]: bf16 low, bf16 high << 16
    const unsigned short *__restrict__ x,           // bf16 [columns]
    unsigned short *__restrict__ y,                 // bf16 [rows]
    int rows, int columns) {
    extern __shared__ unsigned char shared[];
    float *x_shared = reinterpret_cast<float *>(shared);  // [columns + 32]: the last codeword may
    for (int c = threadIdx.x; c < columns + 32; c += 32 * WARPS)  // reach beyond the row
        x_shared[c] = c < columns ? __uint_as_float((unsigned int)x[c] << 16) : 0.0f;
    __syncthreads();

    int lane = threadIdx.x % 32;
    int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;  // the whole warp
    float low = __uint_as_float(low_high[row] << 16);
    float high = __uint_as_float(low_high[row] & 0xffff0000u);

    // Lanes 28 to 31 read level 27, as lane 27 does, and their sums are dropped.
    bool idle = lane >= 28;
    int half = lane >= 14, shift = 4 + 2 * ((idle ? 27 : lane) % 14);
    const float *x_lane = x_shared + (idle ? 0 : lane);
    float sum = 0.0f;
    int last = offsets[row + 1];
    for (int first = offsets[row]; first < last; first += 32) {
        int mine = first + lane < last ? codewords[first + lane] : 0;
        int count = min(32, last - first);
        for (int group = 0; group < count; group += 8) {
#pragma unroll
            for (int i = group; i < group + 8; i++) {  // eight look-ups in flight
                int codeword = __shfl_sync(0xffffffffu, mine, i);
                unsigned int word = i < count ? dictionary[2 * codeword + half] : 0;
                unsigned int level = word >> shift & 3;
                float weight = level & 1 ? low : level & 2 ? high : 0.0f;
                sum += weight * *x_lane;
                x_lane += 2 * (word & 15);
            }
        }
    }
    if (idle) sum = 0.0f;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) {
        unsigned int bits = __float_as_uint(sum);  // to bf16, nearest, ties to even
        y[row] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}
