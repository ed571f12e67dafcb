# make demo: install and run the main job on synthetic radiographs.  make test: install and run every notebook and test.
SHELL := /bin/bash
PYTHON ?= python3
VENV   ?= $(or $(PTX_VENV),.venv)
TOOLS  ?= $(or $(PTX_TOOLS),.venv-tools)
BIN    := $(VENV)/bin
# an environment is as old as what it was made from
KEY    := $(shell grep -E '^(.*requirements|min_python) *=|ptx_' settings.ini | cat - constraints.txt setup.py pyproject.toml | sha256sum | cut -c1-16)
READY  := $(VENV)/.ready-$(KEY)
TREADY := $(TOOLS)/.ready-2
# tests of a file stay in one process, with what they share; the order of files is that of conftest.py
PYTEST := -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# the run that `make kaggle` takes along; the demo's is made if it is not there
RUN    ?= out/demo/run

.PHONY: help demo test test-all test-newest dist docs kaggle export readme style clean distclean hooks env
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): | settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info<(3,10) and "Python 3.10 or newer is needed, $(PYTHON) is "+sys.version.split()[0]+"; set PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,codecs,weights,masks,smp,tensorboard,distributed,app]'
	rm -f $(VENV)/.ready-*; touch $@

env: $(READY) ## make or update the environment

demo: $(READY) ## train, predict and score on synthetic radiographs (out/demo)
	$(BIN)/ptx_demo --out out/demo

test: $(READY) ## every notebook and every test, except the long ones
	$(BIN)/python $(PYTEST) -m 'not slow'

test-all: $(READY) ## the long ones too; those in a browser want Debian's chromium
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[browser,docs]'
	$(BIN)/python $(PYTEST)

test-newest: $(READY) ## the tests of `make test` with the newest fastai, fastcore and nbdev, from an installed wheel
	$(BIN)/python tests/environments.py newest $(VENV)-newest
	JUPYTER_PATH=$(abspath $(VENV))/share/jupyter PYTHONSAFEPATH=1 PTX_INSTALLED=1 $(VENV)-newest/bin/python $(PYTEST) -m 'not slow and not kernel'

dist: $(READY) ## wheel and sdist (dist)
	rm -rf dist build
	$(BIN)/python -m build -q --no-isolation

bench: $(READY) ## the speed suite: every race with its named alternative, into tests/results/speed.csv (a quarter of an hour on a quiet machine)
	$(BIN)/python tests/bench.py

docs: $(READY) ## the site: notebooks, API, commands, changelog, search (_docs/site), which needs no network
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	rm -rf _docs
	$(BIN)/python -W ignore docs/pages.py _docs/pages
	PYTHONWARNINGS=ignore $(BIN)/python -m sphinx -q -W --keep-going -j auto -c docs -d _docs/trees _docs/pages _docs/site
	$(BIN)/python docs/links.py _docs/site

kaggle: $(READY) ## a folder to attach to a Kaggle kernel (out/kaggle), with the weights of RUN=…
	test '$(RUN)' != out/demo/run || test -e $(RUN)/run.json || $(BIN)/ptx_demo --out out/demo
	rm -rf out/kaggle
	$(BIN)/ptx_bundle $(RUN) --out out/kaggle

export: $(READY) ## notebooks → package, and clean the notebooks
	PATH="$(abspath $(BIN)):$$PATH" nbdev_export
	PATH="$(abspath $(BIN)):$$PATH" nbdev_clean

readme: $(READY) ## index.ipynb → README.md
	$(BIN)/python tests/readme.py

$(TREADY):
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q fastaistyle ruff
	touch $@

style: $(TREADY) ## chkstyle and ruff, from an environment of their own
	$(TOOLS)/bin/chkstyle nbs index.ipynb
	$(TOOLS)/bin/ruff check tests docs setup.py

hooks: $(READY) ## nbdev's git hooks: clean notebooks, readable merges
	PATH="$(abspath $(BIN)):$$PATH" nbdev_install_hooks

clean: ## remove what was built, keep the environments
	rm -rf build dist out *.egg-info _docs _proc .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	rm -rf .venv .venv-tools .venv-newest
