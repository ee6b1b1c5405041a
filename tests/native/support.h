// What native tests share: numbers, memory between guard pages, masks, counting of failures, and running tests.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "nm/layout.h"

namespace twofour::test {

// ---- counting ------------------------------------------------------------------------------------------------------

inline int64_t checks = 0, failures = 0;

// Counts one check; prints the first failures.
__attribute__((format(printf, 2, 3))) inline bool check(bool holds, const char* format, ...) {
  ++checks;
  if (holds) return true;
  if (++failures <= 20) {
    std::printf("FAILED: ");
    va_list args;
    va_start(args, format);
    std::vprintf(format, args);
    va_end(args);
    std::printf("\n");
  }
  return false;
}

// ---- numbers -------------------------------------------------------------------------------------------------------

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(next() >> 33) % n; }
  double integer() { return below(9) - 4; }                                         // -4 .. 4: every sum is exact
  double real() { return static_cast<double>(next() >> 11) * 0x1p-52 - 1.0; }       // [-1, 1)

 private:
  uint64_t state_;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline double read_fp32(const void* from) {
  float value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void write_fp32(void* to, double value) {
  const float narrow = static_cast<float>(value);
  std::memcpy(to, &narrow, sizeof narrow);
}

inline double read_bf16(const void* from) {
  uint16_t upper;
  std::memcpy(&upper, from, sizeof upper);
  return float_of(static_cast<uint32_t>(upper) << 16);
}
// To nearest, ties to even; NaN stays NaN. Written otherwise than the kernels do it: by the distance to the neighbours.
inline void write_bf16(void* to, double value) {
  const float narrow = static_cast<float>(value);
  uint16_t upper = static_cast<uint16_t>(bits_of(narrow) >> 16);
  const uint32_t rest = bits_of(narrow) & 0xffffu;
  if (std::isnan(narrow)) {
    upper |= 0x40;
  } else if (rest > 0x8000u || (rest == 0x8000u && upper % 2 == 1)) {
    ++upper;  // a carry runs into the exponent, as it should
  }
  std::memcpy(to, &upper, sizeof upper);
}

// float8 e4m3: subnormals below 2^-6, no infinities, NaN where all bits but the sign are set.
inline double read_e4m3(const void* from) {
  uint8_t bits;
  std::memcpy(&bits, from, sizeof bits);
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return NAN;
  const double size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return bits & 128 ? -size : size;
}
// To nearest, ties to even; NaN where it does not fit.
inline void write_e4m3(void* to, double value) {
  uint8_t best = 127;
  double least = 32;  // half of the step at 448: what lies further is not rounded to it
  for (int bits = 0; bits < 127; ++bits) {
    const uint8_t item = static_cast<uint8_t>(bits);
    const double away = std::fabs(std::fabs(value) - read_e4m3(&item));
    if (away < least || (away == least && bits % 2 == 0 && std::isfinite(value))) {
      least = away;
      best = item;
    }
  }
  if (std::signbit(value)) best |= 128;
  std::memcpy(to, &best, sizeof best);
}

// An element type in memory.
struct Type {
  const char* name;
  int size;
  double unit;  // unit roundoff
  double (*read)(const void*);
  void (*write)(void*, double);
};
inline constexpr Type kFp32 = {"fp32", 4, 0x1p-24, read_fp32, write_fp32};
inline constexpr Type kBf16 = {"bf16", 2, 0x1p-8, read_bf16, write_bf16};
inline constexpr Type kE4m3 = {"e4m3", 1, 0x1p-4, read_e4m3, write_e4m3};

// ---- memory --------------------------------------------------------------------------------------------------------

// Bytes between two pages that nobody may touch: they end at the second one, or begin right after the first.
class Memory {
 public:
  enum class Place { kEnd, kBegin };

  Memory() = default;
  explicit Memory(size_t size, Place place = Place::kEnd) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t pages = (size + page - 1) / page * page;
    mapped_ = pages + 2 * page;
    map_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* const inside = static_cast<char*>(map_) + page;
    if (map_ == MAP_FAILED || (pages > 0 && mprotect(inside, pages, PROT_READ | PROT_WRITE) != 0)) {
      std::perror("guard pages");
      std::exit(2);
    }
    data_ = place == Place::kEnd ? inside + pages - size : inside;
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() {
    if (map_ != nullptr) munmap(map_, mapped_);
  }

  char* data() { return data_; }
  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(Memory& other) {
    std::swap(map_, other.map_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  void* map_ = nullptr;
  size_t mapped_ = 0, size_ = 0;
  char* data_ = nullptr;
};

// [rows, columns] of a type, rows `stride` elements apart, `skipped` elements after the beginning of its memory: 1 puts
// every element off any alignment but its own. What lies between and around the rows is filled with `filler`.
class Rows {
 public:
  Rows(const Type& type, int64_t rows, int64_t columns, int64_t gap = 0, int skipped = 0,
       Memory::Place place = Memory::Place::kEnd, double filler = NAN)
      : type_(&type), rows_(rows), columns_(columns), stride_(columns + gap), skipped_(skipped),
        memory_(static_cast<size_t>((rows > 0 ? (rows - 1) * stride_ + columns : 0) + 2 * skipped) *
                    static_cast<size_t>(type.size), place) {
    for (size_t i = 0; i < memory_.size(); i += static_cast<size_t>(type.size)) type.write(memory_.data() + i, filler);
  }

  const Type& type() const { return *type_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t stride() const { return stride_; }
  char* data() { return memory_.data() + skipped_ * type_->size; }
  const char* data() const { return memory_.data() + skipped_ * type_->size; }
  Memory& memory() { return memory_; }

  double get(int64_t row, int64_t column) const { return type_->read(at(row, column)); }
  void set(int64_t row, int64_t column, double value) { type_->write(const_cast<char*>(at(row, column)), value); }
  const char* at(int64_t row, int64_t column) const { return data() + (row * stride_ + column) * type_->size; }

  template <class Value>
  void fill(Value&& value) {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t column = 0; column < columns_; ++column) set(row, column, value());
    }
  }

  // Every byte that is not in a row of [rows, columns] equals that of `other`, of the same form.
  bool same_around(const Rows& other) const {
    const size_t size = static_cast<size_t>(type_->size);
    const size_t row_bytes = static_cast<size_t>(columns_) * size, row_step = static_cast<size_t>(stride_) * size;
    const size_t begin = static_cast<size_t>(skipped_) * size;
    for (size_t i = 0; i < memory_.size(); ++i) {
      const bool inside = i >= begin && i < begin + static_cast<size_t>(rows_) * row_step &&
                          (i - begin) % row_step < row_bytes;
      if (!inside && memory_.data()[i] != other.memory_.data()[i]) return false;
    }
    return true;
  }
  bool same_bytes(const Rows& other) const {
    return memory_.size() == other.memory_.size() &&
           std::memcmp(memory_.data(), other.memory_.data(), memory_.size()) == 0;
  }

 private:
  const Type* type_;
  int64_t rows_, columns_, stride_;
  int skipped_;
  Memory memory_;
};

// ---- masks ---------------------------------------------------------------------------------------------------------

// Two of each four neighbours, the same two in every `shared` neighbouring rows.
struct Mask {
  std::vector<int64_t> columns;   // [out, in / 2], where in its row each kept value stands
  std::vector<uint8_t> metadata;  // canonical
};

inline Mask random_mask(Random& random, int64_t out_features, int64_t in_features, int shared = 1) {
  const int64_t groups = in_features / 4, kept = in_features / 2;
  Mask mask;
  mask.columns.resize(static_cast<size_t>(out_features * kept));
  mask.metadata.assign(static_cast<size_t>(out_features * nm::metadata_row_bytes(in_features)), 0);
  for (int64_t row = 0; row < out_features; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int first = random.below(4), other = (first + 1 + random.below(3)) % 4;
      int i0 = std::min(first, other), i1 = std::max(first, other);
      if (row % shared != 0) {  // as in the row above
        i0 = static_cast<int>(mask.columns[static_cast<size_t>((row - 1) * kept + 2 * group)] % 4);
        i1 = static_cast<int>(mask.columns[static_cast<size_t>((row - 1) * kept + 2 * group + 1)] % 4);
      }
      mask.columns[static_cast<size_t>(row * kept + 2 * group)] = 4 * group + i0;
      mask.columns[static_cast<size_t>(row * kept + 2 * group + 1)] = 4 * group + i1;
      mask.metadata[static_cast<size_t>(row * nm::metadata_row_bytes(in_features) + group / 2)] |=
          static_cast<uint8_t>((i0 | i1 << 2) << (4 * (group % 2)));
    }
  }
  return mask;
}

// ---- running -------------------------------------------------------------------------------------------------------

template <class Mode>
struct Test {
  const char* name;
  void (*run)(const Mode& mode);
};

// Every test in every mode. The arguments are [--require NAME]..., instruction sets that must be among `count`, whose
// names `name_of` knows, and [--only TEXT] for the tests with TEXT in their names. Returns the exit status.
template <class Mode, size_t kModeCount, size_t kTestCount>
int run_tests(const Test<Mode> (&tests)[kTestCount], const Mode (&modes)[kModeCount], int count,
              const char* (*name_of)(int), const char* threads_source, int argc, char** argv) {
  std::string here;
  for (int i = 0; i < count; ++i) here += std::string(i == 0 ? "" : ", ") + name_of(i);
  std::printf("instruction sets: %s; threads: %s\n", here.c_str(), threads_source);
  std::string only;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    if ((option != "--require" && option != "--only") || i + 1 == argc) {
      std::fprintf(stderr, "usage: %s [--require NAME]... [--only TEXT]\n", argv[0]);
      return 2;
    }
    if (option == "--only") {
      only = argv[i + 1];
      continue;
    }
    check((", " + here + ",").find(std::string(", ") + argv[i + 1] + ",") != std::string::npos,
          "instruction set %s is required and not here", argv[i + 1]);
  }
  for (const Test<Mode>& test : tests) {
    if (std::string(test.name).find(only) == std::string::npos) continue;
    for (const Mode& mode : modes) {
      const auto begin = std::chrono::steady_clock::now();
      const int64_t before = checks;
      test.run(mode);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      std::printf("%-42s %-6s %7" PRId64 " checks %7.2f s\n", test.name, mode.name, checks - before, seconds.count());
      std::fflush(stdout);
    }
  }
  std::printf("%" PRId64 " checks, %" PRId64 " failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace twofour::test
