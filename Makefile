# Everything below works from a bare checkout: Python >= 3.11 with its venv module, and make.
# The environment is made on first use and renewed when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# torch goes first and alone, so that no other package decides which torch is installed.
TORCH  := torch==2.13.0
PIP    := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt

# The environment pip builds cdlm in obeys the same file; older pips read the first name, newer ones the second.
export PIP_CONSTRAINT       := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

# One process a core, four at most.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal \
          --jaxtyping-packages=cdlm,beartype.beartype
TESTS  := tests

# What the lower bounds are tested with: every library they are for is in one of these.
LOWEST       := .venv-lowest
LOWEST_TORCH := torch==2.6.0
LOWEST_TESTS := tests/test_session.py tests/test_runs.py tests/test_training_run.py tests/test_training_parts.py tests/test_hub.py \
                tests/test_evaluation_judge.py tests/test_evaluation_ar_nll.py tests/test_plots.py tests/test_configs.py \
                tests/test_cli.py tests/test_masked_pretrained.py tests/test_lora.py tests/test_samples.py \
                tests/hostile/test_rules_and_settings.py

DEMO   := runs/demo
QUICK  := runs/quick
SAMPLE := --n 256 --solver "Ancestral()"

.DEFAULT_GOAL := help
.PHONY: help quick demo tutorials test test-soak test-lowest test-wheel results results-quick results-check docs lint format clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

quick: $(VENV)/.demo  ## The model that ships: three samples, then plain and committed ones, measured beside real text
	rm -rf $(QUICK)
	$(VENV)/bin/cdlm sample stories --n 3
	$(VENV)/bin/cdlm sample stories --n 64 --solver "Ancestral()" --steps 64 --out $(QUICK)/full.jsonl
	$(VENV)/bin/cdlm sample stories --n 64 --solver "Ancestral()" --steps 64 --commit "FallingThreshold(0.95)" --out $(QUICK)/commits.jsonl
	$(VENV)/bin/cdlm evaluate stories $(QUICK)/commits.jsonl $(QUICK)/full.jsonl --out $(QUICK)
	@echo "Next: cdlm sample stories --prompt 'Anna went to the park.', or make demo, which trains such a model. See README.md."

demo: $(VENV)/.demo  ## Three samples of the model that ships; then train such a model from nothing, sample and evaluate it
	$(VENV)/bin/cdlm sample stories --n 3
	@echo "Now a model of your own, from nothing: ten minutes on two cores."
	rm -rf $(DEMO)
	$(VENV)/bin/cdlm train --config configs/demo.yaml --out $(DEMO)
	$(VENV)/bin/cdlm sample $(DEMO) $(SAMPLE) --steps 128 --out $(DEMO)/full.jsonl
	$(VENV)/bin/cdlm sample $(DEMO) $(SAMPLE) --steps 64 --commit "FallingThreshold(0.95)" --out $(DEMO)/samples.jsonl \
		--plot $(DEMO)/plot.png
	$(VENV)/bin/cdlm evaluate $(DEMO) $(DEMO)/samples.jsonl $(DEMO)/full.jsonl
	@echo "The model is the folder $(DEMO). Next: cdlm sample $(DEMO) --n 4, or cdlm train --text yours.txt --out runs/mine."

tutorials: $(VENV)/.dev  ## Run the notebooks of docs/tutorials and store what they show
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(PY) -m notebooks docs/tutorials/*.ipynb

test: $(VENV)/.dev  ## Run the tests, with shapes checked at run time
	$(PYTEST)

test-soak: SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
test-soak: $(VENV)/.dev  ## Try each property on 500 new examples; to repeat: make test-soak SEED=… TESTS=tests/test_….py
	@echo "Repeat with: make test-soak SEED=$(SEED) TESTS=\"$(TESTS)\""
	$(PYTEST) -m "hypothesis and not slow and not gpu" --hypothesis-profile=soak --hypothesis-seed=$(SEED) $(TESTS)

test-lowest: PIP_CONSTRAINT :=
test-lowest:  ## Run tests with the lowest versions that are promised; another torch: make test-lowest LOWEST_TORCH=torch==...
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --quiet $(LOWEST_TORCH)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-lowest.txt -e '.[lora]' \
		beartype hypothesis jinja2 pytest pytest-xdist tensorboard
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal \
		--jaxtyping-packages=cdlm,beartype.beartype -W ignore -k "not bad_settings_of_an_evaluation" $(LOWEST_TESTS)  # two of those need mauve

test-wheel: $(VENV)/.dev  ## Build sdist and wheel, and try the wheel alone in a bare environment, also with the lowest versions
	.ci/wheel

results: $(VENV)/.dev  ## Build tables of results, and render the pages: make results TABLE="demo systems"
	$(if $(TABLE),,$(error Name tables of results/tables, or all: make results TABLE=demo))
	$(PY) results/build.py run $(TABLE)
	$(PY) results/build.py render

results-quick: $(VENV)/.dev  ## Build the small version of every table from nothing, and its pages
	rm -rf runs/results/quick
	basename -a -s .yaml results/tables/*.yaml | xargs -P "$$(getconf _NPROCESSORS_ONLN)" -n 7 \
		$(PY) results/build.py run --quick
	$(PY) results/build.py render --quick

results-check: $(VENV)/.dev  ## Say which pages and tables of results are not as they were made; the tests do so too
	$(PY) results/build.py check

docs: $(VENV)/.docs  ## Build the documents as a site, build/docs; any warning and any broken link is an error
	rm -rf build/docs build/doctrees
	$(VENV)/bin/sphinx-build -q -W --keep-going -b html -c docs/site -d build/doctrees . build/docs
	$(PY) docs/site/links.py build/docs

lint: $(VENV)/.dev  ## Check style, types and import floors
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev  ## Rewrite the code in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Remove the environment, caches and build results; runs/ stays
	rm -rf $(VENV) $(LOWEST) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("cdlm needs Python >= 3.11: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(PY)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[mauve]'
	touch $@

# The development install holds everything the demo needs.
$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[mauve,gguf,dev]'
	touch $(VENV)/.demo $@

# The site reads the docstrings, so it imports all of cdlm.
$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[mauve,docs]'
	touch $@
