#!/bin/sh
# The Python module with AddressSanitizer and UndefinedBehaviorSanitizer, under the pytest tests of the kernels. Called
# by `make sanitize`, from the root of the repository, when build_module.sh has built it.
set -eu
# Python itself is not instrumented: the runtimes must be there first. torch keeps what it allocates, so leaks are not
# looked for here; linear_test does.
cxx=${CXX:-c++}
export ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0"
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so)" \
  exec build/sanitize-venv/bin/python -m pytest -q -x -n auto -p no:cacheprovider tests/kernels/test_cpu_native.py \
  tests/kernels/test_pack_masked.py tests/masks/test_of_weights.py tests/masks/test_soft.py
