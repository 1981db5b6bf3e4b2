# The only entry point, for people and for CI. `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MEDIATOR := $(BIN)/mediator
RECIPE := recipes/smollm2/mediator.yaml
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help install demo-experts demo test test-slow test-vllm lint types imports docs docs-check bench bench-runtime quality catalogue moe-quality heterogeneous tradeoffs-adapters tradeoffs bench-library serving check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml scripts/constraints.txt scripts/demo/packages.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r scripts/demo/packages.txt
	@touch $(STAMP)

install: $(STAMP) ## create .venv with everything that demo, tests and docs need

demo-experts: install
	$(BIN)/python -m scripts.demo.experts

demo: demo-experts ## build real experts, measure conflict, merge them, route questions, show what it is worth
	@echo "\n== mediator analyze-conflicts $(RECIPE)"
	$(MEDIATOR) analyze-conflicts $(RECIPE) -o demo/conflicts.json --plot demo/conflicts.png
	@echo "\n== mediator merge $(RECIPE)"
	$(MEDIATOR) merge $(RECIPE) --conflicts demo/conflicts.json --overwrite
	@echo "\n== the best static merge, for comparison"
	$(MEDIATOR) merge recipes/smollm2/static.yaml --overwrite --quiet
	@echo "\n== what the bundle answers"
	$(BIN)/python -m scripts.demo.show
	@echo "\nTry next, after \`source $(VENV)/bin/activate\`:"
	@echo "  mediator chat demo/bundle                    talk with it; every turn is routed anew"
	@echo "  mediator route demo/bundle 'Is this film any good?'"
	@echo "  mediator generate demo/bundle 'What is 3 + 4?' --expert maths"
	@echo "  mediator evaluate demo/base demo/bundle --tasks demo/data/maths.test.jsonl"
	@echo "  mediator inspect demo/bundle                 what the bundle holds"

# One thread in each process: there are as many of those as cores.
test: install ## run the tests, below 5 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-slow: demo-experts ## run the long tests, most of them on the real model and its experts
	$(BIN)/python -m pytest -m slow tests

test-vllm: demo-experts ## do vLLM and llama.cpp answer as transformers does, from Mixtures of Experts and from exported bundles? 3.5 GB, 25 minutes
	$(BIN)/python -m scripts.servers.environment
	$(BIN)/python -m scripts.servers.merged
	test -d demo/bundle || $(MEDIATOR) merge $(RECIPE) --quiet
	$(BIN)/python -m scripts.servers.serving --rows 12

lint: install ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## check types
	$(BIN)/mypy

imports: install ## check which room may import which
	$(BIN)/lint-imports

docs: install ## write the generated parts of the docs anew
	$(BIN)/python scripts/docs.py

docs-check: install ## fail if a generated part of the docs is out of date
	$(BIN)/python scripts/docs.py --check

bench: install ## time, memory and bytes of merging four 0.5B checkpoints; ARGS=--peers for mergekit beside it
	$(BIN)/python scripts/bench_peers.py $(ARGS)

bench-runtime: install ## time and memory of a bundle that answers, against its dense expert
	$(BIN)/python scripts/bench_runtime.py

quality: install ## the proof on real experts: all tables of the README, about an hour after make demo
	$(BIN)/python -m scripts.quality.routers
	$(BIN)/python -m scripts.quality
	$(BIN)/python -m scripts.quality.report

catalogue: install ## every merge method on the demo's experts: accuracy, time, memory; about an hour after make demo
	$(BIN)/python -m scripts.catalogue
	$(BIN)/python -m scripts.catalogue.report

moe-quality: install ## Mixtures of Experts of the demo's experts against merges and bundles; two hours after make demo
	$(BIN)/python -m scripts.moe_quality
	$(BIN)/python -m scripts.moe_quality.report

heterogeneous: install ## two experts of different architectures in one model, against each and a router; 15 minutes after make demo-experts
	$(BIN)/python -m scripts.heterogeneous

tradeoffs-adapters: demo-experts ## twelve LoRA adapters on twelve small tasks, and rows of four held-out tasks; half an hour on one core
	$(BIN)/python -m scripts.tradeoffs.adapters

tradeoffs: tradeoffs-adapters ## every way to answer with the twelve adapters, and with fewer of them; an hour and a half after that
	$(MEDIATOR) compare recipes/smollm2/tradeoffs.yaml --markdown scripts/tradeoffs/results.md --plot demo/tradeoffs/compare.html

bench-library: tradeoffs-adapters ## a library of 64 adapters: merging, opening, decoding
	$(BIN)/python scripts/bench_library.py

serving: demo-experts ## the bundle in its own server and in vLLM against four models: tokens per second, first token, memory; 15 minutes
	test -d demo/bundle || $(MEDIATOR) merge $(RECIPE) --quiet
	$(BIN)/python -m scripts.servers.environment
	$(BIN)/python -m scripts.serving
	$(BIN)/python -m scripts.serving.exports
	$(BIN)/python -m scripts.serving.report

check: lint types imports docs-check test ## all that CI checks but the slow tests

clean: ## remove what can be built again; cached experts stay
	rm -rf $(VENV) .venv-vllm build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
