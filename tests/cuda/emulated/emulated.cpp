// Every kernel, built for the GPU of gpu.h, and a way to launch one by its address.
#undef _FORTIFY_SOURCE  // fibers jump between stacks, which its longjmp takes for an accident
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <tuple>
#include <utility>

#include "gpu.h"

#include "cuda/decode.cu"
#include "cuda/gemm.cu"
#include "cuda/pack.cu"
#include "cuda/pack_both.cu"
#include "cuda/tokens.cu"

#define TWOFOUR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kMostArguments = 24;
template <size_t>
using Word = uint64_t;
template <size_t... kPlaces>
auto of_words(std::index_sequence<kPlaces...>) -> void (*)(Word<kPlaces>...);
using Kernel = decltype(of_words(std::make_index_sequence<kMostArguments>{}));
Kernel kernel = nullptr;
std::array<uint64_t, kMostArguments> a;

uint64_t page_bytes() { return static_cast<uint64_t>(sysconf(_SC_PAGESIZE)); }
uint64_t whole_pages(uint64_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }

}  // namespace

// All arguments of kernels are integers or pointers, 8 bytes each: an ABI passes them alike, and ignores those beyond.
TWOFOUR_EXPORT void emulated_launch(void* address, const uint32_t* grid, uint32_t threads, const uint64_t* arguments,
                                    int count, uint32_t cluster, int early) {
  kernel = reinterpret_cast<Kernel>(address);
  if (count > kMostArguments) std::abort();
  a.fill(0);
  std::copy(arguments, arguments + count, a.begin());
  emulated::run_grid(Dim3{grid[0], grid[1], grid[2]}, threads, cluster, early != 0, [] {
    std::apply([](auto... words) { kernel(words...); }, a);
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
