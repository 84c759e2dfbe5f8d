// One entry of a dictionary, in as few words as possible: the look-up is what the walk waits for.
// `length` is its number of bits, `positions` are those of the ones among them.
//
//     ONE_WORD        positions 0 1 2 (a byte each) | length (6 bits) | ones (2)
//     NIBBLES         length (16) | ones (16);  positions 0 to 3 in the low halves of four bytes,
//                     4 to 7 in the high halves
//     BYTE_POSITIONS  length (16) | ones (16);  a byte per position, in one to seven words

#define ONE_WORD 0
#define NIBBLES 1
#define BYTE_POSITIONS 2

constexpr int position_words(int form, int slots) { return form == NIBBLES ? 1 : (slots + 3) / 4; }

// `slots`: most ones of an entry.
template <int form, int slots>
struct alignas(position_words(form, slots) == 1 ? 8 : 16) Entry {
    u32 about;
    u32 position[position_words(form, slots)];
    __device__ u32 length() const { return about & 0xffu; }
    __device__ u32 ones() const { return about >> 16; }
    __device__ bool has(u32 j) const { return ones() > j; }
    __device__ u32 positions(int word) const {
        return form == NIBBLES ? position[0] >> 4 * word & 0x0f0f0f0fu : position[word];
    }
    __device__ u32 sum() const { return about; }  // length | ones << 16
};

template <int slots>
struct Entry<ONE_WORD, slots> {
    u32 word;
    __device__ u32 length() const { return word >> 24 & 63u; }
    __device__ u32 ones() const { return word >> 30; }
    __device__ bool has(u32 j) const { return word >= (j + 1) << 30; }
    __device__ u32 positions(int) const { return word; }
    __device__ u32 sum() const { return (word >> 24) + (word >> 30) * ((1u << 16) - (1u << 6)); }
};
