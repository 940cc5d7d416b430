# Two commands: `make train` (a first run on two ranks) and `make test`. Both set up .venv first when that is needed.
SHELL := /bin/bash
RANKS ?= 2
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup train test lint unit mpi mpi-plain mpi-horovod mpi-torch launch gpu-code docs test-faults test-slurm test-gpu bench utilisation clean

setup:
	@install/setup.sh

train: setup data/digits/test/manifest.json
	install/mpirun -np $(RANKS) hvdlocal train experiments/digits.yaml --overwrite true

data/digits/test/manifest.json:
	python -m data_prep digits --output data/digits

test: setup
	$(MAKE) --jobs=2 --output-sync=target lint docs gpu-code  # each of them keeps one core busy
	$(MAKE) unit mpi launch

lint: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache --no-logo

# The documents and an API reference from the docstrings, as pages in build/site; a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

# Tests that run at a time; of jobs there may be more, since they wait a good part of their time.
WORKERS ?= 2
JOBS ?= 3
IN_PARALLEL = OMP_NUM_THREADS=1 python -m pytest -q --color=no -n
JOBS_IN_PARALLEL = $(IN_PARALLEL) $(JOBS) --timeout 480 --dist loadfile

unit: setup
	$(IN_PARALLEL) $(WORKERS) --dist worksteal tests/unit

# Everything on one, two and three ranks (an odd number finds mistakes that powers of two hide) over plain MPI, and on two over
# Horovod and torch.distributed; what is near the engine on one and three over these, too; what depends on the number of ranks also
# on eight. They run beside each other: Horovod's ranks often wait for its next cycle, and Gloo's for each other.
mpi: setup
	$(MAKE) --jobs=3 --output-sync=target mpi-plain mpi-horovod mpi-torch

MPI_TEST = timeout 1800 install/mpirun -np $$ranks python -m pytest -x -q --color=no -p no:cacheprovider
# Islands as 2 × 2 and 1 × 4 ranks, and what counts ranks and islands also as 3 × 2, 2 × 3 and (over plain MPI) 4 × 2.
ISLANDS_OF_MANY = tests/mpi/test_islands.py -k "average or statistics or larger_batches or messages"
NEAR_THE_ENGINE = tests/mpi/test_{communicator,groups,local,resume,state,synchronous}.py
mpi-plain: export HVDLOCAL_BACKEND = mpi4py
mpi-plain: setup
	@echo "== tests/mpi: mpi4py, 1 rank (no mpirun: two processes of one rank each)"
	$(IN_PARALLEL) $(WORKERS) tests/mpi
	set -e; for ranks in 2 3; do echo "== tests/mpi: mpi4py, $$ranks ranks"; $(MPI_TEST) tests/mpi; done
	set -e; ranks=2; for dtype in bfloat16 float64; do \
	  echo "== tests/mpi: inside hvdlocal the default dtype is $$dtype"; export TEST_DEFAULT_DTYPE=$$dtype; \
	  $(MPI_TEST) tests/mpi/test_{local,policies,state,synchronous,refusals}.py; done
	@echo "== islands: mpi4py, 4, 6 and 8 ranks"
	ranks=4; $(MPI_TEST) tests/mpi/test_{groups,islands,train_islands}.py
	ranks=4; $(MPI_TEST) tests/mpi/test_simulated.py
	ranks=4; $(MPI_TEST) tests/mpi/test_{outer,overlap,moment_periods,train_outer}.py -k island
	ranks=6; $(MPI_TEST) $(ISLANDS_OF_MANY)
	ranks=8; $(MPI_TEST) tests/mpi/test_islands.py -k "larger_batches and 4x2"

mpi-horovod: setup
	@echo "== tests/mpi: horovod, 2 ranks"
	ranks=2; $(MPI_TEST) tests/mpi
	@echo "== tests/mpi near the engine: horovod, 1 and 3 ranks"
	ranks=1; $(MPI_TEST) tests/mpi/test_{communicator,groups,local}.py
	ranks=3; $(MPI_TEST) $(NEAR_THE_ENGINE)
	@echo "== tests/mpi: horovod, 8 ranks"
	ranks=8; $(MPI_TEST) tests/mpi/test_{local,synchronous,large}.py
	@echo "== islands: horovod, 4 and 6 ranks"
	ranks=4; $(MPI_TEST) tests/mpi/test_{groups,islands}.py
	ranks=4; $(MPI_TEST) tests/mpi/test_{outer,overlap}.py -k island
	ranks=6; $(MPI_TEST) $(ISLANDS_OF_MANY)

mpi-torch: export HVDLOCAL_BACKEND = torch
mpi-torch: setup
	@echo "== tests/mpi: torch.distributed, 2 ranks"
	ranks=2; $(MPI_TEST) tests/mpi
	@echo "== tests/mpi near the engine: torch.distributed, 1 and 3 ranks"
	ranks=1; $(MPI_TEST) tests/mpi/test_{communicator,groups,local}.py
	ranks=3; $(MPI_TEST) $(NEAR_THE_ENGINE)
	@echo "== islands: torch.distributed, 4 and 6 ranks"
	ranks=4; $(MPI_TEST) tests/mpi/test_{groups,islands}.py
	ranks=4; $(MPI_TEST) tests/mpi/test_{outer,overlap}.py -k island
	ranks=6; $(MPI_TEST) $(ISLANDS_OF_MANY)

launch: setup
	$(JOBS_IN_PARALLEL) tests/launch --ignore tests/launch/faults

# What runs on a GPU, with little work on the CPU, so that it is in order when there is one.
gpu-code: setup
	timeout 600 python benchmarks/gpu_report.py --device cpu --at-once

# Jobs that are killed, stopped and starved, and started again: minutes.
test-faults: setup
	$(JOBS_IN_PARALLEL) tests/launch/faults

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
	python benchmarks/data_tokens.py
	install/mpirun -np 2 python benchmarks/long_run.py --rounds 5000 --json $(RESULTS)/long_run.json
	benchmarks/slow_link.sh 100mbit python benchmarks/slow_link.py --rate 100mbit --steps 8 --trials 1
	set -e; for rate in 1gbit 10gbit; do \
	  benchmarks/slow_link.sh $$rate python benchmarks/slow_link.py --rate $$rate --json $(RESULTS)/link-$$rate.json; done
	set -e; for engine in mpi4py horovod; do export HVDLOCAL_BACKEND=$$engine; \
	  benchmarks/slow_link.sh 1gbit python benchmarks/gradient_overlap.py; \
	  install/mpirun -np 2 python benchmarks/overlap.py --m 0.2 --json $(RESULTS)/overlap-$$engine.json; \
	  for rate in 100mbit 1gbit 10gbit; do benchmarks/slow_link.sh $$rate \
	    python benchmarks/overlap.py --rate $$rate --json $(RESULTS)/overlap-$$engine-$$rate.json; done; \
	  install/mpirun -np 4 python benchmarks/islands.py --json $(RESULTS)/islands-$$engine.json; \
	  for rate in 1gbit 10gbit; do RANKS=4 benchmarks/slow_link.sh $$rate \
	    python benchmarks/islands.py --rate $$rate --json $(RESULTS)/islands-$$engine-$$rate.json; done; done
	if [ -d $(CIFAR10) ]; then \
	  python -m data_prep cifar10 --source $(CIFAR10) --output data/cifar10 && python benchmarks/sketch.py data/cifar10 && \
	  python benchmarks/data_gather.py --data $(CIFAR10) && python benchmarks/data_cifar.py --data $(CIFAR10); fi
	python benchmarks/data_arrays.py
	if [ -d $(JPEGS) ]; then python benchmarks/data_jpeg.py --data $(JPEGS); fi

# How much of the time workers compute, by method and link: docs/utilisation.svg and its table, in some ten minutes.
utilisation: setup
	@mkdir -p $(RESULTS)
	install/mpirun -np 2 python benchmarks/utilisation.py --json $(RESULTS)/utilisation-none-2.json
	install/mpirun -np 4 python benchmarks/utilisation.py --island 2 --json $(RESULTS)/utilisation-none-4.json
	set -e; for gigabits in 0.1 1 10; do rate=$$(python -c "print(int(1000 * $$gigabits))")mbit; \
	  benchmarks/slow_link.sh $$rate python benchmarks/utilisation.py --gigabits $$gigabits \
	    --json $(RESULTS)/utilisation-$$rate-2.json; \
	  RANKS=4 benchmarks/slow_link.sh $$rate python benchmarks/utilisation.py --gigabits $$gigabits --island 2 \
	    --json $(RESULTS)/utilisation-$$rate-4.json; done
	python benchmarks/utilisation_figure.py $(RESULTS)/utilisation-*.json --figure docs/utilisation.svg

clean:
	rm -rf .venv data runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
