# make demo: a small teacher, curation and students, from nothing
# make test: the tests
# make test-gpu: those of a GPU, which `make test` leaves out
# make bench: figures of speed, into benchmarks/README.md
# make lint: style and format
# All make .venv and install the pinned requirements first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-gpu lint bench

demo: .venv/installed
	$(BIN)/python demo.py

test: .venv/installed
	$(BIN)/python -m pytest

test-gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python -m pip install -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks

.venv/installed: requirements.txt extra_requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt -r extra_requirements.txt
	touch $@
