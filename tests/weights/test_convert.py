"""convert_llama_weights_to_hf.py against an independent LLaMA, and what it says about bad input."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaForCausalLM

from harness import run_script as run_command
from reference_llama import PARAMS, logits, random_weights, write_meta_folder

HUB = Path(__file__).resolve().parent.parent.parent / "model_hub"
sys.path.insert(0, str(HUB))
import convert_llama_weights_to_hf as convert

from alpaca.weights import safetensors_writer
from alpaca.weights.checksums import PUBLISHED
from config_utils import run_script

IDS = [1, 300, 17, 5, 419, 5, 88, 2, 33]
ROWS = 420  # pieces of base.model


def run(*options):
    run_script(convert.main, convert.CONFIG, convert.__file__, [str(option) for option in options])


def convert_folder(folder, *options):
    """Convert folder/7B into folder/7B-hf and return that."""
    run("--input_dir", folder, "--model_size", "7B", "--output_dir", folder / "7B-hf", *options)
    return folder / "7B-hf"


def fails(capsys, *options):
    """The one line of a run that must end in exit code 2."""
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert error.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def source(tmp_path, tokenizer_models):
    """A folder with 7B/, random weights in Meta's layout."""
    write_meta_folder(tmp_path / "7B", PARAMS, random_weights(PARAMS, ROWS), 1, tokenizer_models / "base.model")
    return tmp_path


@pytest.mark.parametrize(
    ("n_shards", "rows", "changes"),
    [
        (1, ROWS, {}),
        (2, ROWS, {}),
        (4, ROWS, {"norm_eps": 1e-6}),
        (8, 424, {}),  # more rows than pieces, as padded vocabularies have
        (1, ROWS, {"n_kv_heads": 2, "vocab_size": ROWS}),
        (2, ROWS, {"n_kv_heads": 4, "ffn_dim_multiplier": 1.3, "multiple_of": 16, "vocab_size": 32000}),
        (4, ROWS, {"n_kv_heads": 4, "rope_theta": 1e6, "ffn_dim_multiplier": 1.3}),
    ],
)
def test_logits_equal_those_of_the_original_architecture(tmp_path, tokenizer_models, n_shards, rows, changes):
    params = PARAMS | changes
    weights = random_weights(params, rows)
    tokenizer = tokenizer_models / "base.model"
    write_meta_folder(tmp_path / "7B", params, weights, n_shards, tokenizer, rope_freqs=n_shards != 4)
    folder = convert_folder(tmp_path)
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    assert model.config.vocab_size == rows
    with torch.no_grad():
        ours = model(torch.tensor([IDS])).logits[0]
    expected = logits(weights, params, IDS)
    assert expected.std() > 0.5  # logits of a size at which the comparison means something
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_number_format_and_values_of_the_source_are_kept(tmp_path, tokenizer_models, dtype):
    weights = random_weights(PARAMS, ROWS, dtype=dtype)
    write_meta_folder(tmp_path / "7B", PARAMS, weights, 2, tokenizer_models / "base.model")
    folder = convert_folder(tmp_path, "--max_position_embeddings=4096")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(down, weights["layers.1.feed_forward.w2.weight"])
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    assert model.config.max_position_embeddings == 4096


def test_folder_is_complete_and_its_tokenizer_exact(source, tokenizer_models, capsys):
    folder = convert_folder(source)
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    size = sum(file.stat().st_size for file in folder.iterdir())
    first, *sums, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"将写入 {folder}：huggingface，0.00 GB（磁盘剩余 ")
    assert last.startswith(f"已写入 {folder}：{size:,} 字节，来自 1 个权重文件，")
    files = [source / "7B" / "tokenizer.model", source / "7B" / "consolidated.00.pth"]
    assert sums == [f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}  {file}" for file in files]
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    sp = SentencePieceProcessor(model_file=str(tokenizer_models / "base.model"))
    text = "The dog，  在中国</s> 龘\n"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == sp.encode(text)


def test_large_models_are_written_in_shards(source, monkeypatch):
    whole = load_file(convert_folder(source) / "model.safetensors")
    monkeypatch.setattr(safetensors_writer, "FILE_BYTES", 200_000)
    folder = convert_folder(source)  # replaces what stands there
    names = [file.name for file in sorted(folder.glob("*.safetensors"))]
    assert len(names) > 2 and names == [
        f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for name, tensor in LlamaForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_tokenizer_beside_the_weights_comes_before_that_of_the_parent(source, tokenizer_models):
    shutil.copyfile(tokenizer_models / "merged.model", source / "tokenizer.model")
    own = (tokenizer_models / "base.model").read_bytes()
    assert (convert_folder(source) / "tokenizer.model").read_bytes() == own
    (source / "7B" / "tokenizer.model").unlink()
    shutil.copyfile(tokenizer_models / "base.model", source / "tokenizer.model")
    assert (convert_folder(source) / "tokenizer.model").read_bytes() == own


def test_tokenizer_only_needs_no_weights(tmp_path, tokenizer_models):
    (tmp_path / "tiny").mkdir()
    shutil.copyfile(tokenizer_models / "base.model", tmp_path / "tiny" / "tokenizer.model")
    out = tmp_path / "tiny-hf"
    run("--input_dir", tmp_path / "tiny", "--model_size", "tokenizer_only", "--output_dir", out)
    assert sorted(file.name for file in out.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]


def test_tokenizer_only_writes_none_that_is_damaged_or_too_large(source, tokenizer_models, capsys):
    folder, options = convert_folder(source), ["--input_dir", source, "--model_size=tokenizer_only", "--output_dir"]
    before = (folder / "tokenizer.model").read_bytes()
    shutil.copyfile(tokenizer_models / "merged.model", source / "tokenizer.model")
    capsys.readouterr()
    assert f"has 508 pieces, but {folder} has embeddings for 420" in fails(capsys, *options, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 508 + 128}))
    assert f"has 508 pieces, but {folder} has embeddings for 636" in fails(capsys, *options, folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": "420"}))
    assert "config.json: \"vocab_size\" must be a whole number above 0, got '420'" in fails(capsys, *options, folder)
    (folder / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.model").write_text("<html>")
    assert "tokenizer.model: is an HTML page" in fails(capsys, *options, folder)
    assert "tokenizer.model: is an HTML page" in fails(capsys, *options, source / "new")
    assert (folder / "tokenizer.model").read_bytes() == before and not (source / "new").exists()


def test_other_files_of_the_output_folder_stay(source):
    folder = source / "7B-hf"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("of an earlier run")
    convert_folder(source)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]


def test_interrupted_run_leaves_nothing_that_loads(source, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_writer, "save_tokenizer", interrupted)
    with pytest.raises(SystemExit) as error:
        convert_folder(source)
    assert error.value.code == 130
    assert [path.name for path in source.iterdir()] == ["7B"]


def test_what_a_killed_run_left_is_cleared_and_what_is_somebodys_own_is_not(source, capsys):
    left = source / "7B-hf.tmp"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_text("half")
    (left / "mine.txt").write_text("mine")
    line = fails(capsys, "--input_dir", source, "--model_size=7B", "--output_dir", source / "7B-hf")
    assert f"{left}/mine.txt: is where the model is to be written; move it away" in line
    assert (left / "mine.txt").read_text() == "mine" and not (source / "7B-hf").exists()
    (left / "mine.txt").unlink()
    assert not (convert_folder(source) / "model-00001-of-00002.safetensors").exists()
    assert not left.exists()


@pytest.mark.parametrize("free", [0, 10**6])
def test_a_disk_without_room_is_found_before_anything_is_written(source, capsys, monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    line = fails(capsys, "--input_dir", source, "--model_size=7B", "--output_dir", source / "a" / "7B-hf")
    assert "the model takes 0.00 GB, and 0.00 GB of that disk are free; make room" in line
    assert [path.name for path in source.iterdir()] == ["7B"]


@pytest.mark.parametrize("written_by", ["bytes_of", "save_tokenizer"])
def test_a_disk_that_fills_up_meanwhile_is_one_line(source, capsys, monkeypatch, written_by):
    def full(file, *folders):
        copied = [str(file), None, str(folders[0] / "tokenizer.model")] if folders else []  # as shutil names them
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *copied)

    monkeypatch.setattr(safetensors_writer, written_by, full)
    with pytest.raises(SystemExit) as error:
        convert_folder(source)
    *_, line = capsys.readouterr().err.splitlines()  # below the progress bar
    assert error.value.code == 2
    assert line.startswith("error: --output_dir=") and "cannot be written (No space left on device); name" in line
    assert [path.name for path in source.iterdir()] == ["7B"]


def test_published_files_are_called_by_their_names(source, capsys, monkeypatch):
    file = source / "7B" / "consolidated.00.pth"
    monkeypatch.setitem(PUBLISHED, hashlib.sha256(file.read_bytes()).hexdigest(), "LLaMA-7B consolidated.00.pth")
    convert_folder(source)
    assert f"  {file}（即官方公布的 LLaMA-7B consolidated.00.pth）\n" in capsys.readouterr().out


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damage(folder, how):
    """Break folder/7B in one way."""
    weights = folder / "7B" / "consolidated.00.pth"
    tensors = torch.load(weights)
    if how == "unknown tensor":
        torch.save(tensors | {"layers.0.attention.wq.bias": torch.ones(2)}, weights)
    elif how == "missing tensor":
        del tensors["layers.1.attention.wq.weight"]
        torch.save(tensors, weights)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif how == "code":
        weights.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif how == "code in an archive":
        torch.save(tensors | {"norm.weight": Evil()}, weights)
    elif how == "empty file":
        weights.write_bytes(b"")
    elif how == "a page":
        weights.write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    elif how == "another object":
        torch.save({"model": SimpleNamespace(**tensors)}, weights)
    elif how == "a second download":
        weights.rename(folder / "7B" / "consolidated.00 (1).pth")
    elif how == "a list":
        torch.save(list(tensors.values()), weights)
    elif how == "quantized":
        torch.save(tensors | {"norm.weight": torch.ones(64, dtype=torch.int8)}, weights)
    elif how == "params list":
        (folder / "7B" / "params.json").write_text("[1, 2]")
    elif how == "params zero":
        (folder / "7B" / "params.json").write_text(json.dumps(PARAMS | {"n_heads": 0}))
    elif how == "params heads":
        (folder / "7B" / "params.json").write_text(json.dumps(PARAMS | {"n_heads": 5}))
    elif how == "params text":
        (folder / "7B" / "params.json").write_text(json.dumps(PARAMS | {"rope_theta": "1e6"}))
    elif how == "missing first shard":
        weights.rename(folder / "7B" / "consolidated.01.pth")
    elif how == "missing last shard":
        shutil.rmtree(folder / "7B")
        write_meta_folder(folder / "7B", PARAMS, random_weights(PARAMS, ROWS), 2)
        (folder / "7B" / "consolidated.01.pth").unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "params":
        (folder / "7B" / "params.json").write_text('{"dim": 64,')
    elif how == "params key":
        (folder / "7B" / "params.json").write_text('{"dim": 64, "n_layers": 2, "norm_eps": 1e-5}')
    elif how == "other params":
        (folder / "7B" / "params.json").write_text(json.dumps(PARAMS | {"dim": 128}))
    elif how == "no folder":
        shutil.rmtree(folder / "7B")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown tensor", "consolidated.00.pth: unknown tensor layers.0.attention.wq.bias"),
        ("missing tensor", "consolidated.00.pth: holds no tensor layers.1.attention.wq.weight"),
        ("truncated", "consolidated.00.pth: damaged"),
        ("code", "consolidated.00.pth: damaged"),
        ("code in an archive", "consolidated.00.pth: damaged"),
        ("empty file", "consolidated.00.pth: damaged"),
        ("a page", "consolidated.00.pth: is an HTML page, perhaps of a download that failed"),
        ("another object", "consolidated.00.pth: damaged, or no file of weights (it holds other things than tensors)"),
        ("a second download", "consolidated.00 (1).pth: no name of Meta's; call it consolidated.00.pth"),
        ("a list", "consolidated.00.pth: holds something else than named tensors"),
        ("quantized", "consolidated.00.pth: norm.weight is of type torch.int8"),
        ("params list", "params.json: expected a JSON object, got list"),
        ("params zero", 'params.json: "n_heads" must be a whole number above 0, got 0'),
        ("params heads", "params.json: 5 heads and 5 key heads do not fit 64 dimensions"),
        ("params text", "params.json: \"rope_theta\" must be a number, got '1e6'"),
        ("missing first shard", "consolidated.00.pth: no such file"),
        ("missing last shard", "is a consolidated file missing"),
        ("no weights", "consolidated.00.pth: no such file"),
        ("params", "params.json: not valid JSON"),
        ("params key", 'params.json: "n_heads" must be a whole number above 0, got None'),
        ("other params", "params.json of another model?"),
        ("no folder", "7B: no such folder; put Meta's"),
    ],
)
def test_bad_input_is_one_line(source, tokenizer_models, capsys, monkeypatch, how, message):
    monkeypatch.chdir(source)
    shutil.copyfile(tokenizer_models / "base.model", "tokenizer.model")
    damage(source, how)
    assert message in fails(capsys, "--input_dir=./", "--model_size=7B", "--output_dir=./7B-hf")
    assert {path.name for path in source.iterdir()} <= {"7B", "tokenizer.model"}  # nothing written, nothing executed


@pytest.mark.parametrize("seed", range(4))
def test_bytes_that_are_cut_off_or_changed_never_end_in_a_traceback(source, capsys, seed):
    """Ten damages each: cut anywhere, or a byte of the pickle changed. What still reads must be what was there."""
    weights, draw = source / "7B" / "consolidated.00.pth", random.Random(seed)
    whole, expected = weights.read_bytes(), load_file(convert_folder(source) / "model.safetensors")
    shutil.rmtree(source / "7B-hf")
    begin = whole.index(b"data.pkl")
    for i in range(10):
        damaged = bytearray(whole)
        if i % 2:
            del damaged[draw.randrange(len(whole)) :]
        else:
            damaged[draw.randrange(begin, begin + 2000)] ^= draw.randrange(1, 256)
        weights.write_bytes(damaged)
        try:
            convert_folder(source)
        except SystemExit as error:
            assert error.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
            assert [path.name for path in source.iterdir()] == ["7B"]
        else:
            written = load_file(source / "7B-hf" / "model.safetensors")
            assert written.keys() == expected.keys()
            assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
            shutil.rmtree(source / "7B-hf")
            capsys.readouterr()


def test_bad_options_are_one_line(source, tokenizer_models, capsys):
    line = fails(capsys, "--input_dir", source, "--model_size=7B", "--output_dir", source / "7B")
    assert "which is read" in line
    shutil.copyfile(tokenizer_models / "merged.model", source / "7B" / "tokenizer.model")
    line = fails(capsys, "--input_dir", source, "--model_size=7B", "--output_dir", source / "7B-hf")
    assert "has 508 pieces, but" in line and "for 420" in line
    (source / "7B" / "tokenizer.model").unlink()
    line = fails(capsys, "--input_dir", source, "--model_size=7B", "--output_dir", source / "7B-hf")
    assert f"{source}/7B/tokenizer.model and {source}/tokenizer.model: no such file" in line
    shutil.copyfile(tokenizer_models / "base.model", source / "tokenizer.model")
    line = fails(capsys, "--input_dir", source, "--model_size=tokenizer_only")
    assert line.startswith("error: --output_dir is missing")


@pytest.mark.slow
def test_command_of_the_readme(source):
    script, options = "model_hub/convert_llama_weights_to_hf.py", ["--input_dir", source, "--model_size", "7B"]
    done = run_command(script, *options, "--output_dir", source / "7B-hf", cwd=HUB)
    assert done.stdout.startswith("将写入 ") and (source / "7B-hf" / "config.json").is_file()
    options[-1] = "70B"
    done = run_command(script, *options, cwd=HUB, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "70B" in done.stderr
