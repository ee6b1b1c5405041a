// The search inside one block of groups. Included inside an unnamed namespace, with kVectorBytes set: plain loops over
// the vector extension of gcc and clang. Sums are kept in kPermuteLanes lanes and added up in one order, and nothing is
// multiplied and added at once (-ffp-contract=off), so every instruction set takes the same decisions.

typedef float F __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(float));
constexpr int kParts = kPermuteLanes / kLanes;
constexpr float kNever = -1e30f;  // the gain of a swap inside one group

inline F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
inline F larger(F a, F b) { return a > b ? a : b; }
inline F smaller(F a, F b) { return a < b ? a : b; }

inline uint64_t next(uint64_t* state) {  // xorshift64*
  *state ^= *state >> 12;
  *state ^= *state << 25;
  *state ^= *state >> 27;
  return *state * 0x2545F4914F6CDD1Dull;
}

template <class T>
inline void exchange(T& a, T& b) {
  const T kept = a;
  a = b;
  b = kept;
}

// The keep-th highest of the others, for every member of a group and every row.
void set_thresholds(const PermuteBlock& block, int group) {
  const int32_t* members = block.order + group * block.group;
  float* out = block.thresholds + group * block.group * block.rows;
  for (int64_t r = 0; r < block.rows; r += kLanes) {
    F best[kPermuteMostGroup + 1];  // the keep + 1 highest, sorted
    for (int j = 0; j <= block.keep; ++j) best[j] = F{} - 1.0f;
    for (int i = 0; i < block.group; ++i) {
      F value = load(block.columns + members[i] * block.rows + r);
      for (int j = 0; j <= block.keep; ++j) {
        const F high = larger(best[j], value);
        value = smaller(best[j], value);
        best[j] = high;
      }
    }
    const F last_kept = best[block.keep - 1], first_lost = best[block.keep];
    for (int i = 0; i < block.group; ++i) {
      const F value = load(block.columns + members[i] * block.rows + r);
      store(out + i * block.rows + r, value >= last_kept ? first_lost : last_kept);
    }
  }
}

// sum over rows of max(column, threshold), for kCount slots.
template <int kCount>
inline void sums_of(const float* column, const float* thresholds, int64_t rows, float* sums) {
  F parts[kCount * kParts];
  for (int i = 0; i < kCount * kParts; ++i) parts[i] = F{};
  for (int64_t r = 0; r < rows; r += kPermuteLanes) {
    for (int p = 0; p < kParts; ++p) {
      const F value = load(column + r + p * kLanes);
      for (int i = 0; i < kCount; ++i) {
        parts[i * kParts + p] += larger(value, load(thresholds + i * rows + r + p * kLanes));
      }
    }
  }
  for (int i = 0; i < kCount; ++i) {
    float lanes[kPermuteLanes];
    for (int p = 0; p < kParts; ++p) store(lanes + p * kLanes, parts[i * kParts + p]);
    for (int n = kPermuteLanes / 2; n > 0; n /= 2) {
      for (int lane = 0; lane < n; ++lane) lanes[lane] += lanes[lane + n];
    }
    sums[i] = lanes[0];
  }
}

void set_gains(const PermuteBlock& block, int group) {
  const int slot0 = group * block.group, stride = block.padded_slots();
  const float* thresholds = block.thresholds + slot0 * block.rows;
  float own[kPermuteMostGroup], sums[kPermuteMostGroup];
  for (int i = 0; i < block.group; ++i) {
    sums_of<1>(block.columns + block.order[slot0 + i] * block.rows, thresholds + i * block.rows, block.rows, own + i);
  }
  for (int t = 0; t < block.slots; ++t) {
    const bool same = t / block.group == group;
    const float* column = block.columns + block.order[t] * block.rows;
    int i = 0;
    for (; !same && i + 4 <= block.group; i += 4) sums_of<4>(column, thresholds + i * block.rows, block.rows, sums + i);
    for (; !same && i < block.group; ++i) sums_of<1>(column, thresholds + i * block.rows, block.rows, sums + i);
    for (i = 0; i < block.group; ++i) {
      const float gain = same ? kNever : sums[i] - own[i];
      block.gains[(slot0 + i) * stride + t] = gain;
      block.gains_across[t * stride + slot0 + i] = gain;
    }
  }
}

void prepare(const PermuteBlock& block) {
  const int stride = block.padded_slots();
  for (int s = 0; s < block.slots; ++s) {
    for (int t = block.slots; t < stride; ++t) block.gains[s * stride + t] = block.gains_across[s * stride + t] = kNever;
  }
  for (int g = 0; g < block.slots / block.group; ++g) set_thresholds(block, g);
  for (int g = 0; g < block.slots / block.group; ++g) set_gains(block, g);
}

void swap_channels(const PermuteBlock& block, int s, int t) {
  const int stride = block.padded_slots();
  exchange(block.order[s], block.order[t]);
  set_thresholds(block, s / block.group);
  set_thresholds(block, t / block.group);
  for (int q = 0; q < block.slots; ++q) {  // what the other slots would gain moves with the channels
    exchange(block.gains[q * stride + s], block.gains[q * stride + t]);
    exchange(block.gains_across[s * stride + q], block.gains_across[t * stride + q]);
  }
  set_gains(block, s / block.group);
  set_gains(block, t / block.group);
}

int64_t anneal(const PermuteBlock& block, float temperature, int sweeps, const float* chances, uint64_t* random) {
  const int stride = block.padded_slots();
  // At temperature 0 rounding must not look like a gain, or two swaps would undo each other for ever.
  float smallest = 0.0f;
  if (temperature == 0.0f) {
    for (int t = 0; t < block.slots; ++t) {
      float sum = 0;
      sums_of<1>(block.columns + block.order[t] * block.rows, block.thresholds + t * block.rows, block.rows, &sum);
      smallest = sum > smallest ? sum : smallest;
    }
    smallest *= 1e-6f;
  }
  int64_t taken = 0;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    const int64_t before = taken;
    for (int s = 0; s < block.slots; ++s) {
      const float* gains = block.gains + s * stride;
      const float* across = block.gains_across + s * stride;
      const float* chance = chances + (next(random) >> 52);  // 12 bits: kPermuteChances
      F best[kParts];
      for (int p = 0; p < kParts; ++p) best[p] = F{} + kNever;
      for (int t = 0; t < stride; t += kPermuteLanes) {
        for (int p = 0; p < kParts; ++p) {
          const int at = t + p * kLanes;
          best[p] = larger(best[p], (load(gains + at) + load(across + at)) - temperature * load(chance + at));
        }
      }
      float lanes[kPermuteLanes], most = kNever;
      for (int p = 0; p < kParts; ++p) store(lanes + p * kLanes, best[p]);
      for (int lane = 0; lane < kPermuteLanes; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
      if (!(most > smallest)) continue;
      int t = 0;
      while (t + 1 < block.slots && (gains[t] + across[t]) - temperature * chance[t] != most) ++t;
      swap_channels(block, s, t);
      ++taken;
    }
    if (temperature == 0.0f && taken == before) break;
  }
  return taken;
}
