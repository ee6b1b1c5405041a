// Cutting work for threads, and memory that is kept from call to call. For dispatching files, not for kernels.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/threads.h"

namespace twofour::cpu {

// Memory of one thread that grows when asked for more; aligned to a page.
class KeptMemory {
 public:
  ~KeptMemory() { std::free(memory_); }
  void* get(size_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, rounded);
      if (memory_ == nullptr) throw std::bad_alloc();
      bytes_ = rounded;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

// Memory of one call, given back at its end; aligned to a page.
class CallMemory {
 public:
  explicit CallMemory(size_t bytes) : memory_(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)) {
    if (memory_ == nullptr && bytes > 0) throw std::bad_alloc();
  }
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;
  ~CallMemory() { std::free(memory_); }
  void* get() const { return memory_; }

 private:
  void* memory_;
};

// Units of work go to whichever thread is free. Each output is computed inside one unit, in an order that the cut does
// not change: the bits are the same for any number of threads.
template <class Unit>
struct Units {
  const Unit* unit;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  static void body(void* context) {
    Units& units = *static_cast<Units*>(context);
    try {
      for (int64_t i; (i = units.next.fetch_add(1, std::memory_order_relaxed)) < units.count;) (*units.unit)(i);
    } catch (const std::bad_alloc&) {  // nothing may leave an OpenMP region
      units.failed = true;
    }
  }
};

template <class Unit>
void run_units(int threads, int64_t count, const Unit& unit) {
  Units<Unit> units{&unit, count};
  run_on_threads(static_cast<int>(count < threads ? count : threads), Units<Unit>::body, &units);
  if (units.failed) throw std::bad_alloc();
}

// Where part `index` of `parts` even parts of `whole` begins.
inline int64_t even_part(int64_t whole, int64_t parts, int64_t index) {
  return whole / parts * index + whole % parts * index / parts;
}

// Bytes of the L1 data cache; 32 KiB where the system does not say.
inline int l1_data_bytes() {
  static const int bytes = [] {
    long l1 = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return l1 < 16 * 1024 || l1 > 256 * 1024 ? 32 * 1024 : static_cast<int>(l1);
  }();
  return bytes;
}

}  // namespace twofour::cpu
