"""What both trainers do alike: make everything ready before the weights load, evaluate, and save.

Each trainer keeps its own loop; whatever must agree between them is here.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from alpaca.common.console import end_bars, say
from alpaca.common.devices import DTYPES, check_launcher, describe_device, init_distributed, resolve_precision
from alpaca.common.errors import UserError
from alpaca.common.locks import locked
from alpaca.models.base import check_model_dir, check_vocabulary
from alpaca.models.base_weights import check_base_weights, load_base
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.adapter_writer import BestScore, adapter_step, save_adapter, training_facts
from alpaca.training.audit import load_audited_data
from alpaca.training.batches import TrainLoader, eval_batches
from alpaca.training.checkpoints import (
    check_files,
    check_save_dir,
    checkpoint,
    checkpoint_to_resume,
    from_main,
    start_run,
    step_of,
)
from alpaca.training.evaluate import evaluate_f1
from alpaca.training.identity import check_resumed, identity_of, own_precision, read_identity
from alpaca.training.lora import add_lora, check_options, compile_for_training, zero_stage
from alpaca.training.loss import evaluate_loss
from alpaca.training.prefix_tree import make_collate
from alpaca.training.run_log import TrainLog, evaluated_steps
from alpaca.training.steps import (
    catch_signals,
    end_by_signal,
    make_scheduler,
    shared_state,
    signalled,
    with_learning_rate,
)

SKIPS = 5  # steps in a row whose gradient is no number: the run ends
SCALE_SEARCH = 16  # as many in fp16 until the first update: its loss scale begins at 2**16 and is halved until it fits


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

        check_launcher()
        check_options(args)
        self.resume_from = checkpoint_to_resume(self.save_dir, args.resume)
        check_save_dir(self.save_dir, self.resume_from)
        self.written = written = read_identity(self.resume_from) if self.resume_from else {}
        self.tokenizer = load_tokenizer(args.model_dir, args.template)
        check_vocabulary(self.tokenizer, check_model_dir(args.model_dir)["vocab_size"], args.model_dir)
        (train_records, self.train_set), (self.dev_records, self.dev_set) = load_audited_data(
            self.train_path, dev_path, self.tokenizer, args
        )
        self.facts = training_facts(args, train_records, self.tokenizer)

        self.device, self.rank, self.world_size = init_distributed()
        self.held = ExitStack()  # until the process ends, however it ends
        from_main(lambda: self.held.enter_context(locked(self.save_dir)))
        precision = own_precision(args, written)
        self.precision, self.settings = resolve_precision(precision, args.deepspeed, self.device)
        check_base_weights(args.base_weights, self.device, self.precision)
        self.settings, self.lr_source = with_learning_rate(
            self.settings, check_model_dir(args.model_dir)["hidden_size"]
        )
        where = describe_device(self.device, self.precision, self.world_size)
        say(
            f"模板: {self.tokenizer.template.name}, {where}, 训练 {len(self.train_set)} 条, 验证 {len(self.dev_set)} 条"
        )

        self.collate = make_collate(args.packing, self.tokenizer.pad_token_id)
        shape = args.train_batch_size, args.gradient_accumulation_steps
        self.loader = TrainLoader(self.train_set, *shape, self.collate, args.seed, self.rank, self.world_size)
        epochs = args.num_train_epochs * self.loader.steps_per_epoch
        self.total_steps = args.max_steps if args.max_steps > 0 else epochs
        self.scheduler = partial(make_scheduler, args=args, total_steps=self.total_steps)
        facts = self.tokenizer, self.precision, self.train_path, self.loader, self.total_steps
        self.identity = from_main(lambda: identity_of(args, *facts))
        if self.resume_from:
            check_resumed(self.resume_from, step_of(self.resume_from), written, self.identity)
            from_main(lambda: check_files(self.resume_from, written))

    def load_model(self):
        """The base with fresh LoRA adapters on this rank's device, its layers compiled where --compile says so."""
        with self.memory_errors():
            self.model = add_lora(self._load_base(), self.args)
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        tokens = sum(len(example.prompt_ids) + len(example.answer_ids) for example in self.train_set)
        say(
            f"学习率 {self.settings['optimizer']['params']['lr']:g}（{self.lr_source}）, 可训练参数 {trained:,}, "
            f"共 {self.total_steps} 步, 每个 epoch {self.loader.steps_per_epoch} 步 {tokens:,} token"
        )
        compile_for_training(
            self.model, self.loader, self.args, self.tokenizer.pad_token_id, self.device, self.total_steps
        )
        return self.model

    def _load_base(self):
        """The base on this rank's device; with ZeRO-3 a share of it, so that no device ever holds the whole."""
        split = zero_stage(self.args) == 3
        device = "cpu" if split else self.device
        base = load_base(self.args.model_dir, DTYPES[self.precision], device, self.args.base_weights)
        if split:
            import deepspeed  # takes seconds, and start() has told it the accelerator

            deepspeed.zero.Init(module=base, config_dict_or_path=self.settings)
        return base.to(self.device)

    @contextmanager
    def memory_errors(self):
        """Meanwhile, a GPU without room is one line, with the remedies in the order in which to try them."""
        try:
            yield
        except torch.OutOfMemoryError:
            end_bars()
            peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
            batch, accumulation, _ = self.loader.shape
            less = next((size for size in range(batch // 2, 0, -1) if batch % size == 0), batch)
            split = f"--train_batch_size={less} --gradient_accumulation_steps={accumulation * batch // less}"
            remedies = [f"{split} (the same examples a step)"] if less < batch else []
            remedies += [] if self.args.gradient_checkpointing else ["--gradient_checkpointing"]
            remedies += [f"a shorter --max_seq_length (the longest row so far has {self.loader.longest} tokens)"]
            raise UserError(
                f"the GPU has no memory left, at a peak of {peak:.1f} GiB; in this order: {'; '.join(remedies)}. --resume goes "
                "on from the last checkpoint"
            ) from None

    def begin(self, first_step):
        """Make save_dir ready and open the log. first_step: the optimizer steps that a resumed run has done already."""
        from_main(lambda: start_run(self.save_dir, self.resume_from))
        self.saved_step = from_main(lambda: adapter_step(self.save_dir))
        self.best = BestScore(self.save_dir, self.args.best)
        self.signals, self.signal = catch_signals(), 0  # signal: the number of the one that ends the run
        self.checkpoint_step = first_step if self.resume_from else None
        self.skips, self.skips_logged, self.updated = 0, 0, False
        # The losses since the last log: their sum and number, in float64. A checkpoint holds them, so that the next mean is
        # that of the run that nothing happened to.
        self.interval = torch.tensor(self.written.get("interval", [0, 0]), dtype=torch.float64, device=self.device)
        self.log = TrainLog(self.save_dir, self.loader, self.total_steps, first_step, self.args.tensorboard)
        if self.resume_from:
            say(f"从 {self.resume_from} 继续，已完成 {first_step} 步")
            if self.args.best == "last" and self.saved_step != first_step:  # that of the course that was left
                self.save_adapter(first_step)
            elif self.best.score is not None and self.saved_step > first_step:
                say(
                    f"adapter_model/ 是第 {self.saved_step} 步的（{self.args.best} {self.best.score:.4f}），更好的才会替换它"
                )
            if self.evaluation_due(first_step) and first_step not in from_main(lambda: evaluated_steps(self.log.path)):
                self.evaluate(first_step)
                if self.signal:
                    end_by_signal(self.signal, first_step)

    def step_ended(self, step, loss, lr, optimizer):
        """Called after each optimizer step. Sets self.signal where any rank got one.

        step: 1-based. loss: this rank's share, a scalar tensor. lr: of this step. optimizer: DeepSpeed's. UserError, on all
        ranks, if a loss is NaN or infinite, or if the gradients of several steps in a row are.
        """
        self.log.step()
        self.interval += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
        diverged, skipped, self.signal = shared_state(loss, getattr(optimizer, "overflow", False), self.signals)
        self.skips = self.skips + 1 if skipped else 0
        self.updated |= not skipped
        self.skips_logged += skipped
        if skipped:
            say(f"step {step}: 梯度是 NaN 或无穷，这一步没有更新权重")
        searching = self.precision == "fp16" and not self.updated
        what = "the loss is NaN or infinite" if diverged else f"the gradients of {self.skips} steps are NaN or infinite"
        if diverged or self.skips >= (SCALE_SEARCH if searching else SKIPS):
            end_bars()
            lines = ", ".join(map(str, self.loader.lines(step - 1)))
            raise UserError(
                f"step {step}: {what} (learning rate {lr:.3g}; {self.train_path}, lines {lines}); what was saved before is "
                "intact. Lower --deepspeed_optimizer_params_lr, use --precision=bf16 or fp32, look at those lines; --resume "
                "goes on from the last checkpoint"
            )

    def log_loss(self, step, lr):
        """Log the mean loss of the steps since the last log, over all ranks."""
        mean = self._over_ranks(self.interval)
        skips = {"skipped": self.skips_logged} if self.skips_logged else {}
        self.log.write(step, loss=(mean[0] / mean[1]).item(), lr=lr, **skips)
        self.interval, self.skips_logged = torch.zeros_like(self.interval), 0

    def _over_ranks(self, tensor):
        tensor = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def evaluation_due(self, step):
        every = self.args.eval_steps
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def save_due(self, step):
        """At a signal too, and before the first evaluation: if it fails, what was trained is there."""
        if self.checkpoint_step == step:
            return False
        every, first = self.args.save_steps, self.evaluation_due(step) and self.checkpoint_step is None
        return bool(self.signal) or first or step == self.total_steps or every > 0 and step % every == 0

    def must_end(self, step):
        """Whether a signal ends the run after `step` steps, which are saved: not if nothing is left to do."""
        return self.signal and (step < self.total_steps or self.evaluation_due(step))

    def evaluate(self, step):
        """Log the dev loss, and F1 with --eval_examples, after `step` steps; save the adapter if --best says so.

        A signal ends it, sets self.signal, and nothing is logged: --resume makes up for it.
        """
        batch_size = self.args.train_batch_size
        batches = eval_batches(self.dev_set, batch_size, self.collate, self.rank, self.world_size)
        count = -(-len(self.dev_set) // (batch_size * self.world_size))
        scores = {"eval_loss": evaluate_loss(self.model, batches, self.device, count, self._asked_to_end)}
        if not self.signal and self.args.eval_examples > 0:
            examples = self.dev_records[: self.args.eval_examples]
            scores["eval_f1"] = evaluate_f1(
                self.model, self.tokenizer, examples, self.args, self.facts, lambda: bool(self.signals)
            )
        if None in scores.values():
            self._asked_to_end()
            return {}
        if self.best.improves(scores):
            self.save_adapter(step, **scores)
        self.log.write(step, **scores)  # last: what is logged is not done again by a run that is resumed
        return scores

    def _asked_to_end(self):
        self.signal = signalled(self.signals, self.device)
        return self.signal

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
        facts = {**self.identity, "interval": self._over_ranks(self.interval).tolist()}
        with checkpoint(folder, self.args.save_total_limit, facts):
            yield
            save_adapter(self.model, folder, self.args, self.settings, self.facts, step)
        self.checkpoint_step = step

    def end(self):
        self.log.draw()  # once more, with the last evaluation
        self.log.close()
        self.held.close()
        adapter = self.save_dir / "adapter_model"
        if self.saved_step is None:
            say(
                f"没有可比较的分数，{adapter} 没有保存；最后的 LoRA 在 {self.save_dir}/checkpoint-{self.total_steps}/adapter_model"
            )
        else:
            say(f"LoRA 已保存到 {adapter}（第 {self.saved_step} 步）")
