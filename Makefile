# make demo          train AMLoss on the embedded data and evaluate it: the tour
# make demo-scratch  the same without ImageNet weights
# make shell         a bash in which `python` is the one of .venv; exit leaves it
# make test          lint and the fast tests
# make test-all      the long ones too
# make gpu-check     every GPU test and benchmark, on a machine with a CUDA GPU,
#                    in under ten minutes; QUICK=1: the short form, in under four
#                    (GPU_PYTHON=... names the python, any with torch)
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet

.PHONY: help demo demo-scratch shell test test-all gpu-check lint format clean again

help:
	@sed -nE 's/^# (make|    )/\1/p' Makefile

# .venv is made anew if its python is gone (after an upgrade of the system, for example) or has no
# pip, or if PYTHON=... names another version.
MINOR := -c 'import sys; print(sys.version_info[:2])'
ANEW := $(if $(realpath $(PY)),,yes)
ifeq ($(origin PYTHON)$(ANEW),command line)
ANEW := $(shell [ "$$($(PYTHON) $(MINOR))" = "$$($(PY) $(MINOR))" ] || echo yes)
endif
SOUND := $(if $(ANEW),false,$(PY) -m pip --version >/dev/null 2>&1)

# A stamp file per requirements file, so that a second call installs nothing.
$(VENV)/.run: requirements.txt constraints.txt $(if $(ANEW),again)
	@$(SOUND) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed; if you have one, name it:" \
	    "make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "installing into $(VENV) (about 6 GB, one to three minutes)"
	@$(SOUND) || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment with pip in it;" \
	    "install its venv package (Debian, Ubuntu: sudo apt install python3-venv) and try again"; exit 2; }
	@$(PIP) -r requirements.txt -c constraints.txt
	@touch $@
	@echo "installed; 'make shell', or 'source $(VENV)/bin/activate', makes it the python of a shell"

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	@echo "installing the test tools"
	@$(PIP) -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: $(VENV)/.run
	@$(PY) train.py @recipes/emoji_imagenet.txt --name demo

demo-scratch: $(VENV)/.run
	@$(PY) train.py @recipes/emoji_scratch.txt --name demo-scratch

# Activated after the user's .bashrc, which may put another python first in PATH, or change folders.
shell: $(VENV)/.run
	@printf '%s\n' '[ -f ~/.bashrc ] && . ~/.bashrc' '. "$$ACTIVATE"' \
	  'echo "python is $$(command -v python); exit leaves this shell"' > $(VENV)/.bashrc
	@ACTIVATE="$$PWD/$(VENV)/bin/activate" exec bash --rcfile $(VENV)/.bashrc -i

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# One process per core, each with one thread: the networks are too small for more threads to help.
# The files run in the order of tests/conftest.py. Bytecode is cached, because otherwise every program
# that the tests start would compile all modules again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n auto \
  --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-all: lint
	$(PYTEST) -m "not gpu"

# Installs nothing: a GPU machine has its own torch. GPU_PYTHON chooses the Python with it.
GPU_PYTHON ?= $(if $(realpath $(PY)),$(PY),$(PYTHON))
gpu-check:
	@$(GPU_PYTHON) benchmarks/gpu_check.py $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
