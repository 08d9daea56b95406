# Every target sets up what it needs from nothing: a virtual environment in .venv with the package installed for development.
# PYTHON=python3.12 make test    another interpreter
# WORKERS=4 make test            more test processes

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export JAX_PLATFORMS ?= cpu

.DEFAULT_GOAL := help
.PHONY: help venv gpu demo test test-full test-slow test-clients test-lowest test-newest dist dist-check notebooks docs bench lint typecheck format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# A new environment and every change of the dependencies install again; an interrupted install leaves no stamp.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dpsgd_optax and its development tools into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

venv: $(STAMP) ## the environment only

demo: $(STAMP) ## train on real handwritten digits with every optimizer; ends with a table and a picture
	$(BIN)/python -m benchmarks demo --out demo

# A worker compiles a row of the tables once; compiled programs are kept in .jax_cache from run to run.
PYTEST := -m pytest -q -n $(WORKERS) --dist loadgroup

test: lint typecheck ## lint, types and the quick tests: six rows of each law, no long test (tests/tiers.py)
	$(BIN)/python $(PYTEST) --tier quick

test-full: lint typecheck ## every row of every law and contract; not the soaks and the clients
	$(BIN)/python $(PYTEST) --tier full

test-slow: $(STAMP) ## the soaks alone: convergence on real problems, races, eight virtual devices
	$(BIN)/python $(PYTEST) --tier slow

$(VENV)/.clients: $(STAMP)
	@echo "installing Equinox, NumPyro, NetKet and others into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[clients]"
	@touch $@

test-clients: $(VENV)/.clients ## our optimizers in the training loops of a dozen other packages
	$(BIN)/python $(PYTEST) --tier clients tests/clients

# The bounds of pyproject.toml, `>=` read as `==`; and whatever pip takes to be the newest.
LOWEST = $$($(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*(d.replace(">=", "==") for d in p["dependencies"]))')
SELECTION ?= dpsgd_optax tests/contract tests/unit/test_report.py tests/golden/test_golden_kron.py tests/golden/test_golden_dpsgd.py

test-lowest: ## a selection of the quick tests with the lowest versions that pyproject.toml allows
	@rm -rf build/lowest && $(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check $(LOWEST) pytest pytest-xdist hypothesis chex
	build/lowest/bin/python $(PYTEST) -p no:cacheprovider $(SELECTION)

test-newest: ## the quick tests with the newest versions of everything; PYTHON=python3.12 for the newest jax
	@rm -rf build/newest && $(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager ".[dev]"
	build/newest/bin/python -m pip uninstall --quiet --yes dpsgd_optax
	build/newest/bin/python $(PYTEST) -p no:cacheprovider

dist: $(STAMP) ## wheel and sdist in dist/
	@rm -rf dist
	$(BIN)/python -m build --outdir dist .

dist-check: dist ## both of them, each installed into an empty environment and put to work
	@rm -rf build/installed && $(PYTHON) -m venv build/installed
	build/installed/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	build/installed/bin/python -I -W error tests/smoke.py
	build/installed/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.tar.gz
	build/installed/bin/python -I -W error tests/smoke.py
	@ls -l dist

$(VENV)/.notebooks: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[notebooks]"
	@touch $@

notebooks: $(VENV)/.notebooks ## make the .ipynb of each notebook from its .py, run it, and keep its outputs; BOOKS="3 8" for some
	$(BIN)/python notebooks/execute.py $(BOOKS)

docs: $(STAMP) ## the pages, the notebooks and the reference, as HTML in build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html notebooks build/docs

# `jax[CUDA]` is installed where there is a card; without a network what is there must do, and without a card all is tiny.
CUDA ?= cuda12

gpu: $(STAMP) ## on a GPU, in ten minutes: tests, milliseconds of a step, ResNet-18 on CIFAR-10; tiny networks on a CPU
	@if command -v nvidia-smi > /dev/null; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[$(CUDA)]" || echo "jax[$(CUDA)] was not installed"; fi
	JAX_PLATFORMS= $(BIN)/python -m benchmarks gpu $(ARGS)

bench: $(STAMP) ## the benchmarks; `make bench ARGS="--help"` lists what there is
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(STAMP) ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP) ## pyrefly
	$(BIN)/pyrefly check

format: $(STAMP) ## ruff, with repairs
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

clean: ## caches, not the environment
	rm -rf .pytest_cache .ruff_cache .hypothesis .jax_cache build dist
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
