// Cutting work for threads, and memory for them: for the files that dispatch an operation. Not for the files of one
// instruction set: what those share must have internal linkage (linear_support.inl.h).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/threads.h"

namespace twofour::cpu {

constexpr size_t kHugePage = 2 << 20;

// Memory of one thread that is kept from call to call and grows when asked for more.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* get(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)  // a new piece of exactly this size each time, so that one byte too many is seen
    std::free(memory_);
    memory_ = nullptr;
    if (posix_memalign(&memory_, 64, bytes) != 0) throw std::bad_alloc();
    return memory_;
#endif
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      const size_t page = bytes < kHugePage / 8 ? 4096 : kHugePage;
      const size_t rounded = (bytes + page - 1) / page * page;
      memory_ = std::aligned_alloc(page, rounded);
      if (memory_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      if (page == kHugePage) madvise(memory_, rounded, MADV_HUGEPAGE);
#endif
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
struct Job {
  const Unit* unit;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  static void body(void* context) {
    Job& job = *static_cast<Job*>(context);
    try {
      for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) (*job.unit)(i);
    } catch (const std::bad_alloc&) {  // nothing may leave an OpenMP region
      job.failed = true;
    }
  }
};

template <class Unit>
void for_each_unit(int threads, int64_t count, const Unit& unit) {
  Job<Unit> job{&unit, count};
  run_on_threads(static_cast<int>(count < threads ? count : threads), Job<Unit>::body, &job);
  if (job.failed) throw std::bad_alloc();
}

// Where part `index` of `parts` even parts of `whole` begins.
inline int64_t part(int64_t whole, int64_t parts, int64_t index) { return whole / parts * index + whole % parts * index / parts; }

// Bytes of the L1 data cache; 32 KiB where the system does not say.
inline int l1_bytes() {
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
