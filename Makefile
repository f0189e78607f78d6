# make demo | make test | make test-core | make real DATA=folder | make docs | make clean
#
# Each makes its environment first (`.venv`; minutes, and about 20 more on two cores where mmcv has to be compiled) and
# takes seconds when that stands. Settings, on the command line or in the environment:
#   PYTHON           the Python to build on, 3.11                    TORCH   another torch than the reference one; from 2.3 on with numpy 2
#   STACK            openmmlab (OpenMMLab's own packages) if not set, or onedl: the maintained forks with the same import names
#                    (onedl-mmcv and so on), on torch 2.13.0 unless TORCH names another. Every TORCH and STACK has a `.venv-...` of its own
#   ARGS             more arguments for pytest or the demo           MAX_JOBS  compilers at a time while mmcv is built
#   MMCV_FIND_LINKS  folder or address with prebuilt mmcv wheels: OpenMMLab publishes an index for every torch and CUDA
#                    version (see the installation page of MMCV); PIP_FIND_LINKS is read too
#   WORKERS          processes that share the tests, 2 if not set
#   PSAQ_MM_WHEELS   where a wheel compiled here is kept, ~/.cache/psaq_mm/wheels if not set
#   PSAQ_MM_DATA     folder of real weights and images for the tests that measure on them; they are skipped without
# Packages come from where pip is told to look: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf.

REFERENCE_TORCH := 2.1.2
NEW_TORCH := 2.13.0

PYTHON ?= python3.11
STACK  ?= openmmlab
TORCH  ?= $(if $(filter onedl,$(STACK)),$(NEW_TORCH),$(REFERENCE_TORCH))
# Another torch or other packages get a folder of their own: the reference environment is dear.
OTHER     := $(if $(filter-out openmmlab,$(STACK)),-$(STACK))$(if $(filter-out $(REFERENCE_TORCH),$(TORCH)),-torch$(TORCH))
VENV      ?= .venv$(OTHER)
VENV_CORE ?= .venv-core-torch$(TORCH)
VENV_DOCS ?= .venv-docs
ARGS   ?=
WORKERS ?= 2
DATA   ?=

# Two threads: the models are small, and more of them only wait for each other. Tests: a process a core beats threads, with one each.
THREADS_GIVEN := $(OMP_NUM_THREADS)
OMP_NUM_THREADS ?= 2
# Not PSAQ_MM_DATA, which is passed on where it is given: exported, it would be there and empty, which is no folder.
export OMP_NUM_THREADS MMCV_FIND_LINKS PSAQ_MM_WHEELS

SET_UP = $(PYTHON) .dev/setup_env.py --torch "$(TORCH)"
CORE_TESTS = $(wildcard tests/quantization tests/pictures tests/calibration tests/psaq_vit)

.PHONY: help demo test test-core real venv venv-core docs python clean distclean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# One clear sentence instead of the shell's "not found".
python:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "There is no Python named '$(PYTHON)': install Python 3.11, or name one with make PYTHON=/path/to/python3.11" >&2; exit 1; }

# Not a file target: what decides is the content of the requirements, not the time of a file, and a fresh clone has only new times.
venv: python
	@$(SET_UP) --stack "$(STACK)" --venv "$(VENV)"

venv-core: python
	@$(SET_UP) --stack core --venv "$(VENV_CORE)"

demo: venv
	"$(VENV)/bin/python" demo/run_demo.py $(ARGS)

# A file stays in one process, whose fixtures its tests share. Not the files of most tests first: those of few are the ones that run for
# minutes, and would keep one process busy at the end. A process that dies ends the run, which names its test: pytest-xdist may wait for ever
# after it has put another in its place.
test: export OMP_NUM_THREADS := $(or $(THREADS_GIVEN),1)
test: venv
	"$(VENV)/bin/python" -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

# The floors that need PyTorch alone, where nothing else is installed; TORCH names any version.
test-core: venv-core
	"$(VENV_CORE)/bin/python" -m pytest -q $(CORE_TESTS) $(ARGS)

real: venv
	@test -d "$(DATA)" || { echo "DATA='$(DATA)' is no folder: name the one with the real weights and images, make real DATA=folder" >&2; exit 1; }
	"$(VENV)/bin/python" benchmarks/real.py --data "$(DATA)" $(ARGS)

# The site, docs/_build/html/index.html, in a small environment of its own: it needs neither torch nor OpenMMLab. Warnings are errors.
docs: python
	@test -x "$(VENV_DOCS)/bin/pip" || $(PYTHON) -m venv "$(VENV_DOCS)"
	@"$(VENV_DOCS)/bin/python" -m pip install -q --disable-pip-version-check -r requirements-docs.txt
	"$(VENV_DOCS)/bin/python" -m sphinx -q -W --keep-going -b html docs docs/_build/html $(ARGS)
	@echo "the site is in docs/_build/html/index.html"

# What builds and tests leave behind; the environments stay.
clean:
	rm -rf build dist docs/_build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -path './.venv*' -prune -o -type d -name __pycache__ -print | xargs -r rm -rf

# The environments too; wheels compiled here stay in their folder outside.
distclean: clean
	rm -rf .venv .venv-*
