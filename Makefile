# Two commands do all the set-up: `make quickstart` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEPS := $(VENV)/.deps-$(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
CHECKOUT := $(VENV)/.checkout-$(shell pwd | cksum | cut -d' ' -f1)
DATA := data/emoji-world

.PHONY: env quickstart test lint slow bench clean

env: $(CHECKOUT)

$(DEPS): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tpu]'
	rm -f $(VENV)/.deps-* $(VENV)/.checkout-* && touch $@

# One environment can serve several checkouts, one at a time: only the link to the package changes hands.
$(CHECKOUT): $(DEPS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.checkout-* && touch $@

# Shards, tokenizer, training, report: about 10 minutes on two cores. Threads that sleep while they wait leave the loader
# its share of a core.
quickstart: env
	$(BIN)/siglip2 data emoji-world --out $(DATA) --scenes 12000 --singles 24000 --emoji 104 --unseen 16 --val 1000 --size 64 --overwrite
	$(BIN)/siglip2 tokenizer train $(DATA)/train --caption json.captions --vocab-size 1500 --out $(DATA)/tokenizer.json
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/siglip2 fit --config quickstart

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# What CI runs beyond `make test`: several processes, built wheels, the example package, the quickstart in small.
slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'dist or slow or xla'

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: env
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/crops.py
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/naflex.py
	$(BIN)/python benchmarks/naflex_loader.py
	$(BIN)/python benchmarks/acid_select.py
	$(BIN)/python benchmarks/balance.py
	$(BIN)/python benchmarks/inference.py

clean:
	rm -rf $(VENV) data runs dist
