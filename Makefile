# make env   the environment in .venv, with the command .venv/bin/vitrim
# make demo  the main job on built-in images and a built-in model, three to four minutes on two cores
# make test  the whole test suite
# make quick a minute of it: laws on a few networks, the contract of one method, command and README texts
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env demo test quick lint clean
.DEFAULT_GOAL := env

env: $(STAMP)

$(STAMP): pyproject.toml uv.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.8"
	UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv sync --frozen --inexact --extra dev --extra track --extra hf
	@touch $(STAMP)

demo: env
	$(BIN)/vitrim demo --force

test: env
	$(BIN)/python -m pytest

quick: env
	$(BIN)/python -m pytest --quick

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist
