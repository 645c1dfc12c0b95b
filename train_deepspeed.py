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

import torch.distributed as dist

from alpaca.training.loss import answer_loss
from alpaca.training.run import Run
from alpaca.training.steps import begin_at_step_0, end_by_signal, seed_step, use_settings
from config_utils import run_script

CONFIG = {
    # data and model
    "data_name": "demo",  # name of the data set: its folder under data/ and under checkpoint/
    "model_dir": "./model_hub/chinese-alpaca-tiny",  # folder of the base model; for 7B ./model_hub/chinese-alpaca-7b
    "template": "auto",  # the prompt around the instruction: auto | alpaca | alpaca2 | chat; auto: that of the base
    "train_path": None,  # file of instruct data to train on; None: data/<data_name>/instruct_data/train.txt
    "dev_path": None,  # file of instruct data to evaluate on; None: data/<data_name>/instruct_data/dev.txt
    "save_dir": None,  # folder for the adapter, checkpoints and logs; None: checkpoint/<data_name>/train_deepspeed
    "instruct_column": "instruct",  # key of the instruction in a line of the data
    "query_column": "query",  # key of the input in a line of the data
    "response_column": "answer",  # key of the answer in a line of the data
    "max_seq_length": 512,  # most tokens of prompt + answer; longer examples are dropped and counted, never cut
    "too_long": "drop",  # drop | error: what to do with examples longer than max_seq_length
    # LoRA
    "lora": {
        "r": 8,  # rank of the LoRA matrices
        "alpha": 32,  # scale of LoRA's update: it is multiplied by alpha / r
        "dropout": 0.0,  # share of LoRA's inputs set to zero at random in training; 0: none
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],  # LoRA layers
    },
    # training; learning rate, betas, weight decay and ZeRO stand in deepspeed.json
    "packing": "prefix",  # layout of a step's examples: prefix (shared beginnings once) | plain (end to end) | none (padded)
    "train_batch_size": 12,  # examples per device and micro-batch
    "gradient_accumulation_steps": 1,  # micro-batches per optimizer step
    "num_train_epochs": 3,  # passes over the training data
    "max_steps": -1,  # stop after this many optimizer steps; -1: after num_train_epochs
    "warmup_ratio": 0.03,  # share of the steps in which the learning rate rises, 0 to 1; then it falls linearly to 0
    "base_weights": "full",  # full | nf4 (4 bits) | fp8 (8 bits): how the frozen base is held; nf4 needs requirements-nf4.txt
    "gradient_checkpointing": False,  # True: compute activations again instead of keeping them; less memory, slower
    "compile": "auto",  # auto | True | False: compile the layers and replay them as CUDA graphs; auto: where that is possible
    "seed": 42,  # random seed of LoRA's first weights, the order of the data and dropout
    "precision": "auto",  # auto | bf16 | fp16 | fp32: number format to compute in; auto: the best that the device has
    # logging and saving
    "log_steps": 10,  # log loss and speed every so many optimizer steps
    "eval_steps": 500,  # compute the dev loss every so many optimizer steps and at the end; -1: never
    "eval_examples": 0,  # with each dev loss, also answer the first N dev examples and log their F1; 0: do not
    "best": "last",  # last | f1 | loss: adapter_model/ holds the newest state, or the one with the best dev F1 or dev loss
    "save_steps": 500,  # save adapter and resumable checkpoint every so many optimizer steps and at the end; -1: at the end
    "save_total_limit": 2,  # how many resumable checkpoints to keep, the newest; 0: all
    "resume": "False",  # continue a run: False | True (from the newest complete checkpoint) | a step | a checkpoint's path
    "tensorboard": False,  # True: write the figures of train_log.jsonl for TensorBoard too, to <save_dir>/tensorboard
    "safe_serialization": True,  # True: the adapter is saved as adapter_model.safetensors; False: as adapter_model.bin
    # DeepSpeed
    "deepspeed_json_path": None,  # DeepSpeed settings; None: data/<data_name>/deepspeed.json if there is one, else deepspeed.json
    "local_rank": -1,  # number of this process on its machine; the deepspeed launcher passes it
}


def main(args):
    run = Run(args, "train_deepspeed")
    model = run.load_model()
    with run.memory_errors():
        train(run, model)
    run.end()
    dist.destroy_process_group()


def train(run, model):
    import deepspeed  # takes seconds, and start() has told it the accelerator

    engine, _, _, scheduler = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=run.settings,
        lr_scheduler=run.scheduler,
    )
    step = 0
    if run.resume_from:
        engine.load_checkpoint(str(run.resume_from.parent), tag=run.resume_from.name, load_module_strict=False)
        use_settings(engine.optimizer, scheduler, run.settings)
        step = engine.global_steps
    else:
        begin_at_step_0(engine.optimizer)
    run.begin(step)
    loss_sum, at_step_end = 0.0, True
    while step < run.total_steps:
        run.loader.seek(step)
        for batch in run.loader:
            if at_step_end:
                seed_step(run.args.seed, step, run.rank)
            # DeepSpeed averages gradients over ranks; the loss is a share of the step's mean over all ranks.
            loss = answer_loss(engine, **batch) * run.world_size
            run.loader.lay_out_next()
            engine.backward(loss, scale_wrt_gas=False)
            loss_sum += loss.detach()
            at_step_end = engine.is_gradient_accumulation_boundary()
            lr = scheduler.get_last_lr()[0]
            engine.step()
            if not at_step_end:
                continue

            step += 1
            run.step_ended(step, loss_sum, lr, engine.optimizer)
            loss_sum = 0.0
            if step % run.args.log_steps == 0 or step == run.total_steps:
                run.log_loss(step, lr)
            if run.save_due(step):
                save(run, engine, step)
            if run.evaluation_due(step) and not run.signal:  # after the save: it may fail
                run.evaluate(step)
            if run.must_end(step):
                if run.save_due(step):  # the signal came while it was evaluated
                    save(run, engine, step)
                end_by_signal(run.signal, step)
            if step == run.total_steps:
                break


def save(run, engine, step):
    run.save_newest(step)
    with run.checkpoint(step):
        engine.save_checkpoint(str(run.save_dir), tag=f"checkpoint-{step}", exclude_frozen_parameters=True)


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
