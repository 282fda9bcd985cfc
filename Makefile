# `make test` and `make run` set up everything they need, on a fresh machine too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Hundreds of processes import the same modules: the bytecode of the first is kept, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: test run lint types unit compat soak clean

# The types are checked beside the tests, some of which wait.
test: lint
	$(MAKE) --jobs 2 types unit

run: $(READY)
	$(BIN)/python -m examples.demo_lm.run --out runs/demo

# torch by its exact version first: any other request fetches gigabytes of CUDA packages on a machine without a GPU.
# Bytecode is made when a module is first imported: of most packages only a few ever are.
$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --no-compile triton==3.7.1
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-compile --editable '.[test,plot]'
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow setup.cfg's package_dir in a source tree, so it reads the packages as they install.
types: $(READY)
	rm -rf build
	$(BIN)/pip install --quiet --no-compile --no-deps --target build/check .
	cp -r benchmarks examples build/check
	cd build/check && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p megacomp -p benchmarks -p examples

# One thread each: the tests' own processes share the cores already.
unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile

# Every supported version of each framework in an environment of its own; fetches all of them, takes about 20 minutes.
compat: $(READY)
	$(BIN)/python tests/compat/matrix.py

# 2,000 steps of generation at TP 2 and at TP 4, 1,000 installations; 4 to 7 minutes on two cores.
soak: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/soak/run.py

clean:
	rm -rf build dist runs *.egg-info
