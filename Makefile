# make demo: set up and compress the network that ships with the package. make test: pass the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: setup demo test test-all lint types bench coverage docs clean

setup: $(READY)

# torch first and alone: anything that depends on it would otherwise bring the newest build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(READY)

demo: $(READY)
	$(BIN)/hcompress demo --force

# A file is one worker's, as its tests share their runs. Beyond 4 workers memory counts more than cores; the order of the
# files is theirs by name, so that a long one does not come last.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m ""

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads folders, not setuptools' package-dir: lay the packages out as they are installed.
types: $(READY)
	rm -rf build/types
	mkdir -p build/types
	cp -rs $(CURDIR)/compress build/types/
	cp -rs $(CURDIR)/cli build/types/compress/cli
	cp -rs $(CURDIR)/presets build/types/compress/presets
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p compress

bench: $(READY)
	$(BIN)/python -m tests.benchmarks.run --out docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks.mfac --out docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks.traces --out docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks.frontier --out docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks.gradients --out docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks.pruning --out docs/benchmarks.md

# Networks of other packages take more room than all else together, so that no other target installs them.
coverage: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[zoo]"
	$(BIN)/python -m tests.coverage --out docs/coverage.md

docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf build dist hcompress-demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
