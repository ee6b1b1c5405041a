// grad_values = (grad.T @ x) at the kept places, with tokens in lanes. Included inside an unnamed namespace.
//
// Both inputs come transposed, a row of tokens for each row of W and each of its columns. Two rows of W against three
// groups: 12 sums stay in registers, each load of the gradient serves six of them, and where the 12 rows of x begin is
// found once for all tokens of a chunk:
//
//   sums[r][2q + i] += grad[row + r][tokens] * x[4 (group + q) + index(row + r, group + q, i)][tokens]
//
// One multiplication per kept value and little more than one load each, which the machine does in the same time. Then
// the lanes are added up, and 16 rows' sums turned into the CPU layout. (One row against six groups needs fewer loads,
// but its x fills the cache with half the tokens: twice as often the lanes are added up. 79 instead of 69 ms.)

constexpr int kBlockGroups = 3;
constexpr int kBlockRows = 2;  // their gradients lie vector by vector: one register addresses both
constexpr int kRowSums = 8;    // room for the 6 sums of a row

// fp32 in the lanes.
struct MultiplyWide {
  static constexpr int kTokensPerVector = kLanes;
  using Vector = F;
  static F load_grad(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static F add_product(F sum, F grad, const char* x) { return fma(grad, load(reinterpret_cast<const float*>(x)), sum); }
};

template <class Multiply, int kGroups>
TWOFOUR_OWN_REGISTERS void grad_rows(const char* x, int64_t pitch, const uint32_t* offsets, const char* grad,
                                     int64_t bytes, float* sums) {
  constexpr int kSums = nm::kKeep * kGroups;
  F acc[kBlockRows][kSums];
  const char* from[kBlockRows][kSums];
  unroll<kGroups>([&](auto q) TWOFOUR_INLINE {
    uint64_t both;  // rows' offsets, i0 * pitch | (i1 * pitch) << 16 each
    __builtin_memcpy(&both, offsets + q * nm::kTileRows, sizeof both);
    const char* group = x + q * nm::kGroup * pitch + bytes;
    from[0][2 * q] = group + (both & 0xffff);
    from[0][2 * q + 1] = group + (both >> 16 & 0xffff);
    from[1][2 * q] = group + (both >> 32 & 0xffff);
    from[1][2 * q + 1] = group + (both >> 48);
  });
  unroll<kBlockRows>([&](auto r) TWOFOUR_INLINE {
    unroll<kSums>([&](auto k) TWOFOUR_INLINE {
      acc[r][k] = zero();
      __asm__("" : "+r"(from[r][k]));  // or the compiler counts up from 0, with one register more than there are
    });
  });
  grad += kBlockRows * bytes;
  __asm__("" : "+r"(grad));
  for (int64_t i = -bytes; i != 0; i += static_cast<int64_t>(sizeof(F))) {  // one register to count and to address
    unroll<kBlockRows>([&](auto r) TWOFOUR_INLINE {
      const typename Multiply::Vector g = Multiply::load_grad(grad + kBlockRows * i + r * static_cast<int>(sizeof(F)));
      unroll<kSums>([&](auto k) TWOFOUR_INLINE { acc[r][k] = Multiply::add_product(acc[r][k], g, from[r][k] + i); });
    });
  }
  unroll<kBlockRows * kRowSums / kLanes>([&](auto b) TWOFOUR_INLINE {
    F v[kLanes];
    unroll<kLanes>([&](auto k) TWOFOUR_INLINE {
      constexpr int row = (b * kLanes + k) / kRowSums, of_row = (b * kLanes + k) % kRowSums;
      if constexpr (of_row < kSums) {
        v[k] = acc[row][of_row];
      } else {
        v[k] = zero();
      }
    });
    store(sums + b * kLanes, sums_of(v));
  });
}

// The name `transpose` is taken inside GradValues.
inline void turn(F (&block)[kLanes]) { transpose(block); }

using GradRows = void (*)(const char*, int64_t, const uint32_t*, const char*, int64_t, float*);
template <class Multiply, int... kIndices>
GradRows grad_rows_of(int64_t groups, Indices<kIndices...>) {
  static constexpr GradRows kFunctions[] = {grad_rows<Multiply, kIndices + 1>...};
  return kFunctions[groups - 1];
}

template <class Item, class Multiply>
struct GradValues {
  template <int kTogether>
  static void transpose(const void* from, int64_t stride, int64_t tokens, int64_t columns, void* to, int64_t pitch) {
    transpose_wide<kTogether>(static_cast<const Item*>(from), stride, tokens, columns, static_cast<char*>(to), pitch,
                              (tokens + kLanes - 1) / kLanes);
  }

  // [16 rows][kRowSums] -> the slots of `groups` cells, added to what earlier chunks left.
  static void finish(const float* rows, int64_t groups, float* sums, Item* out, bool first, bool last) {
    constexpr int64_t kSlots = nm::kTileRows * nm::kKeep;
    float slots[kBlockGroups * kSlots];
    for (int r = 0; r < nm::kTileRows; r += kLanes) {
      for (int k = 0; k < nm::kKeep * groups; k += kLanes) {  // lanes beyond the 6 sums are never stored
        F block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(rows + (r + i) * kRowSums + k);
        turn(block);
        const int count = static_cast<int>(smaller(kLanes, nm::kKeep * groups - k));
        for (int i = 0; i < count; ++i) store(slots + (k + i) * nm::kTileRows + r, block[i]);
      }
    }
    for (int64_t i = 0; i < groups * kSlots; i += kLanes) {
      const F sum = first ? load(slots + i) : add(load(slots + i), load(sums + i));
      store((last ? slots : sums) + i, sum);
    }
    if (last) write(slots, groups, out);
  }

  static void write(const float* slots, int64_t groups, float* out) {
    for (int64_t i = 0; i < groups * nm::kTileRows * nm::kKeep; i += kLanes) store(out + i, load(slots + i));
  }
  static void write(const float* slots, int64_t groups, bf16* out) {
    constexpr int64_t kSlots = nm::kTileRows * nm::kKeep;
    for (int64_t q = 0; q < groups; ++q) {
      store_pairs(out + q * kSlots, slots + q * kSlots, slots + q * kSlots + nm::kTileRows);
    }
  }

  static void values(const GradValuesArgs& args, const void* transposed_x, const void* transposed_grad, int64_t pitch,
                     int64_t row_bytes, float* sums, bool first, bool last, int64_t tile0, int64_t tile1) {
    constexpr int64_t kSlots = nm::kTileRows * nm::kKeep;
    const int64_t groups = nm::groups_of(args.in_features);
    const char* const x = static_cast<const char*>(transposed_x);
    const char* const grad = static_cast<const char*>(transposed_grad);
    float rows[nm::kTileRows * kRowSums + kLanes] = {};  // `finish` reads whole vectors
    uint32_t offsets[kBlockGroups * nm::kTileRows];
    for (int64_t group = 0; group < groups; group += kBlockGroups) {
      const int64_t count = smaller(kBlockGroups, groups - group);
      const GradRows run = grad_rows_of<Multiply>(count, typename IndicesUpTo<kBlockGroups>::Type{});
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t cell = tile * groups + group;
        for (int64_t q = 0; q < count; ++q) {
          row_offsets<1>(args.metadata + (cell + q) * nm::kTileMetadataBytes, static_cast<int>(pitch),
                      offsets + q * nm::kTileRows);
        }
        const int64_t row = tile * nm::kTileRows, held = smaller(nm::kTileRows, args.out_features - row);
        for (int r = 0; r < held; r += kBlockRows) {
          run(x + group * nm::kGroup * pitch, pitch, offsets + r, grad + (row + r) * pitch, row_bytes,
              rows + r * kRowSums);
        }
        for (int64_t k = held * kRowSums; k < nm::kTileRows * kRowSums; ++k) rows[k] = 0;
        finish(rows, count, sums == nullptr ? nullptr : sums + cell * kSlots,
               static_cast<Item*>(args.grad_values) + cell * kSlots, first, last);
      }
    }
  }
};
