"""Folders beside the specimens: what a download, a training or another tool left where weights should be.

That people have them: aria2's manual (--file-allocation: a file has its full size from the beginning); github.com/
IDEA-CCNL/Fengshenbang-LM issue 363 (a delta taken for a model); shibing624/MedicalGPT issue 34 (a cache's snapshots, all
links); huggingface/transformers issue 8497 (what stands in place of weights); ml-explore/mlx-lm issue 1119 (MLX's LoRAs);
ymcui/Chinese-LLaMA-Alpaca-2's 16K models and mistralai's consolidated.safetensors, as their pages on huggingface.co list them.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import specimens_hf as hf
import specimens_lora as lora
import specimens_meta as meta
from alpaca.common.errors import UserError
from alpaca.models.adapter_files import read_adapter
from alpaca.models.adapters import find_adapter
from alpaca.models.base_files import read_base
from alpaca.models.base_weights import load_base
from alpaca.models.tokenizer import load_tokenizer
from specimens import BASE, EMBEDDING, HEAD, merged
from test_defects import last_line
from test_specimens import converted, merge_onto, refused


@pytest.fixture
def base(tmp_path):
    """A Hugging Face folder in one file."""
    base = hf.converted(tmp_path / "base")
    for file in base.folder.glob("pytorch_model*"):
        file.unlink()
    save_file(base.weights, base.folder / "model.safetensors")
    return base


def loaded(folder):
    return load_base(folder, torch.float32, "cpu")


def change(base, **changes):
    """Write other tensors: of the same name with `_` for `.`, or all of them by `names`."""
    rename = changes.pop("names", lambda name: name)
    weights = {rename(name): changes.get(name.replace(".", "_"), tensor) for name, tensor in base.weights.items()}
    save_file(weights, base.folder / "model.safetensors")


def test_what_aria2_has_not_finished_is_refused_by_every_reader(base, tmp_path):
    llama, added = meta.llama1(tmp_path, "13B"), lora.alpaca_lora(tmp_path / "lora")
    files = {
        base.folder / "model.safetensors": (read_base, loaded),
        added.folder / "adapter_model.bin": (read_adapter,),
        llama.folder / "consolidated.01.pth": (lambda _: converted(llama, tmp_path / "out"),),
    }
    for file, readers in files.items():
        control = file.with_name(f"{file.name}.aria2")
        control.write_bytes(b"\0\1")
        for reader in readers:
            with pytest.raises((UserError, SystemExit)) as error:
                reader(file.parent)
            if error.type is UserError:
                assert f"{file}: aria2 has not finished it, for {control} is there; run aria2c -c" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "metas"),
    [("model.layers.1.mlp.up_proj.weight", "layers.1.feed_forward.w3.weight"), ("model.norm.weight", "norm.weight")],
)
def test_a_hole_that_a_download_left_is_refused(base, tmp_path, capsys, name, metas):
    """Also where a LoRA is added to it, so that zeros are not what would be written, and in one of several files."""
    change(base, **{name.replace(".", "_"): torch.zeros_like(base.weights[name])})
    added = lora.alpaca_lora_16(tmp_path / "lora")
    line = last_line(capsys, merge_onto, base.folder, [added], tmp_path / "out")
    assert f"error: {base.folder}: {name} is all zeros: it was not downloaded whole; download it again" in line
    with pytest.raises(UserError, match=f"{name} is all zeros"):
        loaded(base.folder)
    llama = meta.llama1(tmp_path, "13B")
    file = llama.folder / "consolidated.01.pth"
    tensors = torch.load(file)
    torch.save(tensors | {metas: torch.zeros_like(tensors[metas])}, file)
    line = last_line(capsys, converted, llama, tmp_path / "out")
    assert f"error: {file}: {name} is all zeros" in line
    assert not list(tmp_path.glob("out*"))


def test_layers_that_were_added_to_a_model_end_with_zeros(base, tmp_path):
    """As LLaMA-Pro's do before they are trained."""
    name = "model.layers.1.mlp.down_proj.weight"
    change(base, **{name.replace(".", "_"): torch.zeros_like(base.weights[name])})
    ours = load_file(
        merge_onto(base.folder, [lora.alpaca_lora(tmp_path / "lora")], tmp_path / "out") / "model.safetensors"
    )
    assert not ours[name].any() and not loaded(base.folder).get_parameter(name).any()


def test_a_delta_is_no_base(base, tmp_path, capsys):
    """Vicuna's and Ziya's first weights: what training added to LLaMA's. Merged with a LoRA they answered nonsense."""
    change(base, model_norm_weight=(base.weights["model.norm.weight"] - base.weights["model.norm.weight"].mean()) / 10)
    line = last_line(capsys, merge_onto, base.folder, [lora.alpaca_lora(tmp_path / "lora")], tmp_path / "out")
    assert f"{base.folder}: model.norm.weight is about 0, so these weights are a delta" in line
    with pytest.raises(UserError, match="are a delta, to be added to another model; apply them to it first"):
        loaded(base.folder)


def test_one_file_of_metas_under_two_names_is_refused(tmp_path, capsys):
    """A browser calls a second download consolidated.00 (1).pth, and its owner then calls it .01."""
    llama = meta.llama1(tmp_path, "30B")
    shutil.copyfile(llama.folder / "consolidated.01.pth", llama.folder / "consolidated.03.pth")
    line = refused(capsys, converted, llama, tmp_path / "out")
    assert f"{llama.folder}/consolidated.03.pth: holds the same numbers as {llama.folder}/consolidated.01.pth" in line


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_fsdp_wrapped_module.{}"])
def test_names_of_a_model_that_was_saved_wrapped(base, tmp_path, wrap):
    """By torch.compile, DistributedDataParallel or FSDP, whose state_dict has the wrapper's name in every name."""
    change(base, names=wrap.format)
    added = lora.alpaca_lora(tmp_path / "lora")
    ours = load_file(merge_onto(base.folder, [added], tmp_path / "out") / "model.safetensors")
    expected = merged(base.weights, added)
    assert ours.keys() == expected.keys()
    assert all(torch.allclose(ours[name], tensor, rtol=2**-9, atol=2**-12) for name, tensor in expected.items())
    model = loaded(base.folder)
    assert all(torch.equal(model.get_parameter(name).half(), tensor) for name, tensor in base.weights.items())


def test_two_names_that_are_one_without_the_wrapper_are_refused(base):
    norm = base.weights["model.norm.weight"]
    save_file(base.weights | {"module.model.norm.weight": norm * 2}, base.folder / "model.safetensors")
    with pytest.raises(UserError, match="holds model.norm.weight twice, the second time as "):
        read_base(base.folder)


def test_where_an_adapter_is_and_what_it_is(base, tmp_path, capsys):
    """A Trainer's folder has it in checkpoint-<step>; a cache has links; MLX writes another file, of transposed factors."""
    added = lora.alpaca_lora(tmp_path / "run" / "checkpoint-200")

    def lines_of(path):
        with pytest.raises(UserError) as error:
            find_adapter("mine", str(path))
        return refused(capsys, merge_onto, base.folder, [added._replace(folder=path)], tmp_path / "out"), str(
            error.value
        )

    for line in lines_of(tmp_path / "run"):
        assert f"adapter_config.json is in {added.folder}, so name that folder" in line
    for line in lines_of(added.folder / "adapter_model.bin"):
        assert f"{added.folder}/adapter_model.bin: is a file; name the folder that it is in" in line
    (added.folder / "adapter_model.bin").unlink()
    (added.folder / "adapter_model.bin").symlink_to("../../blobs/1f2e")
    with pytest.raises(
        UserError, match=r"adapter_model.bin: is a link to ../../blobs/1f2e, which is not there; download"
    ):
        read_adapter(added.folder)
    (added.folder / "adapter_model.bin").unlink()
    (added.folder / "adapters.safetensors").touch()
    with pytest.raises(
        UserError, match=r"adapters.safetensors: is MLX's; convert it to PEFT's format, or fuse it with"
    ):
        read_adapter(added.folder)


def test_where_metas_weights_are_and_what_is_none_of_metas(base, tmp_path, capsys):
    """The converter of transformers now takes the folder itself; archives unpack into a folder more."""
    llama = meta.llama1(tmp_path / "in" / "LLaMA", "7B")
    for path in (llama.folder / "7B", tmp_path / "in" / "7B"):
        line = refused(capsys, converted, llama._replace(folder=path), tmp_path / "out")
        assert (
            f"{path}: no such folder; params.json is in {llama.folder}: give --input_dir={llama.folder.parent} " in line
        )
    shutil.copyfile(llama.folder.parent / "tokenizer.model", base.folder.parent / "tokenizer.model")
    line = refused(capsys, converted, base, tmp_path / "out")
    assert f"{base.folder}: is in Hugging Face's format already; name it as it is, with --base_model or" in line
    (llama.folder / "consolidated.00.pth").rename(llama.folder / "consolidated.safetensors")
    line = refused(capsys, converted, llama, tmp_path / "out")
    assert f"{llama.folder}/consolidated.safetensors: is Mistral's; take config.json and model*.safetensors" in line


def test_a_lora_whose_vocabulary_is_a_tokenizer_json(base, tmp_path, capsys):
    """transformers 5 writes no tokenizer.model beside a LoRA: one that was trained with a pad token of its own."""
    added = lora.alpaca_lora(tmp_path / "lora")
    file = added.folder / "adapter_model.bin"
    saved = {name: torch.cat([base.weights[name], torch.full((1, 64), 0.5).half()]) for name in (EMBEDDING, HEAD)}
    torch.save(torch.load(file) | {f"base_model.model.{name}": tensor for name, tensor in saved.items()}, file)
    line = refused(capsys, merge_onto, base.folder, [added], tmp_path / "out")
    assert f"{added.folder}: with this adapter the model has embeddings for {BASE + 1} pieces, but its" in line
    hf.long_tokenizer(added.folder, "base")
    settings = json.loads((added.folder / "tokenizer.json").read_text())
    token = {"id": BASE, "content": "[PAD]", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    settings["added_tokens"].append({**token, "single_word": False})
    (added.folder / "tokenizer.json").write_text(json.dumps(settings))
    (added.folder / "tokenizer.model").unlink(missing_ok=True)
    out = merge_onto(base.folder, [added], tmp_path / "out")
    ours, expected = load_file(out / "model.safetensors"), merged(base.weights, added) | saved
    assert all(torch.allclose(ours[name], tensor, rtol=2**-9, atol=2**-12) for name, tensor in expected.items())
    assert len(load_tokenizer(out, "alpaca")) == BASE + 1 and not (out / "tokenizer.model").exists()


def test_one_lora_in_two_formats_is_named_once(base, tmp_path, capsys):
    added, other = lora.alpaca_lora(tmp_path / "lora"), tmp_path / "safetensors"
    shutil.copytree(added.folder, other)
    save_file(
        {name: t.float() for name, t in torch.load(other / "adapter_model.bin").items()},
        other / "adapter_model.safetensors",
    )
    line = refused(capsys, merge_onto, base.folder, [added, added._replace(folder=other)], tmp_path / "out")
    assert f"--lora_model: {other} is the same LoRA as {added.folder}; name it once" in line


def test_a_hole_in_the_embeddings_that_a_lora_brings(tmp_path):
    """They are most of the published LoRAs' files."""
    added = lora.chinese_llama(tmp_path / "lora")
    file, name = added.folder / "adapter_model.bin", f"base_model.model.{HEAD}"
    tensors = torch.load(file)
    torch.save(tensors | {name: torch.zeros_like(tensors[name])}, file)
    with pytest.raises(UserError, match=f"adapter_model.bin: {HEAD} is all zeros: it was not downloaded whole"):
        read_adapter(added.folder)


def test_an_older_folder_that_may_not_be_written_is_found_before_merging(base, tmp_path, capsys, monkeypatch):
    (out := tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out)  # root may write anywhere
    line = refused(capsys, merge_onto, base.folder, [lora.alpaca_lora(tmp_path / "lora")], out)
    assert f"{out}: no right to write there; name another folder" in line and not list(out.iterdir())
