# Everything that a newcomer needs: `make demo` and `make test`. The virtual environment is made on first use.
VENV ?= .venv
# the first that runs: a name alone proves nothing, it may stand for a version that is not installed
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$python && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Flower says nothing to the outside, installs nothing while running, and keeps its files in this folder.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export FLWR_HOME ?= $(CURDIR)/.flwr
export FEDHYPEVAE_HOME ?= $(CURDIR)

.PHONY: help install demo docs fuzz test test-gpu test-units test-simulation test-federation test-compose mutants check format bench bench-curves bench-ablations bench-widths bench-performance bench-engine clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

# the locks first, then torch, whose builds differ by machine, then the code; docs/install.md says why `pip check` complains
$(STAMP): pyproject.toml deploy/locks/development.txt deploy/locks/torch.txt
	@test -n "$(PYTHON)" || { echo "error: expected Python 3.11 to 3.14, found none; name one with PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --require-hashes -r deploy/locks/development.txt
	$(PIP) -r deploy/locks/torch.txt
	$(PIP) --no-deps -e .
	@touch $(STAMP)

install: $(STAMP)  ## make the virtual environment

demo: $(STAMP)  ## four simulated hospitals train one generator on real CT images (minutes)
	$(BIN)/fedhypevae demo

docs: $(STAMP)  ## the documentation as a site, in outputs/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d outputs/docs-cache docs outputs/docs
	@echo "open outputs/docs/index.html"

test: test-units test-simulation  ## every test but those of real processes and containers

# one thread each: two workers share the cores, and small matrices gain nothing from more; each begins with half of the
# list, so that what a file's tests share is made once
test-units: $(STAMP)  ## what needs no processes of its own
	OMP_NUM_THREADS=1 $(PYTEST) tests -n 2 --dist worksteal -m "not federation and not simulation"

test-simulation: $(STAMP)  ## flwr run in simulation
	$(PYTEST) tests/integration -m simulation

test-gpu: $(STAMP)  ## what needs a GPU (skipped where there is none)
	$(PYTEST) tests -m gpu -rs

# most of it is waiting (a dead node is noticed after a minute): the federations run side by side, each in its worker
test-federation: $(STAMP)  ## real processes with TLS and node keys on this machine
	$(PYTEST) tests/integration -m federation -n 5 --dist loadfile --durations=0

test-compose:  ## the compose demo on a real container engine (root and namespaces)
	PYTHON="$(PYTHON)" bash tests/compose/run.sh

# not part of `test`: each of more than 400 bugs costs a start of pytest
mutants: $(STAMP)  ## plant each privacy bug of the list and see which test finds it (half an hour on two cores)
	$(BIN)/python -m tests.mutants --jobs 2 --write-table

fuzz: $(STAMP)  ## 20,000 changed replies of sites to a real server app, 10,000 changed files and as many texts (twenty minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --mutations 20000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.files --inputs 10000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.tables --inputs 10000

check: $(STAMP)  ## ruff and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the comparison table (half an hour on two cores)
	$(BIN)/python -m benchmarks.table

bench-curves: $(STAMP)  ## scores against ε, number of sites and skew (minutes)
	$(BIN)/python -m benchmarks.curves

bench-ablations: $(STAMP)  ## each part of FedHypeVAE on and off (minutes)
	$(BIN)/python -m benchmarks.ablations

bench-widths: $(STAMP)  ## MH-pFedHN over sites with different encoders (minutes)
	$(BIN)/python -m benchmarks.mixed_widths

bench-performance: $(STAMP)  ## the performance measurements beside their goals (twenty minutes on two cores)
	$(BIN)/python -m benchmarks.performance

bench-engine: $(STAMP)  ## a thousand sites in Flower's simulation engine (five minutes)
	$(BIN)/python -m benchmarks.server --sites --engine 1000 --out benchmarks/results/engine.json

clean:  ## remove results and caches, keep the virtual environment
	rm -rf outputs .flwr .pytest_cache .mypy_cache .ruff_cache .hypothesis
