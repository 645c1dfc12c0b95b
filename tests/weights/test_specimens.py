"""Miniatures of the folders that people have go through convert and merge, or are refused in one line that names them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import specimens_hf as hf
import specimens_lora as lora
import specimens_meta as meta
from reference_llama import logits
from specimen_table import GOES_THROUGH, REFUSED, table
from specimens import ALPACA, EMBEDDING, ROOT, SEVEN_B, merged, vocabularies

HUB = Path(__file__).resolve().parents[2] / "model_hub"
sys.path.insert(0, str(HUB))
import convert_llama_weights_to_hf as convert  # noqa: E402
import merge_llama_with_chinese_lora as merge  # noqa: E402

from config_utils import run_script  # noqa: E402


def run(command, **options):
    argv = [f"--{name}={value}" for name, value in options.items()]
    run_script(command.main, command.CONFIG, command.__file__, argv)
    return Path(options["output_dir"])


def converted(model, output_dir, **options):
    return run(convert, input_dir=model.folder.parent, model_size=model.folder.name, output_dir=output_dir, **options)


def merge_onto(base, loras, output_dir, **options):
    folders = ",".join(str(one.folder) for one in loras)
    return run(merge, base_model=base, lora_model=folders, output_dir=output_dir, **options)


def refused(capsys, call, *args, **options):
    """The one line of a command that must end in exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        call(*args, **options)
    [line] = capsys.readouterr().err.splitlines()
    assert error.value.code == 2
    return line


def assert_holds(folder, expected, vocabulary, exact=False):
    """The folder has these weights, in their number format, and this tokenizer.model."""
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype, name
        if exact:
            assert torch.equal(ours[name], tensor), name
        else:  # one unit in the last place: the order of additions within B A is the matrix product's
            rtol = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[tensor.dtype]
            torch.testing.assert_close(ours[name], tensor, rtol=rtol, atol=rtol / 16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(expected[EMBEDDING])
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (folder / "tokenizer.model").read_bytes() == vocabularies()[vocabulary]
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Meta's folders

OF_META = [(meta.llama1, size) for size in ("7B", "13B", "30B", "65B")]
OF_META += [(meta.llama2, size) for size in ("7B", "13B", "70B")]


@pytest.mark.parametrize(("make", "size"), OF_META, ids=lambda value: getattr(value, "__name__", value))
def test_metas_folders_are_converted(tmp_path, make, size):
    model = make(tmp_path / "in", size)
    config = assert_holds(converted(model, tmp_path / "out"), model.weights, "base", exact=True)
    params = json.loads((model.folder / "params.json").read_text())
    assert config["rms_norm_eps"] == params["norm_eps"]
    shape = meta.SHAPES[size]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (shape.heads, shape.key_heads)
    assert config["intermediate_size"] == shape.ffn


@pytest.mark.parametrize("vocabulary", ["llama", "alpaca"])
def test_what_the_publishers_script_merged_into_pth_is_converted(tmp_path, vocabulary):
    model = meta.published_pth(tmp_path / "13B", vocabulary)
    assert_holds(converted(model, tmp_path / "out"), model.weights, vocabulary, exact=True)


def test_a_converted_7b_answers_as_the_original_architecture(tmp_path):
    from transformers import LlamaForCausalLM

    model = meta.llama1(tmp_path / "in", "7B")
    weights = torch.load(model.folder / "consolidated.00.pth")
    weights = {name: tensor.float() for name, tensor in weights.items() if not name.endswith("rope.freqs")}
    params = json.loads((model.folder / "params.json").read_text())
    ids = [1, 300, 17, 5, 419, 5, 88, 2, 33]
    llama = LlamaForCausalLM.from_pretrained(converted(model, tmp_path / "out"), dtype=torch.float32)
    with torch.no_grad():
        ours, expected = llama(torch.tensor([ids])).logits[0], logits(weights, params, ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_llama_3_is_refused(tmp_path, capsys):
    model = meta.llama3(tmp_path / "in")
    line = refused(capsys, converted, model, tmp_path / "out")
    assert REFUSED["llama3"][2] in line and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's folders

# maker, shape, vocabulary of its tokenizer.model
BASES = [
    (hf.decapoda, hf.SHAPE_OF_33, "base"),
    (hf.converted, SEVEN_B, "base"),
    (hf.converted_safetensors, SEVEN_B, "base"),
    (hf.llama2, SEVEN_B, "base"),
    (hf.grown, SEVEN_B, "base"),
    (hf.merged_llama, SEVEN_B, "llama"),
    (hf.merged_alpaca, SEVEN_B, "alpaca"),
    (hf.merged_and_grown, SEVEN_B, "llama"),
    (hf.merged_alpaca_grown, SEVEN_B, "alpaca"),
]


@pytest.mark.parametrize(("make", "shape", "vocabulary"), BASES, ids=[base[0].__name__ for base in BASES])
def test_a_lora_is_merged_onto_hugging_faces_folders(tmp_path, make, shape, vocabulary, capsys):
    base, added = make(tmp_path / "base"), lora.alpaca_lora(tmp_path / "lora", shape)
    folder = merge_onto(base.folder, [added], tmp_path / "out")
    assert_holds(folder, merged(base.weights, added), vocabulary)
    lost = (base.folder / "added_tokens.json").is_file()  # such tokens are not in tokenizer.model, and it is said
    assert (f"注意: {base.folder}/added_tokens.json" in capsys.readouterr().out) == lost


@pytest.mark.parametrize("make", [base[0] for base in BASES], ids=[base[0].__name__ for base in BASES])
def test_transformers_reads_the_same_weights_from_the_specimen(tmp_path, make):
    """So the specimen is what it claims to be: a folder from_pretrained loads without a missing tensor."""
    from transformers import LlamaForCausalLM

    base = make(tmp_path / "base")
    llama, info = LlamaForCausalLM.from_pretrained(base.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    weights = llama.state_dict()
    assert weights.keys() == base.weights.keys()
    assert all(torch.equal(weights[name].to(tensor.dtype), tensor) for name, tensor in base.weights.items())


# ---------------------------------------------------------------------------------------------------------------------
# LoRAs: name -> (base, makers, vocabulary afterwards)


def of_base(make, *rest):
    return lambda folder, base: make(folder, *rest, base)


LORAS = {
    "chinese_llama": (hf.converted, [lora.chinese_llama], "llama"),
    "chinese_llama + chinese_alpaca": (hf.converted, [lora.chinese_llama, lora.chinese_alpaca], "alpaca"),
    "chinese_alpaca_2": (hf.llama2, [lora.chinese_alpaca_2], "second"),
    "alpaca_lora_16": (hf.converted, [lora.alpaca_lora_16], "base"),
    "chinese_vicuna": (hf.converted, [lora.chinese_vicuna], "base"),
    "byte_order_mark": (hf.converted, [lora.byte_order_mark], "base"),
    "llama_factory": (hf.merged_alpaca, [lora.llama_factory], "alpaca"),
    "current_peft": (hf.merged_alpaca, [of_base(lora.current_peft)], "alpaca"),
    "current_peft saving embeddings": (
        hf.merged_alpaca,
        [lambda folder, base: lora.current_peft(folder, base, ("embed_tokens", "lm_head"))],
        "alpaca",
    ),
    "names with default": (hf.converted, [of_base(lora.renamed, "default")], "base"),
    "names with module": (hf.converted, [of_base(lora.renamed, "module")], "base"),
    "bare names": (hf.converted, [of_base(lora.renamed, "bare")], "base"),
    "names with base_layer": (hf.converted, [of_base(lora.renamed, "base_layer")], "base"),
    "trainer_checkpoint": (
        hf.merged_llama,
        [lambda folder, base: lora.trainer_checkpoint(folder, base, whole=False)],
        "alpaca",
    ),
    "trainer_checkpoint of the whole model": (
        hf.merged_llama,
        [lambda folder, base: lora.trainer_checkpoint(folder, base, whole=True)],
        "alpaca",
    ),
}


def made(tmp_path, name):
    """(base, LoRAs, the vocabulary they end with)"""
    make_base, makers, vocabulary = LORAS[name]
    base = make_base(tmp_path / "base")
    loras = []
    for i, make in enumerate(makers):
        needs_base = make.__name__ == "<lambda>"
        loras.append(make(tmp_path / f"lora{i}", base) if needs_base else make(tmp_path / f"lora{i}"))
    return base, loras, vocabulary


@pytest.mark.parametrize("name", LORAS)
def test_loras_are_merged(tmp_path, name):
    base, loras, vocabulary = made(tmp_path, name)
    folder = merge_onto(base.folder, loras, tmp_path / "out")
    assert_holds(folder, merged(base.weights, *loras), vocabulary)


@pytest.mark.parametrize("name", ["alpaca_lora_16", "chinese_vicuna", "llama_factory", "current_peft"])
def test_peft_gives_the_same_weights_for_the_specimen(tmp_path, name):
    """So the expected weights are right: PEFT's own merge, in float32, is a third way."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base, [added], _ = made(tmp_path, name)
    llama = LlamaForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    weights = PeftModel.from_pretrained(llama, added.folder).merge_and_unload().state_dict()
    expected = merged({name: tensor.float() for name, tensor in base.weights.items()}, added)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["zero3", "empty_443", "on_embeddings"])
def test_what_cannot_be_merged_is_named(tmp_path, capsys, name):
    base = (hf.merged_llama if name == "zero3" else hf.converted)(tmp_path / "base")
    line = refused(capsys, merge_onto, base.folder, [getattr(lora, name)(tmp_path / "lora")], tmp_path / "out")
    assert REFUSED[name][2] in line
    assert not (tmp_path / "out").exists()


def test_the_443_bytes_are_what_old_pytorch_wrote(tmp_path):
    file = lora.empty_443(tmp_path / "lora").folder / "adapter_model.bin"
    assert file.stat().st_size == 443 and torch.load(file) == {}


def pth_of_alpaca(folder):
    return meta.published_pth(folder, "alpaca")


# Sizes in bytes that the repositories named in the makers' docstrings show, of files in which no number is scaled.
SIZES = {
    hf.decapoda: {"generation_config.json": 125, "tokenizer_config.json": 141},
    hf.grown: {"tokenizer_config.json": 335},
    hf.merged_alpaca: {"generation_config.json": 132, "special_tokens_map.json": 411, "tokenizer_config.json": 727},
    pth_of_alpaca: {"special_tokens_map.json": 96, "tokenizer_config.json": 727},
    lora.chinese_llama: {"special_tokens_map.json": 72, "tokenizer_config.json": 166},
    lora.chinese_alpaca: {"special_tokens_map.json": 96, "tokenizer_config.json": 166},
    lora.chinese_alpaca_2: {
        "adapter_config.json": 471,
        "special_tokens_map.json": 435,
        "tokenizer_config.json": 766,
    },
    lora.alpaca_lora: {"adapter_config.json": 370},
    lora.chinese_vicuna: {"adapter_config.json": 468},
}


@pytest.mark.parametrize("make", SIZES, ids=lambda make: make.__name__)
def test_config_files_have_the_bytes_of_the_real_ones(tmp_path, make):
    folder = make(tmp_path / "specimen").folder
    assert {name: (folder / name).stat().st_size for name in SIZES[make]} == SIZES[make]


def test_the_pages_have_the_table_of_all_specimens():
    """Those that test_whole_way.py goes the whole way with, and those that are refused above."""
    names = [f"{make.__name__} {size}" for make, size in OF_META]
    names += ["published_pth llama", "published_pth alpaca", *(base[0].__name__ for base in BASES), *LORAS]
    assert sorted(names) == sorted(name for row in GOES_THROUGH for name in row)
    for language in ("zh", "en"):
        page = ROOT / "docs" / language / "seven_b.md"
        assert table(language) in page.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# from Meta's files to pth and back


@pytest.mark.parametrize("pth_files", [1, 2, 4])
def test_from_meta_to_pth_and_back(tmp_path, pth_files):
    """LLaMA-1 7B -> Hugging Face -> Chinese-Alpaca as pth -> Hugging Face again."""
    llama = meta.llama1(tmp_path / "in", "7B")
    loras = [lora.chinese_llama(tmp_path / "lora1"), lora.chinese_alpaca(tmp_path / "lora2")]
    base = converted(llama, tmp_path / "7B-hf")
    expected = merged(llama.weights, *loras)
    pth = merge_onto(base, loras, tmp_path / "alpaca", output_type="pth", pth_files=pth_files)
    assert len(list(pth.glob("consolidated.*.pth"))) == pth_files
    files = [torch.load(file) for file in sorted(pth.glob("consolidated.*.pth"))]
    rows = [len(file["output.weight"]) for file in files]
    # as the publishers' script: each file the same rows, what is left over in the last
    assert rows == [ALPACA // pth_files] * (pth_files - 1) + [ALPACA - ALPACA // pth_files * (pth_files - 1)]
    assert torch.equal(torch.cat([file["output.weight"] for file in files]), expected["lm_head.weight"])
    again = run(convert, input_dir=tmp_path, model_size="alpaca", output_dir=tmp_path / "again")
    assert_holds(again, expected, "alpaca")
