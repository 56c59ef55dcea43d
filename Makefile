# `make help` lists the targets. Each sets up what it needs in .venv and may be run again and again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# A machine for GPU tests may lack what .venv is made from.
GPU_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak bench docs site lint resources instructions release-check test-gpu bench-gpu bench-engines clean

help:
	@echo "make demo           take a trained YOLOv8n with three ACmix blocks to FP16 and INT8, draw what they find"
	@echo "make test           run all tests but those of make soak"
	@echo "make soak           run the tests that take long: large detectors, mAP on 500 images, servers under load"
	@echo "make bench          time one block, fused against plain, on ONNX Runtime"
	@echo "make docs           write the generated parts of the documentation"
	@echo "make site           build the documentation as a site, out/site/index.html, and follow every link"
	@echo "make lint           ruff, mypy --strict, the import linter and clang-format"
	@echo "make resources      compile the kernels and write down what each one needs"
	@echo "make instructions   count what the compiled kernels execute, and write it down"
	@echo "make test-gpu       the tests that need a GPU"
	@echo "make bench-gpu      time the kernels on a GPU"
	@echo "make bench-engines  time engines on a GPU"
	@echo "make release-check  run all tests with nothing skipped, and compile the kernels for all architectures"
	@echo "make dist           build the sdist and the wheel, and check both"

setup: $(READY)

$(READY): pyproject.toml scripts/setup.sh
	PYTHON="$(PYTHON)" scripts/setup.sh $(VENV)
	@touch $@

demo: $(READY)
	$(BIN)/python -m scripts.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(READY)
	ACMIX_SOAK=1 $(BIN)/python -m pytest -m soak

bench: $(READY)
	$(BIN)/python -m scripts.bench

docs: $(READY)
	$(BIN)/python -m scripts.docs
	$(BIN)/python -m scripts.pictures

site: $(READY)
	$(BIN)/python -m scripts.site

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files plugins acmix_deploy | grep -E '\.(h|cpp|cu|cuh)$$' | \
		xargs $(BIN)/clang-format --style=file:plugins/.clang-format --dry-run --Werror

resources: $(READY)
	$(BIN)/python -m scripts.resources

instructions: $(READY)
	$(BIN)/python -m scripts.instructions

test-gpu:
	$(GPU_PYTHON) -m pytest tests/gpu

bench-gpu:
	$(GPU_PYTHON) -m scripts.bench_gpu

bench-engines:
	$(GPU_PYTHON) -m scripts.bench_engines

release-check: $(READY)
	scripts/release_check.sh $(BIN)/python

dist: $(READY)
	rm -rf dist build/lib *.egg-info
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist out .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
