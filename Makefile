# Everything runs in .venv, which the first command makes. `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help serve test bench train clean

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

serve: .venv/.service ## serve weights/cifar_net.pth, or CIFAR_WEIGHTS, on http://127.0.0.1:8000
	$(BIN)/python -m app

test: .venv/.dev ## lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

train: .venv/.training ## train teacher, student and default network on CIFAR_DATA or ./data, from where it stopped
	$(BIN)/python -m training train --recipe teacher --name teacher --resume
	$(BIN)/python -m training train --recipe student --teacher runs/teacher/cifar_net.pth --name student --resume
	$(BIN)/python -m training train --start runs/student/cifar_net.pth \
		--teacher runs/teacher/cifar_net.pth runs/student/cifar_net.pth --name default --resume

bench: .venv/.dev ## measure training, requests per second, start-up and memory on this machine
	$(BIN)/python tests/bench.py

clean: ## remove .venv and caches
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# A stamp per set of packages: each is installed once, and again when pyproject.toml changes.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

# OpenVINO doubles the speed on a CPU; where it has no wheel the service runs on torch alone.
.venv/.service: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[openvino]' \
		|| $(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.training: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[training]'
	@touch $@ .venv/.service

.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[openvino,training,dev]'
	@touch $@ .venv/.service .venv/.training
