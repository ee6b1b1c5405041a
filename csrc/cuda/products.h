// The products of each dtype: what mma.sp multiplies and sums.
#pragma once

#include "cuda/layout.h"
#include "cuda/ptx.h"

namespace twofour::cuda {

constexpr int kTokens = 8;  // of the right operand of mma.sp

// What a lane has of 16 rows and a chunk, as mma.sp takes it: values by step, and a word of metadata.
template <int kSteps>
struct Operand {
  uint4 values[kSteps];
  uint32_t metadata;
};

#define TWOFOUR_PRODUCTS_OF(name, SumType, itemsize, instruction)                                                         \
  struct name {                                                                                                           \
    using Sum = SumType;                                                                                                  \
    static constexpr int kItemsize = itemsize, kWeightItemsize = itemsize;                                                \
    template <int kSelector>                                                                                              \
    TWOFOUR_DEVICE static void multiply(Sum (&sums)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {      \
      instruction<kSelector>(sums, a, b, metadata);                                                                       \
    }                                                                                                                     \
    struct Selectors {};                                                                                                  \
    TWOFOUR_DEVICE static Selectors selectors(int) { return {}; }                                                         \
    TWOFOUR_DEVICE static auto operand(const Operand<steps_of(itemsize)>& loaded, Selectors) { return loaded; }           \
    TWOFOUR_BOTH static constexpr int piece(int i) { return i; }                                                          \
  };
TWOFOUR_PRODUCTS_OF(Bf16Products, float, 2, multiply_bf16)
TWOFOUR_PRODUCTS_OF(Fp16Products, float, 2, multiply_fp16)
TWOFOUR_PRODUCTS_OF(Int8Products, int32_t, 1, multiply_int8)
#if defined(TWOFOUR_MULTIPLIES_E4M3)
TWOFOUR_PRODUCTS_OF(E4m3Products, float, 1, multiply_e4m3)
#endif

// e4m3 weights and inputs of 16 bits: weights become 16 bits, each of its number, and mma.sp multiplies a chunk in two steps.
//
// The order of the groups of a step is free, as long as weights, metadata and inputs have the same. Lane q of four holds
// groups 2 q and 2 q + 1 of the eight of a step, and mma.sp wants of it places q and q + 4:
//
//   lane             0        1        2        3
//   holds groups     0 1      2 3      4 5      6 7
//   multiplies       0 . 2    1 . 3    4 . 6    5 . 7      at places q . q + 4
//
// So neighbours swap a group, one shuffle for both rows of a step. Places 0 to 7 then are groups 0 1 4 5 2 3 6 7: of
// inputs, 16 bytes are two groups, and load_matrices takes pieces 0 2 1 3; of metadata, a byte is two groups, and lane 2 s
// of four takes bytes 0 and 2, lane 2 s + 1 bytes 1 and 3, of row g from bit 0 and of row g + 8 from bit 16. The layout has
// these in lanes 2 s and 2 s + 1, each of one row: they swap words.
template <class Products, bool kBf16>
struct E4m3Weights : Products {
  static constexpr int kWeightItemsize = 1;

  // Of byte_permute, in even lanes and in odd ones.
  struct Selectors {
    uint32_t words, sent, upper, lower;
  };
  TWOFOUR_DEVICE static Selectors selectors(int lane) {
    const bool odd = lane % 2 != 0;
    return {opaque(odd ? 0x3175u : 0x6420u), opaque(odd ? 0x5410u : 0x7632u), opaque(odd ? 0x3254u : 0x5410u),
            opaque(odd ? 0x3276u : 0x7610u)};
  }

  TWOFOUR_DEVICE static Operand<2> operand(const Operand<1>& loaded, const Selectors& of) {
    const uint4& v = loaded.values[0];
    return {{step_of(v.x, v.y, of), step_of(v.z, v.w, of)},
            byte_permute(loaded.metadata, shuffle_xor(loaded.metadata, 1), of.words)};
  }

  // Of what is loaded of row g, and of row g + 8.
  TWOFOUR_DEVICE static uint4 step_of(uint32_t upper, uint32_t lower, const Selectors& of) {
    const uint32_t others = shuffle_xor(byte_permute(upper, lower, of.sent), 1);
    const uint2 first = four_of(byte_permute(upper, others, of.upper)), second = four_of(byte_permute(lower, others, of.lower));
    return {first.x, second.x, first.y, second.y};
  }

  TWOFOUR_DEVICE static uint2 four_of(uint32_t four) {
    const uint2 halves = four_fp16_of_e4m3(four);
    return kBf16 ? uint2{two_bf16_of_fp16(halves.x), two_bf16_of_fp16(halves.y)} : halves;
  }

  TWOFOUR_BOTH static constexpr int piece(int i) { return i % 2 * 2 + i / 2; }
};
using E4m3Bf16Products = E4m3Weights<Bf16Products, true>;
using E4m3Fp16Products = E4m3Weights<Fp16Products, false>;

}  // namespace twofour::cuda
