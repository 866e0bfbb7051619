# Needs only make and a Python 3.11 or later with venv. `make demo` and `make test` do everything else.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint unit bench clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.memedit-installed
DEMO := runs/demo

# The locked versions are those of Python 3.11, so it comes first; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)

# An additional index to take torch from. Without a GPU, and without a pip configuration that knows a
# CPU build: TORCH_INDEX=https://download.pytorch.org/whl/cpu. With a GPU: .../whl/cu130.
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# A process for each core takes half of what the other has left, so that most modules stay in one.
SPREAD := $(BIN)/python -m pytest -n auto --dist worksteal

help:  ## This list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(STAMP)  ## Make .venv and install memedit with the locked versions (once)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later with venv; set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INDEX) -c constraints.txt -e '.[dev,datasets]'
	@touch $@

demo: $(STAMP)  ## Edit the embedded default model with examples/facts.jsonl
	rm -rf $(DEMO)
	$(BIN)/memedit edit --model smollm2 --facts examples/facts.jsonl --out $(DEMO)
	@echo "Report: file://$(CURDIR)/$(DEMO)/report.html"

test: $(STAMP)  ## All tests: those of Ray, which wait, beside those that compute; then what must be alone
	@mkdir -p build; $(BIN)/python -m pytest --durations=15 -m "ray and not alone" > build/ray-tests.log 2>&1 & ray=$$!; \
	nice $(SPREAD) --durations=25 -m beside; beside=$$?; \
	wait $$ray; of_ray=$$?; cat build/ray-tests.log; exit $$(( beside + of_ray ))
	@$(BIN)/python -m pytest --durations=15 -m "ray and alone" > build/ray-tests.log 2>&1 & ray=$$!; \
	$(BIN)/python -m pytest --durations=15 -m "alone and not ray"; alone=$$?; \
	wait $$ray; of_ray=$$?; cat build/ray-tests.log; exit $$(( alone + of_ray ))

check: lint unit  ## Style, types, import directions and the fast tests of single modules

lint: $(STAMP)  ## Style, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(STAMP)  ## The fast tests of single modules, one process a core
	$(SPREAD) -m unit

bench: $(STAMP)  ## The figures of quality, speed and evaluation; benchmarks/README.md has all
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.evaluation

clean:  ## Remove the environment, runs and caches of tools; the model cache stays
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
