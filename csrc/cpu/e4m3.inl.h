// Weights of float8 e4m3 on the kernels of bf16, which holds their numbers exactly: the pairs of a group are widened as they
// come, one cell (16 rows' pairs of a group, 32 bytes) at a time for few tokens, a tile's chunk at a time for many. The cores
// fetch weights ahead in steps of bf16, so each line of these twice. Included inside an unnamed namespace, after the cores.
//
//   e4m3 values   [tiles, groups, 16, 2]     as those of bf16: nm/layout.h

constexpr int kCell = nm::kTileRows * nm::kKeep;

template <class Core>
struct FewE4m3 : Core {
  using WeightItem = E4m3;

  template <int T, int S, class X, class Sums>
  TWOFOUR_INLINE static void group(const E4m3* slots, const uint8_t* metadata, const X* x, Sums& sums) {
    alignas(kCacheLine) bf16 wide[kCell];
    widen_cell(slots, wide);
    Core::template group<T, S>(wide, metadata, x, sums);
  }
};

template <class Core>
struct ManyE4m3 : Core {
  using WeightItem = E4m3;

  static const bf16* widened(const E4m3* values, int groups, bf16* wide) {
    for (int g = 0; g < groups; ++g) widen_cell(values + g * kCell, wide + g * kCell);
    return wide;
  }

  // As the inner loop reads them: bf16 pairs, or floats.
  static const typename Core::Weight* weights(const E4m3* values, int groups, float* converted) {
    if constexpr (sizeof(typename Core::Weight) == sizeof(bf16)) {
      return widened(values, groups, reinterpret_cast<bf16*>(converted));
    } else {
      alignas(kCacheLine) bf16 wide[kMaxChunkGroups * kCell];
      return Core::weights(widened(values, groups, wide), groups, converted);
    }
  }
};
