"""merge_llama_with_chinese_lora.py against W + alpha/r B A, against PEFT, and what it says about bad input."""

import copy
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alpaca.answering.generate import generate
from alpaca.models import base_files
from alpaca.models.adapter_files import adapter_sha256
from alpaca.models.adapters import find_adapter
from alpaca.models.base import load_for_inference
from alpaca.models.templates import TEMPLATES, encode_prompts, message_of
from alpaca.scoring.calibration import Calibration, read_calibration, write_calibration
from dataset import QUERY_PREFIX
from harness import run_script as run_command
from reference_llama import CUT, feed_forward_width, logits

ROOT = Path(__file__).resolve().parent.parent.parent
HUB, SHIPPED = ROOT / "model_hub", ROOT / "checkpoint/demo/shipped/adapter_model"
sys.path.insert(0, str(HUB))
import convert_llama_weights_to_hf as convert
import merge_llama_with_chinese_lora as merge

from alpaca.weights import llama_layout
from alpaca.weights.checksums import PUBLISHED
from config_utils import run_script

IDS = [1, 300, 17, 5, 419, 5, 88, 2, 33]
ROWS = {"base": 420, "merged": 508, "alpaca": 509}
LINEAR = {
    **dict.fromkeys(["self_attn.q_proj", "self_attn.o_proj"], (64, 64)),
    **dict.fromkeys(["self_attn.k_proj", "self_attn.v_proj"], (32, 64)),
    **dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], (176, 64)),
    "mlp.down_proj": (64, 176),
}
# As the adapters published in 2023 have them, keys that later versions of PEFT dropped included.
OLD_CONFIG = {
    "base_model_name_or_path": "somewhere/llama-7b-hf",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": ["embed_tokens", "lm_head"],
    "peft_type": "LORA",
    "r": 4,
    "target_modules": [name.partition(".")[2] for name in LINEAR],
    "task_type": "CAUSAL_LM",
}


def run(base, adapters, output_dir, *options):
    argv = ["--base_model", base, "--lora_model", ",".join(map(str, adapters)), "--output_dir", output_dir, *options]
    run_script(merge.main, merge.CONFIG, merge.__file__, [str(option) for option in argv])
    return output_dir


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def make_base(folder, tokenizer_file, dtype=torch.float32, seed=0, **changes):
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape | {"num_key_value_heads": 2, "vocab_size": ROWS["base"]} | changes)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # LLaMA's own start is so small that logits hardly depend on the layers
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1)
    model.to(dtype).save_pretrained(folder)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    return folder


def adapter_tensors(rows, rank=4, seed=0, dtype=torch.float16, layers=2):
    """Tensors by the names under which the published adapters hold them."""
    random = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return (torch.randn(shape, generator=random) * 0.1).to(dtype)

    tensors = {}
    for i in range(layers):
        for name, (rows_out, columns) in LINEAR.items():
            module = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{module}.lora_A.weight"] = matrix(rank, columns)
            tensors[f"{module}.lora_B.weight"] = matrix(rows_out, rank)
    if rows:
        tensors["base_model.model.model.embed_tokens.weight"] = matrix(rows, 64)
        tensors["base_model.model.lm_head.weight"] = matrix(rows, 64)
    return tensors


def write_adapter(folder, tensors, tokenizer_file=None, **changes):
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(OLD_CONFIG | changes))
    if tokenizer_file:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    return folder


@pytest.fixture
def chain(tmp_path, tokenizer_models):
    """base/ in float16 and the adapters llama/ and alpaca/, as in the README's chain."""
    make_base(tmp_path / "base", tokenizer_models / "base.model", torch.float16)
    for seed, (name, vocabulary) in enumerate({"llama": "merged", "alpaca": "alpaca"}.items(), 1):
        tensors = adapter_tensors(ROWS[vocabulary], seed=seed)
        write_adapter(tmp_path / name, tensors, tokenizer_models / f"{vocabulary}.model")
    return tmp_path


def by_hand(weights, adapters, scaling=32 / 4):
    """W + alpha/r B A in float32 for each adapter in turn, rounded to float16 after each."""
    for tensors in adapters:
        for name in weights:
            key = f"base_model.model.{name}"
            if key in tensors:
                weights[name] = tensors[key].clone()
            module = key.removesuffix(".weight")
            if f"{module}.lora_A.weight" in tensors:
                a, b = tensors[f"{module}.lora_A.weight"].float(), tensors[f"{module}.lora_B.weight"].float()
                weights[name] = (weights[name].float() + scaling * (b @ a)).half()
    return weights


def test_two_adapters_by_hand(chain, tokenizer_models, capsys):
    out = run(chain / "base", [chain / "llama", chain / "alpaca"], chain / "out")
    adapters = [torch.load(chain / name / "adapter_model.bin") for name in ("llama", "alpaca")]
    expected = by_hand(weights_of(chain / "base"), adapters)
    ours = weights_of(out)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == torch.float16
        # one unit in the last place: the order of additions within B A is the matrix product's
        torch.testing.assert_close(ours[name], tensor, rtol=2**-10, atol=2**-14)
    changed = [name for name, tensor in weights_of(chain / "base").items() if not torch.equal(tensor, ours[name])]
    assert len(changed) == 2 * 7 + 2  # all but the norms
    assert torch.equal(ours["lm_head.weight"], adapters[1]["base_model.model.lm_head.weight"])

    assert (out / "tokenizer.model").read_bytes() == (tokenizer_models / "alpaca.model").read_bytes()
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float16 and model.config.vocab_size == ROWS["alpaca"]
    assert model.generation_config.pad_token_id == ROWS["alpaca"] - 1
    sp = SentencePieceProcessor(model_file=str(tokenizer_models / "alpaca.model"))
    text = "去年，北京大学生王明华在长江沙市 😀</s>\n"
    assert AutoTokenizer.from_pretrained(out)(text, add_special_tokens=False)["input_ids"] == sp.encode(text)
    size = sum(file.stat().st_size for file in out.iterdir())
    first, *sums, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"将写入 {out}：huggingface，0.00 GB（磁盘剩余 ")
    files = [chain / "llama" / "adapter_model.bin", chain / "alpaca" / "adapter_model.bin"]
    files += [chain / "base" / "model.safetensors", chain / "alpaca" / "tokenizer.model"]
    assert sums == [f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}  {file}" for file in files]
    assert last.startswith(f"已写入 {out}：huggingface，{size:,} 字节，词表 509，合并了 2 个 LoRA，")


def test_sum_is_rounded_after_each_adapter(chain):
    tensors = {name: torch.full_like(t, 0.25) for name, t in adapter_tensors(0).items()}
    up = {name: torch.full_like(t, 256) if "lora_B" in name else t for name, t in tensors.items()}
    down = {name: -t if "lora_B" in name else t for name, t in up.items()}
    for name, adapter in {"up": up, "down": down}.items():
        write_adapter(chain / name, adapter, modules_to_save=None)
    ours = weights_of(run(chain / "base", [chain / "up", chain / "down"], chain / "out"))
    # beside 2048 float16 has no digits left for a weight of about 0.1
    assert not ours["model.layers.0.mlp.up_proj.weight"].any()
    expected = by_hand(weights_of(chain / "base"), [up, down])
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("safetensors", [True, False])
def test_logits_equal_those_of_base_and_adapters_in_peft(tmp_path, tokenizer_models, safetensors):
    """Three adapters made and merged by PEFT in float32: with a vocabulary, with odd settings, and as NER's are."""
    vocabulary = {"modules_to_save": ["embed_tokens", "lm_head"]}
    odd = {"rank_pattern": {"q_proj": 8, r"layers.1.mlp.*": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 16}}
    settings = {
        "merged": {"r": 4, "lora_alpha": 8, **vocabulary},
        "alpaca": {"r": 4, "lora_alpha": 6, "use_rslora": True, **odd, **vocabulary},
        None: {"r": 2, "lora_alpha": 3},
    }
    make_base(tmp_path / "base", tokenizer_models / "base.model")
    model, folders = LlamaForCausalLM.from_pretrained(tmp_path / "base"), []
    for i, (tokenizer, config) in enumerate(settings.items()):
        folder = tmp_path / f"adapter{i}"
        folders.append(folder)
        if tokenizer:
            model.resize_token_embeddings(ROWS[tokenizer], mean_resizing=False)
        adapter = get_peft_model(
            copy.deepcopy(model), LoraConfig(target_modules=OLD_CONFIG["target_modules"], **config)
        )
        for parameter in adapter.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1 if parameter.requires_grad else parameter.data
        adapter.save_pretrained(folder)
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        if tokenizer:
            shutil.copyfile(tokenizer_models / f"{tokenizer}.model", folder / "tokenizer.model")
        if not safetensors:
            torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
            (folder / "adapter_model.safetensors").unlink()
    merged = LlamaForCausalLM.from_pretrained(run(tmp_path / "base", folders, tmp_path / "out"))
    with torch.no_grad():
        ours, expected = merged(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_order_of_adapters_is_kept(chain, tokenizer_models):
    """Two adapters of one vocabulary: the embeddings of the last one stay, and the sums are rounded in this order."""
    for seed, name in ((5, "one"), (6, "two")):
        write_adapter(chain / name, adapter_tensors(508, seed=seed), tokenizer_models / "merged.model")
    results = {}
    for order in (("one", "two"), ("two", "one")):
        expected = by_hand(
            weights_of(chain / "base"), [torch.load(chain / name / "adapter_model.bin") for name in order]
        )
        results[order] = weights_of(run(chain / "base", [chain / name for name in order], chain / "-".join(order)))
        assert all(torch.equal(results[order][name], tensor) for name, tensor in expected.items())
    one, two = results.values()
    differ = [name for name in one if not torch.equal(one[name], two[name])]
    assert {"lm_head.weight", "model.layers.1.mlp.down_proj.weight"} <= set(differ)


def test_fan_in_fan_out_means_what_it_means_to_peft(tmp_path, tokenizer_models):
    """PEFT switches it off for nn.Linear, so the factors are never transposed; q_proj is square and would hide it."""
    base = make_base(tmp_path / "base", tokenizer_models / "base.model")
    tensors = {name: tensor.float() for name, tensor in adapter_tensors(0).items()}
    adapter = write_adapter(tmp_path / "ner", tensors, fan_in_fan_out=True, modules_to_save=None)
    ours = weights_of(run(base, [adapter], tmp_path / "out"))
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module"):
        peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    for name, tensor in peft.state_dict().items():
        torch.testing.assert_close(ours[name], tensor)


def test_tied_embeddings_are_written_apart(chain, tokenizer_models):
    base = make_base(chain / "tied", tokenizer_models / "base.model", tie_word_embeddings=True)
    assert "lm_head.weight" not in weights_of(base)
    out = run(base, [ner_adapter(chain / "ner", tokenizer_models / "base.model")], chain / "out")
    assert torch.equal(weights_of(out)["lm_head.weight"], weights_of(base)["model.embed_tokens.weight"])
    assert not LlamaForCausalLM.from_pretrained(out).config.tie_word_embeddings


def rename(tensors, how):
    names = {}
    for name, tensor in tensors.items():
        if how == "without prefix":
            name = name.removeprefix("base_model.model.")
        if how == "as in the model":
            name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
            for module in ("embed_tokens", "lm_head"):
                if f"{module}." in name:
                    names[name.replace(f"{module}.", f"{module}.original_module.")] = torch.zeros(420, 64)
                    name = name.replace(f"{module}.", f"{module}.modules_to_save.default.")
        names[name] = tensor
    return names


@pytest.mark.parametrize("how", ["without prefix", "as in the model"])
def test_names_of_all_peft_versions(chain, tokenizer_models, how):
    tensors = torch.load(chain / "llama" / "adapter_model.bin")
    renamed = rename(tensors, how)
    assert not renamed.keys() & tensors.keys()
    write_adapter(chain / "renamed", renamed, tokenizer_models / "merged.model")
    expected = weights_of(run(chain / "base", [chain / "llama"], chain / "out1"))
    ours = weights_of(run(chain / "base", [chain / "renamed"], chain / "out2"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("files", ["bin", "bin shards", "safetensors shards"])
def test_base_in_every_file_format(chain, files):
    expected = weights_of(run(chain / "base", [chain / "llama"], chain / "out1"))
    tensors = weights_of(chain / "base")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # saved by old versions of transformers
    (chain / "base" / "model.safetensors").unlink()
    kind, save = ("pytorch_model.bin", torch.save) if "bin" in files else ("model.safetensors", save_file)
    if "shards" in files:
        where = {name: f"{i % 2}-{kind}" for i, name in enumerate(tensors)}
        for file in set(where.values()):
            save({name: tensors[name] for name in tensors if where[name] == file}, chain / "base" / file)
        (chain / "base" / f"{kind}.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        save(tensors, chain / "base" / kind)
    ours = weights_of(run(chain / "base", [chain / "llama"], chain / "out2"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("ffn", [176, 171, 300])
def test_pth_is_metas_layout_and_converts_back(tmp_path, tokenizer_models, ffn):
    base = make_base(tmp_path / "base", tokenizer_models / "base.model", intermediate_size=ffn, rope_theta=5000.0)
    tensors = {n: t.float() for n, t in adapter_tensors(508).items() if "mlp" not in n}
    adapter = write_adapter(tmp_path / "llama", tensors, tokenizer_models / "merged.model")
    expected = run(base, [adapter], tmp_path / "hf")
    out = run(base, [adapter], tmp_path / "7B", "--output_type=pth", "--offload_dir=unused")
    assert sorted(file.name for file in out.iterdir()) == ["consolidated.00.pth", "params.json", "tokenizer.model"]

    params, weights = json.loads((out / "params.json").read_text()), torch.load(out / "consolidated.00.pth")
    assert params["vocab_size"] == 508 and feed_forward_width(params) == ffn
    with torch.no_grad():
        ours = LlamaForCausalLM.from_pretrained(expected)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(weights, params, IDS), ours, atol=1e-4, rtol=1e-5)

    argv = ["--input_dir", str(tmp_path), "--model_size=7B", "--output_dir", str(tmp_path / "back")]
    run_script(convert.main, convert.CONFIG, convert.__file__, argv)
    back = weights_of(tmp_path / "back")
    assert back.keys() == weights_of(expected).keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights_of(expected).items())
    assert weights["layers.0.attention.wq.weight"].dtype == torch.float32
    assert (out / "consolidated.00.pth").stat().st_size < 1.1 * sum(
        tensor.nbytes for tensor in weights.values()
    ) + 20000


@pytest.mark.parametrize("n_files", [1, 2, 4, 8])
def test_two_adapters_to_pth_and_back_bit_for_bit(tmp_path, tokenizer_models, n_files):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8 if n_files == 8 else 4}
    base, padded = make_base(tmp_path / "base", tokenizer_models / "base.model", torch.float16, **heads), 512
    folders = []
    for seed, name in enumerate(("one", "two"), 1):
        tensors = {name: tensor for name, tensor in adapter_tensors(padded, seed=seed).items() if "_proj" not in name}
        more = adapter_tensors(0, seed=seed)
        tensors |= {name: more[name] for name in more if "q_proj" in name or "down_proj" in name}
        folders.append(write_adapter(tmp_path / name, tensors, tokenizer_models / "merged.model"))
    expected = weights_of(run(base, folders, tmp_path / "hf"))
    out = run(base, folders, tmp_path / "7B", "--output_type=pth", f"--pth_files={n_files}")
    assert len(list(out.glob("consolidated.*.pth"))) == n_files
    params = json.loads((out / "params.json").read_text())
    assert params["vocab_size"] == padded

    argv = ["--input_dir", str(tmp_path), "--model_size=7B", "--output_dir", str(tmp_path / "back")]
    run_script(convert.main, convert.CONFIG, convert.__file__, argv)
    back = weights_of(tmp_path / "back")
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)

    # joined as Meta's own model parallelism cuts, and computed by its formulas
    files = [torch.load(file, weights_only=True) for file in sorted(out.glob("consolidated.*.pth"))]
    parts = {name: [file[name] for file in files] for name in files[0]}
    cuts = {name: CUT.get(name.split(".")[-2]) for name in parts}
    joined = {n: part[0] if cuts[n] is None else torch.cat(part, dim=cuts[n]) for n, part in parts.items()}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        ours = model(torch.tensor([IDS])).logits[0]
    weights = {name: tensor.float() for name, tensor in joined.items()}
    torch.testing.assert_close(logits(weights, params, IDS), ours, atol=1e-4, rtol=1e-5)


def test_pth_is_an_archive_as_torch_save_makes_it(chain, capsys):
    """Bytes that other readers can check (CRC) and map (aligned), the same bytes each time, and their sum printed."""
    out = run(chain / "base", [chain / "llama"], chain / "7B", "--output_type=pth")
    file = out / "consolidated.00.pth"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"sha256 {digest}  {file}" in capsys.readouterr().out.splitlines()
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        names = {name.partition("/")[2].partition("/")[0] for name in archive.namelist()}
        assert names == {"data.pkl", "byteorder", "data", "version"}
    mapped, loaded = torch.load(file, mmap=True, weights_only=True), torch.load(file, weights_only=False)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values())
    assert mapped.keys() == loaded.keys() and all(torch.equal(mapped[name], loaded[name]) for name in mapped)
    run(chain / "base", [chain / "llama"], chain / "7B", "--output_type=pth")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


def test_number_of_pth_files(chain, capsys):
    assert [llama_layout.count_files(config_like(dim), -1) for dim in (4096, 5120, 6656, 8192)] == [1, 2, 4, 8]
    assert llama_layout.count_files(config_like(5120) | {"vocab_size": 49953}, -1) == 2  # Chinese-LLaMA-13B: an odd one
    base, llama = chain / "base", [chain / "llama"]
    line = fails(capsys, base, llama, chain / "out", "--output_type=pth", "--pth_files=8")
    assert "--pth_files=8: 4 heads cannot be shared out equally; use --pth_files=1" in line
    assert "--pth_files=0: " in fails(capsys, base, llama, chain / "out", "--output_type=pth", "--pth_files=0")


def config_like(dim):
    return {"hidden_size": dim, "num_attention_heads": dim // 128, "intermediate_size": 256 * 8, "vocab_size": 32000}


@pytest.mark.parametrize(
    ("dim", "ffn", "expected"),
    [(4096, 11008, {"multiple_of": 256}), (5120, 13824, {"multiple_of": 256}), (8192, 28672, None), (256, 688, None)],
)
def test_params_json_gives_the_real_models_width(dim, ffn, expected):
    config = {"hidden_size": dim, "intermediate_size": ffn, "num_attention_heads": 32, "num_hidden_layers": 2}
    params = llama_layout.params_of(config | {"rms_norm_eps": 1e-6, "vocab_size": 49954})
    assert feed_forward_width(params) == ffn
    assert expected is None or expected.items() <= params.items() and "ffn_dim_multiplier" not in params


def ner_adapter(folder, tokenizer_file, **train_args):
    write_adapter(folder, adapter_tensors(0), modules_to_save=None)
    digest = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    columns = {"instruct_column": "instruct", "query_column": "query", "response_column": "answer"}
    config = {"model_dir": "base", "max_seq_length": 512, **columns}
    facts = {"prompt_sha256": TEMPLATES["alpaca"].sha256, "tokenizer_sha256": digest, "instructs": ["找出实体"]}
    train_args = {"config": config, **facts} | train_args
    (folder / "train_args.json").write_text(json.dumps(train_args))
    return folder


def test_ner_adapter_keeps_the_bases_tokenizer(chain, tokenizer_models, capsys):
    file = tokenizer_models / "base.model"
    out = run(chain / "base", [ner_adapter(chain / "ner", file)], chain / "out")
    assert (out / "tokenizer.model").read_bytes() == file.read_bytes()
    assert LlamaForCausalLM.from_pretrained(out).config.vocab_size == ROWS["base"]
    other = ner_adapter(chain / "other", tokenizer_models / "alpaca.model")
    assert "trained with another tokenizer" in fails(capsys, chain / "base", [other], chain / "out2")
    original = ner_adapter(chain / "original", file, config=None, lora_r=8)
    assert "an adapter of the original scripts" in fails(capsys, chain / "base", [original], chain / "out2")


def test_a_calibration_goes_with_the_adapter_that_it_was_fitted_for(chain, tokenizer_models):
    adapter = ner_adapter(chain / "calibrated", tokenizer_models / "base.model")
    write_calibration(adapter, Calibration(0.5, -1.0), adapter_sha256(adapter), [])
    out = run(chain / "base", [adapter], chain / "out3")
    assert read_calibration(out) == Calibration(0.5, -1.0)
    write_calibration(adapter, Calibration(0.5, -1.0), "another's", [])
    assert read_calibration(run(chain / "base", [adapter], out)) is None  # nor does the older one stay


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """chinese-alpaca-tiny, converted and merged from the embedded weights."""
    folder = tmp_path_factory.mktemp("tiny")
    argv = ["--input_dir", str(HUB), "--model_size=tiny", "--output_dir", str(folder / "tiny-hf")]
    run_script(convert.main, convert.CONFIG, convert.__file__, argv)
    adapters = [HUB / f"chinese-{name}-plus-lora-tiny" for name in ("llama", "alpaca")]
    return run(folder / "tiny-hf", adapters, folder / "chinese-alpaca-tiny")


def test_verify_compares_with_peft(embedded, tmp_path, capsys):
    """A wrong number, and what is written as pth: test_defects.py."""
    run(embedded, [SHIPPED], tmp_path / "ner", "--verify")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"验证：3/3 个贪心答案相同，logits 最大相差 0\.\d{4}（logits 的标准差 \d\.\d{4}）", lines[-2])
    ours, merged = (
        next(line.partition("：")[2].strip() for line in lines if line.startswith(start))
        for start in ("  基座+LoRA：", "  合并后：")
    )
    assert ours == merged and "苏晓岚_人名" in ours


def test_merged_ner_adapter_answers_as_base_and_adapter(embedded, tmp_path):
    """In this project and in plain transformers, with the tokenizer that AutoTokenizer finds."""
    with (ROOT / "data/demo/ori_data/dev.txt").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(6), strict=False)]
    folder, train_args, facts = find_adapter("demo", str(SHIPPED))
    prompts = [message_of(facts["instructs"][0], QUERY_PREFIX + text) for text in texts]
    model, tokenizer = load_for_inference(folder, train_args, facts, str(embedded), None, "fp32", "cpu")
    ids = encode_prompts(tokenizer, prompts)
    expected = [answer.text for answer in generate(model, tokenizer, ids, 64, 4)]
    assert len(set(expected)) > 3

    out = run(embedded, [SHIPPED], tmp_path / "ner")
    model, tokenizer = load_for_inference(None, None, {}, str(out), None, "fp32", "cpu")
    assert [answer.text for answer in generate(model, tokenizer, ids, 64, 4)] == expected

    model, tokenizer = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), AutoTokenizer.from_pretrained(out)
    for prompt, answer in zip(prompts, expected, strict=True):
        text = TEMPLATES["alpaca"].prompt(prompt)
        ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)[0]
        new = new[ids.shape[1] :].tolist()
        new = new[: new.index(2)] if 2 in new else new
        assert SentencePieceProcessor(model_file=str(out / "tokenizer.model")).decode(new) == answer


def test_the_shipped_adapter_keeps_the_bases_tasks(embedded):
    """At least 90 % of what the base answers exactly, of 12 questions of each task on held-out templates and names."""
    pytest.importorskip("jieba", reason="the questions are made with jieba's dictionary")
    from embedded_model.figures import held_out_tasks, with_bos

    questions = [question for found in held_out_tasks(seed=1, count=12).values() for question in found]
    right = []
    for lora_model in (None, str(SHIPPED)):
        model, tokenizer = load_for_inference(
            *find_adapter("demo", lora_model), str(embedded), None, "fp32", "cpu", merge=True
        )
        ids = with_bos(tokenizer, questions)
        answers = generate(model, tokenizer, ids, 120, 48)
        right.append(sum(a.text == gold for a, (_, gold) in zip(answers, questions, strict=True)))
    base, shipped = right
    print(f"exact answers of {len(questions)}: the base {base}, with the shipped adapter {shipped}")
    assert len(questions) == 96 and base >= 48  # a base that knows nothing has nothing to forget
    assert shipped >= 0.9 * base, f"of {base} exact answers {shipped} are left"


def fails(capsys, base, adapters, output_dir, *options):
    """The one line of a run that must end in exit code 2 and write nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run(base, adapters, output_dir, *options)
    assert error.value.code == 2 and not Path(output_dir).exists()
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_wrong_order_and_mixed_up_tokenizers_are_refused(chain, tokenizer_models, capsys):
    base, llama, alpaca = chain / "base", chain / "llama", chain / "alpaca"
    line = fails(capsys, base, [alpaca, llama], chain / "out")
    assert f"{llama}: has embeddings for 508 pieces, but {alpaca} before it has 509" in line and "order" in line

    shutil.copyfile(tokenizer_models / "alpaca.model", llama / "tokenizer.model")
    line = fails(capsys, base, [llama, alpaca], chain / "out")
    assert (
        f"{llama}: with this adapter the model has embeddings for 508 pieces, but its tokenizer.model has 509;" in line
    )
    (llama / "tokenizer.model").unlink()
    line = fails(capsys, base, [llama, alpaca], chain / "out")
    assert "508 pieces" in line and f"has 420 (the adapter has none, so that of {base} was taken)" in line

    (base / "tokenizer.model").unlink()
    assert "--model_size=tokenizer_only" in fails(capsys, base, [llama], chain / "out")
    shutil.copyfile(tokenizer_models / "alpaca.model", base / "tokenizer.model")
    line = fails(capsys, base, [ner_adapter(chain / "ner", tokenizer_models / "alpaca.model")], chain / "out")
    assert f"{base}/tokenizer.model has 509 pieces, but {base} has embeddings for 420" in line


@pytest.mark.slow
def test_the_published_sizes_mixed_up_are_explained(tmp_path, tokenizer_models, capsys):
    """32000, 49953 and 49954: who belongs to whom, and which LoRA goes first, stands in the message."""
    for name, pieces in {"base": 32000, "llama": 49953, "alpaca": 49954}.items():
        proto = sentencepiece_model_pb2.ModelProto.FromString((tokenizer_models / "base.model").read_bytes())
        for i in range(len(proto.pieces), pieces):
            proto.pieces.add(piece=f"<{i}>", score=0.0)
        (tmp_path / f"{name}.model").write_bytes(proto.SerializeToString())
    base = make_base(tmp_path / "7B-hf", tmp_path / "base.model", torch.float16, vocab_size=32000)
    folders = {name: tmp_path / f"chinese-{name}-lora" for name in ("llama", "alpaca")}
    for name, rows in {"llama": 49953, "alpaca": 49954}.items():
        write_adapter(folders[name], adapter_tensors(rows), tmp_path / f"{name}.model")
    llama, alpaca, out = folders["llama"], folders["alpaca"], tmp_path / "out"
    assert "of the Chinese-LLaMA LoRAs 49953, that of the Chinese-Alpaca LoRAs 49954" in merge.CHAIN

    line = fails(capsys, base, [alpaca, llama], out)
    assert f"{llama}: has embeddings for 49953 pieces, but {alpaca} before it has 49954" in line
    assert line.endswith(merge.CHAIN)
    shutil.copyfile(tmp_path / "llama.model", alpaca / "tokenizer.model")
    line = fails(capsys, base, [llama, alpaca], out)
    assert f"{alpaca}: with this adapter the model has embeddings for 49954 pieces, but its tokenizer.model" in line
    assert "tokenizer.model has 49953; put the" in line and line.endswith(merge.CHAIN)
    (alpaca / "tokenizer.model").unlink()
    line = fails(capsys, base, [alpaca], out)
    assert f"has 32000 (the adapter has none, so that of {base} was taken)" in line and line.endswith(merge.CHAIN)
    shutil.copyfile(tmp_path / "alpaca.model", alpaca / "tokenizer.model")
    run(base, [llama, alpaca], out)
    assert len(weights_of(out)["lm_head.weight"]) == 49954


def test_a_published_alpaca_plus_needs_llama_plus(chain, tokenizer_models, capsys, monkeypatch):
    """Its shapes fit LLaMA just as well, so nothing but the published sum can tell."""
    base = make_base(chain / "7B-hf", tokenizer_models / "base.model", vocab_size=32000)
    monkeypatch.setattr(base_files, "UNUSED_ROWS", 32000)  # the tests' tokenizer has fewer pieces than LLaMA's
    for name, sum_of in {"llama": "LLaMA-7B", "alpaca": "Alpaca-Plus-7B", "plus": "LLaMA-Plus-7B"}.items():
        shutil.rmtree(chain / name, ignore_errors=True)
        tensors = adapter_tensors(0, seed=len(name))
        file = write_adapter(chain / name, tensors, modules_to_save=None) / "adapter_model.bin"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setitem(PUBLISHED, digest, f"Chinese-{sum_of} adapter_model.bin")
    expected = (
        f"{chain}/alpaca: Chinese-Alpaca-Plus-7B adapter_model.bin goes onto Chinese-LLaMA-Plus-7B adapter_model.bin"
    )
    assert expected in fails(capsys, base, [chain / "alpaca"], chain / "out")
    assert expected in fails(capsys, base, [chain / "llama", chain / "alpaca"], chain / "out")
    run(base, [chain / "plus", chain / "alpaca"], chain / "out")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 32}, "changes a 64 x 64 matrix model.layers.0.self_attn.q_proj.weight, but that of"),
        ({"num_hidden_layers": 1}, "its tensor model.layers.1.self_attn.q_proj.weight has no counterpart in"),
        ({"intermediate_size": 88}, "model.layers.0.mlp.gate_proj.weight, but that of"),
    ],
)
def test_wrong_base_is_refused(chain, tokenizer_models, capsys, shape, message):
    make_base(chain / "other", tokenizer_models / "base.model", **shape)
    assert message in fails(capsys, chain / "other", [chain / "llama"], chain / "out")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"base_model.model.model.norm.bias": 64}, {}, "its tensor model.norm.bias has no counterpart"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": 4},
            {},
            "a LoRA on embeddings (model.embed_tokens) is unknown here",
        ),
        ({"model.lm_head.lora_B.weight": 4}, {}, "model.lm_head has no lora_A"),
        ({"lm_head.weight": 4}, {}, "holds lm_head.weight twice, the second time as lm_head.weight"),
        ({}, {"r": 8}, "lora_A is 4 x 64 and lora_B 64 x 4, but adapter_config.json says r=8"),
        ({}, {"r": 0}, '"r" and "lora_alpha" must be numbers, got 0, 32.0'),
        ({}, {"rank_pattern": {"(": 2}}, "\"rank_pattern\": '(' is no pattern"),
        ({}, {"alpha_pattern": [2]}, '"alpha_pattern" must be an object, got [2]'),
        ({}, {"lora_bias": True}, 'adapter_config.json: "lora_bias": True is unknown here'),
        ({}, {"r": None}, '"r" and "lora_alpha" must be numbers, got None, 32.0'),
        ({}, {"use_dora": True}, 'adapter_config.json: "use_dora": True is unknown here'),
        ({}, {"bias": "all"}, "adapter_config.json: \"bias\": 'all' is unknown here"),
        ({}, {"init_lora_weights": "pissa"}, "\"init_lora_weights\": 'pissa' is unknown here"),
        ({}, {"peft_type": "IA3"}, "\"peft_type\" is 'IA3'; only LORA"),
        ({}, {"modules_to_save": ["embed_tokens", "norm"]}, "lists norm in modules_to_save, but it is not in the file"),
    ],
)
def test_what_is_not_understood_is_refused(chain, tokenizer_models, capsys, change, config, message):
    tensors = torch.load(chain / "llama" / "adapter_model.bin") | {name: torch.ones(n) for name, n in change.items()}
    write_adapter(chain / "odd", tensors, tokenizer_models / "merged.model", **config)
    assert message in fails(capsys, chain / "base", [chain / "odd"], chain / "out")


def test_empty_untrained_and_half_adapters_are_refused(chain, tokenizer_models, capsys):
    torch.save({}, chain / "adapter_model.bin")  # what a patched state_dict left in many a folder
    bytes_of_nothing = (chain / "adapter_model.bin").stat().st_size
    full = adapter_tensors(508)
    zero = {name: t * ("lora_B" not in name) for name, t in adapter_tensors(0).items()}
    half = {name: tensor for name, tensor in full.items() if "lm_head" not in name}
    for name, tensors, saved, message in [
        ("empty", {}, None, f"adapter_model.bin: an empty adapter ({bytes_of_nothing} bytes), nothing to merge"),
        ("zero", zero, None, "every lora_B is zero"),
        ("half", half, ["embed_tokens"], "embed_tokens has 508 rows and lm_head 420"),
        ("nan", full | {"base_model.model.lm_head.weight": torch.full((508, 64), torch.nan)}, None, "are not finite"),
    ]:
        write_adapter(chain / name, tensors, tokenizer_models / "merged.model", modules_to_save=saved)
        assert message in fails(capsys, chain / "base", [chain / name], chain / "out")


def test_missing_and_damaged_files_are_named(chain, capsys):
    base, llama, out = chain / "base", chain / "llama", chain / "out"
    assert f"{chain}/7B-hf: no such folder; put the model there, or make" in fails(
        capsys, chain / "7B-hf", [llama], out
    )
    assert f"{chain}/lora: no such folder; download" in fails(capsys, base, [chain / "lora"], out)
    assert "several folders are joined by commas" in fails(capsys, base, [f"{chain}/lora-1 {chain}/lora-2"], out)
    assert "adapter_config.json: no such file" in fails(capsys, base, [base], out)
    line = fails(capsys, llama, [llama], out)
    assert f"{llama}: no model here (config.json is missing); adapter_config.json is a LoRA's; name its folder" in line
    assert "expected huggingface or pth, got 'hf'" in fails(capsys, base, [llama], out, "--output_type=hf")
    assert "--lora_model is missing" in fails(capsys, base, [], out)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert f"{weights}: damaged" in fails(capsys, base, [llama], out)
    weights.unlink()
    assert "no weights here (model.safetensors is missing); put the model there" in fails(capsys, base, [llama], out)
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}')
    assert f"{base}/model-1.safetensors: no such file" in fails(capsys, base, [llama], out)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("llama/adapter_config.json", b'{"r": 4,', "adapter_config.json: not valid JSON"),
        ("llama/adapter_config.json", b"[]", "adapter_config.json: expected a JSON object, got list"),
        ("llama/adapter_model.bin", pickle.dumps(Evil(), protocol=2), "adapter_model.bin: damaged"),
        ("llama/adapter_model.bin", b"version https://git-lfs.github.com/spec/v1", "adapter_model.bin: is a Git LFS"),
        ("llama/tokenizer.model", b"<html>", "tokenizer.model: is an HTML page"),
        ("llama/tokenizer.model", b"version https://git-lfs.github.com/spec/v1", "tokenizer.model: is a Git LFS"),
        ("llama/tokenizer.model", b"half", "tokenizer.model: not a SentencePiece model"),
        ("base/config.json", b"\xff", "config.json: not valid JSON"),
        ("base/config.json", b'{"model_type": "gpt2"}', "\"model_type\" is 'gpt2'; only llama"),
        ("base/model.safetensors", b"\xff" * 100, "model.safetensors: damaged"),
        (
            "base/model.safetensors.index.json",
            b'{"weight_map": ["a"]}',
            '"weight_map" must give the file of each tensor',
        ),
        (
            "base/model.safetensors.index.json",
            b'{"weight_map": {"a": "gone.safetensors"}}',
            "gone.safetensors: no such",
        ),
    ],
)
def test_damaged_inputs_are_one_line(chain, capsys, monkeypatch, file, content, message):
    monkeypatch.chdir(chain)
    if file.endswith("index.json"):
        (chain / "base" / "model.safetensors").unlink()
    (chain / file).write_bytes(content)
    before = sorted(chain.rglob("*"))
    assert message in fails(capsys, chain / "base", [chain / "llama", chain / "alpaca"], chain / "out")
    assert sorted(chain.rglob("*")) == before  # nothing written, nothing executed


def test_inputs_are_never_overwritten(chain, capsys):
    before = (chain / "base" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as error:
        run(chain / "base", [chain / "llama"], chain / "alpaca" / ".." / "base")
    assert error.value.code == 2 and "would overwrite" in capsys.readouterr().err
    shutil.copytree(chain / "base", chain / "new.tmp" / "base")  # where the output would be written first
    with pytest.raises(SystemExit):
        run(chain / "new.tmp" / "base", [chain / "llama"], chain / "new")
    assert "would overwrite" in capsys.readouterr().err
    for folder in (chain / "base", chain / "new.tmp" / "base"):
        assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_command_of_the_readme(chain):
    options = ["--base_model", chain / "base", "--lora_model", f"{chain / 'llama'},{chain / 'alpaca'}"]
    options += ["--output_type", "huggingface", "--output_dir", chain / "chinese-alpaca"]
    done = run_command("model_hub/merge_llama_with_chinese_lora.py", *options, cwd=HUB)
    assert done.stdout.startswith("将写入 ") and (chain / "chinese-alpaca" / "config.json").is_file()
