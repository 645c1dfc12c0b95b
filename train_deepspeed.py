"""Train LoRA adapters with a raw DeepSpeed loop.

    deepspeed train_deepspeed.py
    deepspeed train_deepspeed.py --data_name=msra --model_dir=./model_hub/chinese-alpaca-7b --lora_r=16
    python train_deepspeed.py --max_steps=20                      # without the launcher: one process

Reads data/<data_name>/instruct_data/{train,dev}.txt (made by process.py) and deepspeed.json (optimizer, precision,
ZeRO). Writes <save_dir>/adapter_model/ (weights and train_args.json), checkpoint-<step>/ (to resume),
train_log.jsonl and training.png. train_trainer.py is the same recipe in the Hugging Face Trainer.
"""

from alpaca.common.start import start

start()

from functools import partial
from pathlib import Path

import torch.distributed as dist

from alpaca.common.console import say
from alpaca.common.devices import DTYPES, describe_device, init_distributed, resolve_precision
from alpaca.models.base import load_base
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.adapter_writer import BestScore, save_adapter, training_facts
from alpaca.training.audit import load_audited_data
from alpaca.training.batches import TrainLoader, eval_batches
from alpaca.training.checkpoints import check_resumed, checkpoint, checkpoint_to_resume, run_facts, start_run
from alpaca.training.evaluate import evaluate_f1
from alpaca.training.lora import add_lora, check_options, compile_for_training
from alpaca.training.loss import answer_loss, evaluate_loss
from alpaca.training.prefix_tree import make_collate
from alpaca.training.run_log import TrainLog
from alpaca.training.steps import catch_sigterm, end_by_sigterm, end_of_step, make_scheduler, seed_step
from config_utils import run_script

CONFIG = {
    # data and model
    "data_name": "demo",  # folder under data/ and under checkpoint/
    "model_dir": "./model_hub/chinese-alpaca-tiny",  # base model; for 7B ./model_hub/chinese-alpaca-7b
    "train_path": None,  # None: data/<data_name>/instruct_data/train.txt
    "dev_path": None,  # None: data/<data_name>/instruct_data/dev.txt
    "save_dir": None,  # None: checkpoint/<data_name>/train_deepspeed
    "instruct_column": "instruct",  # name of the instruction's column
    "query_column": "query",  # name of the input's column
    "response_column": "answer",  # name of the answer's column
    "max_seq_length": 512,  # tokens of prompt + answer; longer examples are dropped and counted, never cut
    "too_long": "drop",  # drop | error: what to do with longer examples
    # LoRA
    "lora": {
        "r": 8,  # rank
        "alpha": 32,  # scale; the update is multiplied by alpha / r
        "dropout": 0.0,  # on the LoRA branch
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],  # where
    },
    # training; learning rate, betas, weight decay and ZeRO stand in deepspeed.json
    "packing": "prefix",  # prefix (what examples share is computed once) | plain (end to end) | none (padded)
    "train_batch_size": 12,  # examples a device and micro-batch
    "gradient_accumulation_steps": 1,  # micro-batches an optimizer step
    "num_train_epochs": 3,  # passes over the data
    "max_steps": -1,  # stop after so many optimizer steps; -1: by epochs
    "warmup_ratio": 0.03,  # share of the steps with rising learning rate; then it falls linearly to 0
    "gradient_checkpointing": False,  # recompute activations instead of keeping them: less memory, slower
    "compile": "auto",  # auto | True | False: compile the layers and replay them as CUDA graphs, on a CUDA GPU
    "seed": 42,  # of LoRA's start and the data order
    "precision": "auto",  # auto | bf16 | fp16 | fp32; auto: what the device computes best
    # logging and saving
    "log_steps": 10,  # a log line every so many steps
    "eval_steps": 500,  # dev loss every so many steps and at the end; -1: never
    "eval_examples": 0,  # then also answer the first N dev examples and log their F1, as test.py --max_examples=N; 0: none
    "best": "last",  # last | f1 | loss: adapter_model/ is the newest state, or the one with the best F1 or dev loss
    "save_steps": 500,  # adapter and resumable checkpoint every so many steps and at the end; -1: only at the end
    "save_total_limit": 2,  # resumable checkpoints to keep; 0: all
    "resume": "False",  # False | True (newest complete checkpoint) | a step | a path
    "tensorboard": False,  # also write the figures of train_log.jsonl for TensorBoard, in <save_dir>/tensorboard
    "safe_serialization": True,  # False: adapter_model.bin instead of adapter_model.safetensors
    # DeepSpeed
    "deepspeed_json_path": None,  # None: data/<data_name>/deepspeed.json if there is one, else deepspeed.json
    "local_rank": -1,  # the deepspeed launcher passes it
}


def main(args):
    import deepspeed  # takes seconds, and alpaca.training.lora has told it the accelerator

    data_dir = Path("data") / args.data_name / "instruct_data"
    train_path, dev_path = args.train_path or data_dir / "train.txt", args.dev_path or data_dir / "dev.txt"
    save_dir = args.save_dir or Path("checkpoint") / args.data_name / "train_deepspeed"

    # Everything that can be wrong with the input is found before the weights load.
    check_options(args)
    resume_from = checkpoint_to_resume(save_dir, args.resume)
    tokenizer = load_tokenizer(args.model_dir)
    (train_records, train_set), (dev_records, dev_set) = load_audited_data(train_path, dev_path, tokenizer, args)
    facts = training_facts(args, train_records)

    device, rank, world_size = init_distributed()
    precision, ds_config = resolve_precision(args.precision, args.deepspeed, device)
    say(f"{describe_device(device, precision, world_size)}, 训练 {len(train_set)} 条, 验证 {len(dev_set)} 条")

    collate = make_collate(args.packing, tokenizer.pad_token_id)
    loader = TrainLoader(
        train_set, args.train_batch_size, args.gradient_accumulation_steps, collate, args.seed, rank, world_size
    )
    total_steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * loader.steps_per_epoch
    run = run_facts(args, loader)
    if resume_from:
        check_resumed(resume_from, run)

    model = add_lora(load_base(args.model_dir, DTYPES[precision], device), args)
    compile_for_training(model, loader, args, tokenizer.pad_token_id, device)
    engine, _, _, scheduler = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=ds_config,
        lr_scheduler=partial(make_scheduler, args=args, total_steps=total_steps),
    )
    step = 0
    if resume_from:
        engine.load_checkpoint(str(resume_from.parent), tag=resume_from.name, load_module_strict=False)
        step = engine.global_steps
        say(f"从 {resume_from} 继续，已完成 {step} 步")

    def save():
        if args.best == "last":
            save_adapter(model, save_dir, args, ds_config, facts, step)
        with checkpoint(Path(save_dir) / f"checkpoint-{step}", args.save_total_limit, run):
            engine.save_checkpoint(str(save_dir), tag=f"checkpoint-{step}", exclude_frozen_parameters=True)
        log.draw()

    def evaluate():
        batches = eval_batches(dev_set, args.train_batch_size, collate, rank, world_size)
        count = -(-len(dev_set) // (args.train_batch_size * world_size))
        scores = {"eval_loss": evaluate_loss(model, batches, device, count)}
        if args.eval_examples > 0:
            scores["eval_f1"] = evaluate_f1(model, tokenizer, dev_records[: args.eval_examples], facts["labels"])
        log.write(step, **scores)
        if best.improves(scores):
            save_adapter(model, save_dir, args, ds_config, {**facts, **scores}, step)

    start_run(save_dir, resume_from)
    best = BestScore(save_dir, args.best)
    log, sigterm = TrainLog(save_dir, loader, total_steps, step, args.tensorboard), catch_sigterm()
    loss_sum, logged_steps, at_step_end = 0.0, 0, True
    while step < total_steps:
        loader.seek(step)
        for batch in loader:
            if at_step_end:
                seed_step(args.seed, step, rank)
            # DeepSpeed averages gradients over ranks; the loss is a share of the step's mean over all ranks.
            loss = answer_loss(engine, **batch) * world_size
            loader.lay_out_next()
            engine.backward(loss, scale_wrt_gas=False)
            loss_sum += loss.detach()
            at_step_end = engine.is_gradient_accumulation_boundary()
            lr = scheduler.get_last_lr()[0]
            engine.step()
            if not at_step_end:
                continue

            step, logged_steps = step + 1, logged_steps + 1
            log.step()
            stop = end_of_step(loss_sum, sigterm, loader, step, lr, train_path)
            if step % args.log_steps == 0 or step == total_steps:
                mean = loss_sum / logged_steps
                if world_size > 1:
                    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
                log.write(step, loss=mean.item(), lr=lr)
                loss_sum, logged_steps = 0.0, 0
            at_end = step == total_steps
            if args.eval_steps > 0 and (step % args.eval_steps == 0 or at_end):
                evaluate()
            if stop or at_end or (args.save_steps > 0 and step % args.save_steps == 0):
                save()
            if stop and not at_end:
                end_by_sigterm(step)
            if at_end:
                break
    log.close()
    say(f"LoRA 已保存到 {Path(save_dir) / 'adapter_model'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
