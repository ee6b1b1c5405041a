// Cutting a product of many tokens for threads: panels of tokens times blocks of rows are its units.
#pragma once

#include <cstdint>
#include <numeric>

#include "cpu/work.h"

namespace twofour::cpu {

class Cut {
 public:
  struct Piece {
    int64_t panel, row0, row1;
  };

  // `rows` counts what only one thread may hold, such as tiles; `blocks` of them are what the caches ask for. Most products
  // pack a panel again for every block, so there are more only where threads would stand idle for more than a ninth of the
  // time. For the same reason the last units are cut only into pieces of `least` rows or more.
  Cut(int64_t panels, int64_t rows, int64_t blocks, int64_t least, int threads)
      : panels_(panels), rows_(rows), blocks_(blocks < rows ? blocks : rows) {
    cut_last(least, threads);
    while (blocks_ < rows && !fills(threads)) {
      ++blocks_;
      cut_last(least, threads);
    }
  }

  int64_t pieces() const { return whole() + last_ * pieces_of_last_; }

  // All panels of a block before the next one, whose rows are other weights. The last panel first: part() makes the last
  // ones wider, and what is cut at the end should be small.
  Piece operator[](int64_t i) const {
    const bool cut = i >= whole();
    const int64_t piece = cut ? (i - whole()) / last_ : 0, of = cut ? pieces_of_last_ : 1;
    const int64_t unit = i - piece * last_, block = unit / panels_;
    const int64_t row0 = part(rows_, blocks_, block), rows = part(rows_, blocks_, block + 1) - row0;
    return {panels_ - 1 - unit % panels_, row0 + part(rows, of, piece), row0 + part(rows, of, piece + 1)};
  }

 private:
  int64_t units() const { return panels_ * blocks_; }
  int64_t whole() const { return units() - last_; }

  // The units that do not come out even are cut, so that each thread has the same share of them.
  void cut_last(int64_t least, int threads) {
    const int64_t uneven = units() % threads;
    pieces_of_last_ = uneven == 0 ? 1 : threads / std::gcd(uneven, static_cast<int64_t>(threads));
    last_ = units() >= threads && rows_ / blocks_ >= pieces_of_last_ * least ? uneven : 0;
  }

  bool fills(int threads) const {
    const int64_t rounds = (whole() + threads - 1) / threads;
    return (rounds * threads + last_) * 8 <= units() * 9;
  }

  int64_t panels_, rows_, blocks_;
  int64_t last_ = 0;  // units at the end that are cut
  int64_t pieces_of_last_ = 1;
};

}  // namespace twofour::cpu
