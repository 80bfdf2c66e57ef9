# One command from nothing to done. Needs Python 3.11 or newer with venv, make and a network for the installation.
#
#   make PYTHON=python3.12 test     another interpreter
#   make VENV=/somewhere/env test   another place for the environment
#   make TORCH='torch torchvision --index-url ADDRESS' test
#                                   other PyTorch builds (CPU only, another CUDA): the address from pytorch.org

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
# Both in one go: torch and torchvision must be built alike. On a machine without a GPU the ordinary builds work too.
TORCH ?= torch torchvision
PYTEST_ARGS ?=
CELLS ?=
# A process for every core, four at most; a file of tests stays in one, which makes what its tests share once.
# One thread each: a process for every core, and two threads in each of them, would share the cores out twice.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

SHELL = /bin/sh
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
PACKAGING = pyproject.toml $(wildcard adv_nnunet/advmed_nnunet*)

# Two cores are the smallest machine that is meant. Left alone, torch, BLAS and nnU-Net's worker processes would each
# take every core for themselves. A value from outside wins.
export OMP_NUM_THREADS ?= 2
export MKL_NUM_THREADS ?= 2
export OPENBLAS_NUM_THREADS ?= 2
export nnUNet_def_n_proc ?= 2
export nnUNet_n_proc_DA ?= 1
# Threads that wait must sleep, not spin: nnUNetv2_train takes all cores on the CPU whatever the lines above say, and
# beside its own data workers two spinning threads were measured to be 15 times slower than one.
export OMP_WAIT_POLICY ?= PASSIVE
export MPLBACKEND ?= Agg

.DEFAULT_GOAL := help
.PHONY: help demo demo-yolo demo-classify demo-landmark zoo env test test-fast test-matrix lint format docs clean

help:
	@echo 'make demo    environment, installation, then train STD, SAT and AMAT on real MRI, attack them, write a report'
	@echo 'make demo-yolo  the same with YOLO on real images of blood cells'
	@echo 'make demo-classify  STD, SAT and DPAAT on real chest X-rays'
	@echo 'make demo-landmark  STD, SAT and AMAT on real MRI slices with landmarks'
	@echo 'make zoo     attack the trained networks of zoo/, without training any'
	@echo 'make env     environment and installation of everything, for work on Advmed itself'
	@echo 'make test    environments, installation, lint, then the whole test suite'
	@echo 'make test-fast  the tests that take seconds, for daily work'
	@echo 'make test-matrix  the fast suite on Python 3.11 to 3.13 and on the lowest versions; CELLS=... for some of them'
	@echo 'make lint    formatting, style, and types of all packages'
	@echo 'make format  let ruff rewrite formatting and what it can mend by itself'
	@echo 'make docs    build the documentation into build/site'
	@echo 'make clean   remove everything that was built, and the environments $(VENV) and $(DOCS_VENV)'
	@echo
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" PYTEST_ARGS="$(PYTEST_ARGS)"'

demo: $(VENV)/.installed
	@$(PY) examples/demo_nnunet.py

demo-yolo: $(VENV)/.installed-yolo
	@$(PY) examples/demo_yolo.py

demo-classify: $(VENV)/.installed-classify
	@$(PY) examples/demo_classify.py

demo-landmark: $(VENV)/.installed-landmark
	@$(PY) examples/demo_landmark.py

zoo: $(VENV)/.installed $(VENV)/.installed-yolo $(VENV)/.installed-classify
	@$(PY) examples/attack_zoo.py

test: $(VENV)/.installed-dev $(DOCS_VENV)/.installed
	@$(MAKE) --no-print-directory lint
	@$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev
	@$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-matrix:
	@$(PYTHON) tools/matrix.py $(CELLS)

lint: $(VENV)/.installed-dev
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: $(VENV)/.installed-dev
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

docs: $(DOCS_VENV)/.installed
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet
	@echo 'The pages are in build/site/index.html'

env: $(VENV)/.installed-dev

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	@for v in '$(VENV)' '$(DOCS_VENV)'; do \
	  if [ -f "$$v/.advmed" ]; then echo "rm -rf $$v"; rm -rf "$$v"; fi; done

# A stamp is written only after its step has succeeded, so that an interrupted or failed installation is done again.
# .advmed marks an environment that this file made; `make clean` removes no other.
define make-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed. Name one with: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'Making the environment $(1)'
	@if [ ! -e '$(1)' ]; then mkdir -p '$(1)' && touch '$(1)/.advmed'; fi
	@$(PYTHON) -m venv '$(1)' || \
	  { echo 'Could not make the environment. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@'$(1)/bin/python' -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
endef

$(VENV)/.made:
	$(call make-venv,$(VENV))
	@touch $@

$(VENV)/.torch: | $(VENV)/.made
	@echo 'Installing PyTorch (the first time a download of several GB)'
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed: $(PACKAGING) $(VENV)/.torch
	@echo 'Installing advmed with nnU-Net'
	@$(PIP) -e '.[nnunet]'
	@touch $@

$(VENV)/.installed-yolo: $(PACKAGING) $(VENV)/.torch
	@echo 'Installing advmed with Ultralytics'
	@$(PIP) -e '.[yolo]'
	@touch $@

$(VENV)/.installed-classify: $(PACKAGING) $(VENV)/.torch
	@echo 'Installing advmed with Lightning and timm'
	@$(PIP) -e '.[classify]'
	@touch $@

$(VENV)/.installed-landmark: $(PACKAGING) $(VENV)/.torch
	@echo 'Installing advmed with Lightning and segmentation_models_pytorch'
	@$(PIP) -e '.[landmark]'
	@touch $@

$(VENV)/.installed-dev: $(PACKAGING) $(VENV)/.torch
	@echo 'Installing advmed with all hosts and what the tests need'
	@$(PIP) -e '.[nnunet,yolo,classify,landmark,eval,search,dev]'
	@touch $(VENV)/.installed $(VENV)/.installed-yolo $(VENV)/.installed-classify \
	  $(VENV)/.installed-landmark $@

$(DOCS_VENV)/.made:
	$(call make-venv,$(DOCS_VENV))
	@touch $@

$(DOCS_VENV)/.installed: pyproject.toml $(DOCS_VENV)/.made
	@echo 'Installing what builds the documentation'
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --group docs
	@touch $@
