# Two commands matter: `make demo` and `make test`. Both install what they need into .venv first, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test lint docs test-compat evidence clean

help:
	@echo "make demo         serve a generated FP8 checkpoint with vLLM and compare it with its bf16 twin"
	@echo "make test         lint and the whole test suite; with a Hopper GPU also the tests that need one"
	@echo "make lint         ruff check and format check, mypy"
	@echo "make docs         write docs/settings.md from the settings"
	@echo "make test-compat  load the plugin into every supported vLLM release (downloads them)"
	@echo "make evidence     on a Hopper GPU: correctness and serving results into benchmarks/results/<gpu>"
	@echo "make clean        delete what the commands above wrote, except .venv"

install:
	@$(PYTHON) demo/install.py

demo: install
	@$(BIN)/python -m demo.run

test: install lint
	$(BIN)/python -m pytest

docs: install
	$(BIN)/python -m fp8_backend.settings > docs/settings.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-compat: install
	$(BIN)/python tests/compat_probe.py

evidence: install
	$(BIN)/python -m benchmarks.correctness
	$(BIN)/python -m benchmarks.serve

clean:
	rm -rf .demo .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
