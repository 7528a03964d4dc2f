# Every target works on a fresh machine with Python 3.11 or 3.12 and make: .venv is made from its lock, and with
# TORCH=newest .venv-newest is, which has the newest PyTorch.
ifeq ($(TORCH),newest)
VENV   ?= .venv-newest
LOCK   := requirements-newest.lock
else ifeq ($(TORCH),)
VENV   ?= .venv
LOCK   := requirements-dev.lock
else
$(error TORCH=newest is the one choice; without it the versions of pyproject.toml are taken)
endif
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := -m pip --disable-pip-version-check install --quiet

# Versions of transformers that an exported model is tried under, each in a folder of its own.
TRANSFORMERS := $(patsubst tests/release/transformers_versions/%.txt,build/transformers/%/.installed,$(wildcard tests/release/transformers_versions/*.txt))

.PHONY: demo ablate test test-slow test-newest transformers cluster-test infra-check check format bench-build bench-stream bench-train lock clean help

help:            ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Nothing is resolved: the lock names every file by its hash. The stamp is the lock that was installed.
$(STAMP): pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 with venv on the PATH; say PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --no-deps --require-hashes -r $(LOCK)
	$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	@cp $(LOCK) $@

# SIZE=large has a run of its own, so that neither size stands in the other's way.
SIZE   ?= small
RUN    := runs/demo$(if $(filter-out small,$(SIZE)),-$(SIZE))

demo: $(STAMP)   ## the main job on drawn scenes, from data to report (5 minutes; SIZE=large: some 40)
	$(BIN)/python training/demo.py --run $(RUN) --size $(SIZE)

# Two halves side by side, each with one thread: small matrices hardly profit from a second. The later one writes the table.
ABLATE := OMP_NUM_THREADS=1 $(BIN)/python training/ablate.py training/ablations/demo.yaml
ablate: demo     ## the arms of the paper's Tables 3 and 5 on the small demo's data, three seeds each (15 minutes)
	$(ABLATE) --part 1/2 & half=$$!; $(ABLATE) --part 0/2; code=$$?; wait $$half && exit $$code

# Two processes, a thread each; what shares a Ray or a store stays together (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)   ## every unit and one path of each kind from end to end, without the network (4 minutes on two cores)
	$(PYTEST) -m "not slow and not cluster"

test-slow: $(STAMP) transformers ## the rest: every engine, faults and kills, the demo, browsers, other transformers (15 minutes)
	$(PYTEST) -m "slow and not cluster"

test-newest:     ## by hand and before a release: the engines' equal losses and the demo with the newest PyTorch
	$(MAKE) TORCH=newest VENV=.venv-newest .venv-newest/.installed
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest tests/engines/test_engines.py
	rm -rf runs/demo-newest
	.venv-newest/bin/python training/demo.py --run runs/demo-newest

transformers: $(TRANSFORMERS) ## the versions of transformers that the tests try an exported model under (build/transformers)

build/transformers/%/.installed: tests/release/transformers_versions/%.txt | $(STAMP)
	$(BIN)/python $(PIP) --no-deps --require-hashes --upgrade --target build/transformers/$* -r $<
	@touch $@

cluster-test: $(STAMP) ## a SLURM of emulated hosts runs the jobs of infra/slurm; hosts are killed (root, Debian's slurm packages)
	$(BIN)/python -m pytest -m cluster -rs tests/infra/test_slurm.py

infra-check:     ## the files of infra/, each with the tool of its own world (an environment of its own)
	test -x .venv-infra/bin/python || $(PYTHON) -m venv .venv-infra
	.venv-infra/bin/python $(PIP) -r infra/requirements.txt
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
	$(BIN)/python $(PIP) --upgrade --no-deps --target build/peers -r $<
	@touch $@

bench-train: $(STAMP) ## a training step beside its peers: a table, and runs/bench/train.json (15 minutes)
	$(BIN)/python tests/benchmarks/bench_train.py

# uv keeps the versions that it finds in the locks, unless pyproject.toml no longer allows them. It writes on each line
# which Python and systems the project is for; that is said once, in pyproject.toml.
COMPILE := build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url pyproject.toml

lock: build/uv/bin/uv ## the three locks again, after a change of pyproject.toml or infra/newest.txt
	$(COMPILE) --extra dev -o requirements-dev.lock
	cp requirements-dev.lock requirements.lock
	$(COMPILE) -o requirements.lock
	$(COMPILE) --extra dev --override infra/newest.txt -o requirements-newest.lock
	sed -i.bak -E "s/ ; python_full_version < '3.13' and \(sys_platform == 'darwin' or sys_platform == 'linux'\)//; s/python_full_version < '3.13' and //" requirements*.lock
	rm requirements*.lock.bak

build/uv/bin/uv:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python $(PIP) uv==0.13.9

clean:           ## remove what was built, the environments included; runs/ stays
	rm -rf $(VENV) .venv .venv-newest .venv-infra build *.egg-info .mypy_cache .ruff_cache .pytest_cache
