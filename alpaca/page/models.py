"""The models of the page: one base in memory, the adapters that fit it, and the engine that answers everybody."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from alpaca.answering.confidence import calibration_of
from alpaca.answering.generate import without_template
from alpaca.answering.predictions import held_instructs, make_grammar
from alpaca.answering.prefixes import LEAST_ROWS
from alpaca.answering.row import Row
from alpaca.answering.shared import SharedEngine
from alpaca.answering.texts import Answering
from alpaca.answering.windows import cutter
from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.models.adapters import find_adapter
from alpaca.models.base import attach_adapter, check_fit, load_for_inference
from alpaca.models.layers import positions_of
from alpaca.models.templates import encode_prompts, message_of
from alpaca.scoring.calibration import CALIBRATION
from config_utils import load_config
from dataset import example_of_input, task_of

BASE = "不加 LoRA，只用基座"
USUAL_CHARACTERS = 40  # of a question, and of a text where the adapter does not say how long its texts were
MOST_INSTRUCTS = 8  # of an adapter, whose prompts begin as is known before the first is asked


@dataclass(eq=False)
class Choice:
    """One entry of the page's list: an adapter as it stood on the disk at some time, or the base alone."""

    name: str
    folder: Path | None  # adapter_model/; None: the base alone
    train_args: object  # the training's Config; None where there is no train_args.json
    facts: dict  # what train_args.json says beside the Config
    written: tuple = ()  # when_written

    @property
    def labels(self):
        """The entity types that it names; None where it was trained on another task than NER."""
        return task_of(self.facts)[0]


class Answered(NamedTuple):
    """How far the texts of a request are."""

    done: int  # windows of texts that are answered
    total: int  # windows of the texts that were read so far
    rows: list  # rows of predictions.jsonl of the texts that are done since the last Answered, in order


class Models:
    """One base in memory and the adapters that fit it, each read when it is first asked for."""

    def __init__(self, args):
        """args: of web_ner.py. UserError for an adapter or a base that cannot be used."""
        self.args = args
        adapter, train_args, facts = find_adapter(args.data_name, args.lora_model, args.base_model)
        if adapter and not facts:
            raise UserError(f"{adapter}: has no train_args.json; use predict.py, whose --instruct says what to ask")
        self.model, self.tokenizer = load_for_inference(
            *(adapter, train_args, facts, args.base_model, args.tokenizer_path, args.precision),
            base_weights=args.base_weights,
            template=args.template,
        )
        self.base = self.model.config.name_or_path
        bases = {self.base, train_args.model_dir if adapter else self.base}
        self.bases, self.skipped = {Path(base).resolve() for base in bases}, set()
        alone = Choice(BASE, *find_adapter(args.data_name, "none", self.base))
        chosen = Choice(choice_name(adapter), adapter, train_args, facts, when_written(adapter)) if adapter else alone
        self.first, self.choices = chosen.name, {chosen.name: chosen, BASE: alone}
        self.peft_names = {chosen: "default"} if adapter else {}  # of the adapters that are in memory
        self.attached = len(self.peft_names)
        self.grammars, self.calibrations = {}, {}
        self.grammar(chosen)  # now, so that an impossible --constrained ends the command
        self.names()
        self.positions = positions_of(self.model.config)
        self.engine = SharedEngine(
            self._use, self.tokenizer, self.positions, args.max_new_tokens, args.batch_size
        )  # from now on only its thread computes

    def names(self):
        """The entries of the page's list, with the adapters that were trained meanwhile."""
        found = {}
        for file in sorted(Path("checkpoint").glob("**/adapter_model/train_args.json")):
            name, known = choice_name(file.parent), self.choices.get(choice_name(file.parent))
            if known and known.written == when_written(file.parent):
                found[name] = known
            elif choice := self._read_choice(name, file):
                found[name] = choice
        first = {self.first: found.pop(self.first, self.choices[self.first])}
        self.choices = {**first, **found, BASE: self.choices[BASE]}
        return list(self.choices)

    def _read_choice(self, name, file):
        """None, said once, for an adapter that cannot be offered."""
        written = when_written(file.parent)  # before it is read: if it is written meanwhile, it is read again
        try:
            train_args, facts = load_config(file)
            if Path(train_args.model_dir).resolve() in self.bases:
                return Choice(name, file.parent, train_args, facts, written)
            reason = f"略过 {file.parent}: 它的基座是 {train_args.model_dir}"
        except UserError as error:
            reason = f"略过: {error}"
        if reason not in self.skipped:
            self.skipped.add(reason)
            say(reason)
        return None

    def choice(self, name):
        """What a name stands for now; without a name, the first. UserError where there is none."""
        choice = self.choices.get(name or self.first)
        if not choice or choice.folder and choice.written != when_written(choice.folder):
            self.names()
            choice = self.choices.get(name or self.first)
        if not choice:
            raise UserError(f"no adapter {name!r}; there are {', '.join(self.choices)}")
        return choice

    def grammar(self, choice):
        """The grammar that holds a choice's answers; None where they are free."""
        if choice not in self.grammars:
            known = choice.folder or choice.facts
            self.grammars[choice] = make_grammar(self.args.constrained, known, self.tokenizer, choice.labels)
        return self.grammars[choice]

    def calibration(self, choice):
        """That of its confidences, or None."""
        if choice not in self.calibrations:
            known = self.args, choice.folder, choice.train_args, self.base
            self.calibrations[choice] = calibration_of(*known) if self.grammar(choice) else None
        return self.calibrations[choice]

    def answer_texts(self, choice, records, stop):
        """Yield an Answered at each step. records: of read_texts, an iterator. Ends early once the Event `stop` is set."""
        _, instruct, query_prefix = task_of(choice.facts)
        cut, done, total = cutter(self.model, self.tokenizer, choice.train_args, choice.facts), 0, 0

        def counting_cut(examples):
            nonlocal total
            cuts = cut(examples)
            total += sum(len(cut_example.parts) for cut_example in cuts)
            return cuts

        def shared(requests):
            nonlocal done
            for ended in self.engine.answer(choice, requests, stop):
                done += len(ended)
                yield ended

        rules = {"nested": choice.facts.get("nested", False), "calibration": self.calibration(choice)}
        rules["instructs"] = held_instructs(self.args.constrained, choice.facts)
        answer = Answering(self.model, self.tokenizer, counting_cut, choice.labels, **rules, shared=shared)
        for rows in answer.in_turn(example_of_input(record, instruct, query_prefix) for record in records):
            yield Answered(done, total, rows)

    def answer_question(self, choice, question, stop):
        """Yield the growing answer to free text. Ends early once the Event `stop` is set."""
        (prompt,) = encode_prompts(self.tokenizer, [question])
        return without_template(self.engine.stream(choice, prompt, stop), self.tokenizer.template)

    # -----------------------------------------------------------------------------------------------------------------
    # in the engine's thread

    def _use(self, choice):
        """Make the model compute as a choice says -> what SharedEngine wants to know. UserError for one that does not fit."""
        grammar = self.grammar(choice)
        if not choice.folder and self.peft_names:
            self.model.base_model.disable_adapter_layers()
        elif choice.folder and choice not in self.peft_names:
            self._attach(choice)
        if choice.folder:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.peft_names[choice], inference_mode=True)
        return self.model, grammar, self._openings(choice)

    def _attach(self, choice):
        """Read an adapter into memory; what was there of that name, trained earlier, goes."""
        check_fit(choice.folder, choice.train_args, choice.facts, self.base, self.tokenizer)
        name, self.attached = f"adapter{self.attached}", self.attached + 1
        self.model = attach_adapter(self.model, choice.folder, name)
        for earlier in [other for other in self.peft_names if other.name == choice.name]:
            gone = self.peft_names.pop(earlier)
            self.model.delete_adapter(gone)
            self.engine.standby.forget(gone)
            self.grammars.pop(earlier, None)
            self.calibrations.pop(earlier, None)
        self.peft_names[choice] = name

    def _openings(self, choice):
        """Rows as long as usual that begin as the prompts of a choice do: as texts, with its instructions, and questions."""
        _, instruct, query_prefix = task_of(choice.facts)
        characters = "一国人中"
        assert len(characters) == LEAST_ROWS
        usual = choice.facts.get("text_tokens") or USUAL_CHARACTERS
        messages = [character * USUAL_CHARACTERS for character in characters]
        for known in (choice.facts.get("instructs") or [instruct])[:MOST_INSTRUCTS]:
            messages += [message_of(known, query_prefix + character * usual) for character in characters]
        encoded = [ids for ids in encode_prompts(self.tokenizer, messages) if len(ids) < self.positions]
        most = self.args.max_new_tokens
        return [Row(None, ids, min(len(ids) + most, self.positions), self.tokenizer) for ids in encoded]


def choice_name(folder):
    """What the page calls an adapter's folder: demo/shipped for checkpoint/demo/shipped/adapter_model."""
    path, root = Path(folder).resolve(), Path("checkpoint").resolve()
    return str(path.parent.relative_to(root)) if path.is_relative_to(root) else str(folder)


def when_written(folder):
    """When an adapter and its calibration were, in nanoseconds; None where one is not there (any more)."""
    times = []
    for name in ("train_args.json", CALIBRATION):
        try:
            times.append((Path(folder) / name).stat().st_mtime_ns)
        except OSError:
            times.append(None)
    return tuple(times)
