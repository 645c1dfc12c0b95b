"""Train LoRA adapters with the Hugging Face Trainer (on DeepSpeed).

    deepspeed train_trainer.py
    deepspeed train_trainer.py --data_name=msra --model_dir=./model_hub/chinese-alpaca-7b --lora_r=16
    python train_trainer.py --max_steps=20                        # without the launcher: one process

Reads data/<data_name>/instruct_data/{train,dev}.txt (made by process.py) and deepspeed.json (optimizer, precision,
ZeRO). Writes <save_dir>/adapter_model/ (weights and train_args.json), checkpoint-<step>/ (to resume),
train_log.jsonl and training.png. train_deepspeed.py is the same recipe as a raw DeepSpeed loop.
"""

from alpaca.common.start import start

start()

import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from alpaca.training.checkpoints import step_of
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
    "save_dir": None,  # folder for the adapter, checkpoints and logs; None: checkpoint/<data_name>/train_trainer
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


class AdapterTrainer(Trainer):
    """The stock Trainer with eight methods replaced, each for one reason."""

    def __init__(self, run, losses, **kwargs):
        # Not called, since compute_loss is replaced; it tells older versions what loss_is_scaled_for_ga tells newer ones.
        super().__init__(compute_loss_func=answer_loss, **kwargs)
        self.run, self.losses = run, losses  # losses: of the step's micro-batches, shared with LogCallback
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimizer step

    def get_train_dataloader(self):
        """Replaced: accelerate's sharding repeats examples at the end of an epoch; ours has each exactly once."""
        return self.run.loader

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Replaced: Trainer's warm-up begins with a step at learning rate 0."""
        if self.lr_scheduler is None:
            self.lr_scheduler = self.run.scheduler(optimizer or self.optimizer)
        return self.lr_scheduler

    def _run_epoch(self, **kwargs):
        """Extended: a run that is resumed after its last step, to be saved or evaluated, takes no step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def training_step(self, engine, *args, **kwargs):
        """Extended: Trainer's train() and zero_grad() visit every module and parameter of a 7B with LoRA at every step."""
        if "train" not in vars(engine):
            set_mode, trained = engine.train, [p for p in engine.parameters() if p.requires_grad]
            # add_lora and evaluate_loss set all modules, so the outermost speaks for them
            engine.train = lambda mode=True: engine if engine.module.training == mode else set_mode(mode)
            engine.zero_grad = lambda: [setattr(parameter, "grad", None) for parameter in trained]  # no other has one
        return super().training_step(engine, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Replaced: loss over the answer tokens of the whole optimizer step. DeepSpeed averages it over ranks."""
        loss = answer_loss(model, **inputs) * self.args.world_size
        self.run.loader.lay_out_next()
        self.losses.append(loss.detach())
        return loss

    def _save_checkpoint(self, model, trial):
        """Replaced: the checkpoint is marked when it is whole, and a full disk is one line."""
        with self.run.checkpoint(self.state.global_step):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False):
        """Replaced: only the adapter, whole or not at all; the stock method copies the base to the CPU first."""
        self.run.save_newest(self.state.global_step)

    def evaluate(self, *args, **kwargs):
        """Replaced: the mean over all answer tokens instead of a mean of batch means; and a save that is due comes first."""
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control.should_save = False
        metrics = self.run.evaluate(self.state.global_step)
        if self.run.must_end(self.state.global_step):  # a signal came meanwhile
            self.control.should_save, self.control.should_training_stop = (
                self.run.save_due(self.state.global_step),
                True,
            )
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class LogCallback(TrainerCallback):
    """Progress bar, log line, train_log.jsonl, and what begins and ends a step."""

    def __init__(self, run, losses):
        self.run, self.losses = run, losses
        self.lr = 0.0

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if self.run.resume_from:  # which is loaded now; the wrappers are accelerate's
            use_settings(optimizer.optimizer, lr_scheduler.scheduler, self.run.settings)
        else:
            begin_at_step_0(optimizer.optimizer)
        self.run.begin(state.global_step)

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.lr = lr_scheduler.get_last_lr()[0]  # when Trainer logs, DeepSpeed has moved on to the next step's
        self.losses.clear()
        seed_step(args.seed, state.global_step, args.process_index)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        run, step = self.run, state.global_step
        run.step_ended(step, sum(self.losses), self.lr, optimizer.optimizer)
        control.should_save = run.save_due(step)
        control.should_evaluate = run.evaluation_due(step)
        if run.must_end(step):
            control.should_evaluate, control.should_training_stop = False, True
        if step == state.max_steps:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.run.log_loss(state.global_step, self.lr)


def trainer_names(params):
    """DeepSpeed's optimizer settings under Trainer's names; Trainer refuses to start where the two differ."""
    names = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
    renamed = {names[key]: value for key, value in params.items() if key in names}
    if "betas" in params:
        renamed["adam_beta1"], renamed["adam_beta2"] = params["betas"]
    return renamed


def main(args):
    run = Run(args, "train_trainer")
    training_args = TrainingArguments(
        output_dir=str(run.save_dir),
        per_device_train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_steps=run.total_steps,
        seed=args.seed,
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        use_cpu=run.device.type == "cpu",  # without it two CPU ranks would train apart and never say so
        deepspeed=run.settings,
        max_grad_norm=run.settings.get("gradient_clipping", 0.0),
        **trainer_names(run.settings["optimizer"]["params"]),
        logging_steps=args.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if args.eval_steps > 0 else "no",
        eval_steps=args.eval_steps,
        save_steps=args.save_steps if args.save_steps > 0 else run.total_steps,
        report_to="none",
        disable_tqdm=True,  # TrainLog has the bar
        remove_unused_columns=False,
        ignore_data_skip=True,  # the loader skips what a resumed run has seen
    )
    assert training_args.world_size == run.world_size, (training_args.world_size, run.world_size)

    model = run.load_model()
    first_step, losses = step_of(run.resume_from) if run.resume_from else 0, []
    run.loader.seek(first_step)
    trainer = AdapterTrainer(
        run,
        losses,
        model=model,
        args=training_args,
        train_dataset=run.train_set,
        eval_dataset=run.dev_set,
        callbacks=[LogCallback(run, losses)],
    )
    trainer.remove_callback(PrinterCallback)
    with run.memory_errors():
        trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    if run.must_end(trainer.state.global_step):
        end_by_signal(run.signal, trainer.state.global_step)
    run.end()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
