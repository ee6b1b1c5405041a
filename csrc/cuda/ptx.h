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
TWOFOUR_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;  // __byte_perm would first clear what makes signs of bytes
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// Each byte all ones or all zeros, as the highest bits of bytes s of `word` for the four nibbles s of kBytes.
template <uint32_t kBytes>
TWOFOUR_DEVICE uint32_t signs_of(uint32_t word) {
  uint32_t result;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(word), "n"(kBytes | 0x8888u));
  return result;
}

// The upper word of `upper` and `lower`, side by side, shifted to the left.
TWOFOUR_DEVICE uint32_t shift_in(uint32_t upper, uint32_t lower, uint32_t by) { return __funnelshift_l(lower, upper, by); }

// Of the two halves of a word each: one instruction from Hopper on.
TWOFOUR_DEVICE uint32_t max_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
TWOFOUR_DEVICE uint32_t min_halves(uint32_t a, uint32_t b) { return __vminu2(a, b); }
TWOFOUR_DEVICE uint32_t min_signed_halves(uint32_t a, uint32_t b) { return __vmins2(a, b); }

TWOFOUR_DEVICE uint32_t shuffle_xor(uint32_t value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// Is it so for any lane of the warp?
TWOFOUR_DEVICE bool any_lane(bool own) { return __any_sync(0xffffffffu, own) != 0; }

TWOFOUR_DEVICE uint32_t add_max(uint32_t a, uint32_t b, uint32_t c) { return __viaddmax_u32(a, b, c); }  // max(a + b, c)

TWOFOUR_DEVICE double power_of_two(int exponent) { return __longlong_as_double(int64_t{exponent + 1023} << 52); }

// A number that the compiler knows nothing of: what depends on it is computed here, and takes no registers before.
template <class Word>
TWOFOUR_DEVICE Word opaque(Word value) {
  if constexpr (sizeof(Word) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
  return value;
}

// threadIdx.x, read anew rather than kept.
TWOFOUR_DEVICE uint32_t thread_again() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

TWOFOUR_DEVICE void sync_block() { __syncthreads(); }
TWOFOUR_DEVICE void sync_warp() { __syncwarp(); }
// Of so many threads, whole warps that say the same number, 1 .. 15: 0 is the block's.
template <int kThreads>
TWOFOUR_DEVICE void sync_threads(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

// Brings what lies there, and what lies beside it, to the last cache.
TWOFOUR_DEVICE void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// A cluster: blocks that run at the same time and read each other's shared memory, here all of a blockIdx.x. Where a launch
// asks for none a block is one by itself, and so it is on GPUs before Hopper, which have none.
#if __CUDA_ARCH__ >= 900
// All threads of the cluster; what they wrote to shared memory before can be read by all.
TWOFOUR_DEVICE void sync_cluster() {
  sync_warp();
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208  // of shared memory alone: the other waits for global memory too
  asm volatile(
      "fence.release.sync_restrict::shared::cta.cluster;\n\tbarrier.cluster.arrive.relaxed.aligned;\n\t"
      "barrier.cluster.wait.aligned;\n\tfence.acquire.sync_restrict::shared::cluster.cluster;" ::
          : "memory");
#else
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Likewise, but nothing written is waited for: a block may leave, as nobody reads its shared memory any more.
TWOFOUR_DEVICE void leave_cluster() {
  sync_warp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}
// 16 bytes that block `rank` of the cluster has where this one has `own`.
TWOFOUR_DEVICE uint4 load_of_peer(const uint4* own, uint32_t rank) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  uint4 v;
  asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %4, %5;\n\t"
               "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [there]; }"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at), "r"(rank)
               : "memory");
  return v;
}

// A kernel may be started early, while the one before it in the stream still runs. It then reads nothing that others write,
// and writes nothing, until this returns: that one has ended, and what it wrote can be read. Every thread calls it.
TWOFOUR_DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel, if it is to be started early, may take what room there is, once all blocks of this one have said so.
TWOFOUR_DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Brings bytes to the last cache, where all writes are seen: this is no reading. Multiples of 16, as is the address.
TWOFOUR_DEVICE void prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
#else
TWOFOUR_DEVICE void sync_cluster() { sync_block(); }
TWOFOUR_DEVICE void leave_cluster() {}
TWOFOUR_DEVICE uint4 load_of_peer(const uint4* own, uint32_t) { return *own; }
TWOFOUR_DEVICE void wait_for_kernel_before() {}
TWOFOUR_DEVICE void let_next_kernel_start() {}
TWOFOUR_DEVICE void prefetch(const void*, uint32_t) {}
#endif

TWOFOUR_DEVICE void or_into(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }
TWOFOUR_DEVICE void max_into(uint32_t* word, uint32_t value) { atomicMax(word, value); }

#define TWOFOUR_LOADS(name, how)                                                                                          \
  TWOFOUR_DEVICE uint4 name(const uint4* from) {                                                                          \
    uint4 v;                                                                                                              \
    asm volatile("ld.global" how ".v4.u32 {%0, %1, %2, %3}, [%4];"                                                        \
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)                                                             \
                 : "l"(from));                                                                                            \
    return v;                                                                                                             \
  }                                                                                                                       \
  TWOFOUR_DEVICE uint2 name(const uint2* from) {                                                                          \
    uint2 v;                                                                                                              \
    asm volatile("ld.global" how ".v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));                           \
    return v;                                                                                                             \
  }                                                                                                                       \
  TWOFOUR_DEVICE uint32_t name(const uint32_t* from) {                                                                    \
    uint32_t v;                                                                                                           \
    asm volatile("ld.global" how ".u32 %0, [%1];" : "=r"(v) : "l"(from));                                                 \
    return v;                                                                                                             \
  }
// Read once: past the first cache.
TWOFOUR_LOADS(load_stream, ".nc.L1::no_allocate")
// Likewise, where the kernel before this one may have written it while this one had begun: not by the way of constants.
TWOFOUR_LOADS(load_written, ".L1::no_allocate")

// Read again soon: kept in the last cache.
TWOFOUR_DEVICE uint4 load_kept(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Adds 1 once everything that this thread has written, or others before a barrier, can be read by all; what was there before.
// What others had written before they counted can be read afterwards, behind a barrier by the whole block.
TWOFOUR_DEVICE uint32_t count_up(uint32_t* counter) {
  uint32_t before;  // __threadfence() is fence.sc, which also puts all blocks that call it in one order
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// 16 bytes from global to shared memory behind the back of the thread; of those, `bytes` are read and zeros follow.
TWOFOUR_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// 8 bytes, likewise.
TWOFOUR_DEVICE void copy_async(uint2* shared, const uint2* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// 16 bytes where they are wanted; without a branch, so that it can stand between other instructions.
TWOFOUR_DEVICE void copy_async_if(bool wanted, void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0;\n\t@p cp.async.cg.shared.global [%0], [%1], 16, %2; }" ::"r"(to), "l"(global),
               "r"(bytes), "r"(static_cast<uint32_t>(wanted))
               : "memory");
}
TWOFOUR_DEVICE void copy_async_if(bool wanted, void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0;\n\t@p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(to), "l"(global),
               "r"(static_cast<uint32_t>(wanted))
               : "memory");
}
TWOFOUR_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kOpen>
TWOFOUR_DEVICE void wait_for_copies() {  // until no more than kOpen groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane 8 * i + j names row j of matrix i; lane 4 * g + q gets word q of row g of each.
TWOFOUR_DEVICE void load_matrices(const void* row, uint32_t (&words)[4]) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// sums += A * B, A sparse: m16n8k32 of 2-byte items, m16n8k64 of 1-byte items.
#define TWOFOUR_MULTIPLY(name, shape_and_types, Sum, constraint)                                                      \
  template <int kSelector>                                                                                              \
  TWOFOUR_DEVICE void name(Sum(&sums)[4], const uint4& a, const uint32_t(&b)[4], uint32_t metadata) {                   \
    asm volatile("mma.sp::ordered_metadata.sync.aligned." shape_and_types                                               \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"                 \
                 : "+" constraint(sums[0]), "+" constraint(sums[1]), "+" constraint(sums[2]), "+" constraint(sums[3])   \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),   \
                   "n"(kSelector));                                                                                     \
  }
TWOFOUR_MULTIPLY(multiply_bf16, "m16n8k32.row.col.f32.bf16.bf16.f32", float, "f")
TWOFOUR_MULTIPLY(multiply_fp16, "m16n8k32.row.col.f32.f16.f16.f32", float, "f")
TWOFOUR_MULTIPLY(multiply_int8, "m16n8k64.row.col.s32.s8.s8.s32", int32_t, "r")
#if __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200  // elsewhere it is taken apart into 2-byte products
#define TWOFOUR_MULTIPLIES_E4M3
TWOFOUR_MULTIPLY(multiply_e4m3, "m16n8k64.row.col.f32.e4m3.e4m3.f32", float, "f")
#endif

TWOFOUR_DEVICE uint32_t bits_of_float(float value) { return __float_as_uint(value); }
TWOFOUR_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
TWOFOUR_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // rounded once
TWOFOUR_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }  // never part of another operation
TWOFOUR_DEVICE int32_t nearest_integer(float value) { return __float2int_rn(value); }  // ties to even

// To nearest, ties to even.
TWOFOUR_DEVICE uint16_t bf16_of(float value) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(0.0f), "f"(value));
  return static_cast<uint16_t>(two);
}
TWOFOUR_DEVICE uint16_t fp16_of(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
TWOFOUR_DEVICE float float_of_bf16(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
TWOFOUR_DEVICE float float_of_fp16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Two floats as e4m3, to nearest, ties to even, the largest where they are larger; `low` in the lower byte.
#if __CUDA_ARCH__ >= 890
TWOFOUR_DEVICE uint32_t two_e4m3_of(float low, float high) {
  uint16_t two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
  return two;
}
// Four e4m3 as fp16, two and two.
TWOFOUR_DEVICE uint2 four_fp16_of_e4m3(uint32_t four) {
  uint2 halves;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2;\n\tcvt.rn.f16x2.e4m3x2 %0, low;\n\tcvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(halves.x), "=r"(halves.y)
      : "r"(four));
  return halves;
}
#else
#define TWOFOUR_E4M3_BY_HAND
#endif

// a * b + c for each half, rounded once.
TWOFOUR_DEVICE uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t halves;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(halves) : "r"(a), "r"(b), "r"(c));
  return halves;
}

// At once; an assignment becomes two stores.
TWOFOUR_DEVICE void store_wide(uint2* to, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}
TWOFOUR_DEVICE void store_wide(uint4* to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// What another block of this kernel has written: past the first cache, which does not hear of it.
TWOFOUR_DEVICE uint4 load_latest(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

#else
#define TWOFOUR_E4M3_BY_HAND
#define TWOFOUR_MULTIPLIES_E4M3
#endif

#if defined(TWOFOUR_E4M3_BY_HAND)
TWOFOUR_DEVICE uint32_t e4m3_of(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7f;
  if (size >= 0x43e80000u) return sign | 0x7e;  // 464 and above
  if (size < 0x3c800000u) {                     // below 2^-6: whole units of 2^-9, the last bit of 2^14
    const float magnitude = value < 0 ? -value : value;
    return sign | (bits_of_float(magnitude + 16384.0f) - bits_of_float(16384.0f));
  }
  const uint32_t rounded = size + 0x7ffffu + (size >> 20 & 1u);
  return sign | ((rounded >> 20) - ((127 - 7) << 3));
}
TWOFOUR_DEVICE uint32_t two_e4m3_of(float low, float high) { return e4m3_of(low) | e4m3_of(high) << 8; }
// Exponent and fraction of e4m3 in those of fp16 are its number times 2^-8, subnormals included; NaN would be 480. Times
// 35008 it alone overflows, and infinity * 0 is NaN.
TWOFOUR_DEVICE uint32_t two_fp16_of_e4m3(uint32_t apart) {  // in the upper bytes of the halves
  constexpr uint32_t kMinusZeros = 0x80008000, k256 = 0x5c005c00, k35008 = 0x78467846;
  const uint32_t parts = (apart >> 1 & 0x3f803f80u) | (apart & 0x80008000u);
  const uint32_t finite = multiply_add_halves(parts, k256, kMinusZeros);
  return multiply_add_halves(multiply_add_halves(parts, k35008, kMinusZeros), 0, finite);
}
TWOFOUR_DEVICE uint2 four_fp16_of_e4m3(uint32_t four) {
  return {two_fp16_of_e4m3(byte_permute(four, 0, 0x1404)), two_fp16_of_e4m3(byte_permute(four, 0, 0x3424))};
}
#endif

// Two fp16 that bf16 can hold, as bf16.
TWOFOUR_DEVICE uint32_t two_bf16_of_fp16(uint32_t halves) {
  const float low = float_of_fp16(static_cast<uint16_t>(halves)), high = float_of_fp16(static_cast<uint16_t>(halves >> 16));
  return byte_permute(bits_of_float(low), bits_of_float(high), 0x7632);
}

// Sums as words, and back.
TWOFOUR_DEVICE uint32_t bits_of(float sum) { return bits_of_float(sum); }
TWOFOUR_DEVICE uint32_t bits_of(int32_t sum) { return static_cast<uint32_t>(sum); }
template <class Sum>
TWOFOUR_DEVICE Sum number_of(uint32_t bits) {
  if constexpr (Sum(0.5f) != Sum(0)) {
    return float_of_bits(bits);
  } else {
    return static_cast<Sum>(bits);
  }
}

// Four items of a row, at once where their address allows it.
TWOFOUR_DEVICE uint2 load_four(const uint16_t* from) {
  if (reinterpret_cast<uint64_t>(from) % sizeof(uint2) == 0) return load_stream(reinterpret_cast<const uint2*>(from));
  return uint2{from[0] | uint32_t{from[1]} << 16, from[2] | uint32_t{from[3]} << 16};
}
TWOFOUR_DEVICE uint4 load_four(const float* from) {
  if (reinterpret_cast<uint64_t>(from) % sizeof(uint4) == 0) return load_stream(reinterpret_cast<const uint4*>(from));
  return uint4{bits_of_float(from[0]), bits_of_float(from[1]), bits_of_float(from[2]), bits_of_float(from[3])};
}
// Where the kernel itself writes to that memory.
TWOFOUR_DEVICE uint2 load_four_of_own(const uint16_t* from) {
  if (reinterpret_cast<uint64_t>(from) % sizeof(uint2) == 0) return *reinterpret_cast<const uint2*>(from);
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
