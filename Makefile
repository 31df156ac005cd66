# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
INTERNVL := src/gazeguard/assets/base-internvl
ENCODERS := clip=runs/encoders/clip siglip=runs/encoders/siglip longclip=runs/encoders/longclip
SUITES := paper-bye paper-cleansight paper-entropyscan paper-amdet adaptive clean internvl matrix
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-min test-latest lock check fix smoke bench clean

# A venv of exactly the locked versions. torch comes first and by itself, since which build fits is
# the machine's affair. On Linux PyPI's is the CUDA build of several GB; the CPU build is at
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH := 2.13.0
PYTEST = -n logical --dist worksteal  # whole suite on every core; a subset: PYTEST="-m 'not slow'"
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q --disable-pip-version-check torch==$(TORCH)
	$(1)/bin/pip install -q --disable-pip-version-check --no-deps --require-hashes -r locks/$(2).txt
	$(1)/bin/pip install -q --disable-pip-version-check --no-deps -e .
endef

$(VENV)/.base: pyproject.toml locks/base.txt
	$(call install,$(VENV),base)
	touch $@

$(VENV)/.dev: $(VENV)/.base locks/dev.txt
	$(call install,$(VENV),dev)
	touch $@

demo: $(VENV)/.base  ## clean a poisoned set with the shipped model: prints where the report is
	$(BIN)/gazeguard demo --out $(OUT)

test: $(VENV)/.dev  ## the whole test suite, with the locked versions
	$(BIN)/python -m pytest $(PYTEST)

test-min:  ## the suite with the lowest versions that pyproject.toml allows, in a venv of its own
	$(call install,$(VENV)-min,min)
	$(VENV)-min/bin/python -m pytest $(PYTEST)

test-latest:  ## the suite with the newest of everything but torch, transformers' pre-releases too
	rm -rf $(VENV)-latest
	$(PYTHON) -m venv $(VENV)-latest
	$(VENV)-latest/bin/pip install -q --upgrade pip
	$(VENV)-latest/bin/pip install -q torch==$(TORCH)
	$(VENV)-latest/bin/pip install -q -e '.[test]'
	$(VENV)-latest/bin/pip install -q --upgrade --pre transformers  # past pyproject.toml's bound
	$(VENV)-latest/bin/python -m pytest $(PYTEST)

LOCK := $(VENV)-lock/bin/uv pip compile pyproject.toml -q --upgrade --no-header -P torch==$(TORCH)
FULL := --universal --generate-hashes --no-emit-package torch
lock:  ## every version anew: locks/*.txt, and tested.txt, with which `gazeguard doctor` compares
	test -x $(VENV)-lock/bin/uv || ($(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip install -q uv)
	$(LOCK) $(FULL) -o locks/base.txt
	$(LOCK) $(FULL) --extra dev -c locks/base.txt -o locks/dev.txt
	$(LOCK) $(FULL) --extra test --resolution lowest-direct -o locks/min.txt
	$(LOCK) --no-annotate --no-deps --extra bench --extra heic --extra lab --extra ray --extra server \
		-c locks/dev.txt -o src/gazeguard/tested.txt

check: $(VENV)/.dev  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

smoke: $(VENV)/.dev  ## every level of the benchmark once, in minutes
	$(BIN)/gazeguard bench run smoke --out out/smoke

bench: $(VENV)/.dev  ## measures every figure in docs/benchmark.md; hours, resumable
	$(BIN)/pip install -q -c src/gazeguard/tested.txt -e '.[bench,lab]'
	$(BIN)/python -m gazeguard.bench.bye
	$(BIN)/python -m gazeguard.bench.guard --adapters runs/bye
	for suite in $(SUITES); do \
		$(BIN)/gazeguard bench run $$suite --out bench/results/suites/$$suite --work runs || exit 1; done
	$(BIN)/python -m gazeguard.bench.guard_cost --out bench/results/guard_cost.json
	$(BIN)/python -m gazeguard.bench.guard_cost.start --out bench/results/guard_start.json
	$(BIN)/python -m gazeguard.bench.serve --out bench/results/serve.json
	$(BIN)/gazeguard lab zoo --spec src/gazeguard/bench/zoos/lvlm.toml --out runs/zoo/llava
	$(BIN)/gazeguard lab zoo --spec src/gazeguard/bench/zoos/lvlm.toml --base $(INTERNVL) --out runs/zoo/internvl
	$(BIN)/python -m gazeguard.bench.entropyscan runs/zoo/llava
	$(BIN)/python -m gazeguard.bench.entropyscan runs/zoo/internvl --base $(INTERNVL)
	$(BIN)/python -m gazeguard.bench.made_references runs/zoo/llava
	$(BIN)/python -m gazeguard.bench.scan_cost --out bench/results/scan_cost.json
	for kind in clip siglip longclip; do \
		test -f runs/encoders/$$kind/lab.json || \
		$(BIN)/gazeguard lab encoder --kind $$kind --out runs/encoders/$$kind || exit 1; done
	for kind in clip siglip longclip; do \
		$(BIN)/gazeguard lab encoder-zoo --spec src/gazeguard/bench/zoos/$$kind.toml \
		--base $$kind=runs/encoders/$$kind --out runs/encoders/zoo-$$kind || exit 1; done
	$(BIN)/python -m gazeguard.bench.amdet runs/encoders/zoo-* $(ENCODERS:%=--anchor %)
	$(BIN)/python -m gazeguard.bench.amdet_speed --out bench/results/amdet_speed.json
	$(BIN)/python -m gazeguard.bench.speed --out bench/results/speed.json
	$(BIN)/python -m gazeguard.bench.tables bench/results docs/benchmark.md
	$(BIN)/python -m gazeguard.bench.report.limits bench/results/suites docs/limits.md

clean:
	rm -rf $(VENV) $(VENV)-* out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
