// One entry of a dictionary, in as few words as possible: the look-up is what the walk waits for.
// `length` is the number of weights, `positions` are those of the non-zeros among them.
//
//     ONE_WORD        positions 0 1 2 (a byte each) | length (6 bits) | non-zeros (2)
//     NIBBLES         length (16) | non-zeros (16);  positions 0 to 3 in the low halves of four
//                     bytes, 4 to 7 in the high halves
//     BYTE_POSITIONS  length (16) | non-zeros (16);  a byte per position, in one to seven words.
//                     With the signs in the codeword: length (8) | non-zeros (8) | signs (16)

#define ONE_WORD 0
#define NIBBLES 1
#define BYTE_POSITIONS 2

#if ENTRY == ONE_WORD
struct Entry {
    u32 word;
    __device__ u32 length() const { return word >> 24 & 63u; }
    __device__ u32 nonzeros() const { return word >> 30; }
    __device__ bool has(u32 j) const { return word >= (j + 1) << 30; }
    __device__ u32 positions(int) const { return word; }
    __device__ u32 sum() const { return (word >> 24) + (word >> 30) * ((1u << 16) - (1u << 6)); }
    __device__ u32 signs() const { return 0; }
};
#else
#define POSITION_WORDS (ENTRY == NIBBLES ? 1 : (SLOTS + 3) / 4)
struct alignas(POSITION_WORDS == 1 ? 8 : 16) Entry {
    u32 about;
    u32 position[POSITION_WORDS];
    __device__ u32 length() const { return about & 0xffu; }
    __device__ u32 nonzeros() const { return SIGNS_IN_CODEWORD ? about >> 8 & 0xffu : about >> 16; }
    __device__ bool has(u32 j) const { return nonzeros() > j; }
    __device__ u32 positions(int word) const {
        return ENTRY == NIBBLES ? position[0] >> 4 * word & 0x0f0f0f0fu : position[word];
    }
    __device__ u32 sum() const { return SIGNS_IN_CODEWORD ? length() : about; }
    __device__ u32 signs() const { return about >> 16; }
};
#endif
