PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

.PHONY: install quickstart test lint build clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install  ## train a small model with CPPO on this machine, no GPU needed
	OMP_NUM_THREADS=2 $(BIN)/python scripts/quickstart.py --config configs/quickstart/cppo.yaml --seed $(SEED)

test: install  ## the whole default suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: install  ## what pre-commit runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

build: install  ## wheel and sdist in dist/
	$(BIN)/python -m build

clean:
	rm -rf .venv outputs dist
