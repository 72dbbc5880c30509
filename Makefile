# make run: the main job, from nothing to a report; stopped, it goes on where it was.  make test: everything that must hold.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.10; do \
  $$p -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: setup run test bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: setup
	$(BIN)/dimefm-edge distill --target jetson-orin --out runs/first $(if $(wildcard runs/first/config.toml),--resume) $(ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

# Steps and stores against the bare machine, as JSON; benchmarks/record.py keeps a result.
bench: setup
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
