BIN := .venv/bin
DEMO_OUTPUT ?= out/demo

.PHONY: demo test test-slow test-large test-portable chaos fuzz lint constraints tfio test-tfio constraints-tfio bench-peers image-check \
	templates clean

# Installs only if setup.py or constraints.txt has changed.
.venv/installed: setup.py constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || { python=$$(tools/find_python.sh) && "$$python" -m venv .venv; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	if [ -f "$(DEMO_OUTPUT)/manifest.json" ]; then rm -rf "$(DEMO_OUTPUT)"; fi
	$(BIN)/pairsift demo --output $(DEMO_OUTPUT)

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2

# Tests that repeat faster ones at a larger size or with other settings.
test-slow: .venv/installed
	$(BIN)/python -m pytest -n 2 -m 'slow and not large'

# Different random inputs each time; FUZZ_EXAMPLES sets how many of each kind (docs/reliability.md).
fuzz: .venv/installed
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-20000} $(BIN)/python -m pytest -n 0 tests/hostile/test_fuzz.py

# BLIP-2 at full size. Needs 10 GB of memory and 10 GB of disk.
test-large: .venv/installed
	$(BIN)/python -m pytest -n 0 -m large

# Kills each process of a run on the portable runner (docs/runners.md).
test-portable: .venv/installed
	$(BIN)/python -m pytest -n 0 -m '' tests/integration/test_portable.py

# Kills many runs at seeded moments and compares their final outputs (docs/reliability.md): CHAOS_SEED=1 make chaos
chaos: .venv/installed
	$(BIN)/python -m pytest -n 0 -s -m chaos tests/integration/test_chaos.py tests/integration/test_faults.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint --ignore DL3059 Dockerfile
	$(BIN)/shellcheck tools/*.sh

# Builds the documentation site into out/docs.
.PHONY: docs
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Pins every package that setup.py requires, including the dev extra.
constraints: .venv/installed
	$(BIN)/uv pip compile --quiet --python-version 3.11 --extra dev --no-header --no-annotate --output-file constraints.txt setup.py

# The environment that decodes formats that Pillow cannot read (docs/task-centroids.md). Its TensorFlow 2.16 conflicts with
# Beam.
tfio: .tfio/installed

.tfio/installed: constraints-tfio.txt | .venv/installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .tfio
	$(BIN)/uv pip install --quiet --python .tfio/bin/python --requirement constraints-tfio.txt
	touch $@

test-tfio: .tfio/installed
	$(BIN)/python -m pytest -n 0 tests/tfio

# Pins the dependency group `tfio` of pyproject.toml.
constraints-tfio: .venv/installed
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --output-file constraints-tfio.txt --group tfio

# The tools that benchmarks/models.py compares with, each in its own environment. Data-juicer's documented extra for models
# (`generic`) pins transformers 4.57.1. clip-retrieval's CLIP imports pkg_resources, which setuptools 81 removed. All are
# measured with the same version of torch.
bench-peers: .venv/installed .bench/clip-retrieval/installed .bench/data-juicer/installed

.bench/clip-retrieval/installed:
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .bench/clip-retrieval
	$(BIN)/uv pip install --quiet --python .bench/clip-retrieval/bin/python clip-retrieval==2.45.0 'setuptools<81' \
		torch==2.14.1 torchvision==0.29.1
	touch $@

.bench/data-juicer/installed:
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .bench/data-juicer
	$(BIN)/uv pip install --quiet --python .bench/data-juicer/bin/python py-data-juicer==1.6.1 torch==2.14.1 torchvision==0.29.1 \
		transformers==4.57.1 'ray[default]>=2.51' simhash-pybind imagededup fasttext-predict
	touch $@

# Runs the Dockerfile's install and check steps in a separate environment (5 GB of packages, minutes). Together with
# `make lint`, this is all that can be checked without a container engine. PROCESSOR=cpu omits CUDA.
PROCESSOR ?= gpu
image-check:
	rm -rf .image build
	tools/install_package.sh .image $(PROCESSOR)
	tools/check_package.sh $(CURDIR)/.image $(CURDIR)/templates/main.py

# Writes the specs of the flex templates to the folder in the launch settings (docs/dataflow.md):
# make templates SETTINGS=my.yaml
templates: .venv/installed
	$(BIN)/python -m pipeline.dataflow.template.specs $(SETTINGS)

clean:
	rm -rf .venv .bench .tfio .image out build *.egg-info
