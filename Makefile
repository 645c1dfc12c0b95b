# The two commands of a fresh machine are `make demo` and `make test`; both make their own .venv.
.PHONY: demo test quick lint tiny reliability
SHELL := /bin/bash
PYTHON := python3
FOUND = $(or $(shell $(PYTHON) --version 2>&1),not found)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# A worker a core, at most four. One thread each: for models this small a second only waits. Many processes import our code,
# so what Python compiles is kept.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= python -m pytest -n logical --maxprocesses=4 --dist=loadscope --no-loadscope-reorder

demo: tiny
	deepspeed train_trainer.py --num_train_epochs=1
	python test.py
	python predict.py

tiny: .venv/installed
	cd model_hub && python convert_llama_weights_to_hf.py --input_dir ./ --model_size tiny --output_dir ./tiny-hf
	cd model_hub && python merge_llama_with_chinese_lora.py --base_model "./tiny-hf" --lora_model "./chinese-llama-plus-lora-tiny,./chinese-alpaca-plus-lora-tiny" --output_type "huggingface" --output_dir "./chinese-alpaca-tiny"
	python process.py

test: .venv/tools
	$(PYTEST)

# Every room, and more than half of the tests: 56 s on 2 cores (1,320 tests, 2026-11-28).
quick: .venv/tools
	FUZZ=100 $(PYTEST) -m "not slow"

reliability: tiny .venv/tools
	python benchmarks/reliability.py

lint: .venv/tools
	ruff check .
	ruff format --check .

.venv/installed: requirements.txt
	$(if $(filter 3.11.% 3.12.%,$(lastword $(FOUND))),,$(error $(PYTHON): $(FOUND); Python 3.11 or 3.12 is needed, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)))
	$(PYTHON) -m venv .venv
	python -m pip install --upgrade pip
	python -m pip install --no-compile -r requirements.txt
	python -m compileall -qq -j 0 .venv/lib || true  # on every core; pip takes one. Some files are for other Pythons
	touch $@

.venv/tools: .venv/installed requirements-dev.txt
	python -m pip install -r requirements-dev.txt
	touch $@
