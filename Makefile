# make study | test | test-gpu-env | nightly | peer-tests | lint | bench | figures | cpu-bench | gpu | sanitize | clean. Each target makes .venv first where it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PYTHON312 ?= python3.12
GPU_STAMP := .venv-gpu/.installed

.PHONY: help study test test-gpu-env nightly peer-tests lint bench figures cpu-bench sanitize clean gpu
.DELETE_ON_ERROR:

help:
	@echo "make study   the small study: results/study/report.html and results.jsonl"
	@echo "make test    the tests"
	@echo "make test-gpu-env   the tests with Python 3.12, torch 2.11, triton 3.6 and transformers 5.17, in .venv-gpu (downloads torch's CUDA wheel)"
	@echo "make nightly 504 random combinations of family, method and settings, 10,000 of modifications, 1000 hostile inputs, 100 kills"
	@echo "make peer-tests TRANSFORMERS=/path   HF PEFT's and transformers' own tests (of a checkout), unfused and fused; last line: N differences"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make bench   implementations side by side on this machine's GPU or CPU, rows and report: results/bench/ (SECONDS=300)"
	@echo "make figures fills the figures of README and docs in from the rows of bench/results"
	@echo "make cpu-bench   bandwidth of the C++ kernels against a copy: results/bench/"
	@echo "make sanitize    the C++ kernels' tests under the address and undefined-behaviour sanitizers"
	@echo "make gpu     builds, checks, tunes and times on an NVIDIA GPU, in nine minutes: results/gpu/"
	@echo "make clean   removes what the build and the tests left, not .venv and not results"

# The stamp is written last, so that an interrupted set-up starts again.
$(STAMP): requirements-dev.lock setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' was not found; name one with: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) -c 'import platform; print(platform.python_version())'); name another with: make PYTHON=/path/to/python3" >&2; exit 2; }
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

study: $(STAMP)
	$(BIN)/mmpeft-fast study --output results/study

# Two workers with one thread each: the tests are small, so more threads only fight over the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# What GPU users have; no GPU is needed.
$(GPU_STAMP): requirements-gpu.lock setup.py pyproject.toml
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { echo "error: Python 3.12 is needed, but '$(PYTHON312)' is not it; name one with: make test-gpu-env PYTHON312=/path/to/python3.12" >&2; exit 2; }
	@rm -f $@
	$(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --disable-pip-version-check -r requirements-gpu.lock
	.venv-gpu/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

test-gpu-env: $(GPU_STAMP)
	OMP_NUM_THREADS=1 .venv-gpu/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

nightly: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_properties.py --hypothesis-profile=nightly $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_modifications.py --nightly $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train/test_hostile.py tests/train/test_kill.py --nightly $(ARGS)

# Goes on where it was stopped. Fetches peft's source distribution and what only the suites import, into results/peers.
peer-tests: $(STAMP)
	$(BIN)/python -m tests.peers $(if $(TRANSFORMERS),--transformers "$(TRANSFORMERS)") $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

SECONDS ?= 300
bench: $(STAMP)
	$(BIN)/mmpeft-fast bench run --seconds $(SECONDS) --out results/bench/suite.jsonl
	$(BIN)/mmpeft-fast bench report results/bench/suite.jsonl --output results/bench

figures: $(STAMP)
	$(BIN)/python -m bench.figures

cpu-bench: $(STAMP)
	$(BIN)/python -m bench.cpu_kernels --dtype bf16 --out results/bench/cpu_kernels.jsonl
	$(BIN)/python -m bench.cpu_kernels --dtype fp32 --out results/bench/cpu_kernels.jsonl

# A second build of the whole package in build/sanitize, which the tests then import in place of the first.
sanitize: $(STAMP)
	MMPEFT_FAST_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-lib build/sanitize --build-temp build/sanitize-objects
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
		$(BIN)/python -m pytest -o pythonpath="build/sanitize ." -p no:cacheprovider tests/csrc $(ARGS)

gpu: $(STAMP)
	$(BIN)/python -m bench.gpu --out results/gpu --profile

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
