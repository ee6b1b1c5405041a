// The table entry of a dtype. Included inside an unnamed namespace, last.

template <class Input, class Values, class Multiply>
constexpr GradKernel grad_kernel_of() {
  return {Input::kStepTokens,
          kLanes * kGradPanelVectors,
          Input::kRowBytes,
          kLanes * static_cast<int>(sizeof(float)),
          Input::cell_bytes,
          Input::sort,
          Input::scratch_bytes,
          Input::input,
          Multiply::kTokensPerVector,
          kBlockGroups,
          Values::template transpose<1>,
          Values::template transpose<kBlockRows>,
          Values::values};
}
