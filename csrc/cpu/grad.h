// Gradients of y = x @ W.T for a 2:4 matrix W in the CPU layout (nm/layout.h).
//
//   input    grad_x[tokens, in]  = grad[tokens, out] @ W
//   values   grad_values[r, 2g + i] = sum over t of grad[t, r] * x[t, 4g + index(r, g, i)], in the CPU layout; rows
//            beyond out_features get zeros
//
// fp32: everything is fp32. bf16: everything is bf16; sums are fp32 and rounded once, to nearest even. Dropped places
// take no part: inf or NaN that would only meet a dropped place does not reach the result.
//
// Pointers need only the alignment of their elements. Nothing outside the tensors is read or written.
// The bits of the result do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/linear.h"

namespace twofour::cpu {

struct GradInputArgs {
  const void* grad;         // [tokens, out_features], rows grad_stride elements apart
  const void* values;       // CPU layout
  const uint8_t* metadata;  // CPU layout
  void* grad_x;             // [tokens, in_features], rows x_stride elements apart
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;  // a multiple of 4
  int64_t grad_stride;
  int64_t x_stride;
};

struct GradValuesArgs {
  const void* grad;         // [tokens, out_features], rows grad_stride elements apart
  const void* x;            // [tokens, in_features], rows x_stride elements apart
  const uint8_t* metadata;  // CPU layout
  void* grad_values;        // CPU layout
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;  // a multiple of 4
  int64_t grad_stride;
  int64_t x_stride;
};

// One dtype on one instruction set: pure workers, called from several threads at once by grad_dispatch.cpp.
struct GradKernel {
  // Input gradient. `sort` arranges the weights of groups [group0, group1) by which pair of places they keep, in chunks
  // of chunk_rows rows (a multiple of 16); `input` then computes in_features 4 * group0 .. 4 * group1 of a panel.
  int step_tokens;      // a panel has whole steps of tokens
  int panel_tokens;     // of the largest panel
  int panel_row_bytes;  // of one row of W in the packed panel
  int vector_bytes;
  size_t (*cell_bytes)(int chunk_rows);
  void (*sort)(const GradInputArgs& args, int chunk_rows, void* sorted, int64_t group0, int64_t group1);
  size_t (*input_scratch_bytes)(int chunk_rows, int64_t groups);
  void (*input)(const GradInputArgs& args, int chunk_rows, const void* sorted, void* scratch, int64_t token0,
                int tokens, int64_t group0, int64_t group1);

  // Values' gradient. `transpose_x` and `transpose_grad` make rows of tokens of [tokens, columns], `pitch` bytes apart
  // and zero behind the last token; two rows of the gradient lie vector by vector, so its columns come in even numbers
  // but for the last. `values` adds one chunk of tokens to the sums of tiles [tile0, tile1).
  int tokens_per_vector;  // of a vector of vector_bytes
  int block_groups;       // groups whose transposed x should stay in the L1 cache
  void (*transpose_x)(const void* from, int64_t stride, int64_t tokens, int64_t columns, void* to, int64_t pitch);
  void (*transpose_grad)(const void* from, int64_t stride, int64_t tokens, int64_t columns, void* to, int64_t pitch);
  void (*values)(const GradValuesArgs& args, const void* transposed_x, const void* transposed_grad, int64_t pitch,
                 int64_t row_bytes, float* sums, bool first, bool last, int64_t tile0, int64_t tile1);
};

struct GradKernels {
  GradKernel fp32;
  GradKernel bf16;
};

// One object file each; the x86 ones exist only on x86-64.
extern const GradKernels grad_baseline;
extern const GradKernels grad_avx2;
extern const GradKernels grad_avx512;
extern const GradKernels grad_avx512bf16;

// Run on up to `threads` threads; `isa` null means default_isa(). Return "isa/grad_input" or "isa/grad_values", a
// literal. Throw std::invalid_argument for an instruction set that does not run here, std::bad_alloc.
// Memory: grad_input keeps 1.6 bytes for each group of each row of W at most (the rows' order); grad_values one chunk of
// tokens of both inputs transposed, and for bf16 fp32 sums during the call if there are several chunks.
const char* grad_input(const GradInputArgs& args, DType dtype, int threads, const char* isa);
const char* grad_values(const GradValuesArgs& args, DType dtype, int threads, const char* isa);

}  // namespace twofour::cpu
