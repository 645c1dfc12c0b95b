"""Each specimen goes the whole way: convert, merge, two training steps, test, predict, chat, pth and back.

By the commands' main(args) in this process; three of them as a user types them. What a merge must give is computed by
specimens.merged, in plain torch, also for the LoRA that is trained here.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import chat_ner
import predict
import specimens_hf as hf
import specimens_lora as lora
import specimens_meta as meta
import train_deepspeed
from config_utils import parse_config
from harness import INSTRUCTION, make_records, run_script, write_jsonl
from specimens import EMBEDDING, Lora, merged
from test_specimens import BASES, LORAS, OF_META, assert_holds, convert, converted, made, merge, merge_onto, run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("test_command", ROOT / "test.py")  # `import test` is the library's own
test_command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_command)


def command(module, *options):
    module.main(parse_config(module.CONFIG, module.__file__, [str(option) for option in options]))


@pytest.fixture(scope="module", autouse=True)
def one_process_group():
    """A trainer ends its process group with itself; DeepSpeed, which holds on to the first, cannot live with a second."""
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    yield
    dist.destroy_process_group = destroy
    if dist.is_initialized():
        destroy()


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder to work in, with data/mine/instruct_data/."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "mine" / "instruct_data"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.txt", make_records(8, 1))
    write_jsonl(folder / "dev.txt", make_records(3, 2))
    (tmp_path / "questions.txt").write_text("你好\n", encoding="utf-8")
    return tmp_path


def train_options(model_dir):
    options = ["--max_steps=2", "--train_batch_size=2", "--precision=fp32", "--lora_r=2", "--save_steps=-1"]
    options += ["--eval_steps=-1", "--log_steps=1", "--deepspeed_optimizer_params_lr=1e-2", "--max_seq_length=1024"]
    return ["--data_name=mine", f"--model_dir={model_dir}", *options]


def train(model_dir):
    """Two steps; the adapter's folder."""
    command(train_deepspeed, *train_options(model_dir))
    return Path("checkpoint/mine/train_deepspeed/adapter_model")


def trained_lora(folder):
    """What two steps have made, read without the project's reader."""
    config, factors = json.loads((folder / "adapter_config.json").read_text()), {}
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            factors[target] = (a, tensors[name.replace("lora_A", "lora_B")], config["lora_alpha"] / config["r"])
    return Lora(folder, factors, {})


def answers(**options):
    """test, predict and chat with a model; what predict answers."""
    argv = [f"--{name}={value}" for name, value in options.items()]
    short = [*argv, "--max_new_tokens=4"]
    command(test_command, "--data_name=mine", "--precision=fp32", *short)
    command(
        predict,
        "--data_name=mine",
        "--precision=fp32",
        *short,
        "--text=王明去年在北京说新闻。",
        "--output_path=p.jsonl",
    )
    command(
        chat_ner, *short, "--only_cpu", "--data_file=questions.txt", "--predictions_file=c.json", "--interactive=False"
    )
    assert len(json.loads(Path("c.json").read_text(encoding="utf-8"))) == 1
    [row] = [json.loads(line) for line in Path("p.jsonl").read_text(encoding="utf-8").splitlines()]
    return row["prediction"]


def whole_way(model_dir, weights, vocabulary, pth_files=1):
    """From a Hugging Face folder with these weights on."""
    adapter = train(model_dir)
    predicted = answers(lora_model=adapter)
    ner = trained_lora(adapter)
    assert ner.factors
    expected = merged(weights, ner)
    pth = run(
        merge, base_model=model_dir, lora_model=adapter, output_dir="ner-pth", output_type="pth", pth_files=pth_files
    )
    assert len(list(pth.glob("*.pth"))) == pth_files
    again = run(convert, input_dir=".", model_size="ner-pth", output_dir="ner-hf")
    assert_holds(again, expected, vocabulary)
    # without the adapter now, and asked the same, for train_args.json came along; float32 of rounded weights
    assert (again / "train_args.json").read_bytes() == (adapter / "train_args.json").read_bytes()
    alone = answers(base_model=again, lora_model="none")
    if weights[EMBEDDING].dtype == torch.float32:
        assert alone == predicted


# ---------------------------------------------------------------------------------------------------------------------
# what goes through


@pytest.mark.parametrize(("make", "size"), OF_META, ids=lambda value: getattr(value, "__name__", value))
def test_metas_folders(work, make, size):
    model = make(work / "in", size)
    whole_way(converted(model, work / "hf"), model.weights, "base", pth_files=meta.FILES[size])


@pytest.mark.parametrize("vocabulary", ["llama", "alpaca"])
def test_what_the_publishers_script_merged_into_pth(work, vocabulary):
    model = meta.published_pth(work / "13B", vocabulary)
    whole_way(converted(model, work / "hf"), model.weights, vocabulary, pth_files=2)


@pytest.mark.parametrize(
    ("make", "vocabulary"), [(make, name) for make, _, name in BASES], ids=[b[0].__name__ for b in BASES]
)
def test_hugging_faces_folders(work, make, vocabulary):
    """Trained on as they are, their own config.json and tokenizer files beside tokenizer.model."""
    base = make(work / "base")
    whole_way(base.folder, base.weights, vocabulary, pth_files=4 if make is hf.merged_alpaca else 1)


@pytest.mark.parametrize("name", LORAS)
def test_loras(work, name):
    base, loras, vocabulary = made(work, name)
    folder = merge_onto(base.folder, loras, work / "merged")
    whole_way(folder, merged(base.weights, *loras), vocabulary, pth_files=2)


# ---------------------------------------------------------------------------------------------------------------------
# as a user types them


def test_llama_1_7b_as_the_readme_has_it(work):
    """convert, the two published LoRAs, train_trainer.py, merge: each a process of its own."""
    model = meta.llama1(work / "model_hub", "7B")
    loras = [lora.chinese_llama(work / "lora 1"), lora.chinese_alpaca(work / "“lora” 2")]
    run_script("model_hub/convert_llama_weights_to_hf.py", "--input_dir=model_hub", "--model_size=7B", cwd=work)
    chain = ",".join(str(one.folder) for one in loras)
    options = [f"--lora_model={chain}", "--output_dir=alpaca", "--verify"]
    done = run_script("model_hub/merge_llama_with_chinese_lora.py", "--base_model=7B-hf", *options, cwd=work)
    assert "验证：21 个张量" in done.stdout
    assert_holds(work / "alpaca", merged(model.weights, *loras), "alpaca")
    run_script("train_trainer.py", *train_options("alpaca"), cwd=work)
    adapter = work / "checkpoint/mine/train_trainer/adapter_model"
    options = [f"--lora_model={adapter}", "--output_dir=ner"]
    run_script("model_hub/merge_llama_with_chinese_lora.py", "--base_model=alpaca", *options, cwd=work)
    assert_holds(work / "ner", merged(model.weights, *loras, trained_lora(adapter)), "alpaca")
    done = run_script("predict.py", "--base_model=ner", "--lora_model=none", "--text=王明去年在北京。", cwd=work)
    assert INSTRUCTION.replace("\n", "\\n") in done.stdout  # asked what the LoRA in it was trained with


def test_a_folder_of_2023_as_a_user_types_it(work):
    base, added = hf.converted(work / "llama-7b-hf"), lora.alpaca_lora(work / "lora")
    options = [
        f"--base_model={base.folder}",
        f"--lora_model={added.folder}",
        "--output_dir=merged",
        "--output_type=pth",
    ]
    run_script("model_hub/merge_llama_with_chinese_lora.py", *options, cwd=work)
    options = ["--input_dir=.", "--model_size=merged", "--output_dir=back"]
    run_script("model_hub/convert_llama_weights_to_hf.py", *options, cwd=work)
    assert_holds(work / "back", merged(base.weights, added), "base")
    run_script("train_deepspeed.py", *train_options("back"), cwd=work)
    done = run_script("test.py", "--data_name=mine", "--max_new_tokens=4", cwd=work)
    assert "真实： " in done.stdout


def test_an_adapter_of_another_tool_as_a_user_types_it(work):
    """It has no train_args.json: predict.py is told what to ask; without, a line says how."""
    base = hf.merged_alpaca(work / "base")
    added = lora.llama_factory(work / "lora")
    options = [f"--lora_model={added.folder}", "--text=王明去年在北京。", "--max_new_tokens=8"]
    done = run_script("predict.py", *options, cwd=work, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "has no train_args.json, for another tool made it; say what" in line and "--instruct=…" in line
    options += ["--instruct=找出{labels}", "--labels=人名,地名"]
    done = run_script("predict.py", *options, cwd=work, check=False)
    assert done.returncode == 2 and "shibing624/chinese-alpaca-plus-7b-hf" in done.stderr
    assert done.stderr.strip().endswith("is not here; name its folder with --base_model=…")
    done = run_script("predict.py", *options, f"--base_model={base.folder}", cwd=work)
    assert '文本 >>>  "找出人名、地名文本：王明去年在北京。"' in done.stdout
    shown = [line.removeprefix("预测 >>>  ") for line in done.stdout.splitlines()[2:] if line]
    assert shown == ["没有"] or all(line.rpartition("_")[2] in ("人名", "地名") for line in shown)
