PYTHON ?= python3.11
BIN := .venv/bin
DEMO_OUTPUT ?= out/demo

.PHONY: demo test lint constraints clean

# Installs once; again only when what is to be installed has changed.
.venv/installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	if [ -f "$(DEMO_OUTPUT)/manifest.json" ]; then rm -rf "$(DEMO_OUTPUT)"; fi
	$(BIN)/pairsift demo --output $(DEMO_OUTPUT)

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# Pins every package that setup.py asks for, the dev extra included.
constraints: .venv/installed
	$(BIN)/uv pip compile --quiet --python-version 3.11 --extra dev --no-header --no-annotate --output-file constraints.txt setup.py

clean:
	rm -rf .venv out build *.egg-info
