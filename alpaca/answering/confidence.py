"""Confidences of what was answered: which calibration fits a model, on what one may be fitted, and margins to gold."""

from pathlib import Path
from typing import NamedTuple

from alpaca.answering.generate import Request, answer_requests
from alpaca.answering.row_file import rewrite
from alpaca.answering.texts import prompt_encoder
from alpaca.common.console import progress
from alpaca.common.folders import check_writable
from alpaca.common.text_files import read_jsonl
from alpaca.models.adapter_files import adapter_sha256
from alpaca.models.base import base_folder
from alpaca.scoring.calibration import (
    fit_rows,
    rate_confidence,
    read_calibration,
    with_confidence,
    write_calibration,
)
from alpaca.scoring.errors import different
from dataset import NO_ENTITY, format_answer, parse_answer


class Plan(NamedTuple):
    """Where the confidences of tested rows come from."""

    calibration: object  # the one that there is, or None
    adapter: Path | None  # the folder of the adapter that gets a new one, fitted on these rows
    sha256: str | None  # of that adapter
    own: bool  # the rows are of the dev set that a calibration is fitted on


def calibration_of(args, adapter, train_args, base=None):
    """The Calibration for what a model answers, or None: that of its adapter, or that a base with a merged one brings.

    args: of test.py, predict.py or web_ner.py; adapter, train_args: of find_adapter; base: the folder of the model, if
    args do not say. None with another base, instruction, types or rule (--constrained=False) than it was fitted with.
    """
    changed = any(args.nested.get(option) is not None for option in ("instruct", "labels"))
    if not train_args or changed or args.constrained == "False":
        return None
    if not adapter:
        return read_calibration(base or base_folder(None, None, args.base_model))
    return read_calibration(adapter, adapter_sha256(adapter)) if on_own_base(args, adapter, train_args) else None


def on_own_base(args, adapter, train_args):
    """Whether the base is the folder that an adapter says it was trained on."""
    used = base_folder(adapter, train_args, args.base_model)
    return Path(used).resolve() == Path(train_args.model_dir).resolve()


def plan_confidences(args, adapter, train_args, dev_path, remedy):
    """What test.py does about confidences: a Plan. Asked before anything is computed; remedy: for an adapter's folder that
    cannot be written to.

    Fitted is on all of the adapter's own dev set, answered as predict.py would.
    """
    own_dev = train_args and (train_args.dev_path or Path("data") / train_args.data_name / "instruct_data" / "dev.txt")
    own = bool(own_dev) and Path(dev_path).resolve() == Path(own_dev).resolve()
    if args.metric != "ner":
        return Plan(None, None, None, own)
    whole = own and args.max_examples < 0 and args.constrained != "False"
    if adapter and whole and on_own_base(args, adapter, train_args):
        check_writable(adapter, remedy)
        return Plan(None, adapter, adapter_sha256(adapter), own)
    return Plan(calibration_of(args, adapter, train_args), None, None, own)


def settle_confidences(path, answering, examples, plan):
    """Give the rows of a tested file their margins and confidences; returns the Rated. The file holds them afterwards, and
    the adapter its calibration, if the plan is to fit one."""
    rows = [row for _, row in read_jsonl(path)]
    add_margins(answering, examples, rows)
    calibration = fit_rows(rows) if plan.adapter else plan.calibration
    rows = [with_confidence(row, calibration) for row in rows]
    rewrite(path, rows)
    if plan.adapter:
        write_calibration(plan.adapter, calibration, plan.sha256, rows)
    return rate_confidence(rows, calibration, plan.own)


def add_margins(answering, examples, rows):
    """Give each row that was answered and is not gold a `margin`: how much likelier the model finds its answer than gold.

    That is the log-probability of what it said less that of the right answer, which the same engine is made to say, under
    the same grammar; of a text in windows, the sum over them. None: the grammar lets nobody say the right answer, which
    names what is not in the text. answering: the Answering that answered; examples: of all rows. Rows that have one keep it.
    """
    numbers = [i for i in different(rows) if "margin" not in rows[i]]
    cuts = answering.cut([examples[i] for i in numbers])
    asked = [(i, part, gold) for i, cut in zip(numbers, cuts, strict=True) for part, gold in gold_parts(rows[i], cut)]
    prompts = prompt_encoder(answering.tokenizer)([part for _, part, _ in asked])
    golds = answering.tokenizer.encode_texts([gold for _, _, gold in asked])
    requests = [
        Request(i, prompt, part["text"], [*gold, answering.tokenizer.frame.end])
        for (i, part, _), prompt, gold in zip(asked, prompts, golds, strict=True)
    ]
    right, cut_off = dict.fromkeys(numbers, 0.0), set()
    limits = answering.max_new_tokens, answering.batch_size, answering.grammar
    with progress(total=len(requests), desc="比较", unit="段") as bar:
        for ended in answer_requests(answering.model, answering.tokenizer, iter(requests), *limits):
            bar.update(len(ended))
            for i, answer in ended:
                if answer.ended:
                    right[i] += answer.log_probability
                else:  # the model has no room for it
                    cut_off.add(i)
    for i in right.keys() - cut_off:
        margin = round(rows[i]["log_probability"] - right[i], 4)
        rows[i]["margin"] = None if margin == float("inf") else margin


def gold_parts(row, cut):
    """[(part of a CutExample, its right answer)]; what reaches beyond a window is in none."""
    if len(cut.parts) == 1:
        lines = [f"{entity}_{kind}" for entity, kind in parse_answer(row["answer"]).entities]
        return [(cut.parts[0], "\n".join(lines) or NO_ENTITY)]
    spans = [{**entity, "begin": b, "end": e} for entity in row["gold"] for b, e in entity["spans"]]
    golds = [
        format_answer([span for span in spans if begin <= span["begin"] and span["end"] <= end])
        for begin, end in cut.windows
    ]
    return list(zip(cut.parts, golds, strict=True))
