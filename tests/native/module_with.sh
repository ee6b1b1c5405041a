#!/bin/sh
# module_with.sh NAME CMAKE_VARIABLE=VALUE COMMAND...: builds the Python module once more, with that CMake variable, into
# build/NAME-venv, and runs the command with the `python` of that environment first on the path. From the root of the
# repository, when .venv is complete. PRELOAD= names libraries for LD_PRELOAD.
set -eu
name=$1 variable=$2
shift 2
venv=build/$name-venv

# A virtual environment of its own that borrows the libraries of .venv, but not its editable twofour.
rm -rf "$venv"
.venv/bin/python -m venv --without-pip "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sys; print(*[path for path in sys.path if path.endswith("site-packages")], sep="\n")' > "$site/borrowed.pth"
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --ignore-installed --prefix "$venv" \
  --config-settings "build-dir=build/$name-module" --config-settings "cmake.define.$variable" .
export PATH="$PWD/$venv/bin:$PATH"
LD_PRELOAD=${PRELOAD:-} exec "$@"
