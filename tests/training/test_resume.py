"""What a resumed run may change and what it may not.     python -m pytest tests/training/test_resume.py"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_deepspeed
from alpaca.models.templates import encode_examples
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.batches import TrainLoader
from alpaca.training.identity import identity_of, own_precision
from alpaca.training.steps import make_scheduler, use_settings
from config_utils import load_config, parse_config
from dataset import read_examples
from harness import ROOT, read_log, run_script, training_options, write_jsonl

FIXTURES = Path(__file__).parent / "fixtures"
TRAINERS = ("train_deepspeed", "train_trainer")


def options(base_dir, instruct_data, run):
    data = [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    return [*training_options(base_dir), *data, f"--save_dir={run}"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_new_learning_rate_and_split_work(base_dir, instruct_data, tmp_path, trainer):
    """They are what is logged, what train_args.json says and what moves the weights: at 1e-9 they stand still."""
    shutil.copytree(FIXTURES / "bff124a" / trainer, tmp_path / "run")
    more = ["--deepspeed_optimizer_params_lr=1e-9", "--train_batch_size=3", "--gradient_accumulation_steps=2"]
    more += ["--deepspeed_optimizer_params_betas=0.8,0.9", "--resume", "--eval_steps=-1"]
    run_script(f"{trainer}.py", *options(base_dir, instruct_data, tmp_path / "run"), *more, cwd=tmp_path)
    rows = [row for row in read_log(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows[50:]] == [*range(41, 51)]
    assert [row["lr"] for row in rows[50:]] == pytest.approx([1e-9 * (51 - step) / 45 for step in range(41, 51)])
    saved = load_config(tmp_path / "run" / "adapter_model" / "train_args.json")[0]
    assert saved.deepspeed["optimizer"]["params"]["lr"] == 1e-9
    assert saved.deepspeed["optimizer"]["params"]["betas"] == [0.8, 0.9]


def test_what_a_load_has_set_is_set_again():
    weight = torch.nn.Parameter(torch.ones(3))
    args = SimpleNamespace(warmup_ratio=0.2)
    old, new = (torch.optim.Adam([weight], lr=lr, betas=(0.9, 0.95), weight_decay=0.1) for lr in (1e-3, 1e-5))
    before, after = (make_scheduler(optimizer, args, 10) for optimizer in (old, new))
    for _ in range(5):
        old.step()
        before.step()
    new.load_state_dict(old.state_dict())
    after.load_state_dict(before.state_dict())
    params = {"lr": 1e-5, "betas": [0.8, 0.9], "weight_decay": 0.0}
    engine = SimpleNamespace(clip_grad=1.0)
    use_settings(engine, after, {"optimizer": {"params": params}, "gradient_clipping": 0.25})
    (group,) = new.param_groups
    assert (group["lr"], after.get_last_lr()) == (pytest.approx(1e-5 * 5 / 8), [group["lr"]])
    assert (group["betas"], group["weight_decay"], engine.clip_grad) == ([0.8, 0.9], 0.0, 0.25)
    after.step()
    assert group["lr"] == pytest.approx(1e-5 * 4 / 8)


@pytest.fixture
def identity(base_dir, instruct_data, monkeypatch):
    """identity_of a run with these options on this base and this data."""
    monkeypatch.chdir(ROOT)

    def run(*more, base=base_dir, data=instruct_data, precision="fp32"):
        args = parse_config(train_deepspeed.CONFIG, train_deepspeed.__file__, [*options(base, data, "run"), *more])
        tokenizer = load_tokenizer(base, args.template)
        examples = encode_examples(tokenizer, read_examples(data / "train.txt"))
        shape = args.train_batch_size, args.gradient_accumulation_steps
        loader = TrainLoader(examples, *shape, list, args.seed)
        facts = identity_of(args, tokenizer, precision, data / "train.txt", loader, 50)
        return json.loads(json.dumps(facts))

    return run


@pytest.mark.parametrize(
    "option",
    [
        *("lora_r=4", "lora_alpha=16", "lora_dropout=0.2", "lora_target_modules=o_proj", "packing=none", "seed=1"),
        *("train_batch_size=12", "max_seq_length=500", "deepspeed_optimizer_params_eps=1e-6", "query_column=instruct"),
        *("deepspeed_zero_optimization_stage=2", "deepspeed_optimizer_type=AdamW"),
    ],
)
def test_what_decides_the_weights_is_a_fact_of_the_run(identity, option):
    ours, theirs = identity(), identity(f"--{option}")
    key = option.partition("=")[0].replace("train_batch_size", "examples_per_step")
    assert [name for name in ours if ours[name] != theirs[name]] == [key]


@pytest.mark.parametrize(
    "more",
    [
        ["--train_batch_size=2", "--gradient_accumulation_steps=3"],
        ["--deepspeed_optimizer_params_lr=1e-6", "--deepspeed_gradient_clipping=0.5", "--compile=False"],
        ["--gradient_checkpointing", "--log_steps=5", "--save_steps=5", "--eval_steps=5", "--best=loss"],
        ["--lora_target_modules=down_proj,up_proj,gate_proj,o_proj,v_proj,k_proj,q_proj"],
        ["--deepspeed_zero_optimization_reduce_bucket_size=1000", "--save_dir=elsewhere", "--resume"],
    ],
)
def test_what_may_change_is_none(identity, more):
    assert identity(*more) == identity()


def test_auto_is_the_precision_of_the_run_that_is_resumed(monkeypatch):
    monkeypatch.chdir(ROOT)

    def precision(written, *options):
        return own_precision(parse_config(train_deepspeed.CONFIG, train_deepspeed.__file__, options), written)

    assert precision({"precision": "bf16"}) == "bf16" and precision({}) == "auto"
    assert precision({"precision": "bf16"}, "--precision=fp32") == "fp32"  # which check_resumed refuses
    assert precision({"precision": "bf16"}, "--deepspeed_fp16_enabled=True") == "auto"  # the option decides


def differing(ours, theirs):
    return [name for name in ours if ours[name] != theirs[name]]


def test_data_and_base_are_known_by_what_they_hold(identity, base_dir, instruct_data, tokenizer_models, tmp_path):
    ours = identity()
    assert differing(ours, identity(precision="bf16")) == ["precision"]
    assert differing(ours, identity("--template=alpaca2")) == ["prompt_sha256"]
    copy, data = tmp_path / "copy", tmp_path / "data"
    shutil.copytree(base_dir, copy)
    shutil.copytree(instruct_data, data)
    assert identity(base=copy, data=data) == ours
    rows = (data / "train.txt").read_text(encoding="utf-8").splitlines()
    write_jsonl(data / "train.txt", [json.loads(row) for row in (*rows[1:], rows[0])])
    assert differing(ours, identity(base=copy, data=data)) == ["train_data_sha256"]
    shutil.copy(tokenizer_models / "merged.model", copy / "tokenizer.model")
    assert differing(ours, identity(base=copy)) == ["base_tokenizer_sha256"]
    shutil.copy(base_dir / "tokenizer.model", copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert differing(ours, identity(base=copy)) == ["base_tensors_sha256"]
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0, "transformers_version": "6"}))
    assert differing(ours, identity(base=copy)) == ["base_config_sha256", "base_tensors_sha256"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_checkpoint_has_its_lora(base_dir, instruct_data, tmp_path, trainer):
    """A finished run whose adapter_model/ was removed writes it again; another length of the schedule is refused with the
    path of the earlier LoRA, and nothing is moved."""
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "bff124a" / trainer, run)
    more = [*options(base_dir, instruct_data, run), "--eval_steps=-1"]
    run_script(f"{trainer}.py", *more, "--resume", cwd=tmp_path)
    files = ("adapter_config.json", "adapter_model.safetensors", "train_args.json")
    newest, kept = run / "adapter_model", run / "checkpoint-50" / "adapter_model"
    assert [(newest / name).read_bytes() for name in files] == [(kept / name).read_bytes() for name in files]
    assert load_config(kept / "train_args.json")[1]["step"] == 50

    before = (newest / files[1]).read_bytes()
    shutil.rmtree(newest)
    result = run_script(f"{trainer}.py", *more, "--resume", cwd=tmp_path)
    assert (newest / files[1]).read_bytes() == before
    assert f"LoRA 已保存到 {newest}（第 50 步）" in result.stderr
    assert [row["step"] for row in read_log(run) if "loss" in row][50:] == [*range(41, 51)]

    result = run_script(f"{trainer}.py", *more, "--resume=50", "--max_steps=40", cwd=tmp_path, check=False)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "total_steps 50, this run has 40" in error
    assert f"--lora_model={run}/checkpoint-50/adapter_model" in error and "LoRA 已保存" not in result.stderr
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-40", "checkpoint-50"]
