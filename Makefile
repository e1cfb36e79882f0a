# make demo   trains AMLoss on the embedded data and evaluates it: the tour
# make test   lint and the fast tests;  make test-all  the long ones too
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet

.PHONY: help demo test test-all lint format clean

help:
	@grep -E '^# make' Makefile | sed 's/^# //'

# A stamp a requirements file: a second call installs nothing.
$(VENV)/.run: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed; try: make PYTHON=python3.12"; exit 2; }
	@echo "installing into $(VENV) (about 5 GB, one to three minutes)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	@echo "installing the test tools"
	@$(PIP) -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: $(VENV)/.run
	@$(PY) train.py @recipes/emoji_amloss.txt --name demo

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: lint
	$(PY) -m pytest -m "not slow and not gpu"

test-all: lint
	$(PY) -m pytest -m "not gpu"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
