# `make demo` and `make test` need Python >= 3.11 with venv, and make; everything else they install into .venv.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# The other generation of webdataset, for the tests that read our shards with both.
OTHER_WEBDATASET := $(VENV)/webdataset-1
DEMO ?= demo

.PHONY: demo test quick clean

demo: $(VENV)/.installed
	$(BIN)/curate demo -o $(DEMO) --overwrite

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Without the slow tests.
quick: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'curate needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(OTHER_WEBDATASET) webdataset==1.0.2
	touch $@

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache
