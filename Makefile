# make demo   the whole method on the embedded model: .venv, install, t3d run recipes/demo.yaml
# make test   all tests, in .venv
# make lint   ruff and mypy, as in .ci/run
# make docs   the documentation as a site, in site/
# make dist   sdist and wheel, in dist/; .ci/wheel then installs the wheel elsewhere and uses it
# Needs only make and Python >= 3.10 with venv; PYTHON=/path/to/python3.12 chooses one, ARGS="seed=1" goes to t3d run.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10 python,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $(p))))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Of the package, for the tests; .ci/run takes more of them.
EXTRAS := test

# Half of the recipe's size: five minutes. make demo SIZE= takes all of it.
SIZE := task.num_train=1536 train.per_device_train_batch_size=16
# The demo's second student: the paper's objective, on the same rollouts, at about the same cost.
T3D := 'run_dir=runs/demo-seed$${seed}-t3d' 'rollout.source=runs/demo-seed$${seed}/rollout' \
	train.objective=t3d train.max_steps=100

.PHONY: demo test lint docs dist
demo: $(VENV)/.installed
	$(BIN)/t3d rollout recipes/demo.yaml $(SIZE) $(ARGS)
	$(BIN)/t3d train recipes/demo.yaml $(SIZE) $(ARGS) $(T3D)
	$(BIN)/t3d run recipes/demo.yaml $(SIZE) $(ARGS) 'eval.checkpoints=["runs/demo-seed$${seed}-t3d/student"]'

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; to search it, serve it: $(BIN)/python -m http.server -d site"

dist: $(VENV)/.installed-test
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# torch alone and first: an environment that offers a CPU build of this version then gives that one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "t3d needs Python 3.10 or newer; none found (make PYTHON=/path/to/python3)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing (the first time this takes some minutes)"
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(PIP) -e '.[docs]'
	@touch $@
