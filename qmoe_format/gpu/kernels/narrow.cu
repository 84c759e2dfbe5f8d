// Numbers of experts in 32 bits; -1 for those that do not fit.

extern "C" __global__ void narrow(
    const int64* wide,  // int64 [size]
    int* numbers,       // int32 [size]
    int size) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) numbers[i] = wide[i] == (int)wide[i] ? (int)wide[i] : -1;
}
