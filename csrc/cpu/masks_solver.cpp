// Transposable masks of any group: the best b-matching of each block, proven by a dual.
//
// A block of size x size scores is a bipartite graph, rows against columns; a mask keeps `keep` edges at every node. It
// starts with the best edges that still fit, is completed by exchanges, and is then improved along alternating cycles, add
// an edge, remove an edge, ... that gain, until there is none (Klein 1967: a flow without negative cycles in its
// residual graph is one of least cost). The labels of the last search are the dual that proves it.
//
// Scores become whole numbers first, so that sums are exact and every cycle is a true gain: x * 2^p, rounded to nearest
// even, with the power p that puts the largest |x| of the block between 2^53 and 2^54. src/twofour/masks/solver.py takes
// the same steps in the same order, so it gives the same mask.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/masks.h"
#include "cpu/work.h"

namespace twofour::cpu {
namespace {

constexpr int kMostSize = 32;
constexpr int kBits = 53;
constexpr int kUnitBlocks = 64;  // that a thread takes at a time

using Wide = __int128;  // for blocks with NaN and infinities

// NaN counts below all that infinities of a block can make up for, an infinity above all numbers.
constexpr Wide kInfinity = Wide{1} << 66, kNan = -2048 * kInfinity;

// Labels below it begin at zero again. A search adds at most 64 edges to a label: none leaves its type.
template <class Number>
constexpr Number kLowLabel = -(Number{1} << (sizeof(Number) == 8 ? 58 : 110));

template <class Number>
class Block {
 public:
  Block(int size, int keep) : size_(size), keep_(keep) {}
  Number& worth(int row, int column) { return worth_[row * kMostSize + column]; }
  bool kept(int row, int column) const { return (rows_[row] >> column & 1u) != 0; }

  void solve() {
    start();
    complete();
    while (improve()) {
    }
  }

 private:
  void toggle(int row, int column) {
    rows_[row] ^= uint32_t{1} << column;
    columns_[column] ^= uint32_t{1} << row;
  }
  bool has_room(uint32_t bits) const { return __builtin_popcount(bits) < keep_; }

  // The best edges first, wherever both ends have room.
  void start() {
    std::memset(rows_, 0, sizeof rows_);
    std::memset(columns_, 0, sizeof columns_);
    int order[kMostSize * kMostSize];
    int count = 0;
    for (int row = 0; row < size_; ++row) {
      for (int column = 0; column < size_; ++column) order[count++] = row * kMostSize + column;
    }
    std::sort(order, order + count, [&](int a, int b) { return worth_[a] != worth_[b] ? worth_[a] > worth_[b] : a < b; });
    for (int i = 0; i < count; ++i) {
      const int row = order[i] / kMostSize, column = order[i] % kMostSize;
      if (has_room(rows_[row]) && has_room(columns_[column])) toggle(row, column);
    }
  }

  // A row and a column with room have their edge kept (start() would have taken it), so both gain by an exchange: (row,
  // other column) and (other row, column) for (other row, other column), the exchange that costs least. There is one:
  // another column without the row is full, so it has more rows than the column with room has.
  void complete() {
    for (int row = 0; row < size_; ++row) {
      while (has_room(rows_[row])) {
        int column = 0;
        while (!has_room(columns_[column])) ++column;
        int best_row = -1, best_column = -1;
        Number best = 0;
        for (int r = 0; r < size_; ++r) {
          if (kept(r, column)) continue;
          for (int c = 0; c < size_; ++c) {
            if (!kept(r, c) || kept(row, c)) continue;
            const Number gain = worth(row, c) + worth(r, column) - worth(r, c);
            if (best_row < 0 || gain > best) {
              best = gain;
              best_row = r;
              best_column = c;
            }
          }
        }
        toggle(row, best_column);
        toggle(best_row, column);
        toggle(best_row, best_column);
      }
    }
  }

  // Shortest paths (Bellman, Ford) over all that may be added, row to column, and removed, column to row. A circle among
  // the predecessors is a cycle that gains: exchanges along all of them and returns true. False: there is none. Any labels
  // may begin; those of the search before made it 1.4 times as fast on 16x16 as zeros.
  bool improve() {
    const bool low = std::min(*std::min_element(row_label_, row_label_ + size_),
                              *std::min_element(column_label_, column_label_ + size_)) < kLowLabel<Number>;
    for (int i = 0; i < size_; ++i) {
      row_from_[i] = column_from_[i] = -1;
      if (low) row_label_[i] = column_label_[i] = 0;
    }
    for (;;) {
      bool changed = false;
      for (int row = 0; row < size_; ++row) {
        for (int column = 0; column < size_; ++column) {
          const Number label = row_label_[row] - worth(row, column);
          if (label < column_label_[column] && !kept(row, column)) {
            column_label_[column] = label;
            column_from_[column] = row;
          }
        }
      }
      for (int row = 0; row < size_; ++row) {
        for (uint32_t left = rows_[row]; left != 0; left &= left - 1) {
          const int column = __builtin_ctz(left);
          const Number label = column_label_[column] + worth(row, column);
          if (label < row_label_[row]) {
            row_label_[row] = label;
            row_from_[row] = column;
            changed = true;
          }
        }
      }
      if (!changed) return false;
      if (exchange_along_cycles()) return true;
    }
  }

  bool exchange_along_cycles() {
    int seen[kMostSize] = {};
    bool found = false;
    for (int first = 0; first < size_; ++first) {
      int row = first;
      while (row >= 0 && seen[row] == 0) {
        seen[row] = first + 1;
        row = before(row);
      }
      if (row < 0 || seen[row] != first + 1) continue;
      found = true;
      int at = row;
      do {
        const int column = row_from_[at], previous = column_from_[column];
        toggle(at, column);
        toggle(previous, column);
        at = previous;
      } while (at != row);
    }
    return found;
  }
  int before(int row) const { return row_from_[row] < 0 ? -1 : column_from_[row_from_[row]]; }

  const int size_, keep_;
  Number worth_[kMostSize * kMostSize];
  uint32_t rows_[kMostSize], columns_[kMostSize];  // bits of what is kept
  Number row_label_[kMostSize] = {}, column_label_[kMostSize] = {};
  int row_from_[kMostSize], column_from_[kMostSize];
};

template <class Number, class Score>
void solve(const Score* scores, int64_t stride, int size, int keep, int power, uint8_t* mask, int64_t columns) {
  Block<Number> block(size, keep);
  for (int row = 0; row < size; ++row) {
    for (int column = 0; column < size; ++column) {
      const double x = static_cast<double>(scores[row * stride + column]);
      Number& worth = block.worth(row, column);
      if (std::isfinite(x)) {
        worth = static_cast<int64_t>(std::nearbyint(std::ldexp(x, power)));
      } else {
        worth = static_cast<Number>(std::isnan(x) ? kNan : x > 0 ? kInfinity : -kInfinity);
      }
    }
  }
  block.solve();
  for (int row = 0; row < size; ++row) {
    for (int column = 0; column < size; ++column) mask[row * columns + column] = block.kept(row, column);
  }
}

template <class Score>
void solve_block(const MaskArgs& args, int keep, int size, int64_t block) {
  const int64_t across = args.columns / size, row = block / across * size, column = block % across * size;
  const Score* scores = static_cast<const Score*>(args.scores) + row * args.stride + column;
  uint8_t* mask = args.mask + row * args.columns + column;
  double largest = 0;
  bool finite = true;
  for (int r = 0; r < size; ++r) {
    for (int c = 0; c < size; ++c) {
      const double x = std::fabs(static_cast<double>(scores[r * args.stride + c]));
      finite &= std::isfinite(x);
      if (std::isfinite(x) && x > largest) largest = x;
    }
  }
  const int power = largest > 0 ? kBits - std::ilogb(largest) : 0;
  (finite ? solve<int64_t, Score> : solve<Wide, Score>)(scores, args.stride, size, keep, power, mask, args.columns);
}

}  // namespace

void transposable_blocks(const MaskArgs& args, int keep, int size, int threads) {
  const int64_t blocks = args.rows / size * (args.columns / size);
  if (blocks == 0) return;
  for_each_unit(threads < 1 ? 1 : threads, (blocks + kUnitBlocks - 1) / kUnitBlocks, [&](int64_t unit) {
    const int64_t end = (unit + 1) * kUnitBlocks < blocks ? (unit + 1) * kUnitBlocks : blocks;
    for (int64_t block = unit * kUnitBlocks; block < end; ++block) {
      (args.type == ScoreType::kFp32 ? solve_block<float> : solve_block<double>)(args, keep, size, block);
    }
  });
}

}  // namespace twofour::cpu
