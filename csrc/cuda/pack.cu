// Dense matrices to and from the CUDA layout (cuda/layout.h), one way. All of them are bound by memory.
//
//   prune_*        |W| -> two of each four -> packed
//   quantize_*     |W| -> two of each four -> e4m3 with a scale for each row -> packed
//   compress_*     W that keeps two of each four already -> packed; tells where it does not
//   take_*         W where packed metadata keep it -> values: what is kept of a gradient, or of weights after a step
//   expand_*       packed -> W
//
// Columns are a multiple of 4; whatever the layout pads is written too. Rows are `stride` items apart. 8 or 16 bytes are read
// at a time where addresses allow it, and items one by one where not.
#include "cuda/formats.h"
#include "cuda/layout.h"
#include "cuda/two_of_four.h"

namespace twofour::cuda {

// ---- a warp packs a chunk of a tile ----------------------------------------------------------------------------------

constexpr int kWarpsOfBlock = 8;
constexpr int kOneWayThreads = kWarp * kWarpsOfBlock;

// Which group a lane's part i of a fragment is: 4 of 2 bytes (a register each), 8 of 1 byte (half a register each).
template <int kItemsize>
struct Parts {
  static constexpr int kCount = kItemsize == 2 ? 4 : 8;
  TWOFOUR_DEVICE static int row(int lane, int i) { return row_of(lane, kItemsize == 2 ? i : i / 2); }
  TWOFOUR_DEVICE static int group(int lane, int step, int i) {
    return kItemsize == 2 ? group_of(2, lane, step, i) : group_of(1, lane, step, i / 2) + i % 2;
  }
  TWOFOUR_DEVICE static uint32_t kept(uint2 four, uint32_t nibble) {
    return kItemsize == 2 ? kept_of_two_bytes(four, nibble) : kept_of_one_byte(four.x, nibble);
  }
  // Adds what part i keeps to the registers.
  TWOFOUR_DEVICE static void put(uint32_t (&registers)[4], int i, uint32_t two) {
    if (kItemsize == 2) {
      registers[i] = two;
    } else {
      registers[i / 2] |= two << (16 * (i % 2));
    }
  }
  TWOFOUR_DEVICE static uint32_t get(const uint32_t (&registers)[4], int i) {
    return kItemsize == 2 ? registers[i] : registers[i / 2] >> (16 * (i % 2)) & 0xffffu;
  }
};

// The chunks of the tiles of a matrix, one for each warp of the grid: blocks side by side, tiles below each other.
struct Chunks {
  uint32_t rows, columns, chunk, lane;

  TWOFOUR_DEVICE Chunks(int64_t of_rows, int64_t of_columns)
      : rows(static_cast<uint32_t>(of_rows)),
        columns(static_cast<uint32_t>(of_columns)),
        chunk(blockIdx.x * kWarpsOfBlock + threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp) {}

  // body(tile, number of the chunk), by whole warps.
  template <class Body>
  TWOFOUR_DEVICE void each(Body&& body) const {
    const uint32_t chunks = (columns + kColumns - 1) / kColumns;
    if (chunk >= chunks) return;
    TWOFOUR_ROLLED
    for (uint32_t tile = blockIdx.y; tile * kTile < rows; tile += gridDim.y) body(tile, uint64_t{tile * chunks + chunk});
  }
};

// Four items, of 1 byte all in x; zeros outside.
template <int kItemsize>
TWOFOUR_DEVICE uint2 load_group(const void* matrix, int64_t stride, int64_t rows, int64_t columns, int64_t row,
                                int64_t column) {
  if (row >= rows || column >= columns) return uint2{0, 0};
  if constexpr (kItemsize == 2) {
    return load_four(static_cast<const uint16_t*>(matrix) + row * stride + column);
  } else {
    return uint2{load_four(static_cast<const uint8_t*>(matrix) + row * stride + column), 0};
  }
}

// What a lane holds of a chunk, by step and register: a group of 2-byte items, or two side by side of 1-byte items.
template <int kItemsize>
TWOFOUR_DEVICE void load_chunk(const void* matrix, int64_t stride, const Chunks& of, uint32_t tile,
                               uint2 (&words)[4 * steps_of(kItemsize)]) {
  const uint32_t row0 = tile * kTile, column0 = of.chunk * kColumns;
  const int64_t pitch = stride * kItemsize;
  const char* const corner = static_cast<const char*>(matrix) + (row0 * pitch + column0 * kItemsize);
  const bool aligned = (reinterpret_cast<uint64_t>(corner) | static_cast<uint64_t>(pitch)) % sizeof(uint2) == 0;
  if (row0 + kTile <= of.rows && column0 + kColumns <= of.columns && aligned) {
    const char* const from = corner + ((of.lane / 4) * pitch + of.lane % 4 * sizeof(uint2));
    const char* const below = from + 8 * pitch;
    unroll<4 * steps_of(kItemsize)>([&](auto i) {
      words[i] = load_stream(reinterpret_cast<const uint2*>((i % 2 == 0 ? from : below) + i / 2 * 32));
    });
    return;
  }
  const int lane = static_cast<int>(of.lane);
  unroll<4 * steps_of(kItemsize)>([&](auto i) {
    const int64_t row = row0 + row_of(lane, i % 4), column = column0 + 4 * group_of(kItemsize, lane, i / 4, i % 4);
    words[i] = load_group<kItemsize>(matrix, stride, of.rows, of.columns, row, column);
    if (kItemsize == 1) words[i].y = load_group<1>(matrix, stride, of.rows, of.columns, row, column + 4).x;
  });
}

// What is kept of a chunk: a lane's registers of values by step, its word of metadata; the largest magnitudes and the
// largest of all that are third in their group, as two_of_four.h has them.
template <int kItemsize>
struct PackedChunk {
  uint32_t values[steps_of(kItemsize)][4] = {};
  uint32_t metadata = 0, largest = 0, third = 0;
};

// Of 2-byte items. `choose` is given a group and says what is kept of it.
template <class Choose>
TWOFOUR_DEVICE PackedChunk<2> pack_chunk(const uint2 (&groups)[8], uint32_t lane, Choose&& choose) {
  PackedChunk<2> packed;
  uint32_t nibbles[2] = {0, 0};  // of rows g and g + 8
  unroll<8>([&](auto i) {  // the last of a row first: the next ones move it up
    constexpr int at = 7 - decltype(i){};
    const Kept kept = choose(groups[at]);
    packed.values[at / 4][at % 4] = byte_permute(groups[at].x, groups[at].y, kept.selector);
    packed.largest = max_halves(packed.largest, kept.largest);
    packed.third |= kept.third;
    nibbles[at % 2] = shift_in(nibbles[at % 2], nibble_on_top(kept.selector), 4);
  });
  packed.metadata = turn_nibbles<1>(byte_permute(nibbles[0], nibbles[1], 0x5410), lane % 4);
  return packed;
}

// Of 1-byte items: two groups at a time.
template <class Choose>
TWOFOUR_DEVICE PackedChunk<1> pack_chunk(const uint2 (&groups)[4], uint32_t lane, Choose&& choose) {
  PackedChunk<1> packed;
  uint32_t selectors[4];
  unroll<4>([&](auto i) {
    const KeptOfTwo kept = choose(groups[i]);
    packed.values[0][i] = byte_permute(groups[i].x, groups[i].y, kept.selector);
    packed.largest = max_halves(packed.largest, kept.largest);
    packed.third = max_halves(packed.third, kept.third);
    selectors[i] = kept.selector;
  });
  const uint32_t upper = nibbles_of(byte_permute(selectors[0], selectors[1], 0x5410));
  const uint32_t lower = nibbles_of(byte_permute(selectors[2], selectors[3], 0x5410));
  packed.metadata = turn_bytes(byte_permute(upper, lower, 0x6420), lane % 4);
  return packed;
}

// How 2-byte items are ranked: by magnitude, those above kLargest, which are NaN, last.
template <uint32_t kNumbers>
struct TwoBytes {
  static constexpr int kItemsize = 2;
  static constexpr uint32_t kLargest = kNumbers;
  static constexpr bool kMayBeNan = kLargest < 0x7fff;

  TWOFOUR_DEVICE static Kept choose(uint2 four) { return two_of_two_bytes(four); }
  TWOFOUR_DEVICE static Kept choose_beside_nan(uint2 four) {
    return {selector_of(two_largest_beside_nan<2, kLargest>(four)), 0, 0};
  }
  TWOFOUR_DEVICE static bool has_nan(uint32_t largest) {
    return (largest & 0xffffu) > kLargest || largest >> 16 > kLargest;
  }
  TWOFOUR_DEVICE static bool has_third(uint32_t third) { return third != 0; }
};

// Of 1 byte: bits of the magnitude, or all of an integer that is one of `kSigned` ones.
template <uint32_t kMagnitude, uint32_t kNumbers, bool kSigned = false>
struct OneByte {
  static constexpr int kItemsize = 1;
  static constexpr uint32_t kLargest = kNumbers;
  static constexpr bool kMayBeNan = kLargest < kMagnitude;

  TWOFOUR_DEVICE static KeptOfTwo choose(uint2 fours) {
    constexpr uint32_t kMask = kMagnitude * 0x01010101u;
    return kSigned ? two_of_one_byte(sizes_of(fours.x), sizes_of(fours.y)) : two_of_one_byte(fours.x & kMask, fours.y & kMask);
  }
  TWOFOUR_DEVICE static KeptOfTwo choose_beside_nan(uint2 fours) {
    const uint32_t first = two_largest_beside_nan<1, kLargest>(uint2{fours.x, 0});
    const uint32_t second = two_largest_beside_nan<1, kLargest>(uint2{fours.y, 0});
    const uint32_t places = (first & 3u) | (first & 12u) << 2 | (second & 3u) << 8 | (second & 12u) << 10;
    return {places | 0x4400u, 0, 0};
  }
  TWOFOUR_DEVICE static bool has_nan(uint32_t largest) {
    return (largest >> 8 & 0xffu) > kLargest || largest >> 24 > kLargest;
  }
  TWOFOUR_DEVICE static bool has_third(uint32_t third) { return (third & 0xff00ff00u) != 0; }
};

template <class Groups, bool kMayKeepTwo>
TWOFOUR_DEVICE void pack_one_way(const void* matrix, int64_t stride, int64_t rows, int64_t columns, uint4* values,
                                 uint32_t* metadata, uint32_t* status) {
  constexpr int kItemsize = Groups::kItemsize, kSteps = steps_of(kItemsize);
  const Chunks of(rows, columns);
  of.each([&](uint32_t tile, uint64_t place) {
    uint2 groups[4 * kSteps];
    load_chunk<kItemsize>(matrix, stride, of, tile, groups);
    // Zeros behind the ends keep their first two, as the layout pads them.
    PackedChunk<kItemsize> packed = pack_chunk(groups, of.lane, [](auto four) { return Groups::choose(four); });
    if constexpr (Groups::kMayBeNan) {
      if (any_lane(Groups::has_nan(packed.largest))) {
        packed = pack_chunk(groups, of.lane, [](auto four) { return Groups::choose_beside_nan(four); });
      }
    }
    unroll<kSteps>([&](auto step) {
      const auto& four = packed.values[step];
      values[(place * kSteps + step) * kWarp + of.lane] = uint4{four[0], four[1], four[2], four[3]};
    });
    metadata[place * kWarp + of.lane] = packed.metadata;
    if (kMayKeepTwo && Groups::has_third(packed.third) && status != nullptr) or_into(status, 1u);
  });
}

#define TWOFOUR_ONE_WAY(name, Groups, may_keep_two)                                                                      \
  TWOFOUR_KERNEL(kOneWayThreads, 4)                                                                                     \
  name(const void* matrix, int64_t stride, int64_t rows, int64_t columns, uint4* values, uint32_t* metadata,            \
       uint32_t* status) {                                                                                              \
    pack_one_way<Groups, may_keep_two>(matrix, stride, rows, columns, values, metadata, status);                         \
  }
using Bf16Groups = TwoBytes<Bfloat16::kInfinity>;
using Fp16Groups = TwoBytes<Float16::kInfinity>;
using E4m3Groups = OneByte<0x7f, 0x7e>;  // without an infinity
using E5m2Groups = OneByte<0x7f, 0x7c>;
using Int8Groups = OneByte<0xff, 0xff, true>;
// Of what keeps two already any order of what is no zero will do.
using SomeOfTwoBytes = TwoBytes<0x7fff>;
using SomeFp8 = OneByte<0x7f, 0x7f>;
using SomeInt8 = OneByte<0xff, 0xff>;
TWOFOUR_ONE_WAY(prune_bf16, Bf16Groups, false)
TWOFOUR_ONE_WAY(prune_fp16, Fp16Groups, false)
TWOFOUR_ONE_WAY(prune_e4m3, E4m3Groups, false)
TWOFOUR_ONE_WAY(prune_e5m2, E5m2Groups, false)
TWOFOUR_ONE_WAY(prune_int8, Int8Groups, false)
TWOFOUR_ONE_WAY(compress_half, SomeOfTwoBytes, true)
TWOFOUR_ONE_WAY(compress_fp8, SomeFp8, true)
TWOFOUR_ONE_WAY(compress_int8, SomeInt8, true)

// ---- 2-byte items in, e4m3 with a scale for each row out: a block packs a tile, and reads it twice -------------------

constexpr int kQuantizeWarps = 16;
constexpr int kQuantizeThreads = kWarp * kQuantizeWarps;
constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestRow = 1.5046327690525280e-36f;  // 2^-119: the factor of smaller rows would be no number

// What a lane packs of a chunk of 2-byte items, in the places of 1-byte items: two groups side by side, by register.
TWOFOUR_DEVICE void load_wide_chunk(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint32_t tile,
                                    uint32_t chunk, uint32_t lane, uint4 (&words)[4]) {
  const uint32_t row0 = tile * kTile, column0 = chunk * kColumns;
  const uint16_t* const corner = weight + (row0 * stride + column0);
  const bool aligned = (reinterpret_cast<uint64_t>(corner) | static_cast<uint64_t>(stride) * sizeof *corner) % sizeof(uint4) == 0;
  if (row0 + kTile <= rows && column0 + kColumns <= columns && aligned) {
    const uint16_t* const from = corner + ((lane / 4) * stride + lane % 4 * 8);
    unroll<4>([&](auto r) {
      words[r] = load_kept(reinterpret_cast<const uint4*>(from + (r % 2 == 0 ? 0 : 8 * stride) + r / 2 * 32));
    });
    return;
  }
  unroll<4>([&](auto r) {
    const int64_t row = row0 + row_of(static_cast<int>(lane), r), column = column0 + 4 * group_of(1, static_cast<int>(lane), 0, r);
    const uint2 first = load_group<2>(weight, stride, rows, columns, row, column);
    const uint2 second = load_group<2>(weight, stride, rows, columns, row, column + 4);
    words[r] = {first.x, first.y, second.x, second.y};
  });
}

template <class Format>
TWOFOUR_DEVICE float half_of(uint32_t bits) {
  if constexpr (Format::kFraction == Bfloat16::kFraction) return float_of_bf16(static_cast<uint16_t>(bits));
  return float_of_fp16(static_cast<uint16_t>(bits));
}

// The larger of `most` and the magnitudes of two items, NaN left out.
template <class Format>
TWOFOUR_DEVICE uint32_t largest_of(uint32_t most, uint32_t two) {
  const uint32_t items[2] = {two & 0x7fffu, two >> 16 & 0x7fffu};
  unroll<2>([&](auto i) {
    if (items[i] > most && items[i] <= Format::kInfinity) most = items[i];
  });
  return most;
}

template <class Format>
TWOFOUR_DEVICE void quantize(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values,
                             uint32_t* metadata, float* scales) {
  using Groups = TwoBytes<Format::kInfinity>;
  TWOFOUR_SHARED uint32_t largest[kTile];
  const uint32_t thread = threadIdx.x, lane = thread % kWarp, g = lane / 4, tile = blockIdx.x;
  const uint32_t chunks = static_cast<uint32_t>(chunks_of(columns));
  if (thread < kTile) largest[thread] = 0;
  sync_block();
  uint32_t halves[2] = {0, 0}, most[2];  // of rows g and g + 8
  uint4 words[4];
  TWOFOUR_ROLLED
  for (uint32_t chunk = thread / kWarp; chunk < chunks; chunk += kQuantizeWarps) {
    load_wide_chunk(weight, stride, rows, columns, tile, chunk, lane, words);
    unroll<4>([&](auto r) {
      const uint32_t two = max_halves(words[r].x & 0x7fff7fffu, words[r].y & 0x7fff7fffu);
      const uint32_t others = max_halves(words[r].z & 0x7fff7fffu, words[r].w & 0x7fff7fffu);
      halves[r % 2] = max_halves(halves[r % 2], max_halves(two, others));
    });
  }
  unroll<2>([&](auto k) { most[k] = (halves[k] & 0xffffu) > halves[k] >> 16 ? halves[k] & 0xffffu : halves[k] >> 16; });
  if (Groups::has_nan(halves[0]) || Groups::has_nan(halves[1])) {  // seldom: again, without them
    most[0] = most[1] = 0;
    TWOFOUR_ROLLED
    for (uint32_t chunk = thread / kWarp; chunk < chunks; chunk += kQuantizeWarps) {
      load_wide_chunk(weight, stride, rows, columns, tile, chunk, lane, words);
      unroll<4>([&](auto r) {
        uint32_t& own = most[r % 2];
        own = largest_of<Format>(largest_of<Format>(own, words[r].x), words[r].y);
        own = largest_of<Format>(largest_of<Format>(own, words[r].z), words[r].w);
      });
    }
  }
  unroll<2>([&](auto k) { max_into(largest + g + 8 * k, most[k]); });
  sync_block();
  float factors[2];
  unroll<2>([&](auto k) {
    const float size = half_of<Format>(largest[g + 8 * k]);
    factors[k] = size >= kSmallestRow ? kLargestE4m3 / size : 0.0f;
  });
  if (thread < kTile && tile * kTile + thread < rows) {
    const float size = half_of<Format>(largest[thread]);
    scales[tile * kTile + thread] = size >= kSmallestRow ? size / kLargestE4m3 : 0.0f;
  }
  // From the end: what was read last is still in the last cache.
  TWOFOUR_ROLLED
  for (uint32_t left = (chunks + kQuantizeWarps - 1 - thread / kWarp) / kQuantizeWarps; left > 0; --left) {
    const uint32_t chunk = thread / kWarp + (left - 1) * kQuantizeWarps;
    load_wide_chunk(weight, stride, rows, columns, tile, chunk, lane, words);
    uint32_t registers[4], nibbles = 0;
    unroll<4>([&](auto i) {  // the last groups first: the next ones move their nibbles up
      constexpr int r = 3 - decltype(i){};
      const uint2 fours[2] = {{words[r].x, words[r].y}, {words[r].z, words[r].w}};
      uint32_t kept[2];
      unroll<2>([&](auto j) {
        constexpr int k = 1 - decltype(j){};
        Kept two = Groups::choose(fours[k]);
        if (Groups::has_nan(two.largest)) two = Groups::choose_beside_nan(fours[k]);
        kept[k] = byte_permute(fours[k].x, fours[k].y, two.selector);
        nibbles = shift_in(nibbles, nibble_on_top(two.selector), 4);
      });
      unroll<2>([&](auto k) {
        const float low = half_of<Format>(kept[k] & 0xffffu) * factors[r % 2], high = half_of<Format>(kept[k] >> 16) * factors[r % 2];
        kept[k] = two_e4m3_of(low, high);
      });
      registers[r] = kept[0] | kept[1] << 16;
    });
    const uint64_t place = tile * chunks + chunk;
    values[place * kWarp + lane] = uint4{registers[0], registers[1], registers[2], registers[3]};
    metadata[place * kWarp + lane] = turn_bytes(nibbles, lane % 4);
  }
}

#define TWOFOUR_QUANTIZE(name, Format)                                                                                \
  TWOFOUR_KERNEL(kQuantizeThreads, 2)                                                                                 \
  name(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values, uint32_t* metadata,      \
       float* scales) {                                                                                               \
    quantize<Format>(weight, stride, rows, columns, values, metadata, scales);                                        \
  }
TWOFOUR_QUANTIZE(quantize_bf16, Bfloat16)
TWOFOUR_QUANTIZE(quantize_fp16, Float16)

// ---- where metadata lie already --------------------------------------------------------------------------------------

// The nibble of part i of a step, from the words of the lanes of its row group.
template <int kItemsize>
TWOFOUR_DEVICE uint32_t nibble_of_part(const uint32_t* words, int lane, int step, int i) {
  const int group = Parts<kItemsize>::group(lane, step, i), row = Parts<kItemsize>::row(lane, i);
  if (kItemsize == 2) return words[lane / 4 * 4 + group / 4] >> (4 * (group % 4) + 16 * (row / 8)) & 15u;
  return words[lane / 4 * 4 + row / 8 + 2 * (group / 8)] >> (4 * (group % 8)) & 15u;
}

template <int kItemsize>
TWOFOUR_DEVICE void take(const void* matrix, int64_t stride, int64_t rows, int64_t columns, const uint32_t* metadata,
                         uint4* values) {
  constexpr int kSteps = steps_of(kItemsize);
  using Part = Parts<kItemsize>;
  const Chunks of(rows, columns);
  of.each([&](uint32_t tile, uint64_t place) {
    const int lane = static_cast<int>(of.lane);
    uint2 groups[4 * kSteps];
    load_chunk<kItemsize>(matrix, stride, of, tile, groups);
    unroll<kSteps>([&](auto step) {
      uint32_t registers[4] = {0, 0, 0, 0};
      unroll<Part::kCount>([&](auto i) {
        const uint2 two = groups[kItemsize == 2 ? 4 * step + i : i / 2];
        const uint2 four = kItemsize == 2 ? two : uint2{i % 2 == 0 ? two.x : two.y, 0};
        Part::put(registers, i, Part::kept(four, nibble_of_part<kItemsize>(metadata + place * kWarp, lane, step, i)));
      });
      values[(place * kSteps + step) * kWarp + of.lane] = uint4{registers[0], registers[1], registers[2], registers[3]};
    });
  });
}

TWOFOUR_KERNEL(kOneWayThreads, 4)
take_half(const void* matrix, int64_t stride, int64_t rows, int64_t columns, const uint32_t* metadata, uint4* values) {
  take<2>(matrix, stride, rows, columns, metadata, values);
}
TWOFOUR_KERNEL(kOneWayThreads, 4)
take_byte(const void* matrix, int64_t stride, int64_t rows, int64_t columns, const uint32_t* metadata, uint4* values) {
  take<1>(matrix, stride, rows, columns, metadata, values);
}

// Kept items back to their places, zeros beside them.
template <int kItemsize>
TWOFOUR_DEVICE void expand(const uint4* values, const uint32_t* metadata, int64_t rows, int64_t columns, void* matrix,
                           int64_t stride) {
  constexpr int kSteps = steps_of(kItemsize), kBits = 8 * kItemsize;
  using Part = Parts<kItemsize>;
  const Chunks of(rows, columns);
  of.each([&](uint32_t tile, uint64_t place) {
    const int lane = static_cast<int>(of.lane);
    const int64_t row0 = int64_t{tile} * kTile, column0 = int64_t{of.chunk} * kColumns;
    unroll<kSteps>([&](auto step) {
      const uint4 loaded = values[(place * kSteps + step) * kWarp + of.lane];
      const uint32_t registers[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
      unroll<Part::kCount>([&](auto i) {
        const int64_t row = row0 + Part::row(lane, i), column = column0 + 4 * Part::group(lane, step, i);
        if (row >= rows || column >= columns) return;
        const uint32_t nibble = nibble_of_part<kItemsize>(metadata + place * kWarp, lane, step, i);
        const uint32_t two = Part::get(registers, i), first = nibble & 3u, second = nibble >> 2;
        const uint64_t low = two & ((1u << kBits) - 1), high = two >> kBits;
        const uint64_t four = low << (kBits * first) | high << (kBits * second);
        if constexpr (kItemsize == 2) {
          store_four(static_cast<uint16_t*>(matrix) + row * stride + column,
                     uint2{static_cast<uint32_t>(four), static_cast<uint32_t>(four >> 32)});
        } else {
          store_four(static_cast<uint8_t*>(matrix) + row * stride + column, static_cast<uint32_t>(four));
        }
      });
    });
  });
}

TWOFOUR_KERNEL(kOneWayThreads, 4)
expand_half(const uint4* values, const uint32_t* metadata, int64_t rows, int64_t columns, void* matrix, int64_t stride) {
  expand<2>(values, metadata, rows, columns, matrix, stride);
}
TWOFOUR_KERNEL(kOneWayThreads, 4)
expand_byte(const uint4* values, const uint32_t* metadata, int64_t rows, int64_t columns, void* matrix, int64_t stride) {
  expand<1>(values, metadata, rows, columns, matrix, stride);
}

}  // namespace twofour::cuda
