# `make quickstart` and `make test` do all the set-up they need, once, in .venv.
PYTHON ?= python3
VENV := .venv
PACKAGE := $(VENV)/.package
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart replicate bench test test-all test-lowest lint format docs clean

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

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The annotation is one of PEFT's, inherited by StitchConfig; it cannot be read outside of its module.
docs: $(PACKAGE)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(VENV)/bin/python -W "ignore:Error parsing type annotation Optional[Union[str, TaskType]]:UserWarning" \
		-m pdoc --docformat google --no-show-source --output-directory build/docs \
		peft_bts '!peft_bts.plan' peft_bts.attaching peft_bts.generating peft_bts.gate_table peft_bts.gate_sequences

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

clean:
	rm -rf $(VENV) $(LOWEST) .cache build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
