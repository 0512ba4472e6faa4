# Everything runs in .venv, which is made when it is missing, from the one constraints file.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint zoo recall conformance bench axe statistics recipes wheel clean

train: .venv/ready
	$(BIN)/truenorm train

test: .venv/ready-dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

zoo: .venv/ready-dev
	$(BIN)/python -m pytest -m "zoo or not zoo" tests/doctor/test_zoo.py tests/doctor/test_recall.py

recall: .venv/ready-dev
	$(BIN)/python bench/recall.py

conformance: .venv/ready-dev
	$(BIN)/python bench/conformance.py

bench: .venv/ready-dev
	$(BIN)/python bench/main_job.py
	$(BIN)/python bench/layers.py
	$(BIN)/python bench/small_batch.py
	$(BIN)/python bench/doctor.py
	$(BIN)/python bench/folding.py
	$(BIN)/python bench/study.py
	$(BIN)/python bench/busy.py

axe: .venv/ready-dev
	$(BIN)/python bench/axe.py

statistics: .venv/ready-dev
	$(BIN)/python bench/paired.py

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
