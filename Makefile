# `make demo` and `make test` are the two commands to start with. Every target installs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS = 1
DEMO := build/demo

.PHONY: install demo demo-data demo-towers serve test test-all test-slurm lint bench gpu-check docs fuzz mutants lock
install: .venv/installed

.venv/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo-data: install
	$(BIN)/python shards/demo_data.py --out $(DEMO)/videos
	for split in train val test; do \
	  $(BIN)/python shards/make_shards.py --source manifest --annotations $(DEMO)/videos/manifest.jsonl \
	    --videos $(DEMO)/videos --split $$split --out $(DEMO)/shards/$$split --image-size 32 || exit 1; \
	done

demo: demo-data
	rm -rf runs/demo $(DEMO)/gallery
	$(BIN)/python launch/submit.py --cluster local --config demo.yaml

runs/demo/checkpoints/best.safetensors:
	$(MAKE) demo

serve: runs/demo/checkpoints/best.safetensors
	$(BIN)/python -m tmass_dist index runs/demo --videos $(DEMO)/videos/videos --out $(DEMO)/gallery
	$(BIN)/python -m tmass_dist serve $(DEMO)/gallery --open

demo-towers: install
	$(BIN)/python shards/demo_towers.py --out configs/towers

test: install
	$(BIN)/python -m pytest -m 'not slow and not slurm'

test-all: install
	$(BIN)/python -m pytest

test-slurm: install
	$(BIN)/python -m pytest -m slurm tests/slurm

# Each case may break the rule of tests/fuzz/rule.py. `make test` runs some of them, other ones at each commit.
FUZZ_CASES ?= 10000
FUZZ_SEED ?= 0

fuzz: install
	FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/fuzz --hypothesis-seed=$(FUZZ_SEED)

# Continues where it stopped; remove build/mutants.jsonl to begin again.
mutants: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutants]'
	$(BIN)/python -m tests.mutation

# Renews the versions that the container recipes install. TORCH limits torch, for example TORCH='torch<2.9' for CUDA 12.
TORCH ?= torch
lock: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lock]'
	echo '$(TORCH)' | $(BIN)/uv pip compile pyproject.toml --constraint - --quiet --upgrade --generate-hashes --no-annotate \
	  --extra search --extra serve --extra s3 --extra lora --extra tune --extra towers \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock' \
	  --output-file launch/container/requirements.lock

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/pdoc --docformat google --output-directory build/docs ./tmass_dist '!tmass_dist.__main__'

gpu-check: install
	$(BIN)/python benchmarks/gpu.py
