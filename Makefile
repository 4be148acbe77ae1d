PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo demo-long test lint types format docs bench bench-gpu bench-loss bench-step bench-stream bench-evaluation app peers clean

help:
	@echo "make demo       install, train and evaluate on the embedded pictures, write runs/demo/report.html"
	@echo "make demo-long  the same with presets that take about half an hour"
	@echo "make test       install and run all tests"
	@echo "make bench      time and memory of the routed layers on the CPU (bench-gpu: on a GPU)"
	@echo "make bench-loss time and memory of the contrastive losses, alone and on several processes"
	@echo "make app        a page to play with the demo's model (MODEL=run or checkpoint, IMAGES=folder or shards)"
	@echo "make docs       the pages and the API reference, in build/site"
	@echo "make peers      what the evaluation is compared with in tests, which are skipped without"
	@echo "make lint types check style and types"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

install: $(INSTALLED)

demo: install
	$(BIN)/python -m scripts.demo

demo-long: install
	$(BIN)/python -m scripts.demo --run_dir runs/demo_long --pretrain configs/demo_long_pretrain.yaml \
		--contrastive configs/demo_long.yaml --evaluate configs/demo_long_evaluate.yaml

MODEL ?= runs/demo/contrastive
IMAGES ?= data/emoji/test

app: install
	@test -e "$(MODEL)" || { echo "error: '$(MODEL)' does not exist: run make demo first, or make app MODEL=..."; exit 2; }
	$(BIN)/python -m scripts.app "$(MODEL)" --images "$(IMAGES)"

# Evaluation is compared with these; what else they require is not needed, and would not fit.
peers: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		clip-benchmark tensorflow-datasets mmpretrain

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyrefly check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.routed_layers

bench-gpu: install
	$(BIN)/python -m benchmarks.routed_layers --device cuda

bench-loss: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.contrastive_loss --full
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.contrastive_worlds

bench-step: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training_step

bench-stream: install
	$(BIN)/python -m benchmarks.stream_resume --out benchmarks/results/stream_resume_cpu.json

bench-evaluation: install
	$(BIN)/python -m benchmarks.evaluation

docs: install
	$(BIN)/zensical build -f mkdocs.yml --strict

clean:
	rm -rf runs data build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
