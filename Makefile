# Everything runs in .venv, which the first call makes from the lock file.
PYTHON ?= python3
PROFILE ?= mini
DATA ?=
SEEDS ?=
JOBS ?=
ONLY ?=
MINUTES ?= 30

BIN := .venv/bin
STAMP := .venv/.installed
# Through the environment, so that no character in a value means anything to make or the shell.
export REPORT_PROFILE := $(value PROFILE)
export REPORT_DATA := $(value DATA)
export REPORT_SEEDS := $(value SEEDS)
export REPORT_JOBS := $(value JOBS)
export REPORT_ONLY := $(value ONLY)
export SOAK_MINUTES := $(value MINUTES)
OPTIONS = --profile "$$REPORT_PROFILE" $(if $(value DATA),--data "$$REPORT_DATA") $(if $(value SEEDS),--seeds "$$REPORT_SEEDS") $(if $(value JOBS),--jobs "$$REPORT_JOBS") $(if $(value ONLY),--only "$$REPORT_ONLY")

.PHONY: help install reports figures lab test test-slow test-lowest soak format clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  reports takes PROFILE=smoke|mini|night|photographs|paper  DATA=folder  SEEDS=\"0 1 2\"  JOBS=n"
	@echo "  and ONLY=\"fig3_stepwise …\"; figures takes DATA, soak MINUTES, the set-up PYTHON=python3.12"

install: $(STAMP) ## set up .venv with the locked versions (the other targets do it too)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"$(PYTHON) is Python {v.major}.{v.minor}; sssd needs 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 > /dev/null
	@touch $(STAMP)

reports: $(STAMP) ## train what is missing, rebuild figures, tables and report.pdf into reports/
	$(BIN)/python -m sssd reports $(OPTIONS)

figures: $(STAMP) ## draw the committed reports again from their records, without training
	$(BIN)/python -m sssd figures $(if $(value DATA),--data "$$REPORT_DATA")

# On copies, as JupyterLab saves outputs into the notebook that it shows. A copy that is there stays.
lab: $(STAMP) ## open JupyterLab on copies of the notebooks, in lab/
	@mkdir -p lab
	@for file in notebooks/*.ipynb; do [ -e "lab/$${file##*/}" ] || cp "$$file" lab/; done
	$(BIN)/jupyter lab --notebook-dir=lab $(if $(filter 0,$(shell id -u)),--allow-root)

test: $(STAMP) ## lint, types and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

LOWEST := .venv-lowest
test-lowest: ## the tests with the oldest supported torch, in an environment of its own
	$(PYTHON) -m venv $(LOWEST)
	grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' requirements.lock > $(LOWEST)/others.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $(LOWEST)/others.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check $$(sed -nE 's/^ *"(torch|torchvision)>=([0-9.]+)".*/\1==\2/p' pyproject.toml)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(LOWEST)/bin/python -m ipykernel install --sys-prefix --name python3 > /dev/null
	$(LOWEST)/bin/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		--ignore tests/test_packaging.py  # which is about the locked versions

soak: $(STAMP) ## kill and damage runs at random for MINUTES=30: they must end the same
	$(BIN)/python tests/soak.py --minutes "$$SOAK_MINUTES"

format: $(STAMP) ## format code and notebooks
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove caches and environments; runs and reports stay
	rm -rf .venv $(LOWEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis
