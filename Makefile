# Each target sets up what it needs: a virtual environment with pinned packages and the extension built into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc kernels cmake -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' -o -name '*.in') \
	CMakeLists.txt pyproject.toml python/rewardfuse/__init__.py
CPP := $(shell find csrc kernels tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-large lint format bench gpu-check clean

demo: $(VENV)/.built
	$(BIN)/python -m rewardfuse.demo --output_dir demo-output

test: $(VENV)/.built
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-large: $(VENV)/.built
	$(BIN)/python -m pytest -m large

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.built
	$(BIN)/rewardfuse bench

# On a machine with a GPU, which may have no network: uses that machine's torch, triton and test packages.
gpu-check:
	$(PYTHON) -m venv --system-site-packages --clear $(VENV)-gpu
	REWARDFUSE_NATIVE=ON REWARDFUSE_CUDA=ON $(VENV)-gpu/bin/python -m pip install --no-build-isolation --no-deps .
	$(VENV)-gpu/bin/python benchmarks/gpu_check.py

$(VENV)/.ready: requirements/dev.txt requirements/peers.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --no-deps -r requirements/dev.txt
	$(BIN)/python -m pip install -q --no-compile --no-deps -r requirements/peers.txt
	touch $@

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	REWARDFUSE_NATIVE=ON $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build $(VENV) $(VENV)-gpu demo-output
