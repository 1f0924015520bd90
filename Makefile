# Everything runs in .venv, which the first command makes. `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin
# By python -m, because the other scripts in .venv/bin name the folder in which they were made.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
# What a failed rule leaves does not count as done; and rules in parallel would install into one .venv at once.
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help serve test bench train clean gone

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-10s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: .venv/.service ## serve weights/cifar_net.pth, or CIFAR_WEIGHTS, on http://127.0.0.1:8000
	$(BIN)/python -m app

# Two tests at a time, as most of them wait for a process to start; torch's threads must not outnumber the cores.
test: .venv/.dev ## lint, format, types, tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

train: runs/default/cifar_net.pth ## train the default network on CIFAR_DATA or ./data, from where it stopped

bench: .venv/.dev ## measure training, requests per second, start-up and memory on this machine
	PYTHONPATH=. $(BIN)/python tests/bench.py

clean: ## remove .venv and caches
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# A stamp per set of packages: each is installed once, and again when pyproject.toml changes.
.venv/.made: $(if $(realpath $(BIN)/python),,gone)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

# What .venv depends on when the Python that it links to does not exist (any more).
gone:

# OpenVINO is up to twice as fast on a CPU; where it has no wheel the service runs on torch alone.
.venv/.service: .venv/.made pyproject.toml
	$(INSTALL) -e '.[openvino]' || { echo "Without OpenVINO:"; $(INSTALL) -e .; }
	@touch $@

.venv/.training: .venv/.made pyproject.toml
	$(INSTALL) -e '.[training]'
	@touch $@

.venv/.dev: .venv/.made pyproject.toml
	$(INSTALL) -e '.[openvino,training,dev]' || { echo "Without OpenVINO:"; $(INSTALL) -e '.[training,dev]'; }
	@touch $@ .venv/.service .venv/.training

# Four runs; each goes on where it stopped, and a finished one is not run again. The first downloads CIFAR-10 if needed.
TRAIN := $(BIN)/python -m training train --resume
TEACHERS := runs/teacher-0/cifar_net.pth runs/teacher-1/cifar_net.pth

runs/teacher-0/cifar_net.pth: | .venv/.training
	$(TRAIN) --name teacher-0 --recipe teacher --cutmix 0.3

runs/teacher-1/cifar_net.pth: | .venv/.training
	$(TRAIN) --name teacher-1 --recipe teacher --seed 1

runs/validation/cifar_net.pth: $(TEACHERS)
	$(TRAIN) --name validation --teacher $(TEACHERS) --validation 0.1

runs/default/cifar_net.pth: $(TEACHERS) runs/validation/cifar_net.pth
	$(TRAIN) --name default --teacher $(TEACHERS) --calibration runs/validation/cifar_net.pth
