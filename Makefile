# make demo: sets up, then runs the whole pipeline on the bundled digits.
# make test: sets up, then runs the tests.
# make bench: sets up, then races this code against its rivals (under three minutes).
# make wheels: fetches to wheels/ what bench/gpu.sh needs on a machine without internet (Linux, x86-64, Python 3.12).
# Python of your choice: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SYSTEM := g++ pkg-config libopencv-dev libturbojpeg0-dev
ifeq ($(shell command -v $(PYTHON)),)
SYSTEM += python3 python3-venv python3-dev
else ifneq ($(filter /usr/bin/%,$(shell command -v $(PYTHON))),)
SYSTEM += python3-venv python3-dev
endif

.PHONY: demo test bench lint wheels setup system clean

demo: setup
	$(PY) -m diffult.run --preset digits-lt --run runs/digits-lt

test: setup
	$(PY) -m pytest -n 2

bench: setup
	$(PY) -m bench --quick

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

PLATFORM := $(foreach n,5 12 17 24 27 28,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64
wheels:
	rm -rf wheels
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.12 $(PLATFORM) \
	  -r bench/wheels.txt -d wheels
	@du -sh wheels

setup: $(VENV)/ready

# ffcv is built from source and needs these; nothing is installed where all are there.
system:
	@missing=""; for package in $(SYSTEM); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "error: system packages are missing; run: sudo apt-get install$$missing"; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'

$(VENV)/ready: pyproject.toml constraints.txt | system
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt setuptools wheel
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build wheels
