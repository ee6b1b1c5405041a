// Cutting work for threads, without kernels: every row of every panel lies in one piece, and threads end together.
#include "cpu/cut.h"

#include <algorithm>
#include <vector>

#include "support.h"

namespace twofour::test {
namespace {

struct Case {
  int64_t panels, rows, blocks, least;
  int threads;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int64_t panels : {1, 2, 3, 5, 11, 22, 86}) {
    for (const int64_t rows : {1, 2, 7, 24, 48, 256}) {
      for (const int64_t blocks : {1, 2, 4, 7, 300}) {
        for (const int64_t least : {1, 8, 16}) {
          for (const int threads : {1, 2, 3, 4, 8, 16, 192}) all.push_back({panels, rows, blocks, least, threads});
        }
      }
    }
  }
  return all;
}

void every_row_lies_in_one_piece(const Case& of, const cpu::Cut& cut) {
  std::vector<int> seen(static_cast<size_t>(of.panels * of.rows));
  bool right = true;
  for (int64_t i = 0; i < cut.pieces(); ++i) {
    const cpu::Cut::Piece piece = cut[i];
    right &= 0 <= piece.panel && piece.panel < of.panels && 0 <= piece.row0 && piece.row0 < piece.row1 && piece.row1 <= of.rows;
    for (int64_t row = piece.row0; right && row < piece.row1; ++row) ++seen[static_cast<size_t>(piece.panel * of.rows + row)];
  }
  for (const int count : seen) right &= count == 1;
  check(right, "%" PRId64 " panels, %" PRId64 " rows, %" PRId64 " blocks, %d threads: not every row in one piece",
        of.panels, of.rows, of.blocks, of.threads);
}

// Without need there are no more blocks than the caches ask for, nothing is cut, and a panel is packed as often as there are
// blocks.
void nothing_is_cut_without_need() {
  struct {
    Case of;
    int64_t pieces;
  } const known[] = {
      {{11, 48, 1, 12, 2}, 12},   // ten panels, and the last one in two pieces
      {{11, 48, 1, 12, 1}, 11},   // one thread
      {{22, 48, 1, 12, 2}, 22},   // comes out even
      {{3, 48, 1, 12, 2}, 4},     // two panels, and two pieces
      {{3, 20, 1, 12, 2}, 6},     // pieces of ten rows would be too small: two blocks
      {{7, 48, 1, 12, 4}, 16},    // four panels, and three in four pieces
      {{44, 64, 4, 12, 2}, 176},  // blocks as asked for
      {{1, 256, 2, 12, 16}, 15},  // fewer panels than threads: blocks for nearly all of them
  };
  for (const auto& [of, pieces] : known) {
    const cpu::Cut cut(of.panels, of.rows, of.blocks, of.least, of.threads);
    check(cut.pieces() == pieces, "%" PRId64 " panels, %" PRId64 " rows, %d threads: %" PRId64 " pieces, not %" PRId64,
          of.panels, of.rows, of.threads, cut.pieces(), pieces);
  }
}

// The last panels, which part() makes the widest, come first; what is cut comes at the end.
void large_pieces_come_first(const Case& of, const cpu::Cut& cut) {
  const cpu::Cut::Piece first = cut[0], last = cut[cut.pieces() - 1];
  check(first.panel == of.panels - 1 && last.row1 - last.row0 <= first.row1 - first.row0 + 1,
        "%" PRId64 " panels, %" PRId64 " rows, %" PRId64 " blocks, %d threads: small pieces first", of.panels, of.rows,
        of.blocks, of.threads);
}

// Threads take the next piece as they come free; at the end none may have stood idle for more than a ninth of the time. Where
// parts of few rows differ by one row, that shows too.
void threads_end_together(const Case& of, const cpu::Cut& cut) {
  std::vector<int64_t> busy(static_cast<size_t>(of.threads));
  for (int64_t i = 0; i < cut.pieces(); ++i) *std::min_element(busy.begin(), busy.end()) += cut[i].row1 - cut[i].row0;
  const double longest = static_cast<double>(*std::max_element(busy.begin(), busy.end()));
  const double even = static_cast<double>(of.panels * of.rows) / of.threads;
  if (of.rows < 48 || of.threads > 16) return;
  check(longest <= even * 9 / 8 + 2,
        "%" PRId64 " panels, %" PRId64 " rows, %" PRId64 " blocks, %d threads: %.0f rows for one, of %.0f",
        of.panels, of.rows, of.blocks, of.threads, longest, even);
}

}  // namespace
}  // namespace twofour::test

int main() {
  using namespace twofour::test;
  nothing_is_cut_without_need();
  for (const Case& of : cases()) {
    const twofour::cpu::Cut cut(of.panels, of.rows, of.blocks, of.least, of.threads);
    every_row_lies_in_one_piece(of, cut);
    threads_end_together(of, cut);
    large_pieces_come_first(of, cut);
    if (of.threads == 1) {
      check(cut.pieces() == of.panels * std::min(of.blocks, of.rows), "one thread: more than the caches ask for");
    }
  }
  std::printf("%" PRId64 " checks, %" PRId64 " failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}
