// The activation between an expert's inputs and its output: silu(gate) * up.

__device__ __forceinline__ float silu_gate(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}
