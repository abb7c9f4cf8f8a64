# Two commands on a fresh machine: `make demo` and `make test`. They need python3 (3.11+), its venv, and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Dependency groups need pip 25.1; the one that comes with python3 -m venv may be older.
PIP_VERSION := pip>=25.1

.PHONY: demo test check coverage docs format lint types imports bench faults fuzz systemd debian-tree debian-boot \
	report-check review-check test-arm64 clean help

help:
	@echo "make demo    install the station (no torch) and count drawn slides with known numbers of cells"
	@echo "make test    install everything and run all tests"
	@echo "make check   format, lint, types, imports, tests, and the floor of the coverage"
	@echo "make docs    make the tables of columns and options, and every output that README and docs/ show"
	@echo "make bench   time the station, yolo predict and the bare networks (BENCH=--quick)"
	@echo "make faults  kill, fill, unmount, damage: nothing lost, doubled or wrong (FAULTS=--short)"
	@echo "make fuzz    changed images and settings: no crash, no hang, nothing damaged counted (FUZZ_SECONDS=600)"
	@echo "make systemd check the unit, the example of the settings and the scripts of deploy/"
	@echo "make debian-tree  install into a fresh Debian and count there (root, debootstrap)"
	@echo "make debian-boot  start that Debian as a virtual machine and cut its power (qemu, half an hour)"
	@echo "make report-check  open the reports in headless Chromium and check them (chromium)"
	@echo "make review-check  correct cells on the review page in headless Chromium (chromium)"
	@echo "make test-arm64   install, test and count as a Raspberry Pi 4 and 5, emulated (root, qemu-user-static)"
	@echo "make format  format the sources and apply the fixes of the linter"
	@echo "make clean   remove what these commands made"

demo: $(VENV)/.station
	$(BIN)/rbc-edge demo --out demo

# The tests are measured as they run: `make test check` in one call runs them once.
test: $(VENV)/.workshop
	$(BIN)/python -m coverage run -m pytest $(TESTS)

check: lint types imports coverage

# The floor stands in pyproject.toml.
coverage: test
	$(BIN)/python -m coverage report

# The tables of columns and options first: docs/make_picture.py draws a picture, and is run by hand.
docs: $(VENV)/.station
	for script in $(filter-out docs/make_picture.py,$(wildcard docs/make_*.py)); do $(BIN)/python $$script || exit 1; done
	$(BIN)/python docs/outputs.py

lint: $(VENV)/.workshop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.workshop
	$(BIN)/mypy

imports: $(VENV)/.workshop
	$(BIN)/lint-imports

# BENCH="--quick", "--images FOLDER", "--json FILE", "--only fields start": see `python -m bench --help`.
bench: $(VENV)/.workshop
	$(BIN)/python -m bench $(BENCH)

# FAULTS="--short", "--only NAME", "--jobs 2": see `python -m tests.faults --help`.
faults: $(VENV)/.workshop
	$(BIN)/python -m tests.faults $(FAULTS)

# FUZZ_SECONDS=60: for how long. The same files again: `python -m tests.fuzz --seed N`.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.workshop
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

systemd: $(VENV)/.workshop
	$(BIN)/python -m pytest tests/deploy -rs

debian-tree: $(VENV)/.station
	$(BIN)/python -m tests.deploy.debian_tree

debian-boot: $(VENV)/.station
	$(BIN)/python -m tests.deploy.debian_tree --boot

# ARM64="--only counts --computer pi4": see `python -m tests.arm64 --help`.
test-arm64: $(VENV)/.station
	$(BIN)/python -m tests.arm64 $(ARM64)

# SHOTS=DIR keeps the screenshots, RESULTS=DIR opens the reports of that output folder.
report-check: $(VENV)/.station
	$(BIN)/python tests/browser/check_pages.py $(RESULTS) $(if $(SHOTS),--shots $(SHOTS))

review-check: $(VENV)/.workshop
	$(BIN)/python tests/browser/check_review.py $(if $(SHOTS),--shots $(SHOTS))

format: $(VENV)/.workshop
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rbc-edge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "$(PIP_VERSION)"

$(VENV)/.station: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

# ultralytics asks for opencv-python, which would overwrite files of the headless one: one cv2 in an environment.
$(VENV)/.workshop: $(VENV)/.station
	$(PIP) install --constraint constraints.txt --editable '.[train,export]' --group dev
	-$(PIP) uninstall --yes opencv-python
	$(PIP) install --constraint constraints.txt --no-deps --force-reinstall opencv-python-headless
	touch $@
