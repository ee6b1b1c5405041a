# make demo, make test: each starts from nothing (no virtual environment, nothing built) and is quick the second time.
# They need Python >= 3.10, a C++17 compiler and pip. TWOFOUR_NO_NATIVE=1 builds without a compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint types examples bench-smallest check clean

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

bench-smallest: $(VENV)/installed
	for bench in benchmarks/kernels/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench --smallest || exit 1; done

check: lint types test examples bench-smallest

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
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@
