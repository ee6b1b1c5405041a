// A GPU for g++: the text of the kernels runs thread by thread on the CPU, so that tests see what they compute and where they
// write on machines without a GPU. It knows nothing of time.
//
// The threads of a block are fibers. A warp runs until all of its threads wait at a barrier of the block, then another one;
// blocks run one after the other, or clusters, whose blocks take turns. Shared memory of a block that has ended is spoilt, as
// peers must not read it any more. A kernel that is started early may read nothing by way of ptx.h before it has waited.
// Asynchronous copies spoil their destination at once and bring what they copy when their thread waits for them: no later
// wait or barrier than the kernel's own helps it. What cuda/ptx.h says in PTX is written out here from the PTX ISA.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define TWOFOUR_DEVICE inline
#define TWOFOUR_BOTH inline
#define TWOFOUR_APART inline
#define TWOFOUR_ROLLED
#define TWOFOUR_SHARED static
#define TWOFOUR_TABLE inline constexpr
#define TWOFOUR_DYNAMIC_SHARED(name) char* const name = emulated::block->shared()
#define TWOFOUR_KERNEL(threads, blocks) extern "C" __attribute__((visibility("default"))) void

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Dim3 {
  uint32_t x = 0, y = 0, z = 0;
};

inline Dim3 blockIdx, gridDim, threadIdx, blockDim;

namespace emulated {

constexpr int kWarp = 32, kMostWords = 16, kBarriers = 16;
constexpr size_t kStackBytes = 64 << 10, kSharedBytes = 227 << 10;

// Everybody leaves when the last one has come.
struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t round = 0;

  void arrive() {
    if (++arrived == expected) open();
  }
  void leave_for_good() {
    if (--expected == arrived && expected > 0) open();
  }
  void open() {
    arrived = 0;
    ++round;
  }
};

struct Warp {
  Barrier barrier;
  uint32_t slots[kWarp][kMostWords];  // what lanes tell each other
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, of;  // of so many, zeros follow
};

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it waits
  bool begun = false, done = false;
  const Barrier* barrier = nullptr;  // what it waits for, and until when
  uint64_t round = 0;
  bool waits = false;                        // for the kernel before
  std::vector<Copy> copies;                  // not committed yet
  std::vector<std::vector<Copy>> committed;  // under way, the oldest first

  bool may_run() const { return !done && (barrier == nullptr || barrier->round != round); }
};

struct alignas(128) Line {
  char bytes[128];
};

struct Block {
  Dim3 index;
  std::unique_ptr<Line[]> lines{new Line[kSharedBytes / sizeof(Line)]};
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  Barrier others[kBarriers];  // of some of its warps, by number
  jmp_buf scheduler;
  size_t current = 0;
  int running = 0;

  char* shared() { return lines[0].bytes; }
  void spoil() { std::memset(shared(), 0xff, kSharedBytes); }  // NaN
};

inline std::vector<Block> cluster;
inline Barrier cluster_barrier;
inline Block* block = nullptr;
inline void (*body)() = nullptr;

inline Fiber& fiber() { return block->fibers[block->current]; }
inline Warp& warp() { return block->warps[block->current / kWarp]; }
inline int lane() { return static_cast<int>(block->current % kWarp); }

// Jumps rather than swapcontext, which asks the kernel for the mask of signals each time.
__attribute__((noinline)) inline void resume(Fiber& next) {
  if (_setjmp(block->scheduler) != 0) return;
  if (next.begun) _longjmp(next.place, 1);
  next.begun = true;
  setcontext(&next.context);
}
__attribute__((noinline)) inline void pause() {
  if (_setjmp(fiber().place) == 0) _longjmp(block->scheduler, 1);
}

inline void wait(Barrier& barrier) {
  fiber().barrier = &barrier;
  fiber().round = barrier.round;
  barrier.arrive();
  if (!fiber().may_run()) pause();
  fiber().barrier = nullptr;
}

inline void fiber_main() {
  body();
  fiber().done = true;
  if (--block->running == 0) block->spoil();
  cluster_barrier.leave_for_good();
  block->barrier.leave_for_good();
  warp().barrier.leave_for_good();
  pause();
}

// Runs the threads of a warp until all of them wait for others; whether any ran.
inline bool run_warp(size_t first, size_t last) {
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    for (size_t t = first; t < last; ++t) {
      if (!block->fibers[t].may_run()) continue;
      again = ran = true;
      block->current = t;
      threadIdx.x = static_cast<uint32_t>(t);
      resume(block->fibers[t]);
    }
  }
  return ran;
}

inline void begin_block(Block& own, Dim3 index, uint32_t threads, bool early) {
  own.index = index;
  own.spoil();
  own.running = static_cast<int>(threads);
  own.barrier = {};
  std::fill(std::begin(own.others), std::end(own.others), Barrier{});
  own.fibers = std::vector<Fiber>(threads);
  own.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
  own.barrier.expected = static_cast<int>(threads);
  for (uint32_t t = 0; t < threads; ++t) {
    ++own.warps[t / kWarp].barrier.expected;
    Fiber& fiber = own.fibers[t];
    fiber.waits = early;
    if (own.stacks.size() <= t) own.stacks.emplace_back(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = own.stacks[t].get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

// The blocks of `cluster`, side by side.
inline void run_blocks(uint32_t threads) {
  cluster_barrier = {};
  cluster_barrier.expected = static_cast<int>(threads * cluster.size());
  bool upwards = true;  // the first warp runs ahead of the others, then the last one, so that a missing barrier shows
  for (bool any = true; any; upwards = !upwards) {
    any = false;
    for (size_t i = 0; i < cluster.size(); ++i) {
      block = &cluster[upwards ? i : cluster.size() - 1 - i];
      blockIdx = block->index;
      const size_t warps = block->warps.size();
      for (size_t j = 0; j < warps; ++j) {
        const size_t w = upwards ? j : warps - 1 - j;
        any |= run_warp(w * kWarp, std::min<size_t>(threads, (w + 1) * kWarp));
      }
    }
  }
  for (const Block& own : cluster) {
    if (own.running == 0) continue;
    std::fprintf(stderr, "threads wait at a barrier that others never reach\n");
    std::abort();
  }
  block = nullptr;
}

// `together` blocks of gridDim.y are a cluster.
inline void run_grid(Dim3 grid, uint32_t threads, uint32_t together, bool early, void (*kernel)()) {
  gridDim = grid;
  blockDim = Dim3{threads, 1, 1};
  body = kernel;
  if (together == 0 || grid.y % together != 0) std::abort();
  if (cluster.size() != together) cluster = std::vector<Block>(together);
  for (uint32_t z = 0; z < grid.z; ++z) {
    for (uint32_t y = 0; y < grid.y; y += together) {
      for (uint32_t x = 0; x < grid.x; ++x) {
        for (uint32_t i = 0; i < together; ++i) begin_block(cluster[i], Dim3{x, y + i, z}, threads, early);
        run_blocks(threads);
      }
    }
  }
}

// Nothing may be read of what the kernel before writes.
inline void need_kernel_before() {
  if (!fiber().waits) return;
  std::fprintf(stderr, "a kernel that was started early reads or writes before it has waited\n");
  std::abort();
}

// Every lane of the warp brings `words`; `use` makes a lane's result of those of all, by lane.
template <int kWords, class Use>
auto together(const uint32_t (&words)[kWords], Use&& use) {
  static_assert(kWords <= kMostWords, "a lane has so many");
  Warp& own = warp();
  std::memcpy(own.slots[lane()], words, sizeof words);
  wait(own.barrier);
  const auto result = use(own.slots);
  wait(own.barrier);
  return result;
}

}  // namespace emulated

namespace twofour::cuda {

inline uint32_t shift_left(uint32_t value, uint32_t by) { return by < 32 ? value << by : 0; }
inline uint64_t shift_left(uint64_t value, uint32_t by) { return by < 64 ? value << by : 0; }

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15u;
    const auto byte = static_cast<uint8_t>(bytes >> (8 * (s & 7u)));
    result |= static_cast<uint32_t>(s < 8 ? byte : byte < 128 ? 0 : 255) << (8 * i);
  }
  return result;
}

template <uint32_t kBytes>
uint32_t signs_of(uint32_t word) {
  return byte_permute(word, 0, kBytes | 0x8888u);
}

inline uint32_t shift_in(uint32_t upper, uint32_t lower, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(upper) << 32 | lower) << by >> 32);
}

template <class Half, class Choose>
uint32_t of_halves(uint32_t a, uint32_t b, Choose&& choose) {
  const auto of = [&](int shift) {
    const Half chosen = choose(static_cast<Half>(a >> shift), static_cast<Half>(b >> shift));
    return static_cast<uint32_t>(static_cast<uint16_t>(chosen)) << shift;
  };
  return of(0) | of(16);
}
inline uint32_t max_halves(uint32_t a, uint32_t b) {
  return of_halves<uint16_t>(a, b, [](auto x, auto y) { return std::max(x, y); });
}
inline uint32_t min_halves(uint32_t a, uint32_t b) {
  return of_halves<uint16_t>(a, b, [](auto x, auto y) { return std::min(x, y); });
}
inline uint32_t min_signed_halves(uint32_t a, uint32_t b) {
  return of_halves<int16_t>(a, b, [](auto x, auto y) { return std::min(x, y); });
}

inline uint32_t shuffle_xor(uint32_t value, int lanes) {
  const uint32_t words[1] = {value};
  return emulated::together(words, [&](const auto& slots) { return slots[emulated::lane() ^ lanes][0]; });
}

inline bool any_lane(bool own) {
  const uint32_t words[1] = {own};
  return emulated::together(words, [](const auto& slots) {
    return std::any_of(std::begin(slots), std::end(slots), [](const auto& slot) { return slot[0] != 0; });
  });
}

inline uint32_t add_max(uint32_t a, uint32_t b, uint32_t c) { return std::max(a + b, c); }

inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class Word>
Word opaque(Word value) {
  return value;
}
inline uint32_t thread_again() { return threadIdx.x; }

inline void sync_block() { emulated::wait(emulated::block->barrier); }
inline void sync_warp() { emulated::wait(emulated::warp().barrier); }
template <int kThreads>
void sync_threads(int number) {
  if (number < 1 || number >= emulated::kBarriers) std::abort();
  emulated::Barrier& barrier = emulated::block->others[number];
  barrier.expected = kThreads;
  emulated::wait(barrier);
}
inline void prefetch_line(const void* from) { static_cast<void>(*static_cast<const volatile char*>(from)); }  // it is there

inline void sync_cluster() { emulated::wait(emulated::cluster_barrier); }
inline void leave_cluster() { emulated::wait(emulated::cluster_barrier); }
inline uint4 load_of_peer(const uint4* own, uint32_t rank) {
  if (rank >= emulated::cluster.size() || reinterpret_cast<uintptr_t>(own) % sizeof(uint4) != 0) std::abort();
  const auto at = reinterpret_cast<const char*>(own) - emulated::block->shared();
  if (at < 0 || at + sizeof(uint4) > emulated::kSharedBytes) std::abort();
  uint4 found;
  std::memcpy(&found, emulated::cluster[rank].shared() + at, sizeof found);
  return found;
}
inline void wait_for_kernel_before() { emulated::fiber().waits = false; }
inline void let_next_kernel_start() { emulated::need_kernel_before(); }
inline void prefetch(const void* from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) std::abort();
  for (uint32_t i = 0; i < bytes; ++i) static_cast<void>(static_cast<const volatile char*>(from)[i]);  // it is there
}

inline void or_into(uint32_t* word, uint32_t bits) { *word |= bits; }
inline void max_into(uint32_t* word, uint32_t value) { *word = std::max(*word, value); }

template <class V>
V load_stream(const V* from) {
  emulated::need_kernel_before();
  if (reinterpret_cast<uintptr_t>(from) % sizeof(V) != 0) {
    std::fprintf(stderr, "a load of %zu bytes at %p, which is no multiple\n", sizeof(V), static_cast<const void*>(from));
    std::abort();
  }
  return *from;
}

template <class V>
V load_written(const V* from) {
  return load_stream(from);
}
template <class V>
V load_kept(const V* from) {
  return load_stream(from);
}

inline uint32_t count_up(uint32_t* counter) {
  emulated::need_kernel_before();
  return (*counter)++;
}

inline void copy_async(void* shared, const void* global, int bytes) {
  emulated::need_kernel_before();
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0)) std::abort();
  std::memset(shared, 0xff, 16);
  emulated::fiber().copies.push_back({shared, global, static_cast<size_t>(bytes), 16});
}
inline void copy_async(uint2* shared, const uint2* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 8 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 8 != 0)) std::abort();
  std::memset(shared, 0xff, 8);
  emulated::fiber().copies.push_back({shared, global, static_cast<size_t>(bytes), 8});
}
inline void copy_async_if(bool wanted, void* shared, const void* global, int bytes = 16) {
  if (wanted) copy_async(shared, global, bytes);
}
inline void commit_copies() {
  auto& own = emulated::fiber();
  own.committed.push_back(std::move(own.copies));
  own.copies.clear();
}
template <int kOpen>
void wait_for_copies() {
  auto& open = emulated::fiber().committed;
  while (open.size() > kOpen) {
    for (const emulated::Copy& copy : open.front()) {
      std::memset(copy.to, 0, copy.of);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    open.erase(open.begin());
  }
}

inline void load_matrices(const void* row, uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  uint32_t address[2];
  std::memcpy(address, &row, sizeof address);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  const auto found = emulated::together(address, [&](const auto& slots) {
    for (int other = g + 1; other < 8; ++other) {  // rows of a matrix in the same banks would be read one after the other
      if ((slots[8 * q + g][0] ^ slots[8 * q + other][0]) / 16 % 8 != 0) continue;
      std::fprintf(stderr, "rows %d and %d of a matrix lie in the same banks\n", g, other);
      std::abort();
    }
    uint4 four;
    uint32_t* const to[4] = {&four.x, &four.y, &four.z, &four.w};
    for (int i = 0; i < 4; ++i) {
      const char* own;
      std::memcpy(&own, slots[8 * i + g], sizeof own);
      std::memcpy(to[i], own + 4 * q, 4);
    }
    return four;
  });
  words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float rounded_product(float a, float b) { return a * b; }
inline int32_t nearest_integer(float value) { return static_cast<int32_t>(std::nearbyint(value)); }
inline float float_of_bf16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
// Any small float: sign, exponent bits, fraction bits; e4m3 has no infinity.
inline float float_of_small(uint32_t bits, int exponent_bits, int fraction_bits, bool infinity) {
  const int top = (1 << exponent_bits) - 1, bias = top >> 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & top;
  const int fraction = static_cast<int>(bits) & ((1 << fraction_bits) - 1), all = (1 << fraction_bits) - 1;
  const bool special = infinity ? exponent == top : exponent == top && fraction == all;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), 1 - bias - fraction_bits)
                              : std::ldexp(static_cast<float>(fraction | 1 << fraction_bits), exponent - bias - fraction_bits);
  if (special) value = infinity && fraction == 0 ? INFINITY : NAN;
  return bits >> (exponent_bits + fraction_bits) & 1u ? -value : value;
}
inline float float_of_fp16(uint16_t bits) { return float_of_small(bits, 5, 10, true); }
inline float float_of_e4m3(uint8_t bits) { return float_of_small(bits, 4, 3, false); }

inline uint16_t bf16_of(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t fp16_of(float value) {
  const auto sign = static_cast<uint16_t>(bits_of_float(value) >> 16 & 0x8000u);
  if (value != value) return 0x7fff;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  const int exponent = std::max(size == 0 ? -14 : std::ilogb(size), -14);  // of the number, or of subnormals
  const float units = std::nearbyint(std::ldexp(size, 10 - exponent));      // to even, of 2^(exponent - 10)
  return static_cast<uint16_t>(sign + static_cast<uint16_t>(units) + ((exponent + 14) << 10));
}

inline uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t halves = 0;
  for (int by = 0; by < 32; by += 16) {
    const auto number = [by](uint32_t word) { return double{float_of_fp16(static_cast<uint16_t>(word >> by))}; };
    halves |= uint32_t{fp16_of(static_cast<float>(number(a) * number(b) + number(c)))} << by;
  }
  return halves;
}

// mma.sp as the PTX ISA draws it; it shares nothing with cuda/layout.h. `item(word, i)` is an item of a register.
template <int kItems, class Sum, class Item>
void multiply(Sum (&sums)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata, int selector, Item&& item) {
  const uint32_t words[9] = {a.x, a.y, a.z, a.w, b[0], b[1], b[2], b[3], metadata};
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  struct Four {
    Sum at[4];
  };
  const Four found = emulated::together(words, [&](const auto& slots) {
    Four four{};
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i / 2), column = 2 * q + i % 2;
      Sum sum = sums[i];
      for (int group = 0; group < 4 * kItems; ++group) {
        const uint32_t word = kItems == 2 ? slots[row % 8 * 4 + 2 * selector + group / 4][8]
                                          : slots[row % 8 * 4 + row / 8 + 2 * (group / 8)][8];
        const uint32_t nibble = kItems == 2 ? word >> (16 * (row / 8) + 4 * (group % 4)) : word >> (4 * (group % 8));
        for (int kept = 0; kept < 2; ++kept) {
          const int k = 4 * group + static_cast<int>(nibble >> (2 * kept) & 3u);
          // A: the lane of four and the register that hold this group; B: likewise of row k.
          const int in_four = kItems == 2 ? group % 4 : group % 8 / 2, high = kItems == 2 ? group / 4 : group / 8;
          const uint32_t own = slots[row % 8 * 4 + in_four][row / 8 + 2 * high];
          const int place = kItems == 2 ? kept : 2 * (group % 2) + kept;
          const int in_register = k % (4 * kItems);
          const uint32_t other = slots[column * 4 + in_register / kItems][4 + k / (4 * kItems)];
          sum += item(own, place) * item(other, in_register % kItems);
        }
      }
      four.at[i] = sum;
    }
    return four;
  });
  std::copy(found.at, found.at + 4, sums);
}
inline uint16_t half_at(uint32_t word, int i) { return static_cast<uint16_t>(word >> (16 * i)); }
inline uint8_t byte_at(uint32_t word, int i) { return static_cast<uint8_t>(word >> (8 * i)); }

template <int kSelector>
void multiply_bf16(float (&sums)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
  multiply<2>(sums, a, b, metadata, kSelector, [](uint32_t word, int i) { return float_of_bf16(half_at(word, i)); });
}
template <int kSelector>
void multiply_fp16(float (&sums)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
  multiply<2>(sums, a, b, metadata, kSelector, [](uint32_t word, int i) { return float_of_fp16(half_at(word, i)); });
}
template <int kSelector>
void multiply_int8(int32_t (&sums)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
  multiply<4>(sums, a, b, metadata, kSelector, [](uint32_t w, int i) { return int32_t{static_cast<int8_t>(byte_at(w, i))}; });
}
template <int kSelector>
void multiply_e4m3(float (&sums)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
  multiply<4>(sums, a, b, metadata, kSelector, [](uint32_t word, int i) { return float_of_e4m3(byte_at(word, i)); });
}

template <class V>
void store_wide(V* to, V value) {
  emulated::need_kernel_before();
  if (reinterpret_cast<uintptr_t>(to) % sizeof(V) != 0) std::abort();
  *to = value;
}
inline uint4 load_latest(const uint4* from) { return load_stream(from); }

}  // namespace twofour::cuda
