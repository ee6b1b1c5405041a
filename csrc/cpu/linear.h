// y[tokens, out] = activation(x[tokens, in] @ W[out, in].T + bias) + residual for a 2:4 matrix W in the CPU layout
// (nm/layout.h).
//
// fp32: x, W, y are fp32. bf16: x, W, y are bf16; sums are fp32, y is rounded once, to nearest even, and NaN stays
// NaN. bf16_fp32: W is bf16, x and y are fp32. e4m3_fp32, e4m3_bf16: W is float8 e4m3, x and y as named. The bias may be of
// fp32 or bf16. Dropped positions take no part: inf or NaN in x there does not reach y.
//
// Pointers need only the alignment of their elements. Nothing outside the tensors is read or written.
// The bits of y do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace twofour::cpu {

enum class DType : int { kFp32 = 0, kBf16 = 1, kBf16Fp32 = 2, kE4m3Fp32 = 3, kE4m3Bf16 = 4 };  // weights, then tokens
constexpr int kDTypes = 5;
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };  // kGelu: by erf
enum class Family : int { kAuto = 0, kFew = 1, kMany = 2 };

struct LinearArgs {
  const void* x;            // [tokens, in_features], rows x_stride elements apart
  const void* values;       // CPU layout
  const uint8_t* metadata;  // CPU layout
  const float* bias;        // [out_features] or null
  void* y;                  // [tokens, out_features], rows y_stride elements apart
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;  // a multiple of 4
  int64_t x_stride;
  int64_t y_stride;
  int shared = 1;  // 1, 2 or 4 neighbouring rows of the tiles have one mask: what the metadata was packed with
  // y = activation(x @ W.T + bias) + residual, in fp32, rounded once (epilogue.inl.h).
  Activation activation = Activation::kNone;
  const void* residual = nullptr;  // [tokens, out_features] of y's type, or null; shares no memory with y
  int64_t residual_stride = 0;     // elements between its rows
  // Which row of W lies where in the tiles (nm/layout.h); null where every row lies at its own place.
  const uint8_t* order = nullptr;
  // [out_features] or null: what each row's sums are multiplied with before the bias is added.
  const float* scales = nullptr;
};

// One dtype on one instruction set. The functions are pure workers: dispatch.cpp cuts the work, owns the scratch
// memory (64-byte aligned) and calls them from several threads at once.
struct LinearKernel {
  // Few tokens: 16 output rows in the lanes of a vector; streams the weights once.
  // `prepare` arranges all of x for every thread to read; `few` then computes the rows of tiles [tile0, tile1), with a bias
  // in the order of the tiles.
  size_t (*few_scratch_bytes)(const LinearArgs& args);
  void (*few_prepare)(const LinearArgs& args, void* scratch);
  void (*few)(const LinearArgs& args, const void* scratch, int64_t tile0, int64_t tile1);

  // Many tokens: tokens in the lanes. Computes tokens [token0, token0 + tokens) of the rows of tiles [tile0, tile1), whole
  // windows where there is an order, tokens <= panel_tokens; the packed activations of a K-chunk take at most panel_bytes.
  // The thread will probably go on at next_token, args.tokens if with nothing.
  int lanes;          // tokens of a vector
  int panel_tokens;   // tokens of the largest panel
  int panel_percent;  // share of the L1 cache that panel_bytes should be
  int weight_bytes;   // of one kept weight
  size_t (*many_scratch_bytes)(int panel_bytes, int64_t tiles);
  void (*many)(const LinearArgs& args, void* scratch, int panel_bytes, int64_t token0, int tokens, int64_t tile0,
               int64_t tile1, int64_t next_token);
};

struct LinearKernels {
  LinearKernel kernels[kDTypes];

  const LinearKernel& of(DType dtype) const { return kernels[static_cast<int>(dtype)]; }
};

// One object file each; the avx ones exist only on x86-64, the neon ones only on AArch64.
extern const LinearKernels linear_baseline;
extern const LinearKernels linear_avx2;
extern const LinearKernels linear_avx512;
extern const LinearKernels linear_avx512bf16;
extern const LinearKernels linear_neon;
extern const LinearKernels linear_neonbf16;

// Name of the instruction set that runs by default: the best one here, or what TWOFOUR_ISA asks for.
// Throws std::invalid_argument when TWOFOUR_ISA names no instruction set or one that this machine lacks.
const char* default_isa();

// Number of instruction sets that are compiled in and run here, and their names, plainest first.
int isa_count();
const char* isa_name(int index);

// Runs the op on up to `threads` threads. `bias` (null for none, else [out_features] of bias_dtype) takes the place of
// args.bias; args.scales are in the rows' own order; `isa` null means default_isa(). Returns "isa/family", a literal.
// Throws std::invalid_argument as default_isa() does.
const char* linear(LinearArgs args, DType dtype, const void* bias, DType bias_dtype, int threads, const char* isa,
                   Family family);

}  // namespace twofour::cpu
