// The search for permutations, without Python: what it returns is a permutation that keeps more, the same on every
// instruction set and with any number of threads, and it stays inside its memory.
#include "cpu/permute.h"

#include <stdexcept>

#include "cpu/threads.h"
#include "support.h"

namespace twofour::test {
namespace {

struct Mode {
  const char* name;
  int keep, group;
};
constexpr Mode kModes[] = {{"2:4", 2, 4}, {"1:4", 1, 4}, {"1:2", 1, 2}, {"3:5", 3, 5}, {"4:8", 4, 8}, {"31:32", 31, 32}};

struct Case {
  int64_t groups, rows;
};
// One group, two, a block and one more, several blocks; more slots than fit whole vectors.
constexpr Case kCases[] = {{1, 16}, {2, 16}, {3, 48}, {16, 32}, {17, 16}, {70, 16}};

std::vector<int64_t> search(const Mode& mode, const Case& size, const Memory& columns, int threads, const char* isa) {
  const int64_t channels = size.groups * mode.group;
  Memory order(static_cast<size_t>(channels) * sizeof(int64_t));
  std::vector<int64_t> channel(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) channel[static_cast<size_t>(c)] = c;
  std::memcpy(order.data(), channel.data(), order.size());
  const cpu::PermuteArgs args = {reinterpret_cast<const float*>(columns.data()), channels, size.rows, mode.keep, mode.group,
                                 reinterpret_cast<int64_t*>(order.data()), 60, 0, 7};
  cpu::permute(args, threads, isa);
  std::memcpy(channel.data(), order.data(), order.size());
  return channel;
}

double kept(const Mode& mode, const Case& size, const Memory& columns, const std::vector<int64_t>& order) {
  double sum = 0;
  for (size_t g = 0; g < static_cast<size_t>(size.groups); ++g) {
    for (int64_t r = 0; r < size.rows; ++r) {
      std::vector<double> members;
      for (size_t i = 0; i < static_cast<size_t>(mode.group); ++i) {
        const int64_t channel = order[g * static_cast<size_t>(mode.group) + i];
        members.push_back(read_fp32(columns.data() + (channel * size.rows + r) * 4));
      }
      std::sort(members.rbegin(), members.rend());
      for (int k = 0; k < mode.keep; ++k) sum += members[static_cast<size_t>(k)];
    }
  }
  return sum;
}

Memory scores(const Mode& mode, const Case& size, uint64_t seed) {
  Random random(seed);
  const int64_t count = size.groups * mode.group * size.rows;
  Memory columns(static_cast<size_t>(count) * sizeof(float));
  // Some zeros and ties.
  for (int64_t i = 0; i < count; ++i) {
    write_fp32(columns.data() + i * 4, random.below(8) == 0 ? random.below(2) : std::fabs(random.real()));
  }
  return columns;
}

void orders_are_better_and_the_same_everywhere(const Mode& mode) {
  for (const Case& size : kCases) {
    if (size.groups * mode.group > (mode.group > 8 ? 64 : 280)) continue;  // minutes under a sanitizer
    const Memory columns = scores(mode, size, 3);
    std::vector<int64_t> identity(static_cast<size_t>(size.groups * mode.group));
    for (size_t c = 0; c < identity.size(); ++c) identity[c] = static_cast<int64_t>(c);
    const std::vector<int64_t> first = search(mode, size, columns, 1, "baseline");
    std::vector<int64_t> sorted = first;
    std::sort(sorted.begin(), sorted.end());
    check(sorted == identity, "%d groups: not a permutation", static_cast<int>(size.groups));
    const double before = kept(mode, size, columns, identity), after = kept(mode, size, columns, first);
    check(size.groups == 1 ? after == before : after > before, "%d groups: %g after %g", static_cast<int>(size.groups),
          after, before);
    for (int i = 0; i < cpu::permute_isa_count(); ++i) {
      for (const int threads : {1, 3}) {
        check(search(mode, size, columns, threads, cpu::permute_isa_name(i)) == first, "%d groups: %s, %d threads differ",
              static_cast<int>(size.groups), cpu::permute_isa_name(i), threads);
      }
    }
  }
}

void scores_that_are_all_the_same_end(const Mode& mode) {
  for (const float value : {0.0f, 1.0f}) {
    const Case size = {20, 32};
    Memory columns(static_cast<size_t>(size.groups * mode.group * size.rows) * sizeof(float));
    for (size_t i = 0; i < columns.size(); i += 4) write_fp32(columns.data() + i, value);
    search(mode, size, columns, 2, nullptr);
    check(true, "ended");
  }
}

void names_are_checked(const Mode& mode) {
  std::string message = "no error";
  try {
    search(mode, kCases[1], scores(mode, kCases[1], 1), 1, "sse9");
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  check(message.find("no instruction set 'sse9'") != std::string::npos, "%s", message.c_str());
}

constexpr Test<Mode> kTests[] = {
    {"orders are better and the same everywhere", orders_are_better_and_the_same_everywhere},
    {"scores that are all the same end", scores_that_are_all_the_same_end},
    {"names of instruction sets are checked", names_are_checked},
};

}  // namespace
}  // namespace twofour::test

int main(int argc, char** argv) {
  using namespace twofour;
  return test::run_tests(test::kTests, test::kModes, cpu::permute_isa_count(), cpu::permute_isa_name,
                         cpu::threads_source(), argc, argv);
}
