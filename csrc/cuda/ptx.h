// One function for each instruction that C++ cannot say. Where g++ reads this, gpu.h says what they do.
#pragma once

#include "cuda/device.h"

namespace twofour::cuda {

#if defined(__CUDACC__)

// Shifts of 32 and more give 0.
TWOFOUR_DEVICE uint32_t shift_left(uint32_t value, uint32_t by) {
  uint32_t result;
  asm("shl.b32 %0, %1, %2;" : "=r"(result) : "r"(value), "r"(by));
  return result;
}
TWOFOUR_DEVICE uint64_t shift_left(uint64_t value, uint32_t by) {
  uint64_t result;
  asm("shl.b64 %0, %1, %2;" : "=l"(result) : "l"(value), "r"(by));
  return result;
}

// Bytes s of the eight of a, below, and b, for the four nibbles s of `selector`.
TWOFOUR_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

TWOFOUR_DEVICE uint32_t shuffle_xor(uint32_t value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

TWOFOUR_DEVICE int32_t add_max(int32_t a, int32_t b, int32_t c) { return __viaddmax_s32(a, b, c); }  // max(a + b, c)

TWOFOUR_DEVICE double power_of_two(int exponent) { return __longlong_as_double(int64_t{exponent + 1023} << 52); }

TWOFOUR_DEVICE void sync_block() { __syncthreads(); }

TWOFOUR_DEVICE void or_into(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }

// Read once: past the first cache.
TWOFOUR_DEVICE uint2 load_stream(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
TWOFOUR_DEVICE uint4 load_stream(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
TWOFOUR_DEVICE uint32_t load_stream(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

// At once; an assignment becomes two stores.
TWOFOUR_DEVICE void store_wide(uint2* to, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

#endif

// Four items of a row, at once where their address allows it.
TWOFOUR_DEVICE uint2 load_four(const uint16_t* from) {
  if (reinterpret_cast<uint64_t>(from) % sizeof(uint2) == 0) return load_stream(reinterpret_cast<const uint2*>(from));
  return uint2{from[0] | uint32_t{from[1]} << 16, from[2] | uint32_t{from[3]} << 16};
}
TWOFOUR_DEVICE uint32_t load_four(const uint8_t* from) {
  if (reinterpret_cast<uint64_t>(from) % sizeof(uint32_t) == 0) return load_stream(reinterpret_cast<const uint32_t*>(from));
  return from[0] | uint32_t{from[1]} << 8 | uint32_t{from[2]} << 16 | uint32_t{from[3]} << 24;
}
TWOFOUR_DEVICE void store_four(uint16_t* to, uint2 four) {
  if (reinterpret_cast<uint64_t>(to) % sizeof(uint2) == 0) {
    store_wide(reinterpret_cast<uint2*>(to), four);
    return;
  }
  to[0] = static_cast<uint16_t>(four.x);
  to[1] = static_cast<uint16_t>(four.x >> 16);
  to[2] = static_cast<uint16_t>(four.y);
  to[3] = static_cast<uint16_t>(four.y >> 16);
}
TWOFOUR_DEVICE void store_four(uint8_t* to, uint32_t four) {
  if (reinterpret_cast<uint64_t>(to) % sizeof(uint32_t) == 0) {
    *reinterpret_cast<uint32_t*>(to) = four;
    return;
  }
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(four >> (8 * i));
}

}  // namespace twofour::cuda
