# Two commands for a newcomer: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# Python 3.11's CPU build of torch; override to use another build.
TORCH  ?= torch==2.13.0

# What writes requirements/*.txt, in an environment of its own.
UV     ?= uv==0.13.9
# torch of `make test-oldest`. The package allows 2.6, whose CPU builds lie on torch's own index alone.
OLDEST_TORCH ?= $(TORCH)
NEWEST_TORCH ?= $(TORCH)

.PHONY: help demo test test-wheels test-slow test-arm test-asan test-oldest test-newest test-ray soak lock bench lint
.PHONY: hardware format clean

help:
	@echo "make demo       virtual environment, base install (no torch), generate text with the shipped model"
	@echo "make test       the same plus torch and the test tools, then the whole test suite in two processes;"
	@echo "                WORKERS=4 takes four"
	@echo "make test-slow  the long soak tests"
	@echo "make soak       20 minutes of a server under 64 careless and hostile clients; MINUTES=1 is the short form"
	@echo "make hardware   the accelerator at length: the model in the box and all small ones with stalls, planted"
	@echo "                faults in whole models, waveforms, deeper proofs; HARDWARE='-k box' runs a part"
	@echo "make test-ray   two replicas behind Ray Serve; installs the extra serve-ray"
	@echo "make test-arm   NEON kernels, cross-compiled and run under qemu-user"
	@echo "make test-asan  native core under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make test-oldest, make test-newest"
	@echo "                tests of file formats, numpy, tokenizers and Hugging Face with the lowest and the newest"
	@echo "                versions that pyproject.toml allows; base install and extra train in environments apart"
	@echo "make test-wheels PYTHONS='python3.10 python3.12 python3.13'"
	@echo "                build wheels, install them in clean environments, run them without a compiler and"
	@echo "                on an emulated CPU without AVX"
	@echo "make lock       renew requirements/*.txt: the versions that demo, test and lint install"
	@echo "make bench      speed and memory against llama.cpp, written to benchmarks/results/"
	@echo "make lint       ruff, clang-format, mypy, import-linter"

# What the installed package is made of: it is built and installed anew where one of these changed
# (the objects in build/ are kept), so that the tests run what users get.
SOURCES := pyproject.toml CMakeLists.txt README.md \
	$(shell find csrc -name '*.cc' -o -name '*.h') \
	$(shell find src -type f -not -name '*.so' -not -path '*/__pycache__/*' -not -path '*/.*')

$(PY):
	$(PYTHON) -m venv $(VENV)

# What is installed is what requirements/ says, to the byte; nothing else is asked of an index but
# torch, whose builds differ by index and which brings libraries that belong to its build.
LOCKED := pip install -q --no-deps --require-hashes -r
BUILT  := pip install -q --no-deps --no-build-isolation

$(VENV)/.base: $(SOURCES) requirements/base.txt | $(PY)
	$(VENV)/bin/$(LOCKED) requirements/base.txt
	$(VENV)/bin/$(BUILT) .
	@touch $@

# One build for both stamps. torch comes first: the versions of the lock win. What comes as sources
# is built with what base.txt pins.
$(VENV)/.dev: $(SOURCES) requirements/base.txt requirements/dev.txt | $(PY)
	$(VENV)/bin/pip install -q "$(TORCH)"
	$(VENV)/bin/$(LOCKED) requirements/base.txt
	$(VENV)/bin/$(LOCKED) requirements/dev.txt --no-build-isolation
	$(VENV)/bin/$(BUILT) .
	@touch $(VENV)/.base $@

demo: $(VENV)/.base
	$(VENV)/bin/nomatmul generate --prompt "It was a dark evening, and" --max-tokens 100 --temperature 0.5 --seed 3 --echo

# Processes that tests run in, a file in one of them, in the order of the rooms: those of the last
# one are short, so that neither has long to wait for the other.
WORKERS ?= 2
test: $(VENV)/.dev
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" tests

test-slow: $(VENV)/.dev
	$(PY) -m pytest -m slow --ignore tests/hardware tests

HARDWARE ?=
hardware: $(VENV)/.dev
	$(PY) -m pytest -m slow --timeout 3600 tests/hardware $(HARDWARE)

MINUTES ?= 20
soak: $(VENV)/.dev
	$(PY) tests/support/soak.py --minutes $(MINUTES)

test-ray: $(VENV)/.dev
	$(VENV)/bin/pip install -q ".[serve-ray]"
	$(PY) -m pytest --ray tests/ray

PYTHONS ?= $(PYTHON)
test-wheels:
	sh .ci/test_wheels.sh $(PYTHONS)

# --- the lock, and the ends of what pyproject.toml allows ---------------------
.venv-uv/bin/uv:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install -q "$(UV)"

COMPILE := .venv-uv/bin/uv pip compile -q --no-annotate --no-emit-package torch \
	--custom-compile-command "make lock" pyproject.toml --group build
PINNED  := $(COMPILE) --universal --python-version 3.10 --generate-hashes --no-emit-index-url --upgrade
TRAIN   := --extra train --extra dev

lock: .venv-uv/bin/uv
	$(PINNED) $(TRAIN) --group torch -o requirements/dev.txt
	$(PINNED) -c requirements/dev.txt -o requirements/base.txt

oldest := --resolution lowest-direct
newest := --resolution highest
.PRECIOUS: .venv-%-base/.ready .venv-%-train/.ready

.venv-%-base/.ready: $(SOURCES) .venv-uv/bin/uv
	$(PYTHON) -m venv --clear .venv-$*-base
	$(COMPILE) $($*) --python .venv-$*-base/bin/python --extra test -o .venv-$*-base/requirements.txt
	.venv-$*-base/bin/pip install -q --no-deps -r .venv-$*-base/requirements.txt
	.venv-$*-base/bin/$(BUILT) --config-settings=build-dir=build/$* .
	@touch $@

.venv-%-train/.ready: $(SOURCES) .venv-uv/bin/uv
	$(PYTHON) -m venv --clear .venv-$*-train
	$(COMPILE) $($*) --python .venv-$*-train/bin/python $(TRAIN) -o .venv-$*-train/requirements.txt
	.venv-$*-train/bin/pip install -q "$(if $(filter oldest,$*),$(OLDEST_TORCH),$(NEWEST_TORCH))"
	.venv-$*-train/bin/pip install -q --no-deps -r .venv-$*-train/requirements.txt
	.venv-$*-train/bin/$(BUILT) --config-settings=build-dir=build/$* .
	@touch $@

BASE_ROOMS  := formats reference engine golden convert cli
TRAIN_ROOMS := models convert evaluate finetune train
test-oldest test-newest: test-%: .venv-%-base/.ready .venv-%-train/.ready
	.venv-$*-base/bin/python -m pytest --base -m "not slow" $(addprefix tests/,$(BASE_ROOMS))
	.venv-$*-train/bin/python -m pytest -m "not slow" $(addprefix tests/,$(TRAIN_ROOMS))

test-arm:
	sh csrc/tests/arm/test_arm.sh

test-asan: $(VENV)/.dev
	PYTHON=$(PY) sh csrc/tests/asan/test_asan.sh

bench: $(VENV)/.dev
	$(VENV)/bin/pip install -q ".[bench]"
	$(PY) benchmarks/vs_llama.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check src tests benchmarks studies
	$(VENV)/bin/ruff format --check src tests benchmarks studies
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc src -name '*.cc' -o -name '*.h')
	$(VENV)/bin/mypy
	cd src && ../$(VENV)/bin/lint-imports --config ../pyproject.toml

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix src tests benchmarks studies
	$(VENV)/bin/ruff format src tests benchmarks studies
	$(VENV)/bin/clang-format -i $$(find csrc src -name '*.cc' -o -name '*.h')

clean:
	rm -rf build dist $(VENV) .venv-uv .venv-oldest-* .venv-newest-*
