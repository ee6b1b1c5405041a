// Masks without Python: every instruction set of this build that runs here, fp32 and fp64 scores, against plain loops.
//
//   masks_test [--require NAME]... [--only TEXT]     as linear_test
//
// This file is compiled with -ffp-contract=off: sums round as the masks' do.
#include <array>
#include <limits>
#include <stdexcept>

#include "cpu/masks.h"
#include "cpu/threads.h"
#include "support.h"

namespace twofour::test {
namespace {

double read_fp64(const void* from) {
  double value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
void write_fp64(void* to, double value) { std::memcpy(to, &value, sizeof value); }
constexpr Type kFp64 = {"fp64", 8, 0x1p-53, read_fp64, write_fp64};

struct Mode {
  const char* name;
  cpu::ScoreType code;
  const Type& type;
};
constexpr Mode kModes[] = {{"fp32", cpu::ScoreType::kFp32, kFp32}, {"fp64", cpu::ScoreType::kFp64, kFp64}};

constexpr double kInf = std::numeric_limits<double>::infinity();

// Numbers of all kinds: `kind` 0 small integers, 1 reals, 2 reals of very different sizes, 3 few values with NaN and
// infinities, 4 the largest and the smallest that there are.
double score(Random& random, const Mode& mode, int kind) {
  const bool wide = mode.code == cpu::ScoreType::kFp64;
  if (kind == 0) return random.integer();
  if (kind == 1) return random.real();
  if (kind == 2) return std::ldexp(random.real(), random.below(120) - 60);
  if (kind == 3) {
    constexpr double kValues[] = {0.0, -0.0, 1, 1, -1, 2, NAN, kInf, -kInf, -NAN};
    return kValues[random.below(10)];
  }
  const double end = wide ? std::numeric_limits<double>::max() : static_cast<double>(std::numeric_limits<float>::max());
  const double tiny = wide ? 0x1p-1074 : 0x1p-149;
  const double values[] = {end, -end, end / 2, tiny, -tiny, 3 * tiny, 0, 1};
  return values[random.below(8)];
}
constexpr int kKinds = 5;

// ---- transposable 2:4 ----------------------------------------------------------------------------------------------

struct Worth {
  int rank;
  double sum;
};
Worth operator+(Worth a, Worth b) { return {a.rank + b.rank, a.sum + b.sum}; }
int compare(Worth a, Worth b) {
  if (a.rank != b.rank) return a.rank < b.rank ? -1 : 1;
  return a.sum < b.sum ? -1 : a.sum > b.sum ? 1 : 0;
}

// A half of a mask: the kept columns of two rows.
struct Half {
  std::array<int, 4> kept;  // i < j, k < l
  std::array<int, 4> columns;
};

std::vector<Half> halves() {
  std::vector<Half> all;  // those whose kept places come first, first
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j)
      for (int k = 0; k < 4; ++k)
        for (int l = k + 1; l < 4; ++l) {
          Half half{{i, j, k, l}, {}};
          for (int c : half.kept) ++half.columns[static_cast<size_t>(c)];
          all.push_back(half);
        }
  return all;
}

// The rule of cpu/masks.h by trying everything: all pairs of halves in the order of their kept places, of which a
// better one replaces the best so far, and a half counts only where none of its columns is worth more.
std::array<uint8_t, 16> best_block(const std::array<double, 16>& block) {
  static const std::vector<Half> all = halves();
  double largest = 0;
  for (double x : block) largest = std::isfinite(x) ? std::max(largest, std::fabs(x)) : largest;
  const double scale = largest > 0x1p1019 ? 0.0625 : 1;
  const auto worth = [&](int row, int column) -> Worth {
    const double x = block[static_cast<size_t>(4 * row + column)];
    if (std::isnan(x)) return {-64, 0};
    if (std::isinf(x)) return {x > 0 ? 1 : -1, 0};
    return {0, x * scale};
  };
  std::vector<Worth> worths[2];
  for (int half = 0; half < 2; ++half) {
    for (const Half& each : all) {
      const auto& c = each.kept;
      worths[half].push_back((worth(2 * half, c[0]) + worth(2 * half, c[1])) +
                             (worth(2 * half + 1, c[2]) + worth(2 * half + 1, c[3])));
    }
  }
  const auto counts = [&](int half, size_t index) {
    for (size_t other = 0; other < all.size(); ++other) {
      const bool better = all[other].columns == all[index].columns && compare(worths[half][other], worths[half][index]) > 0;
      if (better) return false;
    }
    return true;
  };
  bool found = false;
  Worth best{};
  size_t best_upper = 0, best_lower = 0;
  for (size_t upper = 0; upper < all.size(); ++upper) {
    if (!counts(0, upper)) continue;
    for (size_t lower = 0; lower < all.size(); ++lower) {
      bool full = true;
      for (size_t c = 0; c < 4; ++c) full &= all[upper].columns[c] + all[lower].columns[c] == 2;
      if (!full || !counts(1, lower)) continue;
      const Worth now = worths[0][upper] + worths[1][lower];
      if (found && compare(now, best) <= 0) continue;
      found = true;
      best = now;
      best_upper = upper;
      best_lower = lower;
    }
  }
  std::array<uint8_t, 16> mask{};
  for (size_t i = 0; i < 4; ++i) {
    mask[i / 2 * 4 + static_cast<size_t>(all[best_upper].kept[i])] = 1;
    mask[8 + i / 2 * 4 + static_cast<size_t>(all[best_lower].kept[i])] = 1;
  }
  return mask;
}

std::vector<uint8_t> best_blocks(const Rows& scores) {
  std::vector<uint8_t> mask(static_cast<size_t>(scores.rows() * scores.columns()));
  for (int64_t row = 0; row < scores.rows(); row += 4) {
    for (int64_t column = 0; column < scores.columns(); column += 4) {
      std::array<double, 16> block;
      for (size_t i = 0; i < 16; ++i) {
        block[i] = scores.get(row + static_cast<int64_t>(i / 4), column + static_cast<int64_t>(i % 4));
      }
      const std::array<uint8_t, 16> best = best_block(block);
      for (int64_t i = 0; i < 16; ++i) {
        mask[static_cast<size_t>((row + i / 4) * scores.columns() + column + i % 4)] = best[static_cast<size_t>(i)];
      }
    }
  }
  return mask;
}

void transposable_masks_are_the_best(const Mode& mode) {
  Random random(1);
  for (int kind = 0; kind < kKinds; ++kind) {
    for (const int64_t columns : {4, 8, 12, 16, 28, 32, 36, 68}) {
      Rows scores(mode.type, columns == 12 ? 40 : 8, columns, kind % 2 == 0 ? 0 : 3, kind % 3);
      scores.fill([&] { return score(random, mode, kind); });
      const std::vector<uint8_t> expected = best_blocks(scores);
      for (int i = 0; i < cpu::masks_isa_count(); ++i) {
        const char* isa = cpu::masks_isa_name(i);
        Memory mask(expected.size(), columns % 8 == 0 ? Memory::Place::kEnd : Memory::Place::kBegin);
        std::memset(mask.data(), 0x55, mask.size());
        const char* ran = cpu::transposable_2_4({scores.data(), reinterpret_cast<uint8_t*>(mask.data()), mode.code,
                                                 scores.rows(), columns, scores.stride()},
                                                1, isa);
        check(std::string(ran) == isa, "asked for %s, ran %s", isa, ran);
        check(std::memcmp(mask.data(), expected.data(), expected.size()) == 0,
              "%s %s, kind %d, %" PRId64 " columns: not the best mask", isa, mode.name, kind, columns);
      }
    }
  }
}

// ---- transposable, any group ---------------------------------------------------------------------------------------

// Whole numbers and a mask: paths that add a free place, row to column, and remove a kept one, column to row. A path
// back to its beginning that costs less than nothing would be a better mask. (Floyd, Warshall; exact for whole numbers.)
bool has_better_mask(const Rows& scores, const uint8_t* mask, int64_t row0, int64_t column0, int size) {
  const int nodes = 2 * size;
  std::vector<double> cost(static_cast<size_t>(nodes * nodes), kInf);
  const auto at = [&](int from, int to) -> double& { return cost[static_cast<size_t>(from * nodes + to)]; };
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      const double score = scores.get(row0 + i, column0 + j);
      if (mask[(row0 + i) * scores.columns() + column0 + j] != 0) {
        at(size + j, i) = score;
      } else {
        at(i, size + j) = -score;
      }
    }
  }
  for (int k = 0; k < nodes; ++k) {
    for (int i = 0; i < nodes; ++i) {
      for (int j = 0; j < nodes; ++j) at(i, j) = std::min(at(i, j), at(i, k) + at(k, j));
    }
  }
  for (int i = 0; i < nodes; ++i) {
    if (at(i, i) < 0) return true;
  }
  return false;
}

bool is_valid(const uint8_t* mask, int64_t rows, int64_t columns, int keep, int size) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += size) {
      int count = 0;
      for (int i = 0; i < size; ++i) count += mask[row * columns + column + i];
      if (count != keep) return false;
    }
  }
  for (int64_t row = 0; row < rows; row += size) {
    for (int64_t column = 0; column < columns; ++column) {
      int count = 0;
      for (int i = 0; i < size; ++i) count += mask[(row + i) * columns + column];
      if (count != keep) return false;
    }
  }
  return true;
}

void masks_of_other_groups_are_the_best(const Mode& mode) {
  Random random(4);
  constexpr int kGroups[][2] = {{1, 2}, {1, 4}, {2, 4}, {3, 4}, {2, 5}, {3, 7}, {1, 8}, {4, 8}, {7, 8}, {8, 16}, {2, 16},
                                {1, 32}, {16, 32}, {31, 32}};
  int number = 0;
  for (const auto& [keep, size] : kGroups) {
    for (int kind = 0; kind < kKinds; ++kind) {
      ++number;
      Rows scores(mode.type, 2 * size, 3 * size, number % 3, number % 2,
                  number % 4 < 2 ? Memory::Place::kEnd : Memory::Place::kBegin);
      scores.fill([&] { return kind == 1 ? std::floor(random.real() * 1e6) : score(random, mode, kind); });
      Memory one(static_cast<size_t>(scores.rows() * scores.columns())), several(one.size(), Memory::Place::kBegin);
      for (const int threads : {1, 3}) {
        Memory& mask = threads == 1 ? one : several;
        std::memset(mask.data(), 0x55, mask.size());
        cpu::transposable_blocks({scores.data(), reinterpret_cast<uint8_t*>(mask.data()), mode.code, scores.rows(),
                                  scores.columns(), scores.stride()},
                                 keep, size, threads);
      }
      const auto* mask = reinterpret_cast<const uint8_t*>(one.data());
      check(is_valid(mask, scores.rows(), scores.columns(), keep, size), "%d:%d, kind %d: not a mask", keep, size, kind);
      check(std::memcmp(one.data(), several.data(), one.size()) == 0, "%d:%d, kind %d: threads", keep, size, kind);
      for (int64_t row = 0; kind < 2 && row < scores.rows(); row += size) {
        for (int64_t column = 0; column < scores.columns(); column += size) {
          check(!has_better_mask(scores, mask, row, column, size), "%d:%d, kind %d: not the best", keep, size, kind);
        }
      }
    }
  }
}

// The only number worth less than -inf is none.
void nan_is_kept_last_and_infinity_first(const Mode& mode) {
  constexpr int kSize = 8;
  Rows scores(mode.type, kSize, kSize);
  for (int64_t row = 0; row < kSize; ++row) {
    for (int64_t column = 0; column < kSize; ++column) scores.set(row, column, row < 4 ? NAN : column < 4 ? 1e38 : 0);
  }
  scores.set(0, 0, -kInf);
  scores.set(1, 1, kInf);
  scores.set(4, 4, kInf);
  scores.set(5, 0, -kInf);
  Memory memory(kSize * kSize);
  auto* mask = reinterpret_cast<uint8_t*>(memory.data());
  cpu::transposable_blocks({scores.data(), mask, mode.code, kSize, kSize, scores.stride()}, 3, kSize, 1);
  check(is_valid(mask, kSize, kSize, 3, kSize), "a mask");
  check(mask[0] == 1 && mask[kSize + 1] == 1 && mask[4 * kSize + 4] == 1 && mask[5 * kSize] == 0, "NaN and infinities");
}

// ---- groups --------------------------------------------------------------------------------------------------------

struct Pattern {
  int keep, group;
  int64_t shared;
};
constexpr Pattern kPatterns[] = {{2, 4, 1}, {1, 4, 1}, {3, 4, 1}, {1, 2, 1}, {3, 7, 1},  {4, 8, 1},  {2, 9, 1},
                                 {8, 16, 1}, {16, 32, 1}, {31, 32, 1}, {2, 4, 2}, {2, 4, 4}, {3, 7, 3}, {8, 16, 2}};

// The best of each group by looking for the best that is left, again and again.
std::vector<uint8_t> best_groups(const Rows& scores, const Pattern& pattern, bool magnitude) {
  std::vector<uint8_t> mask(static_cast<size_t>(scores.rows() * scores.columns()));
  const auto mark = [&](int64_t row, int64_t column) -> uint8_t& {
    return mask[static_cast<size_t>(row * scores.columns() + column)];
  };
  for (int64_t row = 0; row < scores.rows(); row += pattern.shared) {
    const auto worth = [&](int64_t column) {
      double sum = 0;
      for (int64_t r = row; r < row + pattern.shared; ++r) {
        const double score = magnitude ? std::fabs(scores.get(r, column)) : scores.get(r, column);
        sum = r == row ? score : sum + score;
      }
      return sum;
    };
    for (int64_t group = 0; group < scores.columns(); group += pattern.group) {
      for (int kept = 0; kept < pattern.keep; ++kept) {
        int64_t best = -1;
        for (int64_t column = group; column < group + pattern.group; ++column) {
          if (mark(row, column) != 0) continue;
          const bool better = best < 0 || worth(column) > worth(best) || (std::isnan(worth(best)) && !std::isnan(worth(column)));
          if (better) best = column;
        }
        for (int64_t r = row; r < row + pattern.shared; ++r) mark(r, best) = 1;
      }
    }
  }
  return mask;
}

void groups_keep_their_best(const Mode& mode) {
  Random random(3);
  int number = 0;
  for (const Pattern& pattern : kPatterns) {
    for (const int64_t groups : {1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 300}) {
      const int kind = number++ % kKinds;
      const int64_t columns = groups * pattern.group;
      Rows scores(mode.type, 2 * pattern.shared, columns, number % 2 * 3, number % 3,
                  number % 2 == 0 ? Memory::Place::kEnd : Memory::Place::kBegin);
      scores.fill([&] { return score(random, mode, kind); });
      for (int i = 0; i < cpu::masks_isa_count(); ++i) {
        const char* isa = cpu::masks_isa_name(i);
        for (const bool magnitude : {false, true}) {
          const std::vector<uint8_t> expected = best_groups(scores, pattern, magnitude);
          Memory mask(expected.size(), number % 4 < 2 ? Memory::Place::kEnd : Memory::Place::kBegin);
          std::memset(mask.data(), 0x55, mask.size());
          Rows kept(mode.type, scores.rows(), columns, number % 3), around(mode.type, scores.rows(), columns, number % 3);
          cpu::GroupArgs args = {scores.data(), reinterpret_cast<uint8_t*>(mask.data()), kept.data(), mode.code,
                                 scores.rows(), columns, scores.stride(), kept.stride(), pattern.keep, pattern.group,
                                 pattern.shared, magnitude};
          const char* ran = cpu::best_of_groups(args, 1, isa);
          check(std::string(ran) == isa, "asked for %s, ran %s", isa, ran);
          check(std::memcmp(mask.data(), expected.data(), expected.size()) == 0,
                "%s %s, kind %d, %d:%d, %" PRId64 " rows together, %" PRId64 " groups: not the best", isa, mode.name,
                kind, pattern.keep, pattern.group, pattern.shared, groups);
          bool right = kept.same_around(around);
          for (int64_t row = 0; row < scores.rows(); ++row) {
            for (int64_t column = 0; column < columns; ++column) {
              const bool marked = expected[static_cast<size_t>(row * columns + column)] != 0;
              const char zero[8] = {};
              right &= std::memcmp(kept.at(row, column), marked ? scores.at(row, column) : zero,
                                   static_cast<size_t>(mode.type.size)) == 0;
            }
          }
          check(right, "%s %s, kind %d, %d:%d: what is kept", isa, mode.name, kind, pattern.keep, pattern.group);
        }
      }
    }
  }
}

// ---- all masks -----------------------------------------------------------------------------------------------------

void bits_do_not_depend_on_threads(const Mode& mode) {
  Random random(2);
  Rows scores(mode.type, 516, 520);
  scores.fill([&] { return random.real(); });
  for (int i = 0; i < cpu::masks_isa_count(); ++i) {
    Memory one(static_cast<size_t>(scores.rows() * scores.columns())), several(one.size());
    for (const int threads : {0, 1, 2, 3, 8}) {
      Memory& mask = threads == 0 ? one : several;
      std::memset(mask.data(), 0x55, mask.size());
      cpu::transposable_2_4({scores.data(), reinterpret_cast<uint8_t*>(mask.data()), mode.code, scores.rows(),
                             scores.columns(), scores.stride()},
                            threads, cpu::masks_isa_name(i));
      check(std::memcmp(one.data(), mask.data(), one.size()) == 0, "%s, %d threads", cpu::masks_isa_name(i), threads);
    }
    for (const int threads : {0, 1, 2, 3, 8}) {
      Memory& mask = threads == 0 ? one : several;
      std::memset(mask.data(), 0x55, mask.size());
      cpu::best_of_groups({scores.data(), reinterpret_cast<uint8_t*>(mask.data()), nullptr, mode.code, scores.rows(),
                           scores.columns(), scores.stride(), 0, 2, 4, 4, true},
                          threads, cpu::masks_isa_name(i));
      check(std::memcmp(one.data(), mask.data(), one.size()) == 0, "%s, groups, %d threads", cpu::masks_isa_name(i),
            threads);
    }
  }
}

void names_are_checked(const Mode& mode) {
  std::string message = "no error";
  try {
    cpu::transposable_2_4({nullptr, nullptr, mode.code, 0, 0, 0}, 1, "sse9");
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  const char* expected = "masks have no instruction set 'sse9' on this machine, which has: baseline";
  check(message.find(expected) == 0, "%s", message.c_str());
  const std::string ran = cpu::transposable_2_4({nullptr, nullptr, mode.code, 0, 4, 4}, 1, nullptr);
  check(ran == cpu::default_masks_isa(), "%s ran by default", ran.c_str());
}

constexpr Test<Mode> kTests[] = {
    {"names of instruction sets are checked", names_are_checked},
    {"transposable masks are the best", transposable_masks_are_the_best},
    {"masks of other groups are the best", masks_of_other_groups_are_the_best},
    {"NaN is kept last and infinity first", nan_is_kept_last_and_infinity_first},
    {"groups keep their best", groups_keep_their_best},
    {"bits do not depend on threads", bits_do_not_depend_on_threads},
};

}  // namespace
}  // namespace twofour::test

int main(int argc, char** argv) {
  using namespace twofour;
  return test::run_tests(test::kTests, test::kModes, cpu::masks_isa_count(), cpu::masks_isa_name,
                         cpu::threads_source(), argc, argv);
}
