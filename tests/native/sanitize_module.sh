#!/bin/sh
# The Python module with AddressSanitizer and UndefinedBehaviorSanitizer, under the pytest tests of the kernels. Called
# by `make sanitize`, from the root of the repository, when .venv is complete.
set -eu
python=.venv/bin/python
sanitized=build/sanitize-venv

# A virtual environment of its own that borrows the libraries of .venv, but not its editable twofour.
rm -rf "$sanitized"
"$python" -m venv --without-pip "$sanitized"
site=$("$sanitized/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sys; print(*[path for path in sys.path if path.endswith("site-packages")], sep="\n")' > "$site/borrowed.pth"
"$sanitized/bin/python" -m pip install --quiet --no-deps --no-build-isolation --ignore-installed --prefix "$sanitized" \
  --config-settings build-dir=build/sanitize-module --config-settings cmake.define.TWOFOUR_SANITIZE=address,undefined .

# Python itself is not instrumented: the runtimes must be there first. torch keeps what it allocates, so leaks are not
# looked for here; linear_test does.
cxx=${CXX:-c++}
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" \
  "$sanitized/bin/python" -m pytest -q -x -n auto -p no:cacheprovider tests/kernels/test_cpu_native.py
