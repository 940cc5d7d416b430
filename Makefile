# Two commands: `make train` (a first run on two ranks) and `make test`. Both set up .venv first when that is needed.
SHELL := /bin/bash
RANKS ?= 2
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup train test lint unit mpi launch gpu-code docs test-slurm test-gpu bench clean

setup:
	@install/setup.sh

train: setup data/digits/test/manifest.json
	install/mpirun -np $(RANKS) hvdlocal train experiments/digits.yaml --overwrite true

data/digits/test/manifest.json:
	python -m data_prep digits --output data/digits

test: lint docs unit mpi launch gpu-code

lint: setup
	ruff check .
	ruff format --check .
	mypy

# The documents and an API reference from the docstrings, as pages in build/site; a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

unit: setup
	python -m pytest tests/unit

# The same tests on one, two and three ranks (an odd number finds mistakes that powers of two hide), over both backends; what
# depends on the number of ranks also on eight.
MPI_TEST = timeout 900 install/mpirun -np $$ranks python -m pytest -x -q --color=no -p no:cacheprovider
mpi: setup
	set -e; for backend in horovod mpi4py; do for ranks in 1 2 3; do \
	  echo "== tests/mpi: $$backend, $$ranks ranks"; \
	  HVDLOCAL_BACKEND=$$backend $(MPI_TEST) tests/mpi; \
	done; done
	set -e; for dtype in bfloat16 float64; do echo "== tests/mpi: inside hvdlocal the default dtype is $$dtype"; ranks=2; \
	  export TEST_DEFAULT_DTYPE=$$dtype; $(MPI_TEST) tests/mpi/test_{local,policies,state,synchronous,refusals}.py; done
	@echo "== tests/mpi: horovod, 8 ranks"
	ranks=8; $(MPI_TEST) tests/mpi/test_local.py tests/mpi/test_synchronous.py tests/mpi/test_large.py

launch: setup
	python -m pytest tests/launch

# What runs on a GPU, with little work on the CPU, so that it is in order when there is one.
gpu-code: setup
	timeout 600 python benchmarks/gpu_report.py --device cpu --at-once

# A real Slurm on this machine, started by the tests. Installed first where that is allowed; without one the tests are skipped.
test-slurm: setup
	install/slurm.sh || true
	python -m pytest tests/slurm

# On one GPU. Needs no Horovod: `python -m pytest tests/gpu` does the same in any environment with torch and mpi4py.
test-gpu: setup
	python -m pytest tests/gpu
	python -m pytest tests/unit/data -k gpu

# Every figure that the README and docs/ quote. BENCH_DATA holds cifar-10-batches-bin and jpeg-sample; what is not there is left out.
BENCH_DATA ?= ../shared/data
CIFAR10 = $(BENCH_DATA)/cifar-10-batches-bin
JPEGS = $(BENCH_DATA)/jpeg-sample
RESULTS = runs/benchmarks
bench: setup data/digits/test/manifest.json
	@mkdir -p $(RESULTS)
	install/mpirun -np 2 python benchmarks/averaging.py --json $(RESULTS)/averaging.json
	python benchmarks/local_step.py
	install/mpirun -np 2 python benchmarks/long_run.py --rounds 5000 --json $(RESULTS)/long_run.json
	benchmarks/slow_link.sh 100mbit python benchmarks/slow_link.py --rate 100mbit --steps 8 --trials 1
	set -e; for rate in 1gbit 10gbit; do \
	  benchmarks/slow_link.sh $$rate python benchmarks/slow_link.py --rate $$rate --json $(RESULTS)/link-$$rate.json; done
	if [ -d $(CIFAR10) ]; then \
	  python -m data_prep cifar10 --source $(CIFAR10) --output data/cifar10 && python benchmarks/sketch.py data/cifar10 && \
	  python benchmarks/data_gather.py --data $(CIFAR10) && python benchmarks/data_cifar.py --data $(CIFAR10); fi
	if [ -d $(JPEGS) ]; then python benchmarks/data_jpeg.py --data $(JPEGS); fi

clean:
	rm -rf .venv data runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
