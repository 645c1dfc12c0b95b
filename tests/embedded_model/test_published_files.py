"""python -m pytest tests/embedded_model/test_published_files.py: the embedded model is read and written in the published shapes."""

import torch

from alpaca.weights.llama_layout import EMBEDDING, HEAD
from embedded_model.published_files import FOLDERS, LORA, load_base, with_rows, write_adapter, write_base
from harness import ROOT

TINY, LLAMA = (ROOT / "model_hub" / FOLDERS[stage] for stage in ("base", "llama"))


def tensors_of(file):
    return torch.load(file, weights_only=True)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_base_is_written_as_it_was_read(tmp_path):
    write_base(load_base(TINY), tmp_path, (TINY / "tokenizer.model").read_bytes())
    assert_equal(tensors_of(tmp_path / "consolidated.00.pth"), tensors_of(TINY / "consolidated.00.pth"))
    for name in ("params.json", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in TINY.iterdir())


def test_an_adapter_is_written_as_the_published_ones_are(tmp_path):
    tensors = tensors_of(LLAMA / "adapter_model.bin")
    write_adapter(tensors, tmp_path, (LLAMA / "tokenizer.model").read_bytes())
    assert_equal(tensors_of(tmp_path / "adapter_model.bin"), tensors)
    for name in ("adapter_config.json", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (LLAMA / name).read_bytes()
    assert {name.split(".")[-3] for name in tensors if "lora_A" in name} == set(LORA["target_modules"])


def test_a_new_row_starts_as_that_of_unk():
    base = load_base(TINY)
    more, fewer = with_rows(base, 2003), with_rows(base, 1000)
    for name in (EMBEDDING, HEAD):
        old, new = base.state_dict()[name], more.state_dict()[name]
        assert torch.equal(new[:2000], old) and torch.equal(new[2000:], old[:1].expand(3, -1))
        assert torch.equal(fewer.state_dict()[name], old[:1000])
