# `make help` lists the targets. Each sets up what it needs in .venv and may be run again and again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench docs lint resources release-check test-gpu bench-gpu clean

help:
	@echo "make demo           export, fuse and verify a YOLOv8n with three ACmix blocks, print the table"
	@echo "make test           run all tests"
	@echo "make bench          time one block, fused against plain, on ONNX Runtime"
	@echo "make docs           write the generated parts of the documentation"
	@echo "make lint           ruff, mypy --strict, the import linter and clang-format"
	@echo "make resources      compile the kernels and write down what each one needs"
	@echo "make test-gpu       the tests that need a GPU"
	@echo "make bench-gpu      time the kernels on a GPU"
	@echo "make release-check  run all tests with nothing skipped, and compile the kernels for all architectures"

setup: $(READY)

$(READY): pyproject.toml scripts/setup.sh
	PYTHON="$(PYTHON)" scripts/setup.sh $(VENV)
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python scripts/bench.py

docs: $(READY)
	$(BIN)/python scripts/docs.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files plugins | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run --Werror

resources: $(READY)
	$(BIN)/python scripts/resources.py

test-gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu

bench-gpu: $(READY)
	$(BIN)/python scripts/bench_gpu.py

release-check: $(READY)
	scripts/release_check.sh $(BIN)/python

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
