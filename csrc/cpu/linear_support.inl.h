// What every instruction set's file includes first, inside its unnamed namespace: nothing here may be shared between
// object files, or the linker might keep the copy that needs AVX-512 for a machine without it. For the same reason
// these files call no inline function of the standard library.

using bf16 = uint16_t;  // the upper half of a float

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
