# Everything runs in .venv, which is made when it is missing, from the one constraints file.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint bench recipes wheel clean

train: .venv/ready
	$(BIN)/truenorm train

test: .venv/ready-dev lint
	$(BIN)/python -m pytest

lint: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready-dev
	$(BIN)/python bench/main_job.py
	$(BIN)/python bench/layers.py
	$(BIN)/python bench/small_batch.py
	$(BIN)/python bench/doctor.py

recipes: .venv/ready-dev
	$(BIN)/python bench/recipes.py

wheel: .venv/ready-dev
	$(BIN)/python -m build

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	touch $@

clean:
	rm -rf .venv build dist runs
