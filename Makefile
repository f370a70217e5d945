# Everything a newcomer needs: `make demo` shows it, `make test` checks it. Both set up by themselves.
PYTHON ?= python3
PYTHON_LATEST ?= $(shell for p in python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python); \
	do $$p -c "" 2>/dev/null && echo $$p && break; done)
VENV := .venv
LATEST := .venv-latest
DOCS := .venv-docs
RELAY := .venv-relay
BENCH ?=
FUZZ_SECONDS ?= 120
FUZZ_SEED ?= 0
TE_VERSIONS := 2.6.0 2.20.2

# Containers often set it; then each process that tests start would compile this package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo train-demo relay-demo test test-slow test-latest test-te fuzz coverage lint docs wheel bench clean

help:
	@echo "make demo         set up, convert a 1B model both ways, and prove that nothing was lost"
	@echo "make train-demo   set up, and go from text to a trained model in transformers; 5 minutes"
	@echo "make relay-demo   train in three legs, OLMo-core, Megatron, OLMo-core; 5 minutes"
	@echo "make test         set up, lint, run the tests"
	@echo "make test-slow    the tests that take long or kill at many places: an hour"
	@echo "make test-latest  the same tests on Python 3.12 with the newest megatron-core"
	@echo "make test-te      Transformer Engine's own Python on a CPU, oldest and newest version"
	@echo "make fuzz         changed files to all readers, 2 minutes; FUZZ_SECONDS=3600 FUZZ_SEED=7 for more"
	@echo "make coverage     the tests, and which lines they miss"
	@echo "make lint         ruff and mypy --strict"
	@echo "make docs         build the documentation site into site/"
	@echo "make wheel        build the package into dist/"
	@echo "make bench        time import and export next to cp -r, live loading next to safetensors,"
	@echo "                  the fingerprint next to sha256sum, training next to a PyTorch loop;"
	@echo "                  BENCH='--size olmo2-7b' for more"
	@echo "make clean        remove what these made"

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

$(LATEST)/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON_LATEST)" || { echo "no python3.12 found; set PYTHON_LATEST"; exit 1; }
	$(PYTHON_LATEST) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

# OLMo-core needs other versions of two packages.
$(RELAY)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RELAY)
	grep -v -e huggingface_hub -e rich constraints.txt > $(RELAY)/constraints.txt
	$(RELAY)/bin/pip install --quiet --disable-pip-version-check -c $(RELAY)/constraints.txt \
		-e ".[train]" \
		ai2-olmo-core==3.0.0
	touch $@

# The extra alone: the site is made from the source without importing torch.
$(DOCS)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['optional-dependencies']['docs'], sep='\n')" > $(DOCS)/requirements.txt
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r $(DOCS)/requirements.txt
	touch $@

demo: $(VENV)/ready
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh examples/demo.sh demo-output

train-demo: $(VENV)/ready
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh examples/train/train_demo.sh train-demo-output

relay-demo: $(RELAY)/ready
	rm -rf relay-demo-output
	OMP_NUM_THREADS=1 $(RELAY)/bin/python examples/relay/relay.py relay-demo-output

test: $(VENV)/ready lint
	$(VENV)/bin/python -m pytest -m "not slow" -n 3 --dist loadfile --durations=15

test-slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m slow -n 2 --dist loadfile --durations=15

# Measuring takes half as long again.
coverage: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m "not slow" -n 3 --dist loadfile --cov --cov-report=term \
		--cov-fail-under=90

test-latest: $(LATEST)/ready
	$(LATEST)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile

# The pure Python wheel alone: 6 MB, without the compiled parts and without CUDA.
.te/%/ready: $(VENV)/ready
	rm -rf .te/$*
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		-c constraints.txt --target .te/$* transformer-engine==$* einops
	touch $@

test-te: $(VENV)/ready $(TE_VERSIONS:%=.te/%/ready)
	for version in $(TE_VERSIONS); do \
		CUDA_VISIBLE_DEVICES= TRANSFORMER_ENGINE_PYTHON=.te/$$version $(VENV)/bin/python -m pytest \
			tests/functional_tests/te_on_cpu -n 2 --dist loadfile || exit 1; \
	done

fuzz: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy src

docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

wheel: $(VENV)/ready
	rm -rf dist
	$(VENV)/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

bench: $(VENV)/ready
	$(VENV)/bin/python benchmarks/bench.py $(BENCH)
	$(VENV)/bin/python benchmarks/live.py
	$(VENV)/bin/python benchmarks/fingerprint.py
	$(VENV)/bin/python benchmarks/train.py

clean:
	rm -rf $(VENV) $(LATEST) $(DOCS) $(RELAY) .te dist build site fuzz-findings demo-output train-demo-output relay-demo-output bench-output no_magic_output .pytest_cache .mypy_cache .ruff_cache
