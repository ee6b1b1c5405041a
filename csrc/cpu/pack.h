// Canonical format <-> CPU layout (both drawn in nm/layout.h). Exact bits, any item of 2 or 4 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace twofour::cpu {

// Bytes of the packed buffers: values tiles * groups * 32 * itemsize, metadata tiles * groups * 8 / shared. `shared` is 1,
// 2 or 4: each so many neighbouring rows have one mask, which the caller has checked; the first row's is taken.
void pack_linear(const void* values, const uint8_t* metadata, void* packed_values, uint8_t* packed_metadata,
                 int64_t out_features, int64_t in_features, int itemsize, int shared);

// The inverse; a last metadata byte with a single group gets a high nibble of 0.
void unpack_linear(const void* packed_values, const uint8_t* packed_metadata, void* values, uint8_t* metadata,
                   int64_t out_features, int64_t in_features, int itemsize, int shared);

// Asks for huge pages under the whole 2 MiB pieces of a buffer that nobody has written to yet. Kernels walk weights tile by
// tile, each on pages of its own: with few tokens that costs a tenth of the speed. Does nothing where it cannot.
void ask_for_huge_pages(void* buffer, size_t bytes);

}  // namespace twofour::cpu
