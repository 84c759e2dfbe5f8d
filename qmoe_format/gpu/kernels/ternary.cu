// In place of refinement.cu where no expert has a refinement: every magnitude is 1.

struct Refinement {
    Refinement() = default;
    __device__ Refinement(const Stack&, int, int) {}
};

struct Magnitudes {
    __device__ Magnitudes(const Refinement&, const Tables&, u8*) {}
    __device__ static void clear_ring(u8*) {}
    __device__ float operator[](u32) const { return 1.0f; }
    __device__ void provide(u32, u32) {}
};
