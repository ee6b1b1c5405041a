#!/bin/sh
# The Python module with AddressSanitizer and UndefinedBehaviorSanitizer, under the pytest tests of the kernels. Called
# by `make sanitize`, from the root of the repository, when .venv is complete.
set -eu
# Python itself is not instrumented: the runtimes must be there first. torch keeps what it allocates, so leaks are not
# looked for here; linear_test does.
cxx=${CXX:-c++}
export PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so)"
export ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0"
exec tests/native/module_with.sh sanitize TWOFOUR_SANITIZE=address,undefined \
  python -m pytest -q -x -n auto -p no:cacheprovider tests/kernels/test_cpu_native.py
