// A GPU for g++: the text of the kernels runs thread by thread on the CPU, so that tests see what they compute and where they
// write on machines without a GPU. It knows nothing of time.
//
// The threads of a block are fibers. One runs until it waits for others, at a barrier of its block or warp; blocks run one
// after the other. What cuda/ptx.h says in PTX is written out here from the PTX ISA.
#pragma once

#include <ucontext.h>

#include <algorithm>
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

constexpr int kWarp = 32, kMostWords = 16;
constexpr size_t kStackBytes = 64 << 10;

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

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  size_t current = 0;
};

inline Block* block = nullptr;
inline void (*body)() = nullptr;

inline Warp& warp() { return block->warps[block->current / kWarp]; }
inline int lane() { return static_cast<int>(block->current % kWarp); }

inline void wait(Barrier& barrier) {
  const uint64_t round = barrier.round;
  barrier.arrive();
  while (barrier.round == round) swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

inline void fiber_main() {
  body();
  Fiber& own = block->fibers[block->current];
  own.done = true;
  block->barrier.leave_for_good();
  warp().barrier.leave_for_good();
  swapcontext(&own.context, &block->scheduler);
}

inline void run_block(uint32_t threads) {
  Block own;
  block = &own;
  own.fibers = std::vector<Fiber>(threads);
  own.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
  own.barrier.expected = static_cast<int>(threads);
  for (uint32_t t = 0; t < threads; ++t) {
    ++own.warps[t / kWarp].barrier.expected;
    Fiber& fiber = own.fibers[t];
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (uint32_t t = 0; t < threads; ++t) {
      if (own.fibers[t].done) continue;
      any = true;
      own.current = t;
      threadIdx.x = t;
      swapcontext(&own.scheduler, &own.fibers[t].context);
    }
  }
  block = nullptr;
}

inline void run_grid(Dim3 grid, uint32_t threads, void (*kernel)()) {
  gridDim = grid;
  blockDim = Dim3{threads, 1, 1};
  body = kernel;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
    }
  }
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

inline uint32_t shuffle_xor(uint32_t value, int lanes) {
  const uint32_t words[1] = {value};
  return emulated::together(words, [&](const auto& slots) { return slots[emulated::lane() ^ lanes][0]; });
}

inline int32_t add_max(int32_t a, int32_t b, int32_t c) { return std::max(a + b, c); }

inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void sync_block() { emulated::wait(emulated::block->barrier); }
inline void or_into(uint32_t* word, uint32_t bits) { *word |= bits; }

template <class V>
V load_stream(const V* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(V) != 0) {
    std::fprintf(stderr, "a load of %zu bytes at %p, which is no multiple\n", sizeof(V), static_cast<const void*>(from));
    std::abort();
  }
  return *from;
}

inline void store_wide(uint2* to, uint2 value) { *to = value; }

}  // namespace twofour::cuda
