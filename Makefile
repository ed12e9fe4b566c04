# Each target sets up what it needs in .venv and runs; nothing else has to be done first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: nine tenths of the files installed are never imported, and Python compiles the others when they are
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
EXTRAS := world,plots,lora,datasets,optimizers,tensorboard,wandb,trackio,scale,serve,replicas,mediapipe,onnx,photographs,segmentation,dev
WORKERS ?= logical# processes that run tests: one a core

.PHONY: demo gallery test lint docs extras clean
.DEFAULT_GOAL := demo

$(VENV)/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/dev: $(VENV)/run
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/world: $(VENV)/run
	$(PIP) -e ".[world]"
	touch $@

demo: $(VENV)/run  ## drawings and prompts in, controlled pictures out: out/demo/index.html
	$(BIN)/python recipes/demo.py --out out/demo

gallery: $(VENV)/world  ## examples of every control on one page: out/gallery/index.html
	$(BIN)/python recipes/gallery.py --out out/gallery

test: $(VENV)/dev  ## the fast suite; one thread a process, so that processes do not wait for each other
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/dev  ## write the pages that are generated: docs/cli.md, docs/tree.md, the contents of docs/decisions.md
	$(BIN)/python docs/generate.py

extras: $(VENV)/dev  ## can all extras be installed together at the pinned versions?
	$(PIP) --dry-run -e ".[$(EXTRAS)]"

clean:
	rm -rf $(VENV) out
