#!/bin/sh
# build_module.sh NAME CMAKE_VARIABLE=VALUE: builds the Python module once more, with that CMake variable, for
# build/NAME-venv/bin/python, and the tests of this folder beside it, in build/NAME-module/tests/native. From the root of
# the repository, when .venv is complete.
set -eu
name=$1 variable=$2
venv=build/$name-venv

# A virtual environment of its own that borrows the libraries of .venv, but not its editable twofour.
rm -rf "$venv"
.venv/bin/python -m venv --without-pip "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sys; print(*[path for path in sys.path if path.endswith("site-packages")], sep="\n")' > "$site/borrowed.pth"
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --ignore-installed --prefix "$venv" \
  --config-settings "build-dir=build/$name-module" --config-settings "cmake.define.$variable" \
  --config-settings cmake.define.TWOFOUR_TESTS=ON .
cmake --build "build/$name-module" --target native_tests
