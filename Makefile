# make demo   install what is needed and train on generated rooms, with steering and without: a table of both, and a report
# make demo-language   next-token prediction with designed targets beside its controls, on generated arithmetic
# make toy    a whole comparison, with reports, on a toy whose answer is known
# make install   the environment alone, in .venv
# make test   install what is needed and run the tests
# make check  lint, types and the order of imports
# make peers  the libraries to compare with: Betty, learn2learn; needs a C compiler
# make docs   build the documentation into build/site, strictly and without network
# make notebooks   the gallery and the tutorial as .ipynb files in build/notebooks
# make coverage   the tests, with lines and branches of metavpt/ that they reach
# make mutants    do the tests notice when the code of hypergradients is changed? long
# make bench  what steering costs: a designer update beside its peers and by size, whole training beside its lower bound, reading; wants a quiet machine
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGE := $(VENV)/.package
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
LANGUAGE := $(VENV)/.language
# Two torch processes that share two cores with two threads each run many times slower than with one each.
TEST_WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo demo-language toy test check docs notebooks coverage mutants peers bench clean

install: $(PACKAGE)

demo: $(PACKAGE)
	$(BIN)/python -m metavpt.compare problem=data2vec_nyuv2 experiment=rooms "strategies=[functional]" "controls=[fixed]" "seeds=[0,1,2]" threads=1 jobs=2

demo-language: $(LANGUAGE)
	$(BIN)/python -m metavpt.compare problem=lm_gsm8k "seeds=[0]" warm_start=400 budget.steps=500 strategy.optimizer.lr=3e-3 strategy.gate=0.1 jobs=2

toy: $(PACKAGE)
	$(BIN)/python -m metavpt.compare problem=toy_sources "strategies=[one_step,unrolled,implicit]" "seeds=[0,1,2,3,4]" \
		strategy.optimizer.lr=0.1 strategy.burn_in=0 jobs=2

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(DOCS)
	mkdir -p build/notebooks
	for page in docs/tutorial.md $$(ls docs/notebooks/*.md | grep -v index); do \
		$(BIN)/python -m jupytext --quiet --to ipynb --output build/notebooks/$$(basename $$page .md).ipynb $$page; done

coverage: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --cov --cov-report=term-missing:skip-covered

mutants: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run

# betty-ml's metadata refuses Python 3.11, on which its code runs. learn2learn's sdist carries generated C that no longer compiles: with
# build_ext among its arguments its setup.py runs Cython afresh. Neither may change what the tests ran on, hence --no-deps.
peers: $(DEV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'cython>=3' gym requests
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python betty-ml==0.2.1
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --use-pep517 --config-settings=--global-option=build_ext learn2learn==0.2.0

bench: peers
	$(BIN)/python benchmarks/designer_update.py --threads 2
	$(BIN)/python benchmarks/language.py --threads 2
	$(BIN)/python benchmarks/steady.py --threads 2
	$(BIN)/python benchmarks/scaling.py --threads 2
	$(BIN)/python benchmarks/decode.py --threads 2

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(PACKAGE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("metavpt needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[focus]'
	touch $@

$(LANGUAGE): $(PACKAGE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[language]'
	touch $@

$(DOCS): $(PACKAGE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(DEV): $(PACKAGE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
