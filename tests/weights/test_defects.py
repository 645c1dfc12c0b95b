"""Inputs that once were written wrong with exit code 0, ended in a traceback, or were refused for a reason that misleads."""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import specimens_hf as hf
import specimens_lora as lora
import specimens_meta as meta
from alpaca.common.errors import UserError
from alpaca.common.locks import locked
from alpaca.models.base import check_model_dir, load_for_inference
from alpaca.models.base_files import read_base
from alpaca.models.base_weights import load_base
from alpaca.models.facts import read_facts, with_task
from alpaca.weights import checksums
from config_utils import run_script
from dataset import INSTRUCT
from specimens import ALPACA, EMBEDDING, HEAD, LLAMA, merged, vocabularies
from test_specimens import convert, converted, made, merge, merge_onto, refused, run

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "checkpoint/demo/shipped/adapter_model"


@pytest.fixture
def llama(tmp_path):
    """7B/ in Meta's layout, tokenizer.model beside it."""
    return meta.llama1(tmp_path, "7B")


@pytest.fixture
def base(tmp_path):
    return hf.converted(tmp_path / "base")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------------------------------------------------------------
# what is written is right, or nothing is


def test_a_changed_byte_that_swaps_two_matrices_is_refused(llama, tmp_path, capsys):
    """output.weight and tok_embeddings.weight are of one shape: the number of the storage is all that parts them."""
    file = llama.folder / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        pickled = archive.read(name)
    data = file.read_bytes()
    begin = data.index(pickled)
    at = pickled.index(b"output.weight")
    key = pickled.index(b"X\x01\x00\x00\x002", at) + 5  # the storage "2" of output.weight; "0" is tok_embeddings'
    file.write_bytes(data[: begin + key] + b"0" + data[begin + key + 1 :])
    assert torch.equal(*(torch.load(file, weights_only=True)[n] for n in ("output.weight", "tok_embeddings.weight")))
    assert "consolidated.00.pth: damaged" in refused(capsys, converted, llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(llama, base, tmp_path, capsys, number):
    file = llama.folder / "consolidated.00.pth"
    tensors = torch.load(file)
    tensors["layers.1.feed_forward.w2.weight"][3, 5] = number
    torch.save(tensors, file)
    line = last_line(capsys, converted, llama, tmp_path / "out")
    assert "model.layers.1.mlp.down_proj.weight holds NaN or infinite numbers: the source is damaged" in line

    added = lora.alpaca_lora(tmp_path / "lora")
    edit(added.folder / "adapter_config.json", lora_alpha=number)
    assert '"r" and "lora_alpha" must be numbers' in refused(capsys, merge_onto, base.folder, [added], tmp_path / "out")
    edit(added.folder / "adapter_config.json", lora_alpha=1e9)
    line = last_line(capsys, merge_onto, base.folder, [added], tmp_path / "out")
    assert "with the LoRA in it is more than torch.float16 can hold; is lora_alpha in" in line

    edit(added.folder / "adapter_config.json", lora_alpha=16)
    [first, *_] = sorted(base.folder.glob("*.bin"))
    tensors = torch.load(first)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = number
    torch.save(tensors, first)
    line = last_line(capsys, merge_onto, base.folder, [added], tmp_path / "out")
    assert f"{base.folder}: model.layers.0.mlp.up_proj.weight holds NaN or infinite numbers; convert" in line
    assert not list(tmp_path.glob("out*"))


def last_line(capsys, call, *args, **options):
    """As refused, where a progress bar may stand above the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        call(*args, **options)
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_verify_accepts_bfloat16_and_large_loras(tmp_path, capsys):
    """Where the LoRA is large, rounding moves logits far: the limit is what rounding can do, not a guess about logits."""
    base = hf.converted(tmp_path / "base")
    for file in base.folder.glob("*.bin"):
        torch.save({name: tensor.bfloat16() for name, tensor in torch.load(file).items()}, file)
    loras = [lora.chinese_llama(tmp_path / "lora1"), lora.chinese_alpaca(tmp_path / "lora2")]
    out = merge_onto(base.folder, loras, tmp_path / "out", verify=True)
    expected = merged({name: tensor.bfloat16() for name, tensor in base.weights.items()}, *loras)
    assert all(
        torch.allclose(t, expected[name], rtol=2**-7) for name, t in load_file(out / "model.safetensors").items()
    )
    merge_onto(base.folder, loras, tmp_path / "pth", verify=True, output_type="pth", pth_files=2)
    printed = capsys.readouterr().out
    assert printed.count("验证：21 个张量与 float32 的基座+LoRA 相符") == 2


@pytest.mark.parametrize("kind", ["huggingface", "pth"])
def test_verify_sees_one_wrong_number(base, tmp_path, capsys, monkeypatch, kind):
    def wrong(name, weight, adapters):
        merged = add_adapters(name, weight, adapters).clone()
        if name == "model.layers.1.self_attn.v_proj.weight":
            merged[7, 9] += 0.01
        return merged

    add_adapters = merge.add_adapters
    monkeypatch.setattr(merge, "add_adapters", wrong)
    added = lora.alpaca_lora(tmp_path / "lora")
    line = last_line(capsys, merge_onto, base.folder, [added], tmp_path / "out", output_type=kind, verify=True)
    assert "--verify: model.layers.1.self_attn.v_proj.weight of the merged model is off by" in line
    assert not (tmp_path / "out").exists() and any((tmp_path / "out.unverified").iterdir())


def test_a_lora_that_is_in_the_base_already_is_refused(base, tmp_path, capsys):
    loras = [lora.chinese_llama(tmp_path / "lora1"), lora.chinese_alpaca(tmp_path / "lora2")]
    out = merge_onto(base.folder, loras, tmp_path / "out")
    line = refused(capsys, merge_onto, out, [loras[1]], tmp_path / "twice")
    assert f"{loras[1].folder}: is in {out} already" in line
    shutil.copytree(loras[0].folder, tmp_path / "copy")
    for again in (loras[0], lora.Lora(tmp_path / "copy", {}, {})):
        line = refused(capsys, merge_onto, base.folder, [loras[0], again], tmp_path / "twice")
        assert f"{again.folder} is the same LoRA as {loras[0].folder}; name it once" in line
    edit(loras[1].folder / "adapter_config.json", modules_to_save=None)  # as the first message says
    merge_onto(out, [loras[1]], tmp_path / "twice")


# ---------------------------------------------------------------------------------------------------------------------
# settings and names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": [1]}, '"rope_parameters" must be an object, got [1]'),
        ({"rope_scaling": "linear"}, "\"rope_scaling\" must be an object, got 'linear'"),
        ({"rms_norm_eps": "1e-6"}, '"rms_norm_eps" must be a number'),
        ({"rms_norm_eps": float("nan")}, '"rms_norm_eps" must be a number, got nan'),
        ({"num_key_value_heads": 3}, "4 heads and 3 key heads do not fit 64 dimensions"),
        ({"head_dim": -16}, '"head_dim" must be a whole number above 0'),
        ({"tie_word_embeddings": "yes"}, '"tie_word_embeddings" must be true or false'),
        ({"max_position_embeddings": [2048]}, '"max_position_embeddings" must be a number'),
    ],
)
def test_settings_of_another_type_are_one_line(base, tmp_path, capsys, changes, message):
    edit(base.folder / "config.json", **changes)
    added = lora.alpaca_lora(tmp_path / "lora")
    assert message in refused(capsys, merge_onto, base.folder, [added], tmp_path / "out", output_type="pth")


@pytest.mark.parametrize("number", [-5, 0])
def test_positions_below_one_are_refused(llama, tmp_path, capsys, number):
    line = refused(capsys, converted, llama, tmp_path / "out", max_position_embeddings=number)
    assert f"--max_position_embeddings={number}: expected 1 or more" in line


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({0: torch.ones(2)}, "holds something else than named tensors"),
        ({"default": torch.ones(2)}, "its tensor default has no counterpart"),
        ({"lora_A.weight": torch.ones(2, 2)}, "its tensor lora_A.weight has no counterpart"),
        ({"module.": torch.ones(2)}, "has no counterpart"),
    ],
)
def test_odd_names_in_an_adapter_are_one_line(base, tmp_path, capsys, tensors, message):
    added = lora.alpaca_lora(tmp_path / "lora")
    torch.save(torch.load(added.folder / "adapter_model.bin") | tensors, added.folder / "adapter_model.bin")
    assert message in refused(capsys, merge_onto, base.folder, [added], tmp_path / "out")


def test_tables_of_angles_are_left_out_wherever_they_stand(base, llama, tmp_path):
    """Also in an adapter, and by names that no file is known to have."""
    table = torch.ones(8)
    added = lora.alpaca_lora(tmp_path / "lora")
    tensors = torch.load(added.folder / "adapter_model.bin")
    tensors |= {"base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": table, "module.rope.freqs": table}
    torch.save(tensors, added.folder / "adapter_model.bin")
    [first, *_] = sorted(base.folder.glob("*.bin"))
    torch.save(torch.load(first) | {"model.rotary_emb.inv_freq": table}, first)
    merge_onto(base.folder, [added], tmp_path / "out")
    file = llama.folder / "consolidated.00.pth"
    torch.save(torch.load(file) | {"rope.freqs": table}, file)
    converted(llama, tmp_path / "out2")


def test_a_file_that_cannot_be_read_is_not_called_one_that_cannot_be_written(llama, tmp_path, capsys, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checksums, "sha256_of", broken)
    line = last_line(capsys, converted, llama, tmp_path / "out")
    assert line.startswith("error: ") and "tokenizer.model: cannot be read (Input/output error)" in line
    monkeypatch.undo()

    def gone(source, *_):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))

    monkeypatch.setattr("alpaca.models.tokenizer.copyfile", gone)
    line = last_line(capsys, converted, llama, tmp_path / "out")
    assert f"{tmp_path}/tokenizer.model: cannot be read (No such file or directory)" in line


def test_pth_files_are_uneven_where_they_must_be_and_counted_aloud(base, tmp_path, capsys):
    loras = [lora.chinese_llama(tmp_path / "lora1"), lora.chinese_alpaca(tmp_path / "lora2")]
    out = merge_onto(base.folder, loras, tmp_path / "7B", output_type="pth", pth_files=4)
    assert "pth 分成 4 个文件" in capsys.readouterr().out.splitlines()
    parts = [torch.load(file)["output.weight"] for file in sorted(out.glob("*.pth"))]
    assert [len(part) for part in parts] == [ALPACA // 4] * 3 + [ALPACA - 3 * (ALPACA // 4)]
    embedding = [torch.load(file)["tok_embeddings.weight"] for file in sorted(out.glob("*.pth"))]
    assert torch.equal(torch.cat(embedding, 1), loras[1].saved[EMBEDDING])
    assert torch.equal(torch.cat(parts), loras[1].saved[HEAD])


# ---------------------------------------------------------------------------------------------------------------------
# what is a base, and what is none: every command says the same

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13476\n"


def without_index(folder):
    (folder / "pytorch_model.bin.index.json").unlink()


def only(name, content="GGUF"):
    def change(folder):
        for file in folder.glob("pytorch_model*"):
            file.unlink()
        (folder / name).write_text(content)

    return change


def metas(folder):
    only("consolidated.00.pth")(folder)
    (folder / "config.json").unlink()


def described_nowhere(folder):
    """As the folders of GGUF files on huggingface.co: config.json is there, and says nothing."""
    only("llama-7b.Q4_K_M.gguf")(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def in_a_cache(folder):
    """The folder of a cache, models--<owner>--<name>, in place of its snapshots/<commit>."""
    snapshot = folder / "snapshots" / "4782ad27"
    snapshot.mkdir(parents=True)
    (folder / "._____temp").mkdir()
    (folder / "._____temp" / "config.json").touch()  # ModelScope's, of a download that was interrupted
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(snapshot / file.name)


def copied_links(folder):
    """What cp -r makes of a cache's snapshot."""
    only("tokenizer_config.json", "{}")(folder)
    (folder / "model.safetensors").symlink_to("../../blobs/1f2e")


def with_a_lora_inside(folder):
    """Saved from a PeftModel that was not merged, as model.save_pretrained() under DeepSpeed and others do."""
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(8, 64)}
    for file in folder.glob("*.bin"):
        torch.save(tensors, file)


def of_gpt(folder):
    edit(folder / "config.json", model_type="gpt2")


def quantized(folder):
    edit(folder / "config.json", quantization_config={"bits": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_index, "pytorch_model-00001-of-00002.bin is a part, and pytorch_model.bin.index.json is missing"),
        (only("ggml-model-q4_0.bin"), "ggml-model-q4_0.bin is llama.cpp's, which is not supported; take the model"),
        (only("llama-7b.Q4_K_M.gguf"), "llama-7b.Q4_K_M.gguf is llama.cpp's, which is not supported"),
        (only("pytorch_model.bin"), "pytorch_model.bin: is llama.cpp's, which is not supported"),
        (only("gptq_model-4bit-128g.safetensors"), "gptq_model-4bit-128g.safetensors is quantized"),
        (only("llama-7b-4bit-128g.pt"), "llama-7b-4bit-128g.pt is quantized"),
        (only("pytorch_model.bin", LFS), "pytorch_model.bin: is a Git LFS pointer, not the file; fetch the file"),
        (only("model.safetensors", LFS), "model.safetensors: is a Git LFS pointer, not the file; fetch the file"),
        (only("model.safetensors", "<html>"), "model.safetensors: is an HTML page"),
        (only("adapter_config.json"), "adapter_config.json is a LoRA's; name its folder with --lora_model"),
        (only("consolidated.safetensors"), "consolidated.safetensors is Mistral's; take the model in Hugging Face's"),
        (only("model (1).safetensors"), "model (1).safetensors is no name that transformers loads; call it model.safe"),
        (
            only("pytorch_model_fsdp.bin"),
            "pytorch_model_fsdp.bin is no name that transformers loads; call it pytorch_m",
        ),
        (only("zero_to_fp32.py"), "zero_to_fp32.py is of a DeepSpeed checkpoint; run it there, it makes the weights"),
        (only("lit_model.pth"), "lit_model.pth is of another tool; take the model in Hugging Face's format"),
        (described_nowhere, "llama-7b.Q4_K_M.gguf is llama.cpp's, which is not supported"),
        (in_a_cache, "config.json is in {folder}/snapshots/4782ad27, so name that folder"),
        (copied_links, "model.safetensors: is a link to ../../blobs/1f2e, which is not there; download it"),
        (metas, "(config.json is missing); consolidated.00.pth is Meta's; convert them with"),
        (of_gpt, "config.json: \"model_type\" is 'gpt2'; only llama, mistral, qwen2, qwen3 can be used"),
        (quantized, "its weights are quantized, which is not supported; take the model that is not"),
    ],
)
def test_what_is_no_base_is_named_alike_by_all(base, change, message):
    change(base.folder)
    lines = set()
    for command in (read_base, check_model_dir, lambda folder: load_base(folder, torch.float32, "cpu")):
        with pytest.raises(UserError) as error:
            command(base.folder)
        lines.add(str(error.value))
    [line] = lines
    assert message.format(folder=base.folder) in line


def test_torchs_advice_to_run_a_files_code_is_never_given(base):
    [first, *_] = sorted(base.folder.glob("*.bin"))
    torch.save({"model": argparse.Namespace()}, first)
    for command in (read_base, lambda folder: load_base(folder, torch.float32, "cpu")):
        with pytest.raises(UserError, match="damaged, or no file of weights .it holds other things than tensors.;"):
            command(base.folder)


def test_a_base_that_holds_a_lora_is_named(base):
    with_a_lora_inside(base.folder)
    for command in (read_base, lambda folder: load_base(folder, torch.float32, "cpu")):
        with pytest.raises(
            UserError, match=r"holds a LoRA beside the model \(.*lora_A.default.weight\), not merged into it"
        ):
            command(base.folder)


def test_a_byte_order_mark_in_config_json(base, tmp_path):
    """As editors of Windows write it."""
    expected = logits_of(base.folder, {name: tensor.float() for name, tensor in base.weights.items()})
    config = base.folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8"), encoding="utf-8-sig")
    added = lora.alpaca_lora(tmp_path / "lora")
    model, _ = load_for_inference(None, None, {}, str(base.folder), None, "fp32", "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([IDS])).logits, expected)
    load_for_inference(added.folder, None, {}, str(base.folder), None, "fp32", "cpu")
    merge_onto(base.folder, [added], tmp_path / "out")


def test_a_lora_with_tokens_of_its_own(base, tmp_path, capsys):
    """Its added_tokens.json names the rows for which tokenizer.model has no piece."""
    added = lora.chinese_llama(tmp_path / "lora")
    tensors = torch.load(added.folder / "adapter_model.bin")
    for name, tensor in tensors.items():
        if len(tensor) == LLAMA:
            tensors[name] = torch.cat([tensor, tensor[:4]])
    torch.save(tensors, added.folder / "adapter_model.bin")
    line = refused(capsys, merge_onto, base.folder, [added], tmp_path / "out")
    assert f"embeddings for {LLAMA + 4} pieces, but its tokenizer.model has {LLAMA}; put the" in line
    tokens = {f"<{i}>": LLAMA + i for i in range(4)}
    (added.folder / "added_tokens.json").write_text(json.dumps(tokens))
    out = merge_onto(base.folder, [added], tmp_path / "out")
    assert f"注意: {added.folder}/added_tokens.json" in capsys.readouterr().out
    assert len(load_file(out / "model.safetensors")[HEAD]) == LLAMA + 4
    load_for_inference(None, None, {}, str(out), None, "fp32", "cpu")


def test_what_a_save_that_was_cut_short_left_is_merged(base, tmp_path, capsys):
    """Between the two renames of a save there is no adapter_model, but adapter_model.old."""
    added = lora.alpaca_lora(tmp_path / "adapter_model.old")
    named = added._replace(folder=tmp_path / "adapter_model")
    ours = load_file(merge_onto(base.folder, [named], tmp_path / "out") / "model.safetensors")
    expected = merged(base.weights, added)
    assert all(torch.allclose(ours[name], tensor, rtol=2**-9, atol=2**-12) for name, tensor in expected.items())


# ---------------------------------------------------------------------------------------------------------------------
# disks, locks, paths


def test_an_output_below_a_file_is_named(base, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    added = lora.alpaca_lora(tmp_path / "lora")
    line = refused(capsys, merge_onto, base.folder, [added], tmp_path / "notes" / "out")
    assert f"{tmp_path}/notes: is no folder; move it away or name another" in line


ON_ANOTHER_DISK = f"""
set -e
mkdir -p "$1/mounted"
mount -t tmpfs none "$1/mounted"
cp -r "$1/older/." "$1/mounted"
{sys.executable} {ROOT}/model_hub/merge_llama_with_chinese_lora.py --base_model="$1/base" --lora_model="$1/lora" --output_dir="$1/mounted"
ls -a "$1/mounted" "$1"
cmp "$1/mounted/model.safetensors" "$1/expected/model.safetensors"
"""


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="mounting needs user namespaces",
)
def test_an_output_folder_that_is_a_disk_of_its_own(base, tmp_path):
    """A mounted volume: files cannot be renamed into it, and the older model in it must not be lost by trying."""
    added = lora.alpaca_lora(tmp_path / "lora")
    merge_onto(base.folder, [added], tmp_path / "expected")
    merge_onto(base.folder, [lora.alpaca_lora_16(tmp_path / "lora16")], tmp_path / "older")
    command = ["unshare", "-rm", "sh", "-c", ON_ANOTHER_DISK, "sh", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mounted.tmp" not in done.stdout and ".lock" not in done.stdout


def test_two_at_once_into_one_folder(base, llama, tmp_path, capsys, monkeypatch):
    added = lora.alpaca_lora(tmp_path / "lora")
    with locked(tmp_path / "out"):
        for call, args in ((merge_onto, (base.folder, [added])), (converted, (llama,))):
            line = last_line(capsys, call, *args, tmp_path / "out")
            assert (
                f"{tmp_path}/out: another process is writing there ({socket.gethostname()}, process {os.getpid()}, "
                in line
            )
    merge_onto(base.folder, [added], tmp_path / "out")
    assert not list(tmp_path.glob("*.lock"))

    import process

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine" / "ori_data").mkdir(parents=True)
    for name in ("train", "dev"):
        text = json.dumps({"text": f"{name}：王明到了北京。", "entity_list": []}, ensure_ascii=False)
        (tmp_path / "data" / "mine" / "ori_data" / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    with locked("data/mine/instruct_data"), pytest.raises(SystemExit):
        run_process(process)
    assert "data/mine/instruct_data: another process is writing there" in capsys.readouterr().err
    run_process(process)
    assert sorted(path.name for path in (tmp_path / "data" / "mine").iterdir()) == ["instruct_data", "ori_data"]


def run_process(process):
    run_script(process.main, process.CONFIG, process.__file__, ["--data_name=mine"])


HOLDING = """
import os, sys, time
from alpaca.common.locks import locked
with locked(sys.argv[1]):
    os.write(1, b"%d\\n" % os.fork())  # by both, each line at once: the fork then has let go of what it holds
    time.sleep(60)
"""


def test_a_killed_process_holds_no_lock(tmp_path):
    """Also where it leaves a fork, as a worker that loads data, behind. The refusal names host, process and time."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        fork = sum(int(process.stdout.readline()) for _ in range(2))
        holder = rf"\({re.escape(socket.gethostname())}, process {process.pid}, since 20[-0-9]+ [:0-9]+\); wait for it"
        with pytest.raises(UserError, match=f"another process is writing there {holder}"), locked(tmp_path / "out"):
            pass
        process.send_signal(signal.SIGKILL)
    try:
        with locked(tmp_path / "out"):
            assert (tmp_path / "out.lock").read_text().startswith(f"{socket.gethostname()}, process {os.getpid()}, ")
    finally:
        os.kill(fork, signal.SIGKILL)
    assert not (tmp_path / "out.lock").exists()


def test_a_disk_without_locks_is_said(tmp_path, capsys, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path / "out"):
        pass
    assert "out.lock: 这个磁盘没有文件锁（No locks available）" in capsys.readouterr().err


def test_home_blanks_and_chinese_quotes_in_paths(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    named = tmp_path / "我的 “模型” 7B"
    run(convert, input_dir="~", model_size="7B", output_dir=f"“{named}”")
    added, other = lora.alpaca_lora(tmp_path / "a b" / "“lora”"), lora.alpaca_lora_16(tmp_path / "‘quoted’")
    argv = [f"--base_model={named}", f"--lora_model=~/a b/“lora”, {other.folder}", "--output_dir=~/新 模型"]
    run_script(merge.main, merge.CONFIG, merge.__file__, argv)
    expected = merged(llama.weights, added, other)
    ours = load_file(tmp_path / "新 模型" / "model.safetensors")
    assert all(torch.allclose(ours[name], tensor, rtol=2**-9, atol=2**-12) for name, tensor in expected.items())
    assert vocabularies()["base"] == (tmp_path / "新 模型" / "tokenizer.model").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# adapters that are not merged

IDS = [1, 300, 17, 5, 419, 5, 88, 2, 33]
UNMERGED = ["alpaca_lora_16", "current_peft", "current_peft saving embeddings", "byte_order_mark", "llama_factory"]
UNMERGED += ["names with default", "names with module", "bare names", "names with base_layer"]


@pytest.mark.parametrize("name", UNMERGED)
def test_every_command_reads_an_adapter_as_merge_does(tmp_path, name):
    """PEFT would load names that it does not know as an untrained LoRA, with a warning."""
    base, [added], _ = made(tmp_path, name)
    weights = {name: tensor.float() for name, tensor in base.weights.items()}
    expected = logits_of(base.folder, merged(weights, added))
    plain = logits_of(base.folder, weights)
    assert (expected - plain).abs().max() > 0.1
    for merge_lora in (False, True):
        model, _ = load_for_inference(added.folder, None, {}, str(base.folder), None, "fp32", "cpu", merge=merge_lora)
        with torch.no_grad():
            torch.testing.assert_close(model(torch.tensor([IDS])).logits, expected, atol=1e-4, rtol=1e-4)
            if not merge_lora:
                with model.disable_adapter():
                    torch.testing.assert_close(model(torch.tensor([IDS])).logits, plain, atol=1e-4, rtol=1e-4)


def logits_of(folder, weights):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits


def test_adapters_that_do_not_fit_are_refused_unmerged(tmp_path):
    """Case by case with the reason, before the base is loaded."""

    def load(added, base):
        load_for_inference(added.folder, None, {}, str(base.folder), None, "fp32", "cpu")

    base = hf.converted(tmp_path / "base")
    with pytest.raises(UserError, match="brings embeddings for 797 pieces, .* has 512; merge it into its base"):
        load(lora.chinese_llama(tmp_path / "lora1"), base)
    with pytest.raises(
        UserError,
        match=r"changes model.layers.0.self_attn.q_proj.weight, of size 32 x 32, and the model has one of 64 x 64",
    ):
        load(lora.alpaca_lora(tmp_path / "lora2", hf.SHAPE_OF_33), base)
    with pytest.raises(UserError, match="an empty adapter \\(443 bytes\\)"):
        load(lora.empty_443(tmp_path / "lora3"), base)
    with pytest.raises(UserError, match="its base, 'decapoda-research/llama-7b-hf', is not here; name its folder with"):
        load_for_inference(lora.alpaca_lora(tmp_path / "lora4").folder, None, {}, None, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("instructs", [], '"instructs" must be a list of instructions, got []'),
        ("instructs", None, '"instructs" must be a list of instructions, got None'),
        ("labels", "人名", "\"labels\" must be a list of entity types, or null, got '人名'"),
        ("tokenizer_sha256", 5, '"tokenizer_sha256" must be a string, got 5'),
        ("text_tokens", "many", '"text_tokens" must be a whole number, 0 or more'),
        ("max_seq_length", "512", '"config" has no max_seq_length of type int'),
        ("model_dir", None, '"config" has no model_dir of type str'),
    ],
)
def test_train_args_with_a_wrong_or_missing_key_is_one_line(tmp_path, key, value, message):
    facts = json.loads((SHIPPED / "train_args.json").read_text(encoding="utf-8"))
    read_facts(SHIPPED)
    if key in facts:
        facts[key] = value
    elif key == "model_dir":
        facts["config"].pop(key)
    else:
        facts["config"][key] = value
    (tmp_path / "train_args.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_facts(tmp_path)
    assert f"{tmp_path}/train_args.json: {message}" in str(error.value)


@pytest.mark.parametrize(
    ("adapter", "facts", "instruct", "labels", "expected"),
    [
        (None, {}, None, None, {}),
        (
            None,
            {},
            None,
            "人物,城市",
            {"labels": ["人物", "城市"], "instructs": [INSTRUCT.replace("{labels}", "人物、城市")]},
        ),
        ("a", {}, "找{labels}：\\n", "人物", {"labels": ["人物"], "instructs": ["找人物：\n"]}),
        ("a", {}, "翻译", None, {"labels": None, "instructs": ["翻译"]}),
        ("a", {"labels": ["人名"], "instructs": ["x"]}, None, "none", {"labels": None, "instructs": ["x"]}),
        ("a", {"labels": ["人名"], "instructs": ["x"]}, "y", None, {"labels": ["人名"], "instructs": ["y"]}),
        ("a", {}, None, "人名", None),
        ("a", {}, None, None, None),
    ],
)
def test_what_is_asked(adapter, facts, instruct, labels, expected):
    if expected is None:
        with pytest.raises(UserError, match="has no train_args.json, for another tool made it"):
            with_task(adapter, facts, instruct, labels)
    else:
        assert with_task(adapter, facts, instruct, labels) == expected
