# One virtual environment, made from pyproject.toml; every target works on a fresh machine with Python 3.11 or 3.12 and make.
VENV   ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo ablate test cluster-test infra-check check format bench-build bench-stream bench-train clean help

help:            ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 with venv on the PATH; say PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)   ## the main job on drawn scenes: store, stage 1, stage 2, answers, report (under 5 minutes)
	$(BIN)/python training/demo.py

ablate: demo     ## the arms of the paper's Tables 3 and 5 on the demo's data, two seeds each (under 15 minutes)
	$(BIN)/python training/ablate.py training/ablations/demo.yaml

test: $(STAMP)   ## the tests, without the network, two files at a time, a thread each (20 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

cluster-test: $(STAMP) ## a SLURM of emulated hosts runs the jobs of infra/slurm; hosts are killed (root, Debian's slurm packages)
	$(BIN)/python -m pytest -m cluster -rs tests/infra/test_slurm.py

infra-check:     ## the files of infra/, each with the tool of its own world (an environment of its own)
	test -x .venv-infra/bin/python || $(PYTHON) -m venv .venv-infra
	.venv-infra/bin/python -m pip install --quiet --disable-pip-version-check -r infra/requirements.txt
	.venv-infra/bin/python infra/check.py

bench-build: $(STAMP) ## how fast a store is built, beside its limits and peers (runs/bench/build.json; 8 minutes)
	$(BIN)/python tests/benchmarks/bench_build.py

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-stream: $(STAMP) build/peers/.installed ## the stream beside its peers: a table, and runs/bench/stream.json
	PYTHONPATH=build/peers $(BIN)/python tests/benchmarks/bench_stream.py

# Their own requirements contradict this project's (mosaicml-streaming wants numpy < 2.2), so they stand beside it.
build/peers/.installed: tests/benchmarks/peers.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target build/peers -r $<
	@touch $@

bench-train: $(STAMP) ## a training step beside its peers: a table, and runs/bench/train.json
	$(BIN)/python tests/benchmarks/bench_train.py

clean:           ## remove what was built, the environment included
	rm -rf $(VENV) .venv-infra runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
