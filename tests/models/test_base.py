"""A base that is not whole, or not of its tokenizer, is refused by whoever loads it.     python -m pytest tests/models/test_base.py"""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from harness import run_script, write_jsonl


def lack_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantize(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"bits": 4, "group_size": 128, "quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    "spoil, said",
    [(lack_a_tensor, "1 tensors are missing, model.layers.1.mlp.up_proj.weight among them"), (quantize, "quantized")],
)
def test_a_base_that_is_not_whole(spoil, said, base_dir, instruct_data, tmp_path):
    """transformers would draw what is missing at random, and answer."""
    shutil.copytree(base_dir, tmp_path / "base")
    spoil(tmp_path / "base")
    asked = ["--base_model=base", "--lora_model=none", "--text=王明。", "--max_new_tokens=2", "--precision=fp32"]
    data = [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    trained = ["--model_dir=base", *data, "--save_dir=run", "--max_steps=1", "--precision=fp32"]
    for script, options in (("predict.py", asked), ("train_deepspeed.py", trained)):
        result = run_script(script, *options, cwd=tmp_path, check=False)
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2 and said in error and "base" in error, result.stderr
    assert not (tmp_path / "run" / "adapter_model").exists()


def test_a_tokenizer_of_another_vocabulary(base_dir, tokenizer_models, tmp_path):
    """LLaMA's own tokenizer on Chinese-Alpaca: it has fewer pieces than the model has embeddings."""
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    shutil.copytree(base_dir, tmp_path / "base")
    shutil.copy(tokenizer_models / "base.model", tmp_path / "base" / "tokenizer.model")
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}), encoding="utf-8")
    train = write_jsonl(tmp_path / "data.txt", [{"instruct": "a", "query": "b", "answer": "c"}])
    asked = ["--base_model=base", "--lora_model=none", "--text=王明。"]
    trained = ["--model_dir=base", f"--train_path={train}", f"--dev_path={train}", "--save_dir=run"]
    for script, options in (("predict.py", asked), ("train_trainer.py", trained)):
        result = run_script(script, *options, cwd=tmp_path, check=False)
        assert result.returncode == 2 and "pieces, base 1000 embeddings; use the tokenizer.model" in result.stderr
