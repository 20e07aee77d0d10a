# Every target sets up what it needs: a fresh machine needs Python and make, nothing else.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# The lock is for Python 3.11 and newer; 3.10 takes what pyproject.toml allows.
LOCK = $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" * (sys.version_info >= (3, 11)))')

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench bench-speed clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1|/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

demo: $(READY)  ## fine-tune on wrong labels in a few minutes, without network
	$(BIN)/noiseproof demo --overwrite

test: $(READY)  ## run the tests; PYTEST_ARGS="-m slow" for the slow ones
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)  ## ruff (rules, format) and mypy; tries all three, fails if one fails
	@failed=0; \
	for tool in "ruff check ." "ruff format --check ." "mypy"; do \
		echo "$(BIN)/$$tool"; \
		$(BIN)/$$tool || failed=1; \
	done; \
	exit $$failed

format: $(READY)  ## sort imports, apply safe fixes, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## build the documentation
	$(BIN)/python docs/build.py

bench: $(READY)  ## run a benchmark grid; GRID=benchmarks/smoke.toml unless given
	$(BIN)/noiseproof bench $(or $(GRID),benchmarks/smoke.toml) --out runs/$(notdir $(basename $(or $(GRID),smoke))) --workers 2
	$(BIN)/noiseproof report runs/$(notdir $(basename $(or $(GRID),smoke))) --out runs/$(notdir $(basename $(or $(GRID),smoke))).html --overwrite

# Texts of the demo and generated ones; docs/results has larger runs.
SPEED := runs/bench-speed
DEMO := src/noiseproof/demo/customer_messages
PAIRS = $(BIN)/python benchmarks/speed.py --data $(DEMO)_train.csv --test $(DEMO)_test.csv \
	--label intent --rows 600 --epochs 4 --pairs 2
ROWS ?= 100000
bench-speed: $(READY)  ## time and memory: pairs with the plain recipe, then scaling to ROWS=100000; a quarter of an hour
	@mkdir -p $(SPEED)
	$(PAIRS) --variant reuse --out $(SPEED)/pairs-reuse.json
	$(PAIRS) --variant "one pass" --out $(SPEED)/pairs-one-pass.json
	$(BIN)/python benchmarks/scaling.py rows --sizes 1000 10000 $(ROWS) --out $(SPEED)/scaling.json
	$(BIN)/python benchmarks/scaling.py processes --out $(SPEED)/scaling.json
	$(BIN)/python benchmarks/scaling.py length --out $(SPEED)/scaling.json
	$(BIN)/python benchmarks/scaling.py limit --out $(SPEED)/scaling.json
	$(BIN)/python benchmarks/scaling.py table $(SPEED)/scaling.json

clean:  ## remove what was built, the environment included
	rm -rf .venv build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that the index's own build of this version (the small CPU build
# where there is one) is in place before anything that depends on torch is resolved.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0 $(LOCK)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' $(LOCK)
	@touch $@
