# make demo    a NeRF from three images of a made room, with and without the prior: a table and a picture sheet
# make test    lint and tests; make test-all adds those that take minutes each
#
# make demo DATA=my/photos STEPS=3000 NUM_VIEWS=3 uses a capture of yours, or photographs alone;
# DOWNSCALE=8 reduces its images, METHOD=diffusionerf is the full preset, for a GPU.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
DATA ?=
STEPS ?=
NUM_VIEWS ?= 3
DOWNSCALE ?=
METHOD ?= diffusionerf-tiny
OUTPUT ?= demo
# Gigabytes of disk that the environment takes while it is made.
ROOM := 10
# Test processes. One thread each: more would wait on each other.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m diffusionerf_ns.demo --output "$(OUTPUT)" --method $(METHOD) --num-views $(NUM_VIEWS) \
		$(if $(DATA),--data "$(DATA)") $(if $(STEPS),--steps $(STEPS)) \
		$(if $(DOWNSCALE),--downscale-factor $(DOWNSCALE))

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not heavy"

test-all: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

$(BIN)/python:
	@free=$$(df -Pk $(dir $(abspath $(VENV))) | awk 'NR == 2 { print int($$4 * 1024 / 1e9) }'); \
		[ "$${free:-$(ROOM)}" -ge $(ROOM) ] || \
		echo "only $$free GB are free here; the environment (torch with CUDA) takes $(ROOM) GB while it is made." >&2
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf demo build dist *.egg-info
