# make demo: set up, then generate a talking video.   make test: set up, then pass the tests.
# Each target sets up its own .venv on a machine with python3 (3.11 or newer) and make, and does nothing when it is there.

PYTHON ?= python3
RUN := .venv/bin
# what a file's tests share is made once: a file goes to one of two processes
ON_TWO_CORES := -n 2 --dist loadfile
# folders of reference fixtures; the small ones come with the tests
REFERENCES ?= tests/golden

demo: .venv/.ready
	@mkdir -p out
	$(RUN)/kavatar generate --mode single --instruction "First she smiles, then she nods." --out out/demo.mp4

# most of the time goes into compiling programs that run once, so they are not optimised; in `make parity` they are
test: .venv/.ready
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(RUN)/python -m pytest $(ON_TWO_CORES) -m "not slow and not torch"

lint: .venv/.ready-lint
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright --pythonpath $(RUN)/python

parity: .venv/.ready-parity .venv/.ready-aot
	$(RUN)/python tools/parity.py $(wildcard $(REFERENCES)/*/)
	PYTHONPATH=.venv/aot $(RUN)/python -m pytest tests/test_aot.py
	$(RUN)/python -m pytest $(ON_TWO_CORES) -m "slow or torch"

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet --upgrade pip

.venv/.ready: pyproject.toml | .venv/bin/python
	$(RUN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.ready-lint: .venv/.ready
	$(RUN)/python -m pip install --quiet --editable '.[lint]'
	@touch $@

# the pinned torch is one whose plain Linux wheel suffices for a CPU
.venv/.ready-parity: .venv/.ready
	$(RUN)/python -m pip install --quiet torch==2.13.0
	$(RUN)/python -m pip install --quiet --editable '.[parity]'
	@touch $@

# the libtpu that jax[tpu] asks for, as jaxlib cannot read all programs of a newer one; in a folder of its own, because where
# JAX sees a libtpu, it looks for a TPU first
LIBTPU = $(RUN)/python -c 'import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("jax") if "libtpu" in r))'
.venv/.ready-aot: .venv/.ready
	$(RUN)/python -m pip install --quiet --no-deps --target .venv/aot "$$($(LIBTPU))"
	@touch $@

.PHONY: demo test lint parity
