# `make` alone lists the targets. Everything lives in .venv, which is made when it is missing.
#   make test ARGS="-k engine -x"     arguments for pytest
#   make test JOBS=0                  tests one after the other, in one process
#   make setup PYTHON=python3.12      another interpreter
PYTHON ?= python3
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
export UV_HTTP_TIMEOUT ?= 600

SHELL := /bin/sh
.SHELLFLAGS := -euc
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup elasticsearch elasticsearch-stop demo test test-long lint check bench pictures shots wheel constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# .venv/.ready holds the key of a finished set-up; .venv/.making stands there while one is under way, so that one that was
# interrupted is noticed. The key holds the path, because a .venv that was moved points to where it was.
setup: ## make .venv and install everything into it; instant when nothing changed
	@key="$$(pwd) $$(cat pyproject.toml constraints.txt | cksum)"
	works() { $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
	if [ -f .venv/.ready ] && [ ! -e .venv/.making ] && [ "$$(cat .venv/.ready)" = "$$key" ] && works; then exit 0; fi
	need="needs Python 3.11 or newer with venv; on Debian: apt-get install python3 python3-venv"
	if ! command -v "$(PYTHON)" >/dev/null; then echo "$(PYTHON) was not found. AgentOps Runtime $$need" >&2; exit 1; fi
	if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
		echo "$$("$(PYTHON)" --version) is too old. AgentOps Runtime $$need, or name another: make setup PYTHON=python3.12" >&2; exit 1
	fi
	if ! "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null; then
		echo "$(PYTHON) comes without venv. AgentOps Runtime $$need" >&2; exit 1
	fi
	if [ -f .venv/.ready ] && [ "$$(sed 's/ [0-9]* [0-9]*$$//' .venv/.ready)" != "$$(pwd)" ]; then rm -rf .venv; fi
	if [ -e .venv/.making ] || ! works; then rm -rf .venv; fi
	if [ ! -d .venv ]; then
		mkdir .venv; : > .venv/.making
		echo "making .venv with $$("$(PYTHON)" --version)" >&2
		"$(PYTHON)" -m venv .venv
	fi
	: > .venv/.making; rm -f .venv/.ready
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	[ -x $(BIN)/uv ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[all]' --group dev
	printf '%s\n' "$$key" > .venv/.ready; rm -f .venv/.making

demo: setup ## prepare model and index, ask three questions, show a trace
	@$(BIN)/python -m agentops demo $(ARGS)

test: setup ## run the tests (ARGS="..." goes to pytest)
	@$(BIN)/python -m pytest -m "not long" -n $(JOBS) --dist loadfile $(ARGS)

test-long: setup ## run the tests that take minutes each
	@$(BIN)/python -m pytest -m long $(ARGS)

lint: setup ## formatting, lint, types and import contracts
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint ## lint, and the tests that need no model
	@$(BIN)/python -m pytest -m "not long and not model" $(ARGS)

bench: setup ## run the benchmarks; the tables are kept in bench/results
	@mkdir -p bench/results
	for script in bench/*.py; do
		$(BIN)/python "$$script" $(ARGS) > bench/results/new.txt
		cat bench/results/new.txt
		mv bench/results/new.txt "bench/results/$$(basename "$$script" .py).txt"
	done

pictures: setup ## draw the graphs anew in docs/graphs.md
	@for file in graphs/[a-z]*.py; do
		$(BIN)/agentops graph draw "$$(basename "$$file" .py)" --output docs/graphs.md
	done

shots: setup ## draw the screens with what is on record (run the demo first)
	@$(BIN)/python -m tui.shots pictures

elasticsearch: setup ## start an Elasticsearch 9 on loopback (needs Java 21+ and Maven)
	@$(BIN)/python tests/elasticsearch_server.py start $(ARGS)

elasticsearch-stop: setup ## stop it (ARGS=--remove also removes its data)
	@$(BIN)/python tests/elasticsearch_server.py stop $(ARGS)

wheel: setup ## build the wheel into dist
	@$(BIN)/uv build --wheel --out-dir dist

constraints: setup ## pin what is installed now
	@sed -n '/^#/p' constraints.txt > constraints.new
	$(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep -v '^pip==' >> constraints.new
	mv constraints.new constraints.txt

clean: ## remove .venv, builds and caches
	@rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
