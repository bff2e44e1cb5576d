# Everything from nothing: `make demo` shows the main job (`make demo SCAN=PATH` on your own scan), `make test` proves it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test soak bench bench-gpu clean

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v else f"samlora needs Python 3.11 or newer, found {v[0]}.{v[1]}; run: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(READY)

setup: $(READY)

demo: $(READY)
	$(BIN)/samlora demo $(if $(SCAN),--scan '$(SCAN)')

# Two processes of one thread each: most tests wait for Python, not for the matrix product.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

soak: $(READY)
	$(BIN)/python -m pytest -m soak

bench: $(READY)
	for name in encoder step memory attention loading metrics volume embeddings clicks lite_medsam peers report; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# One GPU, at most eight minutes.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv build *.egg-info
