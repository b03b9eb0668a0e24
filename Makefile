# make demo    a short tour of pretraining and evaluation on synthetic images, on whatever machine this is
# make test    the test suite (SKIPLESS_TEST_DATA=FOLDER adds the tests on real images, see CONTRIBUTING.md)
# make lint    ruff and mypy
# make stress  kills, full disks, flipped bits, hostile files, absurd settings: what is lost (25 minutes on two cores)
# make docs    the documentation site, into build/site
# make clean   remove the virtual environment and the caches
#
# The first call installs everything into .venv. To use an environment of your own instead: make test PY=python
# Other choices: PYTHON=python3.12 builds .venv with that interpreter; EXTRA=cpu or EXTRA=gpu overrules the GPU check.

PYTHON = python3
EXTRA = $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
PY = .venv/bin/python
ENVIRONMENT = $(if $(filter .venv/bin/python,$(PY)),.venv/.stamp)

.PHONY: help demo test stress lint docs clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(ENVIRONMENT)
	$(PY) examples/demo.py

# Two workers with one thread each: more threads than cores make every test slow.
# -P keeps the repository itself off the search path, so that a mistake in ssl/ is reported by its test and cannot stop pytest.
test: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PY) -P -m pytest -q -n 2 --dist loadfile --durations=5

stress: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PY) benchmarks/stress.py --out results/analysis/stress

docs: $(ENVIRONMENT)
	$(PY) -m mkdocs build

lint: $(ENVIRONMENT)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

clean:
	rm -rf .venv build .pytest_cache .ruff_cache .mypy_cache .hypothesis

# One pip command for everything, so that torch, torchvision and xformers are resolved together.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "skipless needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1): name another, as in 'make PYTHON=python3.12 test'." >&2; exit 1; }
	@echo "Installing skipless[$(EXTRA),dev] into .venv: 6 to 7 GB on Linux, most of it PyTorch with its CUDA libraries; a few minutes."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRA),dev]"
	@touch $@
