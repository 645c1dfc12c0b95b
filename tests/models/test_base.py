"""A base that is not whole, or not of its tokenizer, is refused by whoever loads it.     python -m pytest tests/models/test_base.py"""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca.common.devices import check_devices
from alpaca.common.errors import UserError
from alpaca.models.base_files import EMBEDDING, HEAD
from alpaca.models.base_weights import load_base
from alpaca.models.layers import tensor_shapes
from alpaca.models.spread import place_of, spread
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


def as_archive(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin")


def as_before_archives(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_safetensors(tensors, folder):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("write", [as_safetensors, as_archive, as_before_archives])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_loaded_is_what_transformers_loads(base_dir, tmp_path, write, tied, dtype):
    """Each kind of file, with one matrix for embeddings and head or with two, as it is or in another precision."""
    tensors = load_file(base_dir / "model.safetensors")
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}), encoding="utf-8")
    if tied:
        del tensors["lm_head.weight"]
    write(tensors, tmp_path)
    ours, theirs = load_base(tmp_path, dtype, "cpu"), LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys() and not ours.training
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor) and ours.state_dict()[name].dtype == dtype, name
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert torch.equal(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_tensor_of_another_size_than_config_json_says(base_dir, tmp_path):
    shutil.copytree(base_dir, tmp_path / "base")
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}), encoding="utf-8")
    with pytest.raises(UserError, match="gate_proj.weight is 88 x 32, by config.json 80 x 32"):
        load_base(tmp_path / "base", torch.float32, "cpu")


@pytest.mark.parametrize("base_weights, kind, share", [("full", "Pss", 1.2), ("nf4", "Pss_File", 0.3)])
def test_loading_holds_the_weights_once(base_dir, tmp_path, base_weights, kind, share):
    """100 MB of float16 as bfloat16: neither the file's pages nor numbers of the other type stay beside the model. Of nf4
    only the file's pages: quantizing needs as much as some of these small matrices."""
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 4}
    config |= {"num_key_value_heads": 16, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = tensor_shapes(config)
    as_safetensors({name: torch.full(shape, 0.5, dtype=torch.float16) for name, shape in shapes.items()}, tmp_path)
    weights, peaks, ended = (tmp_path / "model.safetensors").stat().st_size, [], threading.Event()

    def pss():
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))

    def watch():
        while not ended.is_set():
            peaks.append(pss())

    before, watching = pss(), threading.Thread(target=watch)
    watching.start()
    model = load_base(tmp_path, torch.bfloat16, "cpu", base_weights)
    ended.set()
    watching.join()
    assert weights > 100e6 and model.model.layers[3].mlp.down_proj.weight is not None
    assert max(*peaks, pss()) - before < share * weights


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_is_spread_over_as_few_gpus_as_hold_it(tied):
    """Its layers as wholes, in their order; half a byte a number where they are quantized."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=tied, **sizes))
    size = 4 * sum(weight.numel() for weight in model.parameters())

    def gpus(base_weights, *shares):
        places = spread(model, base_weights, {number: int(share * size) for number, share in enumerate(shares)})
        of = {name: place_of(places, name).index for name in model.state_dict()}
        layers = [{of[name] for name in of if name.startswith(f"model.layers.{i}.")} for i in range(8)]
        assert all(len(found) == 1 for found in layers) and of["model.norm.weight"] == max(layers[-1])
        assert of[EMBEDDING] == 0 and (not tied or of[HEAD] == 0)
        return [found.pop() for found in layers]

    assert gpus("full", 1.2, 1.2) == gpus("nf4", 0.4, 0.4) == [0] * 8
    assert gpus("full", 0.8, 0.8, 0.8) == [0] * 4 + [1] * 4
    few = gpus("full", 0.3, 0.9)  # half of it would not fit into the first
    assert few == sorted(few) and 1 <= few.count(0) <= 2
    with pytest.raises(UserError, match="base takes .* as full, and of 2 GPUs .* --base_weights=nf4, or more GPUs"):
        spread(model, "full", {0: size // 3, 1: size // 3})


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked in ("0", "1", "auto"):
        check_devices(asked)
    for asked in ("2", "-1", "cuda:0", "all", ""):
        with pytest.raises(UserError, match=f"--devices={asked}: expected auto, or the number of one of the 2 GPUs"):
            check_devices(asked)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_devices("0")
    with pytest.raises(UserError, match="--devices=auto: each process of a launcher takes a GPU of its own"):
        check_devices("auto")
