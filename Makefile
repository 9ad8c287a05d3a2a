# Two commands for a fresh machine: `make demo` (learn a subject, show it in pictures and in 3D, measure it) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Torch's CPU build if pip finds one; exact versions are in constraints.txt.
STAMP := $(VENV)/.installed

.PHONY: demo test check golden install clean format
demo: install
	$(BIN)/pcs demo --part image --part video --part 3d --out demo --overwrite

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

install: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "$(PYTHON) is Python %d.%d, and 3.10 or newer is needed: make PYTHON=python3.11 (or another)" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,3d]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo build dist *.egg-info

# Six runs on tiny models, to check that moved code still gives the same bits.
golden: install
	$(BIN)/python tests/golden.py
