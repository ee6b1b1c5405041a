#include "cpu/pack.h"

#include <sys/mman.h>

#include <cstring>

#include "nm/layout.h"

namespace twofour::cpu {
namespace {

using namespace nm;

// Index of kept value `kept` of `row` in the 32 values of one (tile, group).
int slot_of(int row, int kept, int itemsize) {
  return itemsize == 4 ? kept * kTileRows + row : row * kKeep + kept;
}

template <class Item>
void pack(const Item* values, const uint8_t* metadata, Item* packed_values, uint8_t* packed_metadata,
          int64_t out_features, int64_t in_features, int shared, const uint8_t* order) {
  const int64_t tiles = tiles_of(out_features), groups = groups_of(in_features);
  const int64_t metadata_row = metadata_row_bytes(in_features);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t group = 0; group < groups; ++group) {
      Item* slots = packed_values + (tile * groups + group) * kTileRows * kKeep;
      uint64_t bits = 0;
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = row_of(order, tile * kTileRows + r);
        Item kept[kKeep] = {0, 0};
        uint64_t nibble = kPaddingNibble;
        if (row < out_features) {
          std::memcpy(kept, values + (row * groups + group) * kKeep, sizeof kept);
          nibble = metadata[row * metadata_row + group / 2] >> (4 * (group % 2)) & 15u;
        }
        for (int k = 0; k < kKeep; ++k) slots[slot_of(r, k, sizeof(Item))] = kept[k];
        if (r % shared == 0) bits |= nibble << bit_of_row(r, shared);
      }
      uint8_t* bytes = packed_metadata + (tile * groups + group) * metadata_bytes(shared);
      for (int b = 0; b < metadata_bytes(shared); ++b) bytes[b] = static_cast<uint8_t>(bits >> (8 * b));
    }
  }
}

template <class Item>
void unpack(const Item* packed_values, const uint8_t* packed_metadata, Item* values, uint8_t* metadata,
            int64_t out_features, int64_t in_features, int shared, const uint8_t* order) {
  const int64_t groups = groups_of(in_features), metadata_row = metadata_row_bytes(in_features);
  std::memset(metadata, 0, static_cast<size_t>(out_features * metadata_row));
  for (int64_t place = 0; place < out_features; ++place) {
    const int64_t row = row_of(order, place);
    const int r = static_cast<int>(place % kTileRows);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t cell = place / kTileRows * groups + group;
      const Item* slots = packed_values + cell * kTileRows * kKeep;
      const Item kept[kKeep] = {slots[slot_of(r, 0, sizeof(Item))], slots[slot_of(r, 1, sizeof(Item))]};
      std::memcpy(values + (row * groups + group) * kKeep, kept, sizeof kept);
      const int bit = bit_of_row(r, shared);
      const unsigned nibble = packed_metadata[cell * metadata_bytes(shared) + bit / 8] >> (bit % 8) & 15u;
      metadata[row * metadata_row + group / 2] |= static_cast<uint8_t>(nibble << (4 * (group % 2)));
    }
  }
}

}  // namespace

bool order_rows(const uint8_t* metadata, int64_t out_features, int64_t in_features, int shared, uint8_t* order) {
  const size_t row_bytes = static_cast<size_t>(metadata_row_bytes(in_features));
  const auto mask_of = [&](int64_t row) { return metadata + static_cast<size_t>(row) * row_bytes; };
  const int64_t places = tiles_of(out_features) * kTileRows;
  for (int64_t window = 0; window < places; window += kWindowRows) {
    const int64_t held = out_features - window;
    const int rows = static_cast<int>(held < kWindowRows ? held : kWindowRows);
    bool placed[kWindowRows] = {};
    int place = 0;
    for (int first = 0; first < rows; ++first) {
      if (placed[first]) continue;
      int equals = 0;
      for (int row = first; row < rows; ++row) {
        if (placed[row] || std::memcmp(mask_of(window + row), mask_of(window + first), row_bytes) != 0) continue;
        placed[row] = true;
        order[window + place++] = static_cast<uint8_t>(row);
        ++equals;
      }
      if (equals % shared != 0) return false;
    }
    for (; place < kWindowRows && window + place < places; ++place) order[window + place] = static_cast<uint8_t>(place);
  }
  return true;
}

// The items move as integers of their size: no NaN is quieted on the way.
void pack_linear(const void* values, const uint8_t* metadata, void* packed_values, uint8_t* packed_metadata,
                 int64_t out_features, int64_t in_features, int itemsize, int shared, const uint8_t* order) {
  if (itemsize == 4) {
    pack(static_cast<const uint32_t*>(values), metadata, static_cast<uint32_t*>(packed_values), packed_metadata,
         out_features, in_features, shared, order);
  } else if (itemsize == 1) {
    pack(static_cast<const uint8_t*>(values), metadata, static_cast<uint8_t*>(packed_values), packed_metadata,
         out_features, in_features, shared, order);
  } else {
    pack(static_cast<const uint16_t*>(values), metadata, static_cast<uint16_t*>(packed_values), packed_metadata,
         out_features, in_features, shared, order);
  }
}

void unpack_linear(const void* packed_values, const uint8_t* packed_metadata, void* values, uint8_t* metadata,
                   int64_t out_features, int64_t in_features, int itemsize, int shared, const uint8_t* order) {
  if (itemsize == 4) {
    unpack(static_cast<const uint32_t*>(packed_values), packed_metadata, static_cast<uint32_t*>(values), metadata,
           out_features, in_features, shared, order);
  } else if (itemsize == 1) {
    unpack(static_cast<const uint8_t*>(packed_values), packed_metadata, static_cast<uint8_t*>(values), metadata,
           out_features, in_features, shared, order);
  } else {
    unpack(static_cast<const uint16_t*>(packed_values), packed_metadata, static_cast<uint16_t*>(values), metadata,
           out_features, in_features, shared, order);
  }
}

void ask_for_huge_pages([[maybe_unused]] void* buffer, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffer);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace twofour::cpu
