# make demo   run the whole thing on a small real model
# make test   run the tests
# make lint   style, types and the order of modules
# make clean  remove what make made
#
# Each creates .venv by itself. PYTHON=... chooses the interpreter it is made from (3.11 or newer).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-npu lint format tools analyser clean

VENV := .venv
BIN := $(VENV)/bin
NPU := .venv-npu
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
FIXTURE := fixtures/digits_cnn
# two processes on two cores: linear algebra with threads of its own would let them wait for each other
ALONE := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := -m pytest -n 2 --dist loadfile

demo: $(VENV)/.run tools
	$(BIN)/graphopt $(FIXTURE)/model.onnx --passes prune,quant --target arm \
	  --calibration $(FIXTURE)/calib.npz --eval $(FIXTURE)/eval.npz --measure -o demo/digits.arm

test: $(VENV)/.dev tools analyser
	$(ALONE) $(BIN)/python $(PYTEST) --ignore tests/backends/npu
	@$(MAKE) --no-print-directory test-npu

# with Vela and the TOSA reference model, which want older versions of what others want new
test-npu: $(NPU)/.test
	$(ALONE) PATH="$(CURDIR)/$(NPU)/bin:$$PATH" $(NPU)/bin/python $(PYTEST) tests/backends/npu tests/test_runner.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NPU) demo

# ---- what they need

$(BIN)/python:
	@for python in $${PYTHON:-python3 python3.11 python3.12 python3.13 python}; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then echo "make: no Python 3.11 or newer found; set PYTHON=/path/to/python3" >&2; exit 1; fi; \
	"$$found" -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "make: $$found cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# a stamp is newer than pyproject.toml once everything in it is installed, so a second run starts at once
$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --group dev
	@touch $@

$(NPU)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv --clear $(NPU)
	$(NPU)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(NPU)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[npu]' --group test
	@touch $@

# cross compiler and emulator: from apt where that is possible, else a compiler from PyPI and no emulator
tools: | $(VENV)/.run
	@missing=(); \
	if [ "$$(uname -m)" != aarch64 ]; then \
	  command -v qemu-aarch64-static qemu-aarch64 >/dev/null || missing+=(qemu-user-static); \
	  command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu); \
	fi; \
	command -v c++ >/dev/null || missing+=(g++); \
	if [ $${#missing[@]} -gt 0 ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "make: installing $${missing[*]}" >&2; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$${missing[@]}"; } \
	    >$(VENV)/apt.log 2>&1 && missing=() || echo "make: apt-get failed, see $(VENV)/apt.log" >&2; \
	fi; \
	if [ $${#missing[@]} -gt 0 ]; then \
	  echo "make: not on this machine: $${missing[*]}; sudo apt-get install $${missing[*]}" >&2; \
	  $(BIN)/python -c 'import ziglang' 2>/dev/null || $(PIP) -e '.[cross]' || \
	    echo "make: no cross linker could be installed; the arm backend will say so" >&2; \
	fi

# LLVM's machine code analyser from apt (50 MB), for tests that judge code for ARM and are skipped without it
analyser: | tools
	@if ! command -v llvm-mca-19 >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "make: installing llvm-19" >&2; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends llvm-19; } \
	    >>$(VENV)/apt.log 2>&1 || echo "make: no llvm-19 from apt, see $(VENV)/apt.log; tests of code for ARM are skipped" >&2; \
	fi
