# Two commands for a newcomer: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# Python 3.11's CPU build of torch; override to use another build.
TORCH  ?= torch==2.13.0

.PHONY: help demo test test-slow test-arm test-asan bench lint format clean

help:
	@echo "make demo       virtual environment, base install (no torch), generate text with the shipped model"
	@echo "make test       the same plus torch and the test tools, then the whole test suite"
	@echo "make test-slow  the long soak tests"
	@echo "make test-arm   NEON kernels, cross-compiled and run under qemu-user"
	@echo "make test-asan  native core under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench      speed and memory against llama.cpp, written to benchmarks/results/"
	@echo "make lint       ruff, clang-format, mypy, import-linter"

# What the installed package is made of: it is built and installed anew where one of these changed
# (the objects in build/ are kept), so that the tests run what users get.
SOURCES := pyproject.toml CMakeLists.txt README.md \
	$(shell find csrc -name '*.cc' -o -name '*.h') \
	$(shell find src -type f -not -name '*.so' -not -path '*/__pycache__/*' -not -path '*/.*')

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(SOURCES) | $(PY)
	$(VENV)/bin/pip install -q .
	@touch $@

# One build for both stamps. torch comes first, so that the extras do not choose another build.
$(VENV)/.dev: $(SOURCES) | $(PY)
	$(VENV)/bin/pip install -q "$(TORCH)"
	$(VENV)/bin/pip install -q ".[train,dev]"
	@touch $(VENV)/.base $@

demo: $(VENV)/.base
	$(VENV)/bin/nomatmul generate --prompt "It was a dark evening, and" --max-tokens 100 --temperature 0.5 --seed 3 --echo

test: $(VENV)/.dev
	$(PY) -m pytest -m "not slow" tests

test-slow: $(VENV)/.dev
	$(PY) -m pytest -m slow tests

test-arm:
	sh csrc/tests/arm/test_arm.sh

test-asan: $(VENV)/.dev
	PYTHON=$(PY) sh csrc/tests/asan/test_asan.sh

bench: $(VENV)/.dev
	$(VENV)/bin/pip install -q ".[bench]"
	$(PY) benchmarks/vs_llama.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/ruff format --check src tests benchmarks
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -name '*.cc' -o -name '*.h')
	$(VENV)/bin/mypy
	cd src && ../$(VENV)/bin/lint-imports --config ../pyproject.toml

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix src tests benchmarks
	$(VENV)/bin/ruff format src tests benchmarks
	$(VENV)/bin/clang-format -i $$(find csrc -name '*.cc' -o -name '*.h')

clean:
	rm -rf build dist $(VENV)
