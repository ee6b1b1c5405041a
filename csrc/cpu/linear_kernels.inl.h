// The table entry of a pair of cores. Included inside an unnamed namespace, last.

template <class FewCore, class ManyCore>
constexpr LinearKernel kernel_of() {
  return {Few<FewCore>::scratch_bytes,
          Few<FewCore>::prepare,
          Few<FewCore>::run,
          kLanes,
          kLanes * Many<ManyCore>::kPanelVectors,
          ManyCore::kPanelPercent,
          static_cast<int>(sizeof(typename ManyCore::WeightItem)),
          Many<ManyCore>::scratch_bytes,
          Many<ManyCore>::run};
}
