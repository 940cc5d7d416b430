# Two commands: `make train` (a first run on two ranks) and `make test`. Both set up .venv first when that is needed.
SHELL := /bin/bash
RANKS ?= 2
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup train test lint unit mpi launch clean

setup:
	@install/setup.sh

train: setup data/digits/test/manifest.json
	install/mpirun -np $(RANKS) hvdlocal train experiments/digits.yaml --overwrite true

data/digits/test/manifest.json:
	python -m data_prep digits --output data/digits

test: lint unit mpi launch

lint: setup
	ruff check .
	ruff format --check .
	mypy

unit: setup
	python -m pytest tests/unit

# The same tests on one, two and three ranks (an odd number finds mistakes that powers of two hide), over both backends.
mpi: setup
	set -e; for backend in horovod mpi4py; do for ranks in 1 2 3; do \
	  echo "== tests/mpi: $$backend, $$ranks ranks"; \
	  HVDLOCAL_BACKEND=$$backend timeout 300 install/mpirun -np $$ranks python -m pytest tests/mpi -x -q --color=no -p no:cacheprovider; \
	done; done

launch: setup
	python -m pytest tests/launch

clean:
	rm -rf .venv data runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
