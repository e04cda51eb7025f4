# `make figures` and `make test` each work on a fresh clone with only python3 (3.11 or later) and make.
PYTHON ?= python3
PROFILE ?= cpu
PY := .venv/bin/python
STAMP := .venv/.ready
LAB := $(PY) -m hire.lab
export TOKENIZERS_PARALLELISM := false

.PHONY: help env figures test demo verify pages checks lint format lock budgets clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-zA-Z%-]+:.*?## ' $(MAKEFILE_LIST) | sed -E 's/^([a-zA-Z%-]+):.*## /\1\t/' | expand -t 16

env: $(STAMP)  ## the environment (.venv) and Gemma's weights, about 3 minutes once

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"error: python {sys.version.split()[0]}: expected 3.11 or later; make PYTHON=python3.12 chooses another")'
	@date +%s > .setup-began
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[all]'
	$(LAB) weights
	@echo $$(($$(date +%s) - $$(cat .setup-began))) > $@ && rm .setup-began

figures: $(STAMP)  ## every notebook at PROFILE=cpu (or smoke, tpu) -> figures/; goes on where it was, FRESH=1 starts anew
	$(LAB) figures --profile $(PROFILE) $(if $(FRESH),--fresh)

figure-%: $(STAMP)  ## one figure, such as figure-02
	$(LAB) figures --profile $(PROFILE) --only $* $(if $(FRESH),--fresh)

WORKERS := -n 2 --dist loadfile
test: $(STAMP)  ## the notebooks' check cells, then the unit tests, on two cores
	$(PY) -m pytest -p nbval --nbval-lax --nbval-cell-timeout=300 notebooks/*.ipynb -W default $(WORKERS)
	$(PY) -m pytest $(WORKERS)

demo: $(STAMP)  ## the first minute: one table, dense against HiRE on a real softmax
	@$(LAB) demo

verify: $(STAMP)  ## every target of the work: obtained, threshold, met or not
	@$(LAB) verify

pages: $(STAMP)  ## the generated parts of README, gallery and notebooks
	@$(LAB) pages

checks: $(STAMP)  ## run the notebooks at smoke and keep what their check cells print
	$(LAB) figures --profile smoke
	$(LAB) checks

lint: $(STAMP)  ## style, types, lines of code against their budget
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	@$(LAB) size

format: $(STAMP)  ## put the code into its one form
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: $(STAMP)  ## constraints.txt from what is installed now
	.venv/bin/pip freeze --exclude-editable > constraints.txt

budgets: $(STAMP)  ## time the targets that have a budget, as records
	$(LAB) budget env
	$(LAB) budget demo
	$(LAB) budget figures PROFILE=smoke FRESH=1
	$(LAB) budget test
	$(LAB) budget figures FRESH=1
	@$(LAB) pages

clean:  ## remove what runs leave behind, the environment included
	rm -rf .venv out build *.egg-info
