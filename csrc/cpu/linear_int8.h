// y[tokens, out] = activation(quantized(x)[tokens, in] @ W[out, in].T, scaled, + bias) for a 2:4 matrix W of int8 in the
// int8 layout below; inputs are quantized here, symmetrically, each token by itself.
//
//   largest = max |x[t, :]|                     x_scale[t] = largest / 127
//   q[t, i] = nearest even of x[t, i] * (127 / largest)
//   y[t, r] = activation(((float(sum_i q[t, i] * W[r, i]) * x_scale[t]) * scale[r]) + bias[r])
//
// Sums are exact int32, every operation on floats is one rounding in fp32, in this order: all instruction sets, cuts and
// kernels/reference.py give the same bits, but for what an activation errs (epilogue.inl.h; ReLU nothing). bf16 y is rounded
// once more, to nearest even. A token whose largest input is
// below 2^-119 counts as zero (its scale would be subnormal). A token with NaN or inf at any place, dropped ones too,
// gives NaN in all its outputs.
//
// Layout: tiles of 16 rows as in nm/layout.h, two groups (8 inputs, a "step") at a time; `steps = ceil(in / 8)`, and
// four steps a "quad", `quads = ceil(steps / 4)`.
//
//   values    [tiles, steps, 16, 4] int8    | r0.g0.v0 r0.g0.v1 r0.g1.v0 r0.g1.v1 | r1... | .. | r15... |
//   metadata  [tiles, quads, 16, 4] uint8   byte k of row r: where in its group kept value k of the row is, two bits
//                                           for each step of the quad, the first lowest
//
// One 32-bit lane for a row: shifted and masked, the metadata are the places of the step's four values, with which
// vpshufb or TBL takes their inputs out of the eight; one dot product adds them up. Rows beyond out_features, the group
// beyond an odd number of groups and steps beyond the last hold the value 0 (if any) and place 0.
//
// Pointers need only the alignment of their elements. Nothing outside the tensors is read or written.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/linear.h"

namespace twofour::cpu {

constexpr int kInt8Step = 8;                          // inputs of a step
constexpr int kInt8Quad = 4;                          // steps whose metadata lie together
constexpr int64_t kInt8MostInputs = int64_t{1} << 18;  // 2^17 kept products of at most 127 * 128 fit an int32
constexpr float kInt8Smallest = 0x1p-119f;            // the scale of any larger token is a normal number

struct LinearInt8Args {
  const void* x;            // [tokens, in_features] of `dtype`, rows x_stride elements apart
  const int8_t* values;     // int8 layout
  const uint8_t* metadata;  // int8 layout
  const float* scales;      // [out_features]
  const float* bias;        // [out_features] or null
  void* y;                  // [tokens, out_features] of `dtype`, rows y_stride elements apart
  DType dtype;
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;  // a multiple of 4
  int64_t x_stride;
  int64_t y_stride;
  Activation activation = Activation::kNone;
};

// One instruction set: pure workers, called from several threads at once; linear_int8.cpp cuts the work.
//
// Quantized tokens lie in blocks: `width` tokens from token `first` on are [steps][width][input_bytes] bytes at
// `quantized + first * steps * input_bytes`. How the bytes say the eight inputs of a step is the kernel's own affair.
struct LinearInt8Kernel {
  int input_bytes;   // of a step of a token
  int few_tokens;    // `few` takes up to so many tokens, in one block of exactly that width
  int block_tokens;  // most tokens of a block of `many`
  int block_step;    // widths of blocks of `many` are multiples of this
  void (*quantize)(const LinearInt8Args& args, int64_t first, int64_t width, uint8_t* block, float* x_scales);
  // The rows of tiles [tile0, tile1) for all tokens; streams the weights once.
  void (*few)(const LinearInt8Args& args, const uint8_t* quantized, const float* x_scales, int64_t tile0,
              int64_t tile1);
  // The rows of tiles [tile0, tile1) for tokens [token0, token1), which are whole blocks but for the end of x.
  size_t (*many_scratch_bytes)(int64_t tokens);
  void (*many)(const LinearInt8Args& args, void* scratch, const uint8_t* quantized, const float* x_scales,
               int64_t token0, int64_t token1, int64_t tile0, int64_t tile1);
};

// Width of the next block when `left` tokens are left: as even as steps allow. The end of x rounds up.
static constexpr int64_t int8_block_width(int64_t left, int64_t most, int64_t step) {
  const int64_t units = (left + step - 1) / step, blocks = (units * step + most - 1) / most;
  return (units + blocks - 1) / blocks * step;
}

extern const LinearInt8Kernel linear_int8_baseline;
extern const LinearInt8Kernel linear_int8_avx2;
extern const LinearInt8Kernel linear_int8_avx512vnni;
extern const LinearInt8Kernel linear_int8_neon;
extern const LinearInt8Kernel linear_int8_neondot;

// Instruction sets with an int8 kernel that run here, plainest first, and the one that runs by default. TWOFOUR_ISA
// "avx512" and "avx512bf16" stand for avx512vnni where the machine has it, else for avx2; "neonbf16" for neondot, else
// for neon. Throws as default_isa().
int int8_isa_count();
const char* int8_isa_name(int index);
const char* default_int8_isa();

// As linear(): runs on up to `threads` threads. Returns "isa/int8-family", a literal.
const char* linear_int8(const LinearInt8Args& args, int threads, const char* isa, Family family);

// Canonical format <-> int8 layout, exact bits.
void pack_linear_int8(const int8_t* values, const uint8_t* metadata, int8_t* packed_values, uint8_t* packed_metadata,
                      int64_t out_features, int64_t in_features);
void unpack_linear_int8(const int8_t* packed_values, const uint8_t* packed_metadata, int8_t* values,
                        uint8_t* metadata, int64_t out_features, int64_t in_features);

}  // namespace twofour::cpu
