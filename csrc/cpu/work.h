// Scratch memory and the cutting of work, for the files that dispatch an operation. Not for the files of one instruction
// set: what they share must have internal linkage (linear_support.inl.h).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/threads.h"

namespace twofour::cpu {

// Memory of one thread that is kept from call to call and grows when asked for more.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
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

}  // namespace twofour::cpu
