# make demo: train on scikit-learn's digits, two stages.  make test: every test.  make lint.
PYTHON ?= python3
BIN := .venv/bin
# One thread a process: two stages on two cores. torchrun would say so at length.
export OMP_NUM_THREADS ?= 1

# The install links to each file, so it is made again when one comes or goes.
FILES := $(sort $(shell find pipeline models launch -name '*.py' -o -name '*.yaml'))
SETUP := setup.cfg pyproject.toml constraints.txt
STAMP := .venv/installed-$(shell (echo $(FILES); cat $(SETUP)) | cksum | tr -d ' ')

.PHONY: demo test lint clean

demo: $(STAMP)
	@$(BIN)/torchrun --standalone --nproc-per-node 2 -m headrace.launch.train --config launch/configs/digits.yaml

# In the folders' order: the long tests first, so that neither core idles at the end.
test: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet .
	@$(BIN)/mypy

$(STAMP): $(SETUP)
	@test -d .venv || $(PYTHON) -m venv .venv
	@echo "Installing into .venv"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f .venv/installed-* && touch $@

# Runs stay.
clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
