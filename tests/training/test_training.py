"""The two trainers: the same losses, the same adapter, nothing a fresh machine lacks.

python -m pytest tests/training/test_training.py
"""

import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import pytest
import torch
import torch.distributed as dist
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_trainer
from alpaca.answering.grammar import AnswerGrammar
from alpaca.answering.texts import Answering, uncut
from alpaca.common.errors import UserError
from alpaca.models.base import load_for_inference
from alpaca.models.base_weights import load_base
from alpaca.models.templates import TEMPLATES, encode_examples
from alpaca.models.tokenizer import load_tokenizer
from alpaca.scoring.metrics import score
from alpaca.training.adapter_writer import BestScore
from alpaca.training.batches import TrainLoader
from alpaca.training.checkpoints import checkpoint_to_resume
from alpaca.training.evaluate import evaluate_f1
from alpaca.training.lora import add_lora, check_options, compile_for_training, for_answers
from alpaca.training.loss import answer_loss, evaluate_loss
from alpaca.training.prefix_tree import make_collate, pad_batch
from alpaca.training.run_log import TrainLog, series_of
from alpaca.training.steps import warmup_linear
from config_utils import load_config, parse_config
from dataset import read_examples
from harness import (
    ROOT,
    assert_same_adapter,
    assert_same_rows,
    free_port,
    lora_settings,
    make_records,
    read_log,
    run_script,
    training_options,
    write_jsonl,
)

TRAINERS = ("train_deepspeed", "train_trainer")
COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|c89|c99)(-[0-9.]+)?")


@pytest.fixture
def examples(base_dir, instruct_data):
    return encode_examples(load_tokenizer(base_dir), read_examples(instruct_data / "train.txt"))[:29]


def gradients(model, batches):
    """Loss and LoRA gradients of some micro-batches, flattened into one vector."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = answer_loss(model, **batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_accumulation_and_ranks_give_the_gradient_of_one_large_batch(lora_model, examples):
    """Weighted by answer tokens, also in the last step, which has 5 examples of 12."""
    collate = make_collate("none", 0)
    whole = list(TrainLoader(examples, 12, 1, collate, 42))
    parts = [list(TrainLoader(examples, 2, 3, collate, 42, rank, 2)) for rank in range(2)]
    for step in range(3):
        loss, gradient = gradients(lora_model, [whole[step]])
        micro = [batch for rank in parts for batch in rank[3 * step : 3 * step + 3]]
        part_loss, part_gradient = gradients(lora_model, micro)
        assert part_loss == pytest.approx(loss, rel=1e-6)
        assert (part_gradient - gradient).norm() < 1e-6 * gradient.norm()


def test_a_fresh_lora_is_what_the_options_say(base_dir):
    def fresh(**changes):
        settings = SimpleNamespace(**{**vars(lora_settings()), **changes})
        return add_lora(load_base(base_dir, torch.float32, "cpu"), settings)

    first = fresh()
    assert torch.equal(first.lora, fresh().lora) and not torch.equal(first.lora, fresh(seed=43).lora)
    assert {name.split(".")[-4] for name in first.lora_shapes} == {"q_proj", "o_proj", "down_proj"}
    config = fresh(lora_r=3, lora_alpha=5, lora_dropout=0.3, lora_target_modules=["v_proj"]).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 5, 0.3, {"v_proj"})


@pytest.mark.parametrize("targets, reached", [(["lm_head"], 0), (["1.mlp.up_proj", "lm_head"], 1)])
def test_layers_are_not_captured_where_some_have_no_lora(base_dir, capsys, targets, reached):
    """It failed while compiling, for a reason that said nothing, at the first step."""
    settings = lora_settings(lora_target_modules=targets)
    settings.compile, settings.packing = "auto", "prefix"
    model = add_lora(load_base(base_dir, torch.float32, "cpu"), settings)
    compile_for_training(model, None, settings, 0, torch.device("cuda"), 1)
    assert model.compiled_layers is None and f"不编译: 2 层里只有 {reached} 层有 LoRA" in capsys.readouterr().err


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(base_dir, examples):
    batch = next(iter(TrainLoader(examples, 12, 1, make_collate("prefix", 0), 42)))

    def train(checkpointing):
        settings = lora_settings(gradient_checkpointing=checkpointing)
        model, kept = add_lora(load_base(base_dir, torch.float32, "cpu"), settings), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = answer_loss(model, **batch)
        loss.backward()
        return loss.item(), model.lora.grad, sum(kept)

    (loss, gradient, kept), (again, recomputed, less) = train(False), train(True)
    assert loss == again and torch.equal(gradient, recomputed)
    assert less < kept / 2


def test_loss_is_the_mean_over_answer_tokens(lora_model, examples):
    """Against one example at a time, written out."""
    summed, tokens = 0.0, 0
    with torch.no_grad():
        for prompt, answer, _ in examples:
            logits = lora_model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            for k, target in enumerate(answer):
                summed -= logits[len(prompt) + k - 1, target].item()
            tokens += len(answer)
    batches = [[pad_batch(examples[i : i + 3], 0), pad_batch(examples[i + 3 : i + 6], 0)] for i in range(0, 29, 6)]
    assert evaluate_loss(lora_model, batches, "cpu") == pytest.approx(summed / tokens, rel=1e-6)


def test_an_evaluation_drops_nothing_and_the_training_goes_on_as_it_was(base_dir, examples):
    """Both for the dev loss and for answers, which are computed with the LoRA where DeepSpeed has moved it."""
    model = add_lora(load_base(base_dir, torch.float32, "cpu"), lora_settings(lora_dropout=0.5))
    torch.nn.init.normal_(model.lora)
    batches = [[pad_batch(examples[:6], 0)]]
    losses = {evaluate_loss(model, batches, "cpu") for _ in range(2)}
    assert all(module.training for module in model.modules())
    model.eval()
    assert losses == {evaluate_loss(model, batches, "cpu")} and not model.training
    with for_answers(model):
        pass
    assert not model.training
    model.train()
    model.lora.data = model.lora.data + 1
    with for_answers(model):
        assert not any(module.training for module in model.modules())
        held = torch.cat([module.weight.flatten() for module in model.lora_modules])
        assert torch.equal(held, model.lora.data)
    assert all(module.training for module in model.modules())


def test_warmup_never_stands_still_and_ends_near_zero():
    factors = [warmup_linear(k, 4, 20) for k in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 16) and warmup_linear(20, 4, 20) == 0
    assert warmup_linear(0, 0, 1) == 1.0


def test_both_trainers_agree(workspace):
    """Losses, learning rates, dev losses and adapters over 50 steps, warm-up and an epoch boundary."""
    first, second = (workspace / "checkpoint" / "mine" / name for name in TRAINERS)
    log = read_log(first)
    assert_same_rows(read_log(second), log)
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 50 and [row["step"] for row in log if "eval_loss" in row] == [25, 50]
    assert sum(losses[-5:]) < 0.96 * sum(losses[:5])
    assert [row["lr"] for row in log if "loss" in row][:6] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])
    assert_same_adapter(second, first)
    weights = load_file(first / "adapter_model" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_run_leaves_behind(workspace, base_dir, trainer):
    run = workspace / "checkpoint" / "mine" / trainer
    assert sorted(p.name for p in (run / "adapter_model").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "train_args.json",
    ]
    assert sorted(p.parent.name for p in run.glob("checkpoint-*/complete")) == ["checkpoint-40", "checkpoint-50"]
    args, facts = load_config(run / "adapter_model" / "train_args.json")
    assert (args.lora_r, args.max_steps, args.deepspeed_optimizer_params_lr) == (8, 50, 1e-3)
    assert "local_rank" not in args.nested
    assert (
        facts["tokenizer_sha256"] == load_tokenizer(base_dir).sha256
        and facts["prompt_sha256"] == TEMPLATES["alpaca"].sha256
    )
    assert (facts["labels"], facts["step"]) == (["人名", "地名"], 50)
    assert 5 < facts["text_tokens"] < 60  # at the 80th percentile
    assert args.deepspeed["bf16"]["enabled"] is args.deepspeed["fp16"]["enabled"] is False
    assert len(facts["instructs"]) == 1 and facts["versions"].keys() >= {"torch", "transformers", "peft", "deepspeed"}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_can_be_watched(workspace, trainer):
    """TensorBoard has the log's figures, the picture those of the last save."""
    run = workspace / "checkpoint" / "mine" / trainer
    log = read_log(run)
    assert [row["examples"] for row in log if "loss" in row][32:37] == [198, 204, 205, 211, 217]
    assert [row["epoch"] for row in log] == [row["step"] / 35 for row in log]
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    for name in ("loss", "lr", "eval_loss"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(row["step"], pytest.approx(row[name])) for row in log if name in row]
    assert imread(run / "training.png").shape[1] == 800
    assert (run / "training.png").stat().st_mtime_ns > (run / "train_log.jsonl").stat().st_mtime_ns
    assert not (run / "training.png.new").exists()


def test_the_picture_counts_once_what_a_resumed_run_has_done_again(tmp_path):
    log = tmp_path / "train_log.jsonl"
    rows = [{"examples": n, "loss": n / 10} for n in (6, 12, 18)] + [{"examples": 18, "eval_loss": 5.0}]
    rows += [{"examples": 12, "loss": 9.0}, {"examples": 12, "eval_loss": 4.0}, {"examples": 18, "loss": 8.0}]
    write_jsonl(log, [{"step": 1, "loss": 7.0}, *rows])  # the first: as earlier versions logged
    series = {"loss": [(6, 0.6), (12, 9.0), (18, 8.0)], "eval_loss": [(12, 4.0)], "eval_f1": [], "lr": []}
    assert series_of(log) == series


def test_a_picture_that_cannot_be_drawn_is_said_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    log = TrainLog(tmp_path, TrainLoader([None] * 9, 3, 1, list, 42), 3)
    for step in (1, 2, 3):
        log.write(step, loss=1.0, lr=0.1)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None if step > 1 else matplotlib.figure)
        log.draw()
    log.close()
    assert capsys.readouterr().err.count("画不了") == 1
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["train_log.jsonl", "training.png"]


def test_tensorboard_keeps_what_a_resumed_run_goes_on_from(tmp_path):
    for first_step, losses in ((0, [1.0, 2.0, 3.0]), (2, [9.0])):
        log = TrainLog(tmp_path, TrainLoader([None] * 9, 3, 1, list, 42), 3, first_step, tensorboard=True)
        for step, loss in enumerate(losses, first_step + 1):
            log.write(step, loss=loss, lr=0.1)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_the_time_that_is_left_the_speed_and_the_memory_are_said(tmp_path, monkeypatch, capsys):
    """Time and speed without an evaluation, the time also without the first step, which compiles. The memory is what a card
    must have, free parts of its blocks included."""
    clock = SimpleNamespace(now=0, time=lambda: clock.now)
    monkeypatch.setattr("alpaca.training.run_log.time", clock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: (10 + clock.now) * 2**30)
    log = TrainLog(tmp_path, TrainLoader([None] * 120, 3, 1, list, 42), 40, first_step=5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    for step, seconds in enumerate((30, *[2] * 11), 6):
        clock.now += seconds
        log.step()
        if step in (11, 15):
            log.write(step, loss=1.0, lr=0.1)
        if step == 11:
            clock.now += 100
            log.write(step, eval_loss=1.0)
    log.close()
    assert [json.loads(line).get("examples_per_second") for line in log.path.open()] == [18 / 40, None, 12 / 8]
    said = [line for line in re.split("[\r\n]", capsys.readouterr().err) if "峰值" in line or "约需" in line]
    left = "每步 2.00 秒，余下 25 步约需 0:00:50（不算保存和评估）"
    assert said == ["第 1 步后显存峰值 40.0 GiB", left, "训练结束，显存峰值 162.0 GiB"]


def test_tensorboard_has_no_room(tmp_path, monkeypatch):
    def full(*_, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    with pytest.raises(UserError, match="tensorboard: cannot be written .*No space left.* --resume"):
        TrainLog(tmp_path, TrainLoader([None] * 9, 3, 1, list, 42), 3, tensorboard=True)


def test_tensorboard_that_is_not_there(base_dir, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    args = parse_config(train_trainer.CONFIG, train_trainer.__file__, [f"--model_dir={base_dir}", "--tensorboard"])
    with pytest.raises(UserError, match="pip install tensorboard"):
        check_options(args)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_accumulation_gives_the_same_losses(workspace, base_dir, tmp_path, trainer):
    """Over an epoch's end: 19 rows are three steps of 6, and one of 1, whose second micro-batch is empty."""
    path = write_jsonl(tmp_path / "train.txt", make_records(19, 3))
    same = [f"--train_path={path}", "--max_steps=6", "--warmup_ratio=0"]
    same += ["--lora_dropout=0"]  # which draws for each micro-batch
    shapes = {"parts": ["--train_batch_size=3", "--gradient_accumulation_steps=2"], "whole": ["--train_batch_size=6"]}
    for run, shape in shapes.items():
        options = [*training_options(base_dir), *same, *shape, f"--save_dir={tmp_path / run}"]
        run_script(f"{trainer}.py", *options, cwd=workspace)
    losses = [[row["loss"] for row in read_log(tmp_path / run) if "loss" in row] for run in shapes]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_packing_does_not_change_the_losses(workspace, base_dir, tmp_path, trainer):
    """Eight steps of each layout: the same examples a step, the same losses."""
    options = ["--max_steps=8", "--deepspeed_optimizer_params_lr=1e-4", "--eval_steps=-1", "--save_steps=99"]
    options += ["--lora_dropout=0"]  # which draws for each position of a row
    losses = {}
    for packing in ("prefix", "plain", "none"):
        run = tmp_path / packing
        run_script(
            f"{trainer}.py",
            *training_options(base_dir),
            *options,
            f"--packing={packing}",
            f"--save_dir={run}",
            cwd=workspace,
        )
        losses[packing] = [row["loss"] for row in read_log(run)]
    assert len(losses["none"]) == 8 and losses["prefix"] != losses["none"]  # not the same arithmetic, the same numbers
    assert losses["prefix"] == pytest.approx(losses["none"], rel=1e-4)
    assert losses["plain"] == pytest.approx(losses["none"], rel=1e-4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_launcher_and_no_compiler(workspace, base_dir, tmp_path, trainer):
    """On a machine without c++, g++ and gcc; adapter_model.bin; a run in the way is kept. test_untrusted.py has the launcher
    with train_trainer.py."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for tool in Path(folder).iterdir() if Path(folder).is_dir() else []:
            if not COMPILER.fullmatch(tool.name) and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    assert shutil.which("c++", path=str(tools)) is None and shutil.which("gcc", path=str(tools)) is None
    save_dir = tmp_path / "run"
    (save_dir / "adapter_model").mkdir(parents=True)
    (save_dir / "adapter_model" / "mine.txt").touch()
    options = [*training_options(base_dir), f"--save_dir={save_dir}", "--max_steps=3", "--safe_serialization=False"]
    launcher = [shutil.which("deepspeed"), "--num_accelerators=1", f"--master_port={free_port()}"]
    launcher = launcher if trainer == "train_deepspeed" else None
    result = run_script(f"{trainer}.py", *options, cwd=workspace, launcher=launcher, env={"PATH": str(tools)})
    weights = torch.load(save_dir / "adapter_model" / "adapter_model.bin", weights_only=True)
    assert len(weights) == 28 and all(t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name)
    assert (
        tmp_path / "run.old-1" / "adapter_model" / "mine.txt"
    ).exists() and "run.old-1" in result.stderr + result.stdout
    assert json.loads((save_dir / "adapter_model" / "train_args.json").read_text(encoding="utf-8"))["step"] == 3


@pytest.mark.parametrize("trainer", TRAINERS)
def test_resume_ends_where_an_uninterrupted_run_does(workspace, base_dir, tmp_path, trainer):
    """From step 40 of 50 to the same adapter."""
    done = workspace / "checkpoint" / "mine" / trainer
    run = tmp_path / "run"
    shutil.copytree(done, run)
    shutil.rmtree(run / "checkpoint-50")
    run_script(f"{trainer}.py", *training_options(base_dir), f"--save_dir={run}", "--resume", cwd=workspace)
    rows = read_log(run)[len(read_log(done)) :]
    assert_same_rows(rows, [row for row in read_log(done) if row["step"] > 40])
    assert_same_adapter(run, done)


@pytest.mark.parametrize(
    "trainer, metric", [("train_deepspeed", "loss"), ("train_trainer", "loss"), ("train_trainer", "f1")]
)
def test_the_best_adapter(workspace, base_dir, tmp_path, trainer, metric):
    """adapter_model/ is the first of the states with the best score, checkpoint-<step>/ the newest ones. A loss that falls
    and rises, by a large learning rate, has its best in between; F1 of so short a run is 0 throughout."""
    options = ["--eval_examples=4", f"--best={metric}", "--max_steps=20", "--eval_steps=5", "--save_steps=10"]
    if metric == "loss":
        options += ["--eval_examples=0", "--deepspeed_optimizer_params_lr=0.1", "--warmup_ratio=0.9"]
    run_script(f"{trainer}.py", *training_options(base_dir), *options, f"--save_dir={tmp_path}/run", cwd=workspace)
    scores = {row["step"]: row[f"eval_{metric}"] for row in read_log(tmp_path / "run") if "eval_loss" in row}
    assert list(scores) == [5, 10, 15, 20]
    _, facts = load_config(tmp_path / "run" / "adapter_model" / "train_args.json")
    best = (min if metric == "loss" else max)(scores, key=scores.get)
    assert (facts["step"], facts[f"eval_{metric}"]) == (best, scores[best])
    assert metric == "f1" or len(set(scores.values())) == 4
    kept = sorted(p.parent.name for p in (tmp_path / "run").glob("checkpoint-*/complete"))
    assert kept == ["checkpoint-10", "checkpoint-20"]


def test_which_score_is_better(tmp_path):
    (tmp_path / "adapter_model").mkdir()
    saved = {"config": {}, "eval_f1": 0.5, "eval_loss": 2.0}
    (tmp_path / "adapter_model" / "train_args.json").write_text(json.dumps(saved))
    f1, loss, last = (BestScore(tmp_path, metric) for metric in ("f1", "loss", "last"))
    assert [f1.improves({"eval_f1": score}) for score in (0.5, 0.6, 0.55, 0.7)] == [False, True, False, True]
    assert [loss.improves({"eval_loss": score}) for score in (2.0, 1.5, 1.7)] == [False, True, False]
    assert not last.improves({"eval_f1": 1.0, "eval_loss": 0.0})
    assert BestScore(tmp_path / "nowhere", "loss").improves({"eval_loss": 9.0})


def test_f1_in_training_is_that_of_test(workspace, base_dir, tmp_path, monkeypatch):
    """An adapter that is trained, and the same one merged: equal answers; and the weights are what they were. Also where
    two ranks answer a part each."""
    adapter = tmp_path / "adapter_model"
    shutil.copytree(workspace / "checkpoint" / "mine" / "train_trainer" / "adapter_model", adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.manual_seed(0)  # random ones say something of every text; trained for so few steps it may say 没有 to all
    save_file(
        {name: torch.randn_like(t) if "lora_B" in name else t for name, t in weights.items()},
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    args, facts = load_config(adapter / "train_args.json")
    load = partial(load_for_inference, adapter, args, facts, None, None, "fp32", "cpu")
    (model, tokenizer), (merged, _) = load(), load(merge=True)
    examples = read_examples(workspace / "data" / "mine" / "instruct_data" / "dev.txt")[:9]
    answer = Answering(merged, tokenizer, uncut, facts["labels"], grammar=AnswerGrammar(tokenizer, facts["labels"]))
    rows = [row for ended in answer.in_turn(examples) for row in ended]
    for example, row in zip(examples[:6], rows, strict=False):  # of which it is thus right
        example.update(answer=row["prediction"], entities=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    steps = []
    f1 = evaluate_f1(model, tokenizer, examples, args, facts, lambda: steps.append(False))
    rows = [row for ended in answer.in_turn(examples) for row in ended]
    assert f1 == score(rows, facts["labels"])["string"]["micro"]["f1"] > 0.3
    assert model.training and all(layer.training for layer in model.modules())
    steps[-1] = True  # stopped when some are answered: no score of these alone
    assert evaluate_f1(model, tokenizer, examples, args, facts, iter(steps).__next__) is None

    answered = []  # by rank 0, then by both
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: len(answered))
    monkeypatch.setattr(
        dist, "all_gather_object", lambda parts, rows: answered.append(rows) or parts.__init__(answered)
    )
    evaluate_f1(model, tokenizer, examples, args, facts)
    assert evaluate_f1(model, tokenizer, examples, args, facts) == f1
    assert [len(rows) for rows in answered] == [5, 4]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_first_step_goes_the_learning_rate(base_dir, instruct_data, tmp_path, trainer):
    """As Adam's does, also at ZeRO 0 in half precision, where DeepSpeed has made a step of its own before."""
    options = [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    options += [f"--model_dir={base_dir}", "--save_dir=run", "--precision=bf16", "--max_steps=1", "--eval_steps=-1"]
    options += ["--deepspeed_zero_optimization_stage=0", "--deepspeed_optimizer_params_lr=1e-3", "--warmup_ratio=0"]
    run_script(f"{trainer}.py", *options, "--lora_target_modules=lm_head", cwd=tmp_path)
    tensors = load_file(tmp_path / "run" / "adapter_model" / "adapter_model.safetensors")
    moved = tensors["base_model.model.lm_head.lora_B.weight"].float().abs().mean().item()
    assert moved == pytest.approx(1e-3, rel=0.01)


def test_what_can_be_resumed(tmp_path):
    for step, marker in ((5, "complete"), (10, "complete"), (15, "half")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / marker).touch()
    assert checkpoint_to_resume(tmp_path, "False") is None
    assert checkpoint_to_resume(tmp_path, "True") == tmp_path / "checkpoint-10"
    assert checkpoint_to_resume(tmp_path, "5") == tmp_path / "checkpoint-5"
    assert checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-10")) == tmp_path / "checkpoint-10"
    with pytest.raises(UserError, match="checkpoint-15 is not a complete checkpoint; .*checkpoint-5, checkpoint-10"):
        checkpoint_to_resume(tmp_path, "15")
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint_to_resume(tmp_path / "nowhere", "True")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model_dir=./model_hub/chinese-alpaca-tiny"], "chinese-alpaca-tiny: no model here .* `make tiny`"),
        (["--train_path=nowhere.txt"], "nowhere.txt: no such file"),
        (["--response_column=output"], "train.txt:1: no column 'output' .*--response_column"),
        (["--lorar=8"], "unknown option --lorar, did you mean --lora_r?"),
        (["--train_batch_size=0"], "--train_batch_size=0: expected 1 or more"),
        (["--packing=dense"], "--packing=dense: expected prefix, plain, none"),
        (["--compile=yes"], "--compile=yes: expected auto, True, False"),
        (["--save_dir=data"], "--save_dir=.*data: holds other files"),
        (["--best=f1"], "--best=f1 needs answers to score; give --eval_examples=200"),
        (["--best=loss", "--eval_steps=0"], "--best=loss needs evaluations; give --eval_steps=500"),
        (["--best=newest"], "--best=newest: expected last, f1, loss"),
        (["--eval_examples=9", "--deepspeed_zero_optimization_stage=3"], "--eval_examples: with ZeRO-3 no process has"),
        (["--lora_r=abc"], "--lora_r: expected int, got 'abc'"),
        (["--learning_rate=1"], "--deepspeed_optimizer_params_lr"),
        (
            ["--lora_target_modules=q_projj"],
            "--lora_target_modules=q_projj: .*no linear layer 'q_projj'; did you mean q_proj?",
        ),
        pytest.param(
            ["--precision=fp16"],
            "fp16 needs a CUDA GPU; on a CPU use --precision=fp32",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        (["--max_seq_length=8"], "no example fits into max_seq_length=8"),
        (["--resume=7"], "--resume=7: .*not a complete checkpoint"),
        (["--deepspeed_json_path={tmp_path}/wrong.json"], "train_micro_batch_size_per_gpu.*99.*train_batch_size.*12"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workspace, base_dir, tmp_path, options, message):
    settings = {"train_micro_batch_size_per_gpu": 99, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    (tmp_path / "wrong.json").write_text(json.dumps(settings))
    given = ["--data_name=mine", f"--model_dir={base_dir}", f"--save_dir={tmp_path}/run"]
    given += [option.format(tmp_path=tmp_path) for option in options]
    result = run_script("train_deepspeed.py", *given, cwd=workspace, check=False)
    assert (workspace / "data" / "mine" / "instruct_data" / "train.txt").exists()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and re.search(message, errors[0]), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "adapter_model").exists()


@pytest.fixture
def checked(base_dir, monkeypatch):
    """check_options of a command line."""
    monkeypatch.chdir(ROOT)

    def run(*options):
        given = [f"--model_dir={base_dir}", *options]
        check_options(parse_config(train_trainer.CONFIG, train_trainer.__file__, given))

    return run


@pytest.mark.parametrize(
    "option, expected",
    [
        ("lora_dropout=1.5", "0 or more and less than 1"),
        ("lora_dropout=-1", "0 or more and less than 1"),
        ("lora_dropout=1", "0 or more and less than 1"),
        ("lora_alpha=0", "more than 0"),
        ("lora_r=0", "1 or more"),
        *((f"{name}=0", "1 or more") for name in ("gradient_accumulation_steps", "num_train_epochs", "log_steps")),
        *((f"{name}=-2", "1 or more, or -1") for name in ("max_steps", "save_steps")),
        ("eval_examples=-1", "0 or more"),
        ("deepspeed_optimizer_params_eps=0", "more than 0"),
        ("warmup_ratio=100", "0 to 1, a share of the steps and not their number"),
        ("warmup_ratio=-0.1", "0 to 1, a share of the steps and not their number"),
        ("max_seq_length=0", "1 or more"),
        ("lora_target_modules=", "names of linear layers; there are down_proj, gate_proj, k_proj, lm_head, o_proj"),
        ("seed=-1", "0 to 4294967295"),  # train_trainer ended in a traceback
        ("deepspeed_optimizer_type=Muon", "Adam or AdamW"),  # it trained with Adam, without a word
        ("save_total_limit=-1", "0 or more"),
        ("eval_steps=-2", "1 or more, or -1"),
        ("deepspeed_optimizer_params_lr=0", "more than 0"),
        ("deepspeed_optimizer_params_lr=-0.1", "more than 0"),
        ("deepspeed_optimizer_params_weight_decay=-0.1", "0 or more"),
        ("deepspeed_gradient_clipping=-1", "0 or more"),
        ("deepspeed_optimizer_params_betas=0.9", "two numbers"),
        ("deepspeed_optimizer_params_betas=0.9,1.0", "two numbers"),
        ("deepspeed_optimizer_params_betas=0.9,0.95,0.9", "two numbers"),
    ],
)
def test_a_value_out_of_its_range(checked, option, expected):
    with pytest.raises(UserError) as error:
        checked(f"--{option}")
    name, _, value = option.partition("=")
    assert re.fullmatch(rf"--{name}={re.escape(value)}(\.0)?: expected {expected}.*", str(error.value))


def test_values_at_the_ends_of_their_ranges(checked):
    checked("--lora_dropout=0", "--warmup_ratio=1", "--deepspeed_optimizer_params_weight_decay=0", "--save_steps=-1")
    checked(
        "--lora_dropout=0.99",
        "--warmup_ratio=0",
        "--deepspeed_gradient_clipping=0",
        "--lora_target_modules=0.mlp.up_proj",
    )
    checked("--deepspeed_zero_optimization_stage=3", "--eval_examples=0")


def test_a_layer_that_the_base_lacks(checked):
    """PEFT would train the one that is there. Half a name is none; embeddings are not for it."""
    with pytest.raises(UserError, match="no linear layer 'query_key_value'; there are down_proj, "):
        checked("--lora_target_modules=q_proj,query_key_value")
    for name in ("proj", "embed_tokens"):
        with pytest.raises(UserError, match=f"no linear layer '{name}'"):
            checked(f"--lora_target_modules={name}")
