# The two commands of a fresh machine are `make demo` and `make test`; both make their own .venv.
.PHONY: demo test lint tiny reliability
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)

demo: tiny
	deepspeed train_trainer.py --num_train_epochs=1
	python test.py
	python predict.py

tiny: .venv/installed
	cd model_hub && python convert_llama_weights_to_hf.py --input_dir ./ --model_size tiny --output_dir ./tiny-hf
	cd model_hub && python merge_llama_with_chinese_lora.py --base_model "./tiny-hf" --lora_model "./chinese-llama-plus-lora-tiny,./chinese-alpaca-plus-lora-tiny" --output_type "huggingface" --output_dir "./chinese-alpaca-tiny"
	python process.py

test: .venv/tools
	python -m pytest

reliability: tiny .venv/tools
	python benchmarks/reliability.py

lint: .venv/tools
	ruff check .
	ruff format --check .

.venv/installed: requirements.txt
	python3 -m venv .venv
	python -m pip install --upgrade pip
	python -m pip install -r requirements.txt
	touch $@

.venv/tools: .venv/installed
	python -m pip install pytest==9.2.0 hypothesis==6.170.17 ruff==0.17.6 jieba==0.42.1 seqeval==1.2.2 gradio==6.31.0 playwright==1.65.2 tensorboard==2.21.0
	touch $@
