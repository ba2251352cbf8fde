# make train    train the quickstart on this machine's Python library, from nothing
# make test     run the tests; PYTHON=python3.12 uses another interpreter, in its own .venv-3.12
#              ARGS="-m long" or "-m slow" runs the long ones instead; ARGS=tests/training/test_pod.py one file
# make oracle   PyTorch, transformers and lm-eval into that environment, for the tests of those
# make lint     ruff and mypy

PYTHON ?= python3
ifeq ($(PYTHON),python3)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test install oracle lint clean

train: $(VENV)/.ready
	$(BIN)/python -m bltjax.train --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest $(ARGS)

install: $(VENV)/.ready-dev

oracle: $(VENV)/.ready-dev
	$(PIP_INSTALL) -e '.[oracle,eval]'

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: requirements.txt pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-* runs .pytest_cache .ruff_cache .hypothesis bltjax.egg-info
