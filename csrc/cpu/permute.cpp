// The search over all channels: cuts them into blocks, anew at every temperature, and lets threads work on those.
#include "cpu/permute.h"

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/features.h"
#include "cpu/linear.h"
#include "cpu/work.h"

namespace twofour::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
  const PermuteKernels* kernels;
};

// Plainest first; the last one that runs here is the default.
constexpr Isa kIsas[] = {
    {"baseline", always, &permute_baseline},
#if defined(TWOFOUR_X86)
    {"avx2", has_avx2, &permute_avx2},
    {"avx512", has_avx512, &permute_avx512},
#endif
};

// Slots of a block: its table stays in the L1 cache, and what a swap costs grows with it. 512 x 512 in the same time: 22.5
// of efficacy with 64, 22.0 with 32; 23.2 with 128 in 1.6 times the time.
constexpr int kBlockSlots = 64;
constexpr int kSweepsAtOnce = 20;  // at one temperature
// Temperatures in units of the mean |gain| of a swap at the start. At 0.2 one offer in 400 is taken.
constexpr double kHot = 0.2, kCold = 0.04;
// Up to so many channels are one block at the end, so that no swap at all is left that gains.
constexpr int kPolishSlots = kPermuteMostSlots;
constexpr int kPolishSweeps = 1000;
// Searches of what is one block only, of which the best counts. 64 x 128, 2000 sweeps: 36.3 of efficacy with one, 36.7 with
// four.
constexpr int kChains = 4;

const PermuteKernels& find_kernels(const char* name) {
  default_isa();  // refuses a TWOFOUR_ISA that names nothing of this machine
  const char* asked = name != nullptr ? name : std::getenv("TWOFOUR_ISA");
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas) {
    if (!isa.runs_here()) continue;
    best = &isa;
    if (asked != nullptr && std::strcmp(asked, isa.name) == 0) return *isa.kernels;
  }
  if (name != nullptr) throw std::invalid_argument("the search has no instruction set '" + std::string(name) + "' here");
  return *best->kernels;
}

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

class Random {  // splitmix64, too: any seed is a good one
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t below(uint64_t count) {
    state_ += 0x9E3779B97F4A7C15ull;
    return (mixed(state_) >> 32) * count >> 32;
  }

 private:
  uint64_t state_;
};

template <class T>
void shuffle(std::vector<T>& items, Random& random) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.below(i)]);
}

// log((i + 1/2) / count) in random order, and the beginning once more: a block reads on from any place. By a series, not by
// std::log: libraries differ in the last bit.
const float* chances() {
  static const std::vector<float> table = [] {
    std::vector<float> logs(kPermuteChances);
    for (int i = 0; i < kPermuteChances; ++i) {
      double value = (i + 0.5) / kPermuteChances, halvings = 0;
      for (; value < 0.7; value *= 2) halvings += 1;
      const double z = (value - 1) / (value + 1);
      double power = z, sum = 0;
      for (int k = 1; k < 40; k += 2, power *= z * z) sum += power / k;
      logs[i] = static_cast<float>(2 * sum - halvings * 0.69314718055994530942);
    }
    Random random(1);
    shuffle(logs, random);
    for (int i = 0; i < kPermuteMostSlots; ++i) logs.push_back(logs[i]);
    return logs;
  }();
  return table.data();
}

Scratch& block_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

int64_t blocks_of(const PermuteArgs& args) {
  const int64_t most = kBlockSlots / args.group > 2 ? kBlockSlots / args.group : 2;
  return (args.channels / args.group + most - 1) / most;
}

double kept_score(const PermuteArgs& args, const int64_t* order) {
  double sum = 0;
  for (int64_t c = 0; c < args.channels; c += args.group) {
    for (int64_t r = 0; r < args.rows; ++r) {
      float members[kPermuteMostGroup];
      for (int i = 0; i < args.group; ++i) members[i] = args.columns[order[c + i] * args.rows + r];
      for (int k = 0; k < args.keep; ++k) {
        int best = k;
        for (int i = k + 1; i < args.group; ++i) best = members[i] > members[best] ? i : best;
        std::swap(members[k], members[best]);
        sum += members[k];
      }
    }
  }
  return sum;
}

class Search {
 public:
  Search(const PermuteArgs& args, int threads, const PermuteKernels& kernels)
      : args_(args), threads_(threads), kernels_(kernels), groups_(args.channels / args.group), random_(args.seed),
        start_(std::chrono::steady_clock::now()) {
    order_.assign(args.order, args.order + args.channels);
  }

  int64_t run() {
    const int64_t levels = args_.sweeps / kSweepsAtOnce > 2 ? args_.sweeps / kSweepsAtOnce : 2;
    const int64_t blocks = blocks_of(args_);
    double scale = 0;
    for (int64_t level = 0; level < levels; ++level) {
      const double by_sweeps = static_cast<double>(level) / static_cast<double>(levels - 1);
      const double by_time = args_.seconds > 0 ? seconds() / args_.seconds : 0;
      const double progress = by_time > by_sweeps ? by_time : by_sweeps;
      if (progress > 1) break;
      if (blocks > 1) shuffle_groups();
      if (level == 0) scale = mean_gain(groups_ / blocks);
      // Falls as 1 / (1 + time): about as a geometric schedule does, without a power that libraries round differently.
      sweep(blocks, scale * kHot / (1 + (kHot / kCold - 1) * progress), kSweepsAtOnce, level);
    }
    sweep(args_.channels <= kPolishSlots ? 1 : blocks, 0, kPolishSweeps, levels);
    for (int64_t i = 0; i < args_.channels; ++i) args_.order[i] = order_[i];
    return taken_;
  }

 private:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

  void shuffle_groups() {
    std::vector<int64_t> places(groups_);
    for (int64_t g = 0; g < groups_; ++g) places[g] = g;
    shuffle(places, random_);
    const std::vector<int32_t> before = order_;
    for (int64_t i = 0; i < args_.channels; ++i) {
      order_[i] = before[places[i / args_.group] * args_.group + i % args_.group];
    }
  }

  PermuteBlock block_of(int64_t group0, int64_t group1) {
    PermuteBlock block = {};
    block.columns = args_.columns;
    block.rows = args_.rows;
    block.slots = static_cast<int>((group1 - group0) * args_.group);
    block.keep = args_.keep;
    block.group = args_.group;
    block.order = order_.data() + group0 * args_.group;
    const size_t table = static_cast<size_t>(block.slots) * block.padded_slots();
    const size_t columns = static_cast<size_t>(block.slots) * block.rows;
    block.thresholds = static_cast<float*>(block_scratch().get((columns + 2 * table) * sizeof(float)));
    block.gains = block.thresholds + columns;
    block.gains_across = block.gains + table;
    return block;
  }

  // Mean |gain| of the swaps of the first groups.
  double mean_gain(int64_t groups) {
    const PermuteBlock block = block_of(0, groups);
    kernels_.prepare(block);
    const int stride = block.padded_slots();
    double sum = 0;
    int64_t pairs = 0;
    for (int s = 0; s < block.slots; ++s) {
      for (int t = 0; t < block.slots; ++t) {
        if (s / block.group == t / block.group) continue;
        sum += std::fabs(static_cast<double>(block.gains[s * stride + t]) + block.gains_across[s * stride + t]);
        ++pairs;
      }
    }
    return pairs > 0 ? sum / static_cast<double>(pairs) : 0;
  }

  void sweep(int64_t blocks, double temperature, int sweeps, int64_t level) {
    std::vector<int64_t> taken(blocks, 0);
    const auto t = static_cast<float>(temperature);
    for_each_unit(threads_, blocks, [&](int64_t i) {
      const PermuteBlock block = block_of(part(groups_, blocks, i), part(groups_, blocks, i + 1));
      uint64_t random = mixed(mixed(args_.seed ^ mixed(static_cast<uint64_t>(level))) + static_cast<uint64_t>(i)) | 1;
      kernels_.prepare(block);
      taken[i] = kernels_.anneal(block, t, sweeps, chances(), &random);
    });
    for (const int64_t count : taken) taken_ += count;
  }

  const PermuteArgs& args_;
  const int threads_;
  const PermuteKernels& kernels_;
  const int64_t groups_;
  Random random_;
  const std::chrono::steady_clock::time_point start_;
  std::vector<int32_t> order_;
  int64_t taken_ = 0;
};

}  // namespace

int64_t permute(const PermuteArgs& args, int threads, const char* isa) {
  const PermuteKernels& kernels = find_kernels(isa);
  chances();
  if (blocks_of(args) > 1) return Search(args, threads, kernels).run();

  std::vector<std::vector<int64_t>> orders(kChains, {args.order, args.order + args.channels});
  int64_t taken[kChains] = {};
  double kept[kChains] = {};
  for_each_unit(threads, kChains, [&](int64_t i) {
    PermuteArgs chain = args;
    chain.order = orders[i].data();
    chain.seed = mixed(args.seed + static_cast<uint64_t>(i));
    chain.seconds = args.seconds * (threads < kChains ? threads : kChains) / kChains;
    taken[i] = Search(chain, 1, kernels).run();
    kept[i] = kept_score(chain, chain.order);
  });
  int best = 0;
  for (int i = 1; i < kChains; ++i) best = kept[i] > kept[best] ? i : best;
  std::memcpy(args.order, orders[best].data(), orders[best].size() * sizeof(int64_t));
  return taken[best];
}

int permute_isa_count() {
  int count = 0;
  for (const Isa& isa : kIsas) count += isa.runs_here() ? 1 : 0;
  return count;
}

const char* permute_isa_name(int index) {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && index-- == 0) return isa.name;
  }
  return nullptr;
}

}  // namespace twofour::cpu
