# Everything runs in .venv, which is made when it is missing, from the one constraints file.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint zoo recall conformance bench axe statistics recipes wheel sanitize aarch64 clean

train: .venv/ready
	$(BIN)/truenorm train

# The second part is what the layers compute where the kernels are not live.
test: .venv/ready-dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal
	TRUENORM_KERNELS=torch $(BIN)/python -m pytest -n auto --dist worksteal $(WITHOUT_KERNELS)

WITHOUT_KERNELS := $(patsubst %,tests/layers/test_%.py,batch_norm kernel running repeats transaction \
	torch_cases fused)

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
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/steps.py
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

# One wheel for every Python from 3.11 and every torch from 2.10 on, and the proof of both.
wheel: .venv/ready-dev
	$(INSTALL) --no-build-isolation --editable ".[wheel]"
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/torch-abi-audit --check torch src/truenorm/kernels/_kernels.abi3.so

# The kernels under the address and undefined-behaviour sanitizers: all their tests (g++).
sanitize: .venv/ready-dev
	$(BIN)/python tests/kernels/sanitized.py

# The kernels for another processor, compiled by Debian's g++-aarch64-linux-gnu, run by qemu-user.
CROSS := aarch64-linux-gnu-g++ -std=c++20 -O3 -fno-math-errno -fno-trapping-math -fno-strict-aliasing \
	-Wno-psabi -Isrc/truenorm/kernels/csrc
aarch64: .venv/ready
	mkdir -p build
	$(CROSS) -fsyntax-only -DTORCH_TARGET_VERSION=0x020a000000000000 \
		-I$$($(BIN)/python -c "import torch; print(torch.__path__[0])")/include \
		src/truenorm/kernels/csrc/binding.cpp
	$(CROSS) -static src/truenorm/kernels/csrc/baseline.cpp src/truenorm/kernels/csrc/choose.cpp \
		tests/kernels/standalone.cpp -o build/standalone-aarch64
	qemu-aarch64 build/standalone-aarch64

KERNELS := setup.py src/truenorm/kernels/build.py $(wildcard src/truenorm/kernels/csrc/*)
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# The kernels are compiled against the torch that is pinned, so that has to be there first.
.venv/ready: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv .venv
	$(INSTALL) torch "setuptools>=77"
	$(INSTALL) --no-build-isolation --editable .
	@$(BIN)/python -c "from truenorm.kernels.ops import notice; notice()"
	touch $@

.venv/ready-dev: .venv/ready
	$(INSTALL) --no-build-isolation --editable ".[dev,bench]"
	touch $@

clean:
	rm -rf .venv build dist runs src/truenorm/kernels/*.abi3.so
