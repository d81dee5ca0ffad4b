# `make demo` and `make test` work on a fresh clone, each alone: both use .venv, and neither installs twice.
# PYTHON=/path/to/python3.x picks the interpreter; ARGS="..." is handed to the demo, or to pytest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test clean-venv

# Bytecode is written when a module is first imported, not for 6 GB at installation: nothing may switch that off here.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --no-compile --disable-pip-version-check --constraint constraints.txt

help:
	@echo "make demo   install what the demo needs, then pre-train, tune, evaluate and report on embedded data"
	@echo "make test   install what the tests need, then run them all"

demo: $(VENV)/.installed-eval
	$(VENV)/bin/aimv2-vlm demo $(ARGS)

test: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadgroup $(ARGS)

clean-venv:
	rm -rf $(VENV)

# A stamp is written only after success, so an installation that was cut short is simply repeated.
$(VENV)/.created:
	@for candidate in $(or $(PYTHON),python3.11 python3 python); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "error: no Python 3.11 or newer found ($(or $(PYTHON),python3.11, python3)); install one or say make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	echo "$$found -m venv $(VENV)"; \
	if ! "$$found" -m venv --clear $(VENV); then \
	    echo "error: $$found cannot make virtual environments; on Debian and Ubuntu install its package python3-venv" >&2; \
	    exit 1; \
	fi
	@touch $@

$(VENV)/.installed-eval: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[eval]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[test]'
	@touch $(VENV)/.installed-eval $@
