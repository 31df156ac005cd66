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

.PHONY: demo test test-min check fix smoke bench clean

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -r constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.base  ## clean a poisoned set with the shipped model: prints where the report is
	$(BIN)/gazeguard demo --out $(OUT)

test: $(VENV)/.dev  ## the whole test suite
	$(BIN)/python -m pytest

test-min:  ## the suite with the lowest versions that pyproject.toml allows, in a venv of its own
	test -x $(VENV)-min/bin/python || $(PYTHON) -m venv $(VENV)-min
	$(VENV)-min/bin/pip install -q -r constraints.txt
	$(VENV)-min/bin/pip install -q -c constraints-min.txt -e '.[test]'
	$(VENV)-min/bin/python -m pytest

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
	$(BIN)/pip install -q -c constraints.txt -e '.[bench,lab]'
	$(BIN)/python -m gazeguard.bench.bye
	$(BIN)/python -m gazeguard.bench.guard --adapters runs/bye
	for suite in $(SUITES); do \
		$(BIN)/gazeguard bench run $$suite --out bench/results/suites/$$suite --work runs || exit 1; done
	$(BIN)/python -m gazeguard.bench.guard_cost --out bench/results/guard_cost.json
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
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
