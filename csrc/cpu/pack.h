// Canonical format <-> CPU layout (both drawn in nm/layout.h). Exact bits, any item of 1, 2 or 4 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace twofour::cpu {

// Finds an order (nm/layout.h, tiles * 16 bytes) in which each `shared` neighbours have one mask; false where the rows of
// some window do not allow it. Equal rows follow the first of them: masks of `shared` neighbours alone keep their places.
bool order_rows(const uint8_t* metadata, int64_t out_features, int64_t in_features, int shared, uint8_t* order);

// Bytes of the packed buffers: values tiles * groups * 32 * itemsize, metadata tiles * groups * 8 / shared. `shared` is 1,
// 2 or 4: each so many rows that are neighbours in `order` (null: as they are) have one mask, which the caller has checked;
// the first row's is taken.
void pack_linear(const void* values, const uint8_t* metadata, void* packed_values, uint8_t* packed_metadata,
                 int64_t out_features, int64_t in_features, int itemsize, int shared, const uint8_t* order = nullptr);

// The inverse; a last metadata byte with a single group gets a high nibble of 0.
void unpack_linear(const void* packed_values, const uint8_t* packed_metadata, void* values, uint8_t* metadata,
                   int64_t out_features, int64_t in_features, int itemsize, int shared, const uint8_t* order = nullptr);

// Asks for huge pages under the whole 2 MiB pieces of a buffer that nobody has written to yet. Kernels walk weights tile by
// tile, each on pages of its own: with few tokens that costs a tenth of the speed. Does nothing where it cannot.
void ask_for_huge_pages(void* buffer, size_t bytes);

}  // namespace twofour::cpu
