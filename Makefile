# Every target sets itself up, from Python >= 3.10, a C compiler and make; a second run starts at once.
#
#   make demo       a small model decodes a few dozen requests out of one arena     ARGS="--requests 40"
#   make replay     traffic of a service through a cache, and what it comes to      ARGS="--workload code"
#   make test       the tests, against the installed package                        TESTS=tests/test_spec.py ARGS="-k itemsize"
#   make fuzz       damaged files for the reader of cache files, for a minute               ARGS="10 SEED"
#   make bench      the benchmarks, compared with the committed baseline
#   make docs       the manual, warnings are errors: docs/_build/html
#   make soak       two minutes of a storm over the admission queue                 ARGS="--seed 2"
#   make lint       ruff, cython-lint, Cython's performance hints, stubs
#   make coverage   the tests on a build with line tracing; less than 95 % fails
#   make sanitize   the tests on a build with AddressSanitizer and UBSan
#   make dist       sdist, and the wheel made from it: dist/
#   make dist-check the tests of the unpacked sdist, on sdist and wheel, each in an empty environment
#   make inplace    native modules beside their sources, for work on the package

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TESTS ?= tests

# a wheel is for one Python: another VENV has its own
DIST := $(if $(filter .venv,$(VENV)),dist,$(VENV)/dist)
ROOT := $(CURDIR)
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py MANIFEST.in LICENSE \
	$(wildcard kvcache/*.py kvcache/*.pyx kvcache/*.pxd kvcache/*.pyi kvcache/*.h kvcache/py.typed)
# The tests see the installed package only: nothing beside them is called kvcache.
PYTEST = cd $(VENV) && $(BIN)/pytest -c $(ROOT)/pyproject.toml --rootdir $(ROOT)

.PHONY: demo replay test fuzz soak bench docs lint coverage sanitize dist dist-check inplace clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/kvcache demo $(ARGS)

replay: $(VENV)/.replay
	$(BIN)/kvcache replay $(ARGS)

test: $(VENV)/.test
	$(PYTEST) $(addprefix $(ROOT)/,$(TESTS)) $(ARGS)

fuzz: $(VENV)/.test
	cd $(VENV) && bin/python $(ROOT)/tests/fuzz_cache_file.py $(or $(ARGS),60)

soak: $(VENV)/.test
	cd $(VENV) && $(BIN)/python -X dev -X faulthandler -W error $(ROOT)/tests/soak.py --seconds 120 $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python bench/run.py $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -n -W --keep-going -q docs docs/_build/html $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(BIN):$$PATH" $(BIN)/cython-lint kvcache tests bench
	$(BIN)/python .ci/hints.py
	cd $(VENV) && bin/python $(ROOT)/.ci/stubs.py

dist: $(DIST)/.made

# ---- environments: one, with what each target needs added when it first runs

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip build
	touch $@

$(DIST)/.made: $(SOURCES) | $(VENV)/.python
	rm -rf $(DIST) && mkdir $(DIST)
	$(BIN)/python -m build --outdir $(DIST) . >$(DIST)/build.log 2>&1 || { cat $(DIST)/build.log; exit 1; }
	touch $@

$(VENV)/.package: $(DIST)/.made
	$(PIP) install --force-reinstall --no-deps $(DIST)/*.whl
	touch $@

$(VENV)/.demo $(VENV)/.replay $(VENV)/.test $(VENV)/.bench $(VENV)/.docs $(VENV)/.lint: $(VENV)/.%: $(VENV)/.package
	$(PIP) install "$$(echo $(DIST)/*.whl)[$*]"
	touch $@

# ---- builds of their own, away from the sources

# $(call unpacked,FOLDER) gives the sources anew, nothing built
unpacked = rm -rf $(1) && mkdir -p $(1) && tar xzf $(DIST)/*.tar.gz -C $(1) --strip-components=1

coverage: $(VENV)/.test
	$(call unpacked,build/coverage)
	cd build/coverage && KVCACHE_TRACE=1 $(BIN)/python setup.py -q build_ext --inplace
	cd build/coverage && KVCACHE_TRACE=1 $(BIN)/python -m pytest --cov --cov-report=term --cov-report=html:html $(TESTS) $(ARGS)

sanitize: $(VENV)/.test
	$(call unpacked,build/sanitize)
	cd build/sanitize && KVCACHE_SANITIZE=1 $(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest $(TESTS) $(ARGS)

dist-check: $(DIST)/.made
	PYTHON=$(PYTHON) .ci/dist-check $(DIST) $(ARGS)

inplace: $(VENV)/.lint
	$(BIN)/python setup.py -q build_ext --inplace

clean:
	rm -rf build dist docs/_build *.egg-info kvcache/*.c kvcache/*.so
