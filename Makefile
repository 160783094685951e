# make study   install what is missing, run the study, write its report
# make test    install what is missing, then lint, types and tests
# make rehearse  runs on an accelerator in plain Python, and what the host waits for on it; in make test
# make test-gpu  the same matters on a real accelerator, with a table; by hand, where there is one
# make matrix  every layout x optimizer x precision, every engine x world x accumulation, and every way to
#              resume, against one process, with the figures
# make docs    the site: these pages and the reference of the public names, in build/docs
# make pictures  every picture of README and docs again, from the tables in docs/studies
#
# make compat TORCH=2.10.0   an environment with another torch, and all tests in it
#
# PYTHON=…       the Python that a new environment is made from (3.11 or later)
# VENV=…         where the environment is, or is made
# TORCH_INDEX=…  package index that torch comes from, where none is installed yet
# STUDY=…        bytes (default) or digits; ARGS=… further overrides of the study

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
STUDY ?= bytes
ARGS ?=

comma := ,
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: study test tests compat rehearse test-gpu matrix docs pictures lint types clean

study: $(VENV)/.train
	$(BIN)/largebatch sweep study=$(STUDY) $(ARGS)

# Types beside the tests: they take a minute of one core.
test: lint
	@$(MAKE) --no-print-directory -j 2 types tests

# Files side by side, twice as many as two cores, as many tests wait; a thread a process. Commands under
# test find the bytecode of those before them.
tests: $(VENV)/.dev
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder

compat:
	$(MAKE) test VENV=.venv-torch-$(TORCH) TORCH=torch==$(TORCH)

rehearse: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/rehearsal

test-gpu: $(VENV)/.dev
	PYTHONPATH=src:tests/shared $(BIN)/python tests/rehearsal/real_device.py

WHOLE := tests/optim/test_parity.py tests/optim/test_reshard.py tests/train/test_engines.py \
	tests/train/test_resume_engines.py

matrix: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m '' --timeout 1800 $(WHOLE)
	$(BIN)/python -m pytest -q -m matrix --timeout 1800 $(addprefix --ignore=,$(WHOLE))

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

pictures: $(VENV)/.dev
	$(BIN)/python docs/site/pictures.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# An environment sees what PYTHON has (a site's XPU or CUDA build of torch), also where PYTHON is a
# virtual environment itself, which --system-site-packages alone would pass by; only where that has
# no torch is the tested build installed.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("largebatch needs Python 3.11 or later, got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV) && \
		$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
			> "$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/site.pth"; \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi

# held.txt: what no resolver may move. A site's own environment keeps its torch and, where it has one,
# its numpy; one made here takes the tested versions of everything. By the distributions' own names:
# torch.__version__ may have a suffix (+cu128) that the package index does not know.
INSTALLED := from importlib.metadata import distributions; \
	[print(d.name + "==" + d.version) for n in ("torch", "numpy") for d in [*distributions(name=n)][:1]]

$(VENV)/held.txt: $(BIN)/python constraints.txt
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
		$(BIN)/python -c '$(INSTALLED)' > $@.new; \
	else \
		$(INSTALL) --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) && \
		$(BIN)/python -c '$(INSTALLED)' > $@.new && \
		cat constraints.txt >> $@.new; \
	fi
	@mv $@.new $@

install = $(INSTALL) --constraint $(VENV)/held.txt --editable '.[$(1)]'

EXTRAS := train,dev,docs,examples,hf,parsl,studies,trackers$(if $(filter Linux,$(shell uname -s)),$(comma)mpi$(comma)deepspeed)

$(VENV)/.train: $(VENV)/held.txt pyproject.toml
	$(call install,train)
	@touch $@

# Without bytecode, which takes longer to make of all modules than what is imported takes in the tests.
$(VENV)/.dev: $(VENV)/held.txt pyproject.toml
	$(call install,$(EXTRAS)) --no-compile
	@touch $@

clean:
	rm -rf $(VENV)
