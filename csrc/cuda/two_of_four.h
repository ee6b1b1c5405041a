// The larger two of four magnitudes, the lower place where they are equal, and their items: by instructions that do two
// halves of a word at once, for what packs a weight has 40 to spend on a group of four while its bytes come from memory.
//
// Of two pairs each has a larger and a smaller one. Kept are both of a pair if its smaller one is before the larger one of
// the other pair, else the larger one of each. NaN, as its bits lie above those of infinity, comes first here: who ranks it
// below every number looks for it afterwards.
#pragma once

#include "cuda/ptx.h"

namespace twofour::cuda {

// ---- one group, item by item -----------------------------------------------------------------------------------------

// Nibbles by the four bits of a group, its first place the highest.
constexpr uint64_t make_nibbles_of_bits() {
  uint64_t table = 0;
  for (int first = 0; first < 4; ++first) {
    for (int second = first + 1; second < 4; ++second) {
      table |= static_cast<uint64_t>(first | second << 2) << (4 * (8 >> first | 8 >> second));
    }
  }
  return table;
}

TWOFOUR_DEVICE uint32_t nibble_of_bits(uint32_t bits) {
  constexpr uint64_t table = make_nibbles_of_bits();
  return static_cast<uint32_t>(table >> (4 * bits)) & 15u;
}

// Of byte_permute: the two items that a nibble keeps of four of 2 bytes, in two words.
TWOFOUR_BOTH constexpr uint32_t selector_of(uint32_t nibble) {
  return (nibble & 3u) * 0x22 + 0x1010 + (nibble >> 2) * 0x2200;
}

TWOFOUR_DEVICE uint32_t kept_of_two_bytes(uint2 four, uint32_t nibble) {
  return byte_permute(four.x, four.y, selector_of(nibble));
}

// Four items of 1 byte in a word -> the two kept, in the lower half.
TWOFOUR_DEVICE uint32_t kept_of_one_byte(uint32_t four, uint32_t nibble) {
  return byte_permute(four, 0, (nibble & 3u) | (nibble >> 2) << 4 | 0x4400u);
}

// The nibble of the two places with the largest keys, the lower place where keys are equal.
TWOFOUR_DEVICE uint32_t two_largest(const uint32_t (&k)[4]) {
  // A place is kept where fewer than two are before it.
  const uint32_t b01 = k[0] >= k[1], b02 = k[0] >= k[2], b03 = k[0] >= k[3];
  const uint32_t b12 = k[1] >= k[2], b13 = k[1] >= k[3], b23 = k[2] >= k[3];
  const uint32_t kept0 = b01 + b02 + b03 >= 2, kept1 = (1 - b01) + b12 + b13 >= 2, kept2 = (1 - b02) + (1 - b12) + b23 >= 2;
  const uint32_t kept3 = 1 - ((kept0 + kept1 + kept2) >> 1);
  return nibble_of_bits(kept0 << 3 | kept1 << 2 | kept2 << 1 | kept3);
}

// The same of four items of which some are NaN: magnitudes above kLargest, all alike, below every number.
template <int kItemsize, uint32_t kLargest>
TWOFOUR_APART uint32_t two_largest_beside_nan(uint2 four) {
  constexpr int kBits = 8 * kItemsize;
  constexpr uint32_t kMagnitude = (1u << (kBits - 1)) - 1;
  const uint32_t high = kItemsize == 2 ? four.y : four.x >> 16;
  uint32_t keys[4] = {four.x & kMagnitude, four.x >> kBits & kMagnitude, high & kMagnitude, high >> kBits & kMagnitude};
  unroll<4>([&](auto i) { keys[i] = keys[i] > kLargest ? 0 : keys[i] + 1; });
  return two_largest(keys);
}

// ---- four items of 2 bytes -------------------------------------------------------------------------------------------

struct Kept {
  uint32_t selector;  // of byte_permute, for the two words of the group
  uint32_t largest;   // magnitude of each pair, in halves
  uint32_t third;     // no zero where a third magnitude is none
};

TWOFOUR_DEVICE Kept two_of_two_bytes(uint2 four) {
  constexpr uint32_t kMagnitudes = 0x7fff7fff;
  const uint32_t firsts = byte_permute(four.x, four.y, 0x5410) & kMagnitudes;   // places 0 and 2
  const uint32_t seconds = byte_permute(four.x, four.y, 0x7632) & kMagnitudes;  // places 1 and 3
  const uint32_t larger = max_halves(firsts, seconds), smaller = min_halves(firsts, seconds);
  const uint32_t other = byte_permute(larger, 0, 0x1032);
  // The highest bit of a half: the first place of its pair is before the second; a pair's smaller one before the other
  // pair's larger one, which of the upper pair it is only if it is greater.
  const uint32_t first = firsts - seconds + 0x80008000u, both = smaller - other + 0x7fff8000u;
  uint32_t selector = (signs_of<0x3131>(first) & 0x2222u) ^ 0x7632u;
  const uint32_t lower_pair = signs_of<0x1111>(both), upper_pair = signs_of<0x3333>(both);
  selector = (lower_pair & 0x3210u) | (~lower_pair & selector);
  selector = (upper_pair & 0x7654u) | (~upper_pair & selector);
  return {selector, larger, min_halves(smaller, other)};
}

// The nibble of a selector, in the highest bits.
TWOFOUR_DEVICE uint32_t nibble_on_top(uint32_t selector) {
  return (selector & 0x0606u) * (1u << 27 | 1u << 21);  // the words 2 * place of its bytes, 16 bits apart from there on
}

// ---- two groups of 1 byte --------------------------------------------------------------------------------------------

struct KeptOfTwo {
  uint32_t selector;  // of byte_permute, for the words of both groups: the kept bytes of the first below
  uint32_t largest;   // key of each group, in halves: 256 * magnitude and less
  uint32_t third;     // 256 and more where a third magnitude is no zero
};

// Magnitudes in bytes. The place of each lies below it, so that all keys differ, those of lower places above.
TWOFOUR_DEVICE KeptOfTwo two_of_one_byte(uint32_t first, uint32_t second) {
  constexpr uint32_t kUpper = 0xff00ff00;
  const uint32_t lower = byte_permute(first, second, 0x5410), upper = byte_permute(first, second, 0x7632);
  const uint32_t k0 = (lower << 8 & kUpper) | 0x00030003u, k1 = (lower & kUpper) | 0x00020002u;
  const uint32_t k2 = (upper << 8 & kUpper) | 0x00010001u, k3 = upper & kUpper;
  const uint32_t larger = max_halves(k0, k1), smaller = min_halves(k0, k1);
  const uint32_t other_larger = max_halves(k2, k3), other_smaller = min_halves(k2, k3);
  const uint32_t largest = max_halves(larger, other_larger);
  const uint32_t middle = min_halves(larger, other_larger), low = max_halves(smaller, other_smaller);
  const uint32_t next = max_halves(middle, low);
  // 3 less the key's place: the place itself, and four more for the second group.
  constexpr uint32_t kPlaces = 0x00070003;
  const uint32_t one = ~largest & kPlaces, two = ~next & kPlaces;
  const uint32_t both = min_halves(one, two) + max_halves(one, two) * 16;
  return {byte_permute(both, 0, 0x4420), largest, min_halves(middle, low)};
}

// Of two selectors, in the halves of a word: nibbles of their four groups, a byte for each two groups, in bytes 0 and 2.
TWOFOUR_DEVICE uint32_t nibbles_of(uint32_t selectors) {
  const uint32_t places = selectors & 0x33333333u;
  const uint32_t nibbles = (places | places >> 2) & 0x0f0f0f0fu;
  return nibbles | nibbles >> 4;
}

// Absolute values of four bytes; that of -128 is 128.
TWOFOUR_DEVICE uint32_t sizes_of(uint32_t four) {
  const uint32_t negative = four >> 7 & 0x01010101u;
  return (four ^ negative * 255) + negative;
}

// ---- between four lanes ----------------------------------------------------------------------------------------------

// Of four lanes, `kApart` from each other, number w gets nibble w of each as its nibbles 0 .. 3; and likewise of upper halves.
template <int kApart>
TWOFOUR_DEVICE uint32_t turn_nibbles(uint32_t word, uint32_t number) {
  const bool odd = number % 2 != 0;
  const uint32_t two = byte_permute(word, shuffle_xor(word, 2 * kApart), number < 2 ? 0x6240u : 0x3715u);
  const uint32_t other = shuffle_xor(two, kApart), own = odd ? 0xf0f0f0f0u : 0x0f0f0f0fu;
  return (two & own) | (shift_in(other, other, odd ? 28 : 4) & ~own);
}

// The same of the four bytes, of lanes side by side.
TWOFOUR_DEVICE uint32_t turn_bytes(uint32_t word, uint32_t number) {
  const uint32_t two = byte_permute(word, shuffle_xor(word, 2), number < 2 ? 0x5410u : 0x3276u);
  return byte_permute(two, shuffle_xor(two, 1), number % 2 == 0 ? 0x6240u : 0x3715u);
}

}  // namespace twofour::cuda
