// Which order of the input channels lets an N:M pattern keep the most: simulated annealing over swaps of two channels.
//
// A group's kept sum as a function of one member x, the others fixed, is per row
//   sum(keep highest) = (what the others keep without x's place) + max(x, o),   o = keep-th highest of the others.
// So each slot has one column of thresholds o, and a swap of the channels x (slot s) and y (slot t) of two groups gains
//   sum(max(y, o_s) - max(x, o_s)) + sum(max(x, o_t) - max(y, o_t))      over the rows.
// Both halves stand in a table of slots by channels, made as a matrix product is, with max in place of times. Offering a
// swap is then one addition and one comparison; only swaps that are taken cost a pass over rows. 64 x 128 uniform scores:
// 0.1 ns for each swap offered, 6 us for each one taken; evaluating every offer took 20 to 40 ns.
#pragma once

#include <cstdint>

namespace twofour::cpu {

constexpr int kPermuteLanes = 16;     // rows come in multiples; sums run over so many lanes on every instruction set
constexpr int kPermuteMostGroup = 32;
constexpr int kPermuteChances = 4096;  // logarithms of chances, in random order
constexpr int kPermuteMostSlots = 1024;  // of one block

// Groups that exchange channels among themselves, while other blocks do the same.
struct PermuteBlock {
  const float* columns;  // [channels, rows], finite and not negative
  int64_t rows;          // a multiple of kPermuteLanes
  int slots;             // at most kPermuteMostSlots, a multiple of group
  int keep, group;
  int32_t* order;        // [slots] channels, in and out
  float* thresholds;     // [slots, rows]
  float* gains;          // [slots, padded_slots()]: of slot s taking the channel of slot t
  float* gains_across;   // the same, transposed
  int padded_slots() const { return (slots + kPermuteLanes - 1) / kPermuteLanes * kPermuteLanes; }
};

struct PermuteKernels {
  // Fills thresholds and gains.
  void (*prepare)(const PermuteBlock& block);
  // Offers every pair `sweeps` times, from a random place of `chances`; a loss of up to -temperature * chance is taken.
  // Ends early when a sweep at temperature 0 changed nothing. Returns the number of swaps taken.
  int64_t (*anneal)(const PermuteBlock& block, float temperature, int sweeps, const float* chances, uint64_t* random);
};

extern const PermuteKernels permute_baseline, permute_avx2, permute_avx512;

struct PermuteArgs {
  const float* columns;  // [channels, rows]: zero rows at the end change nothing
  int64_t channels, rows;
  int keep, group;
  int64_t* order;        // [channels], in and out: a permutation
  int64_t sweeps;        // how often each channel is offered its partners, altogether
  double seconds;        // the temperature falls with time where that is faster; 0: as long as the sweeps take
  uint64_t seed;
};

// The same order for a seed on every instruction set and with any number of threads, if seconds is 0. Returns the number of
// swaps taken. isa: nullptr for the best of the machine. std::invalid_argument for an unknown one.
int64_t permute(const PermuteArgs& args, int threads, const char* isa);

// Instruction sets that run here, plainest first.
int permute_isa_count();
const char* permute_isa_name(int index);

}  // namespace twofour::cpu
