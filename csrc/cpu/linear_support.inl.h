// What every instruction set's file includes first, inside its unnamed namespace: nothing here may be shared between
// object files, or the linker might keep the copy that needs AVX-512 for a machine without it. For the same reason
// these files call no inline function of the standard library.

using bf16 = uint16_t;  // the upper half of a float
enum class E4m3 : uint8_t {};  // float8: sign, four bits of exponent, three of mantissa; no infinities, NaN where all are set

#if defined(__clang__)
#define TWOFOUR_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TWOFOUR_UNROLL _Pragma("GCC unroll 16")
#endif
#define TWOFOUR_INLINE __attribute__((always_inline))
#define TWOFOUR_OWN_REGISTERS __attribute__((noinline))  // inlined, accumulators compete with the caller and spill

template <int kValue>
struct Constant {
  constexpr operator int() const { return kValue; }
};

template <int... kIndices>
struct Indices {};
template <int kCount, int... kIndices>
struct IndicesUpTo : IndicesUpTo<kCount - 1, kCount - 1, kIndices...> {};
template <int... kIndices>
struct IndicesUpTo<0, kIndices...> {
  using Type = Indices<kIndices...>;
};

template <int... kIndices, class Body>
TWOFOUR_INLINE inline void unroll_over(Indices<kIndices...>, Body&& body) {
  (body(Constant<kIndices>{}), ...);
}

// body(0), body(1), .., body(kCount - 1) with constants. Loops over accumulators are written this way: g++ keeps an
// array in registers only when every index is a constant (a rolled loop was 2x slower).
template <int kCount, class Body>
TWOFOUR_INLINE inline void unroll(Body&& body) {
  unroll_over(typename IndicesUpTo<kCount>::Type{}, body);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What a float8 is in bf16, by its bits without the sign.
struct E4m3Table {
  bf16 entry[128];
  constexpr bf16 widened(uint8_t bits) const { return static_cast<bf16>(entry[bits & 127] | (bits & 128) << 8); }
};
constexpr E4m3Table e4m3_table() {
  E4m3Table table{};
  for (int bits = 8; bits < 127; ++bits) table.entry[bits] = static_cast<bf16>((bits << 4) + (120 << 7));  // biases 7 and 127
  for (int bits = 1; bits < 8; ++bits) {  // bits * 2^-9, which are normal in bf16
    const int high = bits < 2 ? 0 : bits < 4 ? 1 : 2;
    table.entry[bits] = static_cast<bf16>((127 - 9 + high) << 7 | (bits << (7 - high) & 127));
  }
  table.entry[127] = 0x7fff;
  return table;
}
static_assert(e4m3_table().widened(0x38) == 0x3f80 && e4m3_table().widened(0xb8) == 0xbf80, "1 and -1");
static_assert(e4m3_table().widened(0x7e) == 0x43e0 && e4m3_table().widened(0x08) == 0x3c80, "448 and 2^-6");
static_assert(e4m3_table().widened(0x01) == 0x3b00 && e4m3_table().widened(0x07) == 0x3c60, "2^-9 and 7 * 2^-9");
