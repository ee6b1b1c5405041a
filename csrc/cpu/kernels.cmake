# The object library `kernels`: everything in csrc/cpu, with the instruction sets of the processor that is built for.
# The Python module and tests/native link it, so that both run the same files with the same flags.
set(TWOFOUR_SANITIZE "" CACHE STRING "sanitizers to build with, as in \"address,undefined\"; a finding fails the run")
option(TWOFOUR_EMULATE_AVX512 "run the AVX-512 kernels in plain C, for tests on machines without it (needs SIMDe)")

get_filename_component(csrc "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
add_library(kernels OBJECT
  ${csrc}/cpu/dispatch.cpp
  ${csrc}/cpu/grad_baseline.cpp
  ${csrc}/cpu/grad_dispatch.cpp
  ${csrc}/cpu/linear_baseline.cpp
  ${csrc}/cpu/linear_int8.cpp
  ${csrc}/cpu/linear_int8_baseline.cpp
  ${csrc}/cpu/masks.cpp
  ${csrc}/cpu/masks_baseline.cpp
  ${csrc}/cpu/masks_solver.cpp
  ${csrc}/cpu/pack.cpp
  ${csrc}/cpu/pack_masked.cpp
  ${csrc}/cpu/permute.cpp
  ${csrc}/cpu/permute_baseline.cpp
  ${csrc}/cpu/threads.cpp)
# Products and sums round one by one, but where the source says fma: as in the reference, the same on every machine; and the
# same in two instances of one template, of which the compiler contracts one and not the other.
set(one_by_one -ffp-contract=off)
set_source_files_properties(
  ${csrc}/cpu/linear_baseline.cpp ${csrc}/cpu/linear_int8_baseline.cpp ${csrc}/cpu/masks.cpp ${csrc}/cpu/masks_baseline.cpp
  ${csrc}/cpu/permute.cpp ${csrc}/cpu/permute_baseline.cpp
  PROPERTIES COMPILE_OPTIONS "${one_by_one}")
set_target_properties(kernels PROPERTIES
  POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
target_include_directories(kernels PUBLIC ${csrc})
if(TWOFOUR_SANITIZE)  # -O1: a third of the time to compile, and every intrinsic still runs
  # Null pointers and sizes of objects are AddressSanitizer's to find; asked for twice they cost a quarter of the compiling.
  set(sanitizers -fsanitize=${TWOFOUR_SANITIZE} -fno-sanitize-recover=all -fno-sanitize=null,object-size)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND TWOFOUR_SANITIZE MATCHES "address")
    # Checks are calls: the tests take a minute and a half more, compiling two and a half less, of which several run at once.
    list(APPEND sanitizers --param=asan-instrumentation-with-call-threshold=0)
  endif()
  target_compile_options(kernels PUBLIC -O1 -g1 -fno-omit-frame-pointer ${sanitizers})
  target_link_options(kernels PUBLIC ${sanitizers})
else()
  target_compile_options(kernels PUBLIC -O3)
endif()
target_compile_options(kernels PUBLIC -Wall -Wextra)
target_link_libraries(kernels PUBLIC Threads::Threads ${CMAKE_DL_LIBS})

# One object file per instruction set; dispatch.cpp chooses at run time. Explicit flags: -march names differ between
# compilers and would allow more than dispatch.cpp asks the machine for.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  set(isas avx2 avx512 avx512bf16 avx512vnni)
  set(avx2 -mavx2 -mfma)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  set(avx512bf16 ${avx512} -mavx512bf16)
  set(avx512vnni ${avx512} -mavx512vnni)
  if(TWOFOUR_EMULATE_AVX512)
    set(avx512 ${avx2} -O1 -Wno-psabi -I${csrc}/../tests/native/emulated)
    set(avx512bf16 ${avx512})
    set(avx512vnni ${avx512})
    target_compile_definitions(kernels PUBLIC TWOFOUR_EMULATED_AVX512)
  endif()
  if(TWOFOUR_SANITIZE)
    include(CheckCXXSourceRuns)
    check_cxx_source_runs("int main() { return !__builtin_cpu_supports(\"avx512f\"); }" TWOFOUR_RUNS_AVX512)
    if(NOT TWOFOUR_RUNS_AVX512)  # a finding needs a run, and these files are most of the time to compile
      list(APPEND avx512 -fno-sanitize=all)
      list(APPEND avx512bf16 -fno-sanitize=all)
      list(APPEND avx512vnni -fno-sanitize=all)
    elseif(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # On the stack that AddressSanitizer lends to find uses after return, g++ before 12.4 and 13.3 misaligns vectors of 64
      # bytes: loads of them trap (GCC bug 110027).
      list(APPEND avx512 --param=asan-use-after-return=0)
      list(APPEND avx512bf16 --param=asan-use-after-return=0)
      list(APPEND avx512vnni --param=asan-use-after-return=0)
    endif()
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set(gnu -Wno-uninitialized -Wno-maybe-uninitialized)  # false alarms inside g++ 12's immintrin.h
  endif()
  set(sources_avx2 linear linear_int8 grad masks permute)
  set(sources_avx512 linear grad masks pack_masked permute)
  set(sources_avx512bf16 linear grad)
  set(sources_avx512vnni linear_int8)
  target_compile_definitions(kernels PUBLIC TWOFOUR_X86)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(isas neon neondot neonbf16)
  set(neon)  # every AArch64 machine has it
  set(neondot -march=armv8.2-a+dotprod)
  set(neonbf16 -march=armv8.2-a+bf16)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set(gnu -fno-schedule-insns)  # before registers are given out it hoists loads, and accumulators spill
  endif()
  set(sources_neon linear linear_int8)
  set(sources_neondot linear_int8)
  set(sources_neonbf16 linear)
  target_compile_definitions(kernels PUBLIC TWOFOUR_AARCH64)
endif()
foreach(isa ${isas})
  foreach(source ${sources_${isa}})
    target_sources(kernels PRIVATE ${csrc}/cpu/${source}_${isa}.cpp)
    set(flags ${${isa}} ${gnu})
    if(source MATCHES "^(linear|linear_int8|masks|permute)$")
      list(APPEND flags ${one_by_one})
    endif()
    set_source_files_properties(${csrc}/cpu/${source}_${isa}.cpp PROPERTIES COMPILE_OPTIONS "${flags}")
  endforeach()
endforeach()
