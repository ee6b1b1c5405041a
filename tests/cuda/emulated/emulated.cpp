// Every kernel, built for the GPU of gpu.h, and a way to launch one by its address.
#undef _FORTIFY_SOURCE  // fibers jump between stacks, which its longjmp takes for an accident
#include <sys/mman.h>
#include <unistd.h>

#include "gpu.h"

#include "cuda/decode.cu"
#include "cuda/pack.cu"
#include "cuda/tokens.cu"

#define TWOFOUR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kMostArguments = 16;
using Kernel = void (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                        uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
Kernel kernel = nullptr;
uint64_t a[kMostArguments];

uint64_t page_bytes() { return static_cast<uint64_t>(sysconf(_SC_PAGESIZE)); }
uint64_t whole_pages(uint64_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }

}  // namespace

// All arguments of kernels are integers or pointers, 8 bytes each: an ABI passes them alike, and ignores those beyond.
TWOFOUR_EXPORT void emulated_launch(void* address, const uint32_t* grid, uint32_t threads, const uint64_t* arguments,
                                    int count) {
  kernel = reinterpret_cast<Kernel>(address);
  std::fill(a, a + kMostArguments, 0);
  std::copy(arguments, arguments + count, a);
  emulated::run_grid(Dim3{grid[0], grid[1], grid[2]}, threads, [] {
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]);
  });
}

// Memory that ends where its page ends, the next page forbidden: a read or write behind it ends the process.
TWOFOUR_EXPORT void* emulated_allocate(uint64_t bytes) {
  const uint64_t whole = whole_pages(bytes);
  void* all = mmap(nullptr, whole + 2 * page_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(all) + page_bytes();
  if (mprotect(first, whole, PROT_READ | PROT_WRITE) != 0) return nullptr;
  return first + (whole - bytes);
}
TWOFOUR_EXPORT void emulated_free(void* memory, uint64_t bytes) {
  const uint64_t whole = whole_pages(bytes);
  munmap(static_cast<char*>(memory) - (whole - bytes) - page_bytes(), whole + 2 * page_bytes());
}
