"""What both trainers do alike: make everything ready before the weights load, evaluate, and save.

Each trainer keeps its own loop; whatever must agree between them is here.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

from alpaca.common.console import say
from alpaca.common.devices import DTYPES, describe_device, init_distributed, resolve_precision
from alpaca.models.base import load_base
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.adapter_writer import BestScore, adapter_step, save_adapter, training_facts
from alpaca.training.audit import load_audited_data
from alpaca.training.batches import TrainLoader, eval_batches
from alpaca.training.checkpoints import (
    check_save_dir,
    checkpoint,
    checkpoint_to_resume,
    from_main,
    start_run,
    step_of,
)
from alpaca.training.evaluate import evaluate_f1
from alpaca.training.identity import check_resumed, identity_of, read_identity
from alpaca.training.lora import add_lora, check_options, compile_for_training
from alpaca.training.loss import evaluate_loss
from alpaca.training.prefix_tree import make_collate
from alpaca.training.run_log import TrainLog
from alpaca.training.steps import make_scheduler


class Run:
    """One training run. Made, it has checked and read everything that can be wrong, and no weight is loaded yet.

    args: the trainer's Config. resume_from: the checkpoint's folder or None. settings: DeepSpeed's, with the precision
    filled in. loader: this rank's TrainLoader. facts: what stands beside the adapter (training_facts). total_steps:
    optimizer steps of the whole run. scheduler: optimizer -> its learning rate's schedule.
    """

    def __init__(self, args, trainer):
        """trainer: "train_trainer" or "train_deepspeed", the folder of the default save_dir. UserError for bad input."""
        data_dir = Path("data") / args.data_name / "instruct_data"
        self.args = args
        self.train_path, dev_path = args.train_path or data_dir / "train.txt", args.dev_path or data_dir / "dev.txt"
        self.save_dir = Path(args.save_dir or Path("checkpoint") / args.data_name / trainer)

        check_options(args)
        self.resume_from = checkpoint_to_resume(self.save_dir, args.resume)
        check_save_dir(self.save_dir, self.resume_from)
        written = read_identity(self.resume_from) if self.resume_from else {}
        self.tokenizer = load_tokenizer(args.model_dir)
        (train_records, self.train_set), (self.dev_records, self.dev_set) = load_audited_data(
            self.train_path, dev_path, self.tokenizer, args
        )
        self.facts = training_facts(args, train_records)

        self.device, self.rank, self.world_size = init_distributed()
        asked = {args.precision, *(args.deepspeed.get(key, {}).get("enabled", "auto") for key in ("bf16", "fp16"))}
        own = written.get("precision", "auto") if asked == {"auto"} else args.precision  # of a run that is resumed
        self.precision, self.settings = resolve_precision(own, args.deepspeed, self.device)
        where = describe_device(self.device, self.precision, self.world_size)
        say(f"{where}, 训练 {len(self.train_set)} 条, 验证 {len(self.dev_set)} 条")

        self.collate = make_collate(args.packing, self.tokenizer.pad_token_id)
        shape = args.train_batch_size, args.gradient_accumulation_steps
        self.loader = TrainLoader(self.train_set, *shape, self.collate, args.seed, self.rank, self.world_size)
        epochs = args.num_train_epochs * self.loader.steps_per_epoch
        self.total_steps = args.max_steps if args.max_steps > 0 else epochs
        self.scheduler = partial(make_scheduler, args=args, total_steps=self.total_steps)
        facts = self.precision, self.train_path, self.loader, self.total_steps
        self.identity = from_main(lambda: identity_of(args, *facts))
        if self.resume_from:
            check_resumed(self.resume_from, step_of(self.resume_from), written, self.identity)

    def load_model(self):
        """The base with fresh LoRA adapters on this rank's device, its layers compiled where --compile says so."""
        base = load_base(self.args.model_dir, DTYPES[self.precision], self.device)
        self.model = add_lora(base, self.args)
        compile_for_training(self.model, self.loader, self.args, self.tokenizer.pad_token_id, self.device)
        return self.model

    def begin(self, first_step):
        """Make save_dir ready and open the log. first_step: the optimizer steps that a resumed run has done already."""
        from_main(lambda: start_run(self.save_dir, self.resume_from))
        self.saved_step = adapter_step(self.save_dir)
        self.best = BestScore(self.save_dir, self.args.best)
        self.log = TrainLog(self.save_dir, self.loader, self.total_steps, first_step, self.args.tensorboard)
        if self.resume_from:
            say(f"从 {self.resume_from} 继续，已完成 {first_step} 步")
            if self.args.best == "last" and self.saved_step != first_step:  # that of the course that was left
                self.save_adapter(first_step)

    def evaluate(self, step):
        """Log the dev loss, and F1 with --eval_examples, after `step` steps; save the adapter if --best says so."""
        batch_size = self.args.train_batch_size
        batches = eval_batches(self.dev_set, batch_size, self.collate, self.rank, self.world_size)
        count = -(-len(self.dev_set) // (batch_size * self.world_size))
        scores = {"eval_loss": evaluate_loss(self.model, batches, self.device, count)}
        if self.args.eval_examples > 0:
            examples = self.dev_records[: self.args.eval_examples]
            scores["eval_f1"] = evaluate_f1(self.model, self.tokenizer, examples, self.facts["labels"])
        self.log.write(step, **scores)
        if self.best.improves(scores):
            self.save_adapter(step, **scores)
        return scores

    def save_adapter(self, step, **scores):
        """Write <save_dir>/adapter_model/ as it is after `step` steps, with the scores it was chosen for, if any."""
        save_adapter(self.model, self.save_dir, self.args, self.settings, {**self.facts, **scores}, step)
        self.saved_step = step

    def save_newest(self, step):
        """The adapter after `step` steps, where --best=last wants the newest; and training.png."""
        if self.args.best == "last":
            self.save_adapter(step)
        self.log.draw()

    @contextmanager
    def checkpoint(self, step):
        """The context in which all ranks write the resumable checkpoint-<step>/; the adapter of that step goes with it."""
        folder = self.save_dir / f"checkpoint-{step}"
        with checkpoint(folder, self.args.save_total_limit, self.identity):
            yield
            save_adapter(self.model, folder, self.args, self.settings, self.facts, step)

    def end(self):
        self.log.close()
        adapter = self.save_dir / "adapter_model"
        if self.saved_step is None:
            say(
                f"没有可比较的分数，{adapter} 没有保存；最后的 LoRA 在 {self.save_dir}/checkpoint-{self.total_steps}/adapter_model"
            )
        else:
            say(f"LoRA 已保存到 {adapter}（第 {self.saved_step} 步）")
