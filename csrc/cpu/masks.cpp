// Chooses the instruction set of a mask and cuts the work; 4x4 blocks with scores that vectors do not take.
#include "cpu/masks.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/features.h"
#include "cpu/linear.h"
#include "cpu/work.h"

namespace twofour::cpu {
namespace {

#include "nm/halves.inl.h"

struct Isa {
  const char* name;
  bool (*runs_here)();
  const MaskKernels* kernels;
};

// Plainest first; the last one that runs here is the default.
constexpr Isa kIsas[] = {
    {"baseline", always, &masks_baseline},
#if defined(TWOFOUR_X86)
    {"avx2", has_avx2, &masks_avx2},
    {"avx512", has_avx512, &masks_avx512},
#endif
};

// Scores that a thread takes at a time; a matrix of fewer stays on its own thread.
constexpr int64_t kUnitScores = 1 << 16;

const Isa& find_isa(const std::string& name) {
  std::string here;
  for (const Isa& isa : kIsas) {
    if (!isa.runs_here()) continue;
    if (name == isa.name) return isa;
    here += std::string(here.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("masks have no instruction set '" + name + "' on this machine, which has: " + here);
}

const Isa& chosen_isa() {
  default_isa();  // refuses a TWOFOUR_ISA that names nothing of this machine
  static const Isa* chosen = [] {
    const char* asked = std::getenv("TWOFOUR_ISA");
    const Isa* best = &kIsas[0];
    for (const Isa& isa : kIsas) {
      if (isa.runs_here()) best = &isa;
      if (asked != nullptr && std::strcmp(asked, isa.name) == 0) break;
    }
    return best;
  }();
  return *chosen;
}

// work(begin, end) over `count` things of `scores_each` scores.
template <class Work>
void share_out(int threads, int64_t count, int64_t scores_each, const Work& work) {
  if (count == 0 || scores_each == 0) return;
  const int64_t wanted = (count * scores_each + kUnitScores - 1) / kUnitScores;
  const int64_t units = wanted < count ? wanted : count;
  for_each_unit(threads < 1 ? 1 : threads, units,
                [&](int64_t i) { work(part(count, units, i), part(count, units, i + 1)); });
}

// What a choice keeps: compared by rank (NaN count -64, infinities 1 and -1), then by the sum of the numbers.
struct Worth {
  int rank = -1000;
  double sum = 0;
  int bits = 0;

  bool above(const Worth& other) const { return rank != other.rank ? rank > other.rank : sum > other.sum; }
};

Worth together(const Worth& a, const Worth& b) { return {a.rank + b.rank, a.sum + b.sum, a.bits << 8 | b.bits}; }

}  // namespace

uint32_t transposable_2_4_of_any(const double (&block)[16]) {
  Worth single[16];
  bool large = false;
  for (int i = 0; i < 16; ++i) {
    const double x = block[i];
    single[i] = std::isnan(x) ? Worth{-64, 0} : std::isinf(x) ? Worth{x > 0 ? 1 : -1, 0} : Worth{0, x};
    large |= std::fabs(single[i].sum) > kLargestPlain;
  }
  for (Worth& worth : single) worth.sum *= large ? 0.0625 : 1.0;
  Worth best_halves[2][kKinds];
  for (int lower = 0; lower < 2; ++lower) {
    for (int half = 0; half < kHalves; ++half) {
      Worth rows[2];
      for (int row = 0; row < 2; ++row) {
        const int pair = row == 0 ? half / kPairs : half % kPairs;
        bool started = false;
        for (int c = 0; c < 4; ++c) {
          if ((kPairBits[pair] >> (3 - c) & 1) == 0) continue;
          const Worth& own = single[8 * lower + 4 * row + c];
          rows[row] = started ? together(rows[row], own) : own;
          started = true;
        }
      }
      Worth whole = together(rows[0], rows[1]);
      whole.bits = half_bits(half);
      Worth& best = best_halves[lower][kHalf.kind[half]];
      if (whole.above(best)) best = whole;
    }
  }
  Worth best;
  for (int kind = 0; kind < kKinds; ++kind) {
    const Worth whole = together(best_halves[0][kind], best_halves[1][kHalf.rest[kind]]);
    if (whole.above(best) || (!best.above(whole) && whole.bits > best.bits)) best = whole;
  }
  return static_cast<uint32_t>(best.bits);
}

void soft_2_4(const SoftArgs& args, int threads, const char* isa) {
  const Isa& chosen = isa == nullptr ? chosen_isa() : find_isa(isa);
  const auto kernel = chosen.kernels->soft_2_4[static_cast<int>(args.type)];
  share_out(threads, args.rows, args.columns, [&](int64_t row0, int64_t row1) { kernel(args, row0, row1); });
}

void soft_2_4t(const SoftArgs& args, int threads, const char* isa) {
  const Isa& chosen = isa == nullptr ? chosen_isa() : find_isa(isa);
  const auto kernel = chosen.kernels->soft_2_4t[static_cast<int>(args.type)];
  share_out(threads, args.rows / 4, 4 * args.columns,
            [&](int64_t band0, int64_t band1) { kernel(args, band0, band1); });
}

int64_t count_differences(const uint8_t* one, const uint8_t* other, int64_t count, int threads) {
  constexpr int64_t kPiece = 255;  // a byte counts so far
  std::atomic<int64_t> total{0};
  share_out(threads, (count + kPiece * 64 - 1) / (kPiece * 64), kPiece * 64, [&](int64_t first, int64_t last) {
    int64_t own = 0;
    int64_t at = first * kPiece * 64;
    const int64_t end = last * kPiece * 64 < count ? last * kPiece * 64 : count;
    for (; at + kPiece * 64 <= end; at += kPiece * 64) {
      uint8_t sums[64] = {};
      for (int64_t piece = 0; piece < kPiece; ++piece) {
        for (int lane = 0; lane < 64; ++lane) {
          sums[lane] = static_cast<uint8_t>(sums[lane] + (one[at + 64 * piece + lane] ^ other[at + 64 * piece + lane]));
        }
      }
      for (const uint8_t sum : sums) own += sum;
    }
    for (; at < end; ++at) own += one[at] ^ other[at];
    total += own;
  });
  return total;
}

int masks_isa_count() {
  int count = 0;
  for (const Isa& isa : kIsas) count += isa.runs_here() ? 1 : 0;
  return count;
}

const char* masks_isa_name(int index) {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && index-- == 0) return isa.name;
  }
  throw std::invalid_argument("no such instruction set");
}

const char* default_masks_isa() { return chosen_isa().name; }

const char* transposable_2_4(const MaskArgs& args, int threads, const char* isa) {
  const Isa& chosen = isa == nullptr ? chosen_isa() : find_isa(isa);
  const auto kernel = chosen.kernels->transposable_2_4[static_cast<int>(args.type)];
  share_out(threads, args.rows / 4, 4 * args.columns,
            [&](int64_t band0, int64_t band1) { kernel(args, band0, band1); });
  return chosen.name;
}

const char* best_of_groups(const GroupArgs& args, int threads, const char* isa) {
  const Isa& chosen = isa == nullptr ? chosen_isa() : find_isa(isa);
  const auto kernel = chosen.kernels->best_of_groups[static_cast<int>(args.type)];
  share_out(threads, args.rows / args.shared, args.shared * args.columns,
            [&](int64_t band0, int64_t band1) { kernel(args, band0, band1); });
  return chosen.name;
}

}  // namespace twofour::cpu
