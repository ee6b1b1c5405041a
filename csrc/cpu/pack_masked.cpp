// Packs weights and masks strip by strip, and in squares of plain C++ at the edges and wherever there are no vectors for it.
#include "cpu/pack_masked.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/features.h"
#include "cpu/work.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

using namespace nm;

// Two kept of four items `step` apart, their nibble; false where not two are kept.
template <class Item>
bool keep_two(const Item* items, const uint8_t* mask, int64_t step, int64_t mask_step, Item (&kept)[kKeep],
              uint64_t& nibble) {
  int count = 0;
  unsigned places[kGroup] = {};
  for (int i = 0; i < kGroup; ++i) {
    places[count] = static_cast<unsigned>(i);
    count += mask[i * mask_step] != 0 ? 1 : 0;
    if (count == kGroup) break;
  }
  for (int k = 0; k < kKeep; ++k) kept[k] = items[places[k] * step];
  nibble = nibble_of(places[0], places[1]);
  return count == kKeep;
}

// One (tile, group) of a matrix whose rows are `row_step` items apart and whose neighbours in a group are `step` apart.
template <class Item>
bool pack_cell(const Item* items, const uint8_t* mask, int rows, int64_t row_step, int64_t step, int64_t mask_row_step,
               int64_t mask_step, Item* slots, uint8_t* bytes) {
  bool sound = true;
  uint64_t bits = 0;
  for (int r = 0; r < kTileRows; ++r) {
    Item kept[kKeep] = {0, 0};
    uint64_t nibble = kPaddingNibble;
    if (r < rows) sound &= keep_two(items + r * row_step, mask + r * mask_row_step, step, mask_step, kept, nibble);
    for (int k = 0; k < kKeep; ++k) slots[sizeof(Item) == 4 ? k * kTileRows + r : r * kKeep + k] = kept[k];
    bits |= nibble << bit_of_row(r, 1);
  }
  for (int b = 0; b < kTileMetadataBytes; ++b) bytes[b] = static_cast<uint8_t>(bits >> (8 * b));
  return sound;
}

template <class Item>
bool pack_square(const MaskedPackArgs& args, int64_t row, int64_t column) {
  const Item* items = static_cast<const Item*>(args.weight) + row * args.stride + column;
  const uint8_t* mask = args.mask + row * args.in_features + column;
  const int rows = static_cast<int>(args.out_features - row < kTileRows ? args.out_features - row : kTileRows);
  const int columns = static_cast<int>(args.in_features - column < kTileRows ? args.in_features - column : kTileRows);
  bool sound = true;
  for (int j = 0; j < columns; j += kGroup) {
    const int64_t cell = row / kTileRows * groups_of(args.in_features) + (column + j) / kGroup;
    sound &= pack_cell(items + j, mask + j, rows, args.stride, 1, args.in_features, 1,
                       static_cast<Item*>(args.values) + cell * kTileRows * kKeep,
                       args.metadata + cell * kTileMetadataBytes);
  }
  if (args.turned_values == nullptr) return sound;
  for (int i = 0; i < rows; i += kGroup) {
    const int64_t cell = column / kTileRows * groups_of(args.out_features) + (row + i) / kGroup;
    sound &= pack_cell(items + i * args.stride, mask + i * args.in_features, columns, 1, args.stride, 1,
                       args.in_features, static_cast<Item*>(args.turned_values) + cell * kTileRows * kKeep,
                       args.turned_metadata + cell * kTileMetadataBytes);
  }
  return sound;
}

struct Isa {
  const char* name;
  bool (*runs_here)();
  const PackMaskedKernels* kernels;  // null: plain squares
};

// Plainest first; the last one that runs here is the default.
constexpr Isa kIsas[] = {
    {"baseline", always, nullptr},
#if defined(TWOFOUR_X86)
    {"avx512", has_avx512, &pack_masked_avx512},
#endif
};

const Isa& find_isa(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && name == isa.name) return isa;
  }
  throw std::invalid_argument("weights are not packed by an instruction set '" + name + "' on this machine");
}

const Isa& chosen_isa() {
  static const Isa* chosen = [] {
    const char* asked = std::getenv("TWOFOUR_ISA");
    const Isa* best = &kIsas[0];
    for (const Isa& isa : kIsas) {
      if (isa.runs_here()) best = &isa;
    }
    // What is asked for below AVX-512 runs plain.
    return asked != nullptr && std::strncmp(asked, "avx512", 6) != 0 ? &kIsas[0] : best;
  }();
  return *chosen;
}

}  // namespace

bool pack_masked(const MaskedPackArgs& args, int threads, const char* isa) {
  const Isa& chosen = isa == nullptr ? chosen_isa() : find_isa(isa);
  const int wide = args.itemsize == 4 ? 1 : 0;
  const auto plain = wide ? pack_square<uint32_t> : pack_square<uint16_t>;
  const auto strip = chosen.kernels == nullptr ? nullptr : chosen.kernels->strip[wide];
  const int64_t step = strip == nullptr ? kTileRows : chosen.kernels->columns[wide];
  const int64_t whole_columns = args.in_features / kTileRows * kTileRows;
  std::atomic<bool> sound{true};
  for_each_unit(threads < 1 ? 1 : threads, tiles_of(args.out_features), [&](int64_t tile) {
    const int64_t row = tile * kTileRows;
    bool own = true;
    int64_t column = 0;
    if (strip != nullptr && row + kTileRows <= args.out_features && whole_columns >= step) {
      for (; column < whole_columns; column += step) own &= strip(args, row, std::min(column, whole_columns - step));
      column = whole_columns;  // the last strip may do anew what the one before it has done
    }
    for (; column < args.in_features; column += kTileRows) own &= plain(args, row, column);
    if (!own) sound.store(false, std::memory_order_relaxed);
  });
  return sound.load();
}

int pack_masked_isa_count() {
  int count = 0;
  for (const Isa& isa : kIsas) count += isa.runs_here() ? 1 : 0;
  return count;
}

const char* pack_masked_isa_name(int index) {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && index-- == 0) return isa.name;
  }
  throw std::invalid_argument("no such instruction set");
}

}  // namespace twofour::cpu
