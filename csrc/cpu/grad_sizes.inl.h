// Sizes that the gradient kernels of an instruction set share. Included inside an unnamed namespace.

constexpr int kGradPanelVectors = 6;                    // of tokens
constexpr int kGradPassVectors = kLanes == 16 ? 6 : 3;  // whose four columns fit into the registers
constexpr int kGradRowBytes = kGradPanelVectors * static_cast<int>(sizeof(F));
constexpr int kMaxChunkRows = 256;  // a row's number is one byte
constexpr int kCellHead = 16;       // bytes before the rows of a sorted cell
constexpr int kCellSlack = 32;      // bytes behind them: a filler for each kind, and what a vector writes too far
