# make demo, make test: each starts from nothing (no virtual environment, nothing built) and is quick the second time.
# They need Python >= 3.10, a C++17 compiler and pip. TWOFOUR_NO_NATIVE=1 builds without a compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files by name: in xdist's own order those of few tests come last, and some of them take a minute, alone.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
# $(call native_test,NAME,CMAKE ARGUMENTS) builds the tests of tests/native in build/NAME, without the module.
native_test = export PATH="$(CURDIR)/$(BIN):$$PATH" && \
  cmake -G Ninja -S tests/native -B build/$(1) $(2) > /dev/null && cmake --build build/$(1)
# Fresh memory holds NaN, so that whatever is read before it is written shows in the result.
SANITIZER_OPTIONS := ASAN_OPTIONS=max_malloc_fill_size=1073741824:malloc_fill_byte=255:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1
CROSS_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64 -L /usr/aarch64-linux-gnu

.PHONY: demo test lint types examples bench bench-training bench-smallest gpu gpu-dry gpu-emulated pretended native-test sanitize sanitize-threads neon emulated check clean

demo: $(VENV)/installed
	$(BIN)/twofour demo

test: $(VENV)/installed
	$(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

examples: $(VENV)/installed
	for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example > /dev/null || exit 1; done

RESULTS ?= benchmarks/results/$(shell hostname)
LINEAR = $(BIN)/python benchmarks/kernels/bench_linear.py --json $(RESULTS)/linear.json
FLOAT8 = $(BIN)/python benchmarks/kernels/bench_linear.py --json $(RESULTS)/float8.json --dtype "float8 weights"
MANY := --tokens 256 --tokens 512 --tokens 1024 --tokens 2048 --tokens 4096
FEW := --tokens 1 --tokens 4 --tokens 16
MIDDLE := --tokens 64 --tokens 128

# Half an hour on two cores; stop it whenever you like, it goes on where it was. Other programs must rest.
bench: $(VENV)/installed
	$(LINEAR) --layer MiniLM $(FEW) $(MIDDLE) --tokens 512 --tokens 2048 --threads 1 --threads 2
	$(LINEAR) --layer square $(FEW)
	$(LINEAR) --layer square --pattern 2:4 --pattern 2:4x4 $(MANY) --repeats 20
	$(LINEAR) --layer "big square" $(FEW)
	$(LINEAR) --layer square $(MIDDLE) --tokens 512 --threads 1 --threads 2
	$(LINEAR) --layer BERT $(FEW) $(MIDDLE) --tokens 512
	$(LINEAR) --layer Llama $(FEW) --tokens 128 --tokens 512
	$(LINEAR) --layer square --pattern 2:4x2 --tokens 512
	$(LINEAR) --layer square --dtype "bf16 weights" --tokens 1 --tokens 16 --tokens 512
	$(FLOAT8) --layer "big square" $(FEW)
	$(FLOAT8) --layer square $(FEW) --tokens 64 --tokens 256 --tokens 1024
	$(BIN)/python benchmarks/kernels/bench_int8.py --layer square --json $(RESULTS)/int8.json
	$(BIN)/python benchmarks/kernels/bench_backward.py --json $(RESULTS)/backward.json
	$(BIN)/python benchmarks/masks/bench_masks.py --json $(RESULTS)/masks.json
	$(BIN)/python benchmarks/masks/bench_permute.py --json $(RESULTS)/permute.json
	$(BIN)/python benchmarks/plot_linear.py $(RESULTS)/linear.json $(RESULTS)/speed.svg
	$(BIN)/python benchmarks/bars.py $(RESULTS)/linear.json

# What training costs and gives back; an hour and a half. DATA has tinyshakespeare.txt, stsb-train.tsv, stsb-dev.tsv and
# wikitext2-valid.txt, which are not part of the project.
bench-training: $(VENV)/installed
	$(BIN)/python benchmarks/training/bench_step.py --json $(RESULTS)/step.json
	$(BIN)/python benchmarks/training/bench_digits.py --json $(RESULTS)/digits.json
	$(BIN)/python benchmarks/training/bench_distill.py --data $(DATA) --json $(RESULTS)/distill.json
	$(BIN)/python benchmarks/training/bench_recovery.py --data $(DATA) --json $(RESULTS)/recovery.json

bench-smallest: $(VENV)/installed
	for bench in benchmarks/kernels/bench_*.py benchmarks/masks/bench_*.py benchmarks/solvers/bench_*.py benchmarks/training/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench --smallest || exit 1; done

# All that needs a GPU, in under nine minutes: tests, compute-sanitizer, measurements, each with a time limit and saved before the
# next begins. It takes the environment of PYTHON as it is and downloads nothing; twofour goes into build/gpu-site. The result is
# benchmarks/results/<gpu>/<date>.json; GPU_ARGS may be "--out FOLDER" (copies of result and logs), "--only STEP", "--commit HASH".
gpu:
	$(PYTHON) benchmarks/gpu/run.py $(GPU_ARGS)

# The same on a CPU, tiny, with stand-ins for kernels: do the scripts work?
gpu-dry: $(VENV)/installed
	$(BIN)/python benchmarks/gpu/run.py --dry-run $(GPU_ARGS)

# The tests for GPUs that can run on an emulated one.
gpu-emulated: $(VENV)/installed
	TWOFOUR_GPU_TESTS=emulated $(PYTEST) tests/gpu

# The tests of the CPU that `make gpu` runs on a GPU, on a device that is none: is everything made where it belongs?
PRETENDED = $$($(BIN)/python -c "from benchmarks.gpu import run; print(*run.SUITES)")
pretended: $(VENV)/installed
	TWOFOUR_TEST_DEVICE=pretended $(PYTEST) $(PRETENDED)

# The kernels without Python: on this machine, under AddressSanitizer and UndefinedBehaviorSanitizer, and on an
# emulated AArch64.
native-test: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/module --target native_tests
	build/module/tests/native/cut_test
	build/module/tests/native/linear_test
	build/module/tests/native/int8_test
	build/module/tests/native/masks_test
	build/module/tests/native/permute_test

sanitize: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/native/build_module.sh sanitize TWOFOUR_SANITIZE=address,undefined
	$(SANITIZER_OPTIONS) build/sanitize-module/tests/native/cut_test
	$(SANITIZER_OPTIONS) build/sanitize-module/tests/native/linear_test
	$(SANITIZER_OPTIONS) build/sanitize-module/tests/native/int8_test
	$(SANITIZER_OPTIONS) build/sanitize-module/tests/native/masks_test
	$(SANITIZER_OPTIONS) build/sanitize-module/tests/native/permute_test
	$(SANITIZER_OPTIONS) tests/native/sanitize_module.sh

sanitize-threads: $(VENV)/installed
	$(call native_test,native-sanitize-threads,-DTWOFOUR_SANITIZE=thread)
	build/native-sanitize-threads/linear_test
	build/native-sanitize-threads/int8_test
	build/native-sanitize-threads/masks_test
	build/native-sanitize-threads/permute_test

neon: $(VENV)/installed
	@command -v $(CROSS_CXX) > /dev/null && command -v $(firstword $(QEMU)) > /dev/null || \
	  { echo "error: make neon needs $(CROSS_CXX) and $(firstword $(QEMU)). On Debian: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	$(call native_test,native-neon,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS_CXX))
	$(QEMU) build/native-neon/linear_test --require baseline --require neon --require neonbf16
	$(QEMU) -cpu cortex-a57 build/native-neon/linear_test --require neon --only stay  # a machine without BFDOT
	$(QEMU) build/native-neon/int8_test --require baseline --require neon --require neondot
	$(QEMU) build/native-neon/permute_test --require baseline
	$(QEMU) -cpu cortex-a57 build/native-neon/int8_test --require neon --only agree  # a machine without SDOT
	$(QEMU) build/native-neon/masks_test --require baseline

# The kernels for AVX-512 on a machine that may lack it: tests/native/emulated.
emulated: $(VENV)/installed
	@echo '#include <simde/x86/avx512.h>' | $${CXX:-c++} -E -x c++ - > /dev/null 2>&1 || \
	  { echo "error: make emulated needs SIMDe, headers only. On Debian: apt-get install libsimde-dev"; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/native/build_module.sh emulated TWOFOUR_EMULATE_AVX512=ON
	build/emulated-module/tests/native/linear_test --require avx512 --require avx512bf16
	build/emulated-module/tests/native/int8_test --require avx512vnni
	build/emulated-module/tests/native/masks_test --require avx512
	build/emulated-module/tests/native/permute_test --require avx512
	build/emulated-venv/bin/python -m pytest -q -n auto -p no:cacheprovider tests/kernels/test_cpu_native.py \
	  tests/kernels/test_int8.py tests/kernels/test_backward.py tests/kernels/test_epilogue.py tests/kernels/test_pack_masked.py \
	  tests/masks/test_cpu.py tests/masks/test_of_weights.py tests/masks/test_soft.py

check: lint types test native-test examples bench-smallest

clean:
	rm -rf $(VENV) build demo-output .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than 3.10. Name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The build tools come first and the package is built without isolation, so that a rebuild reuses what is built.
$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE_SOURCES) | $(VENV)/bin/python
	@echo "installing twofour and what its demo and tests need into $(VENV) (minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip scikit-build-core nanobind cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
	  --config-settings build-dir=build/module --config-settings cmake.define.TWOFOUR_TESTS=ON --editable ".[dev]"
	touch $@
