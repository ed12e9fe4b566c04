# Each target sets up what it needs in .venv and runs; nothing else has to be done first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo gallery test lint docs clean
.DEFAULT_GOAL := demo

$(VENV)/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/run
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/run  ## drawings and prompts in, controlled pictures out: out/demo/index.html
	$(BIN)/python recipes/demo.py --out out/demo

$(VENV)/world: $(VENV)/run
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[world]"
	touch $@

gallery: $(VENV)/world  ## what control is good for, one page: out/gallery/index.html
	$(BIN)/python recipes/gallery.py --out out/gallery

test: $(VENV)/dev  ## the fast suite
	$(BIN)/python -m pytest

lint: $(VENV)/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/dev  ## write docs/cli.md from the commands' own help
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) out
