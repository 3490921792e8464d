# `make train` and `make test` set up everything they need. Required: Python 3.10-3.13, git and make.

# the first suitable Python; choose another one with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && exit; done; echo python3)
# torch to install into a new .venv: a version, or the path of a wheel (a CPU or a CUDA build)
TORCH ?= torch==2.13.0
# additional arguments for every pip install
PIP_ARGS ?=
# for `make train`: the number of processes, 1 on a machine with a single GPU; and the run folder
NPROC ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')" = 1 ] && echo 1 || echo 2)
RUN_DIR ?= runs/quickstart
# additional arguments for the target's command
ARGS ?=

export OMP_NUM_THREADS ?= 1
# on a CPU, threads that wait give their core to others
export OMP_WAIT_POLICY ?= passive
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
PY := $(VENV)/bin/python
SPEC := setup.py pyproject.toml constraints.txt
# no build isolation, so that builds use the pinned tools and nothing is downloaded twice
INSTALL = $(PY) -m pip install -q --no-build-isolation -c $(VENV)/constraints.txt $(PIP_ARGS)

.PHONY: help train test test-slow faults defences engines check types kernels tune bench measure gpu balance clean
.DELETE_ON_ERROR:

help:
	@echo "make train   train the quickstart model on $(NPROC) processes   [ARGS=... RUN_DIR=$(RUN_DIR) NPROC=$(NPROC)]"
	@echo "make test    run the fast tests, at most 7 minutes    [ARGS=\"-k routing\"]"
	@echo "make test-slow run the slow tests, about 20 minutes   [ARGS=\"-k routing\"]"
	@echo "make faults  inject every fault of the fault table, and print it; about 15 minutes   [ARGS=\"-k save\"]"
	@echo "make defences switch off the defence against each fault, and see that a test fails; 15 minutes   [ARGS=\"-k 13\"]"
	@echo "make engines run the tests with DeepSpeed, Transformers and others, about 8 minutes   [ARGS=\"-k zero\"]"
	@echo "make check   lint, formatting, types"
	@echo "make kernels compile every Triton kernel for every supported GPU architecture, without a GPU"
	@echo "make tune    measure on this GPU which backend backend=\"auto\" should be, and write kernels/auto.json"
	@echo "make bench   compare one layer with other libraries  [ARGS=...]"
	@echo "make measure time every op and the layer, on the GPU if there is one  [ARGS=\"--suite kernels\"]"
	@echo "make gpu     check and measure everything that needs a GPU, in 12 minutes; rehearses without one  [ARGS=gate]"
	@echo "make balance train and compare small models balanced over 4 to 512 sequences; hours  [ARGS=--quick: 5 minutes]"
	@echo "make clean   remove $(VENV) and caches, keep runs"
	@echo "A new $(VENV) is created with PYTHON=$(PYTHON) TORCH=$(TORCH) PIP_ARGS=$(PIP_ARGS)"

train: $(VENV)/.stamp-train
	@run="$(RUN_DIR)"; case "$$run" in "~/"*) run="$$HOME/$${run#??}";; esac; \
	if [ -n "$$(ls -A "$$run" 2>/dev/null | grep -v '^tokens$$')" ] && ! echo ' $(subst ','"'"',$(ARGS))' | grep -q -e ' --resume'; then \
		echo "$(RUN_DIR) already holds a run. Choose one of:"; \
		echo "  make train ARGS=--resume             continue this run"; \
		echo "  make train RUN_DIR=runs/another      start another run"; \
		echo "  rm -r \"$(RUN_DIR)\" && make train       delete this run and start again"; \
		exit 1; fi
	$(PY) -m equimoe.launch.train --processes $(NPROC) --recipe quickstart --run-dir "$(RUN_DIR)" $(ARGS)

# the whole suite runs as seven processes, a selection as one
PYTEST = $(PY) $(if $(strip $(ARGS)),-m pytest,tests/side_by_side.py)

test: $(VENV)/.stamp-dev
	$(PYTEST) -m "not slow and not engines and not faults" $(ARGS)

test-slow: $(VENV)/.stamp-dev
	$(PYTEST) -m "slow and not faults" $(ARGS)

faults: $(VENV)/.stamp-dev
	$(PY) tests/faults/run.py $(ARGS)

defences: $(VENV)/.stamp-dev
	$(PY) tests/faults/defences.py $(ARGS)

engines: $(VENV)/.stamp-engines
	$(PY) tests/engines/run.py $(ARGS)

check: types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# the links let mypy find the folders under their import names
types: $(VENV)/.stamp-dev
	@mkdir -p $(VENV)/typing/equimoe
	@for d in moe kernels launch; do ln -sfn "$(CURDIR)/$$d" $(VENV)/typing/equimoe/$$d; done
	MYPYPATH=$(VENV)/typing $(PY) -m mypy -p equimoe.moe -p equimoe.kernels -p equimoe.launch

kernels: $(VENV)/.stamp-dev
	$(PY) benchmarks/kernels/compile_gate.py $(ARGS)

tune: $(VENV)/.stamp-dev
	$(PY) benchmarks/kernels/tune.py $(ARGS)

bench: $(VENV)/.stamp-bench
	$(PY) benchmarks/layer/bench_layer.py $(ARGS)

measure: $(VENV)/.stamp-bench
	$(PY) benchmarks/run.py $(ARGS)

gpu: $(VENV)/.stamp-dev
	$(PY) benchmarks/gpu/run.py $(ARGS)

balance: $(VENV)/.stamp-dev
	$(PY) benchmarks/balance/global_balance.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); EquiMoE needs Python 3.10 to 3.13:" \
		"make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { \
		echo "$(PYTHON) cannot create virtual environments; install its venv module (Debian: python3-venv)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# install torch first and alone, so that everything else is resolved against the build that TORCH names
$(VENV)/.stamp-train: $(SPEC) | $(VENV)/bin/python
	@echo "installing $(TORCH) and what training needs (once; takes some minutes on a slow connection)"
	@grep -v -e '^torch==' -e '^triton==' constraints.txt > $(VENV)/constraints.txt
	@$(INSTALL) '$(TORCH)' setuptools wheel || { echo "retrying with the setuptools that $(TORCH) requires"; \
		sed -i.bak '/^setuptools==/d' $(VENV)/constraints.txt; $(INSTALL) '$(TORCH)' 'setuptools>=77' wheel; }
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(VENV)/constraints.txt
	@$(PY) -c 'from importlib.metadata import version; print("triton==" + version("triton"))' \
		>> $(VENV)/constraints.txt 2>/dev/null || grep '^triton==' constraints.txt >> $(VENV)/constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-train
	@echo "installing what the tests need (once)"
	$(INSTALL) -e '.[dev]'
	@touch $@

# the evaluation harness is installed without the many packages of its tasks
$(VENV)/.stamp-engines: $(VENV)/.stamp-dev
	@echo "installing the engines (once)"
	DS_BUILD_OPS=0 $(INSTALL) -e '.[dev,engines]' dill requests
	$(INSTALL) --no-deps lm-eval
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	@echo "installing the libraries to compare with (once)"
	DS_BUILD_OPS=0 $(PY) -m pip install -q -c $(VENV)/constraints.txt $(PIP_ARGS) -e '.[deepspeed,hf]'
	@touch $@
