// The two-row halves of a 4x4 mask with two kept in each row and column: 6 x 6 pairs of places, of 19 kinds.

constexpr int kPairs = 6, kHalves = 36, kKinds = 19;

// Places of a row as four bits, column 0 the highest: kept places that come first are a larger number.
constexpr int kPairBits[kPairs] = {0b1100, 0b1010, 0b1001, 0b0110, 0b0101, 0b0011};

struct Halves {
  int kind[kHalves];   // half 6 * p + q has pair p above pair q
  bool first[kHalves];  // of its kind, in row order
  int rest[kKinds];    // the kind of the other half: the columns are full with both
};

constexpr Halves make_halves() {
  Halves halves{};
  int columns[kKinds] = {};  // kept of each column, two bits each
  int kinds = 0;
  for (int half = 0; half < kHalves; ++half) {
    int counts = 0;
    for (int c = 0; c < 4; ++c) {
      counts += ((kPairBits[half / kPairs] >> c & 1) + (kPairBits[half % kPairs] >> c & 1)) << (2 * c);
    }
    int kind = 0;
    while (kind < kinds && columns[kind] != counts) ++kind;
    halves.first[half] = kind == kinds;
    if (kind == kinds) columns[kinds++] = counts;
    halves.kind[half] = kind;
  }
  for (int kind = 0; kind < kKinds; ++kind) {
    while (columns[halves.rest[kind]] + columns[kind] != 0b10101010) ++halves.rest[kind];
  }
  return halves;
}

constexpr Halves kHalf = make_halves();
constexpr int half_bits(int half) { return kPairBits[half / kPairs] << 4 | kPairBits[half % kPairs]; }
