"""The models of the page: one base in memory, the adapters that fit it, and who may compute with them when."""

import threading
from pathlib import Path
from typing import NamedTuple

from alpaca.answering.confidence import calibration_of
from alpaca.answering.generate import stream, without_template
from alpaca.answering.predictions import held_instructs, make_grammar, predict_rows
from alpaca.answering.standby import Standby
from alpaca.answering.windows import cut_examples, rows_of_texts
from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.models.adapters import find_adapter
from alpaca.models.base import attach_adapter, check_fit, load_for_inference
from alpaca.models.templates import encode_prompts
from config_utils import load_config
from dataset import example_of_input, task_of

BASE = "不加 LoRA，只用基座"


class Choice(NamedTuple):
    """One entry of the page's list: an adapter, or the base alone."""

    folder: Path | None  # adapter_model/; None: the base alone
    train_args: object  # the training's Config; None where there is no train_args.json
    facts: dict  # what train_args.json says beside the Config


class Answered(NamedTuple):
    """How far the texts of a request are."""

    done: int  # windows of texts that are answered
    total: int
    rows: list | None  # those of predictions.jsonl, one a text, once all is done


class Models:
    """One base in memory and the adapters that fit it, each read when it is first asked for. Requests take turns."""

    def __init__(self, args):
        """args: of web_ner.py. UserError for an adapter or a base that cannot be used."""
        self.args, self.turn = args, threading.Lock()
        chosen = Choice(*find_adapter(args.data_name, args.lora_model, args.base_model))
        if chosen.folder and not chosen.facts:
            raise UserError(
                f"{chosen.folder}: has no train_args.json; use predict.py, whose --instruct says what to ask"
            )
        self.model, self.tokenizer = load_for_inference(
            *(*chosen, args.base_model, args.tokenizer_path, args.precision),
            base_weights=args.base_weights,
            template=args.template,
        )
        self.base = self.model.config.name_or_path
        self.first = choice_name(chosen.folder) if chosen.folder else BASE
        own_base = chosen.train_args.model_dir if chosen.folder else self.base
        alone = Choice(*find_adapter(args.data_name, "none", self.base))
        self.choices = {self.first: chosen, **adapters_on({self.base, own_base}), BASE: alone}
        self.peft_names = {self.first: "default"} if chosen.folder else {}  # of the adapters that are in memory
        self.current, self.grammars, self.standby = self.first, {}, Standby(args.batch_size)
        self.grammar(self.first)  # now, so that an impossible --constrained ends the command

    def labels(self, name):
        """The entity types that a choice names; None where it was trained on another task than NER."""
        labels, _, _ = task_of(self.choices[name].facts)
        return labels

    def grammar(self, name):
        """The grammar that holds a choice's answers; None where they are free."""
        if name not in self.grammars:
            folder, _, facts = self.choices[name]
            known = folder or facts
            self.grammars[name] = make_grammar(self.args.constrained, known, self.tokenizer, self.labels(name))
        return self.grammars[name]

    def _use(self, name):
        """Make the model compute as a choice says; UserError for an adapter that does not fit."""
        if name == self.current:
            return
        folder, train_args, facts = self.choices[name]
        self.current = None  # until all of the following has succeeded
        if not folder and self.peft_names:
            self.model.base_model.disable_adapter_layers()
        elif folder and name not in self.peft_names:
            check_fit(folder, train_args, facts, self.base, self.tokenizer)
            peft_name = f"adapter{len(self.peft_names)}"
            self.model = attach_adapter(self.model, folder, peft_name)
            self.peft_names[name] = peft_name
        if folder:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.peft_names[name], inference_mode=True)
        self.current = name

    def _take_turns(self, name, steps):
        """Yield what `steps`, a generator that computes with the model, yields; others may compute between two of them."""
        while True:
            with self.turn:
                self._use(name)
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    def answer_texts(self, name, records):
        """Yield an Answered after each window of the texts (records: those of read_texts), the last with the rows."""
        folder, train_args, facts = self.choices[name]
        calibration = calibration_of(self.args, folder, train_args, self.base) if self.grammar(name) else None
        labels, instruct, query_prefix = task_of(facts)
        examples = [example_of_input(record, instruct, query_prefix) for record in records]
        cuts = cut_examples(examples, self.model, self.tokenizer, train_args, facts)
        parts = [part for cut in cuts for part in cut.parts]
        limits = self.args.max_new_tokens, self.args.batch_size
        nested = facts.get("nested", False)
        instructs = held_instructs(self.args.constrained, facts)
        rules = self.grammar(name), nested, self.standby, instructs
        steps = predict_rows(self.model, self.tokenizer, parts, labels, *limits, *rules)
        rows = []
        yield Answered(0, len(parts), None)
        for row in self._take_turns(name, steps):
            rows.append(row)
            yield Answered(len(rows), len(parts), None)
        rules = calibration, nested, instructs
        yield Answered(len(parts), len(parts), list(rows_of_texts(examples, cuts, iter(rows), *rules)))

    def answer_question(self, name, question):
        """Yield the growing answer to free text."""
        (prompt,) = encode_prompts(self.tokenizer, [question])
        growing = stream(self.model, self.tokenizer, prompt, self.args.max_new_tokens, standby=self.standby)
        return self._take_turns(name, without_template(growing, self.tokenizer.template))


def choice_name(folder):
    """What the page calls an adapter's folder: demo/shipped for checkpoint/demo/shipped/adapter_model."""
    path, root = Path(folder).resolve(), Path("checkpoint").resolve()
    return str(path.parent.relative_to(root)) if path.is_relative_to(root) else str(folder)


def adapters_on(bases):
    """{name: Choice} of the adapters under checkpoint/ that were trained on one of the folders `bases`."""
    found, bases = {}, {Path(base).resolve() for base in bases}
    for file in sorted(Path("checkpoint").glob("**/adapter_model/train_args.json")):
        try:
            train_args, facts = load_config(file)
        except UserError as error:
            say(f"略过: {error}")
            continue
        if Path(train_args.model_dir).resolve() in bases:
            found[choice_name(file.parent)] = Choice(file.parent, train_args, facts)
        else:
            say(f"略过 {file.parent}: 它的基座是 {train_args.model_dir}")
    return found
