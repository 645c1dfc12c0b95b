"""Measure an adapter: generate the answers of the dev set and score the entities.

    python test.py
    python test.py --data_name=msra --lora_model=./checkpoint/msra/train_deepspeed/adapter_model
    python test.py --lora_model=none --max_new_tokens=64          # the base alone
    python test.py --split=test                                   # data/<data_name>/instruct_data/test.txt
    python test.py --split=train                                  # report.html: where the training data may be wrong
    python test.py --resume                                       # after an interruption
    deepspeed test.py                                             # a process for each GPU
    python test.py --data_name=qa --metric=exact                  # another task than NER: how many answers are right

Reads data/<data_name>/instruct_data/dev.txt (--split: another) and an adapter of checkpoint/<data_name>/ (the one written last). Writes
predictions.jsonl, metrics.json and report.html beside adapter_model/ (`exact` no report, `none` only predictions), and into
it calibration.json, fitted on the whole of its own dev set. The answers are generated freely, greedily, for every row; a
long text in windows, as predict.py does; with an adapter for NER, only what the text allows (--constrained=False: anything).
"""

from alpaca.common.start import start

start()

import json
from contextlib import nullcontext
from pathlib import Path

from alpaca.answering.confidence import plan_confidences, settle_confidences
from alpaca.answering.in_order import in_order
from alpaca.answering.row_file import made_with, row_file
from alpaca.answering.texts import load_answering
from alpaca.answering.windows import say_cuts
from alpaca.common.console import progress_or_lines, say
from alpaca.common.errors import UserError
from alpaca.common.processes import Processes
from alpaca.common.text_files import read_jsonl
from alpaca.common.whole_files import written_whole
from alpaca.models.adapters import find_adapter
from alpaca.models.base import check_generation, load_base_tokenizer
from alpaca.models.facts import columns_of
from alpaca.scoring.calibration import calibration_text
from alpaca.scoring.metrics import as_answered_perfectly, exact, percents, score, score_table
from alpaca.scoring.report import write_report
from config_utils import run_script
from dataset import is_ner, labels_of, nests, parse_answer, read_examples, without_rehearsal

CONFIG = {
    "data_name": "demo",  # name of the data set: its folder under data/ and under checkpoint/
    "base_model": None,  # folder of the base model; None: the base that the adapter was trained on
    "lora_model": "auto",  # auto: the adapter of checkpoint/<data_name>/ written last | a folder | none: the base alone
    "tokenizer_path": None,  # folder of the tokenizer; None: the base model's
    "template": "auto",  # the prompt around the instruction: auto | alpaca | alpaca2 | chat; auto: as in training, else the base's
    "split": "dev",  # dev | test | train: test on data/<data_name>/instruct_data/<split>.txt
    "dev_path": None,  # file of instruct data to test on; None: that of split
    "instruct_column": None,  # name of the column that holds the instruction; None: as in training, for the base alone: instruct
    "query_column": None,  # name of the column that holds the query; None: as in training, for the base alone: query
    "response_column": None,  # name of the column that holds the answer; None: as in training, for the base alone: answer
    "resume": False,  # True: continue after the rows that predictions.jsonl already holds
    "batch_size": "auto",  # most texts answered at once; auto: 128 on a GPU, 64 on a CPU. Fewer where memory is short
    "metric": "ner",  # ner: score entities | exact: share of answers equal to the right one | none: only write predictions
    "max_new_tokens": 512,  # most tokens of an answer; answers cut there are counted and reported
    "constrained": "auto",  # True: answers name only parts of the text and known types | False: anything | auto: True for NER
    "precision": "auto",  # auto | bf16 | fp16 | fp32: number format to compute in; auto: the best that the device has
    "base_weights": "auto",  # auto | full | nf4 | fp8: how the base is held; auto: as the adapter was trained, where that is possible
    "devices": "0",  # number of the GPU to use | auto: a base that is too large for one is spread over all
    "max_examples": -1,  # test only the first N examples; -1: all
}
WRITTEN = {  # metric -> files
    "ner": ("predictions.jsonl", "metrics.json", "report.html"),
    "exact": ("predictions.jsonl", "metrics.json"),
    "none": ("predictions.jsonl",),
}
SHOWN = 20  # answers printed as a list, before the table


def check(args):
    check_generation(args)
    if args.split not in ("train", "dev", "test"):
        raise UserError(f"--split={args.split}: expected train, dev or test")
    if args.dev_path and args.split != "dev":
        raise UserError(f"--dev_path and --split={args.split}: give one of the two")
    if args.metric not in WRITTEN:
        raise UserError(f"--metric={args.metric}: expected {', '.join(WRITTEN)}")
    if args.max_examples < 1 and args.max_examples != -1:
        raise UserError(f"--max_examples={args.max_examples}: expected 1 or more, or -1 for all")


def main(args):
    check(args)
    dev_path = args.dev_path or Path("data") / args.data_name / "instruct_data" / f"{args.split}.txt"
    adapter, train_args, facts = find_adapter(args.data_name, args.lora_model, args.base_model)
    columns = columns_of(args, train_args)
    examples = read_examples(dev_path, **columns)
    own = without_rehearsal(examples) if args.metric == "ner" else examples
    if others := len(examples) - len(own):
        say(f"{dev_path}: {others} 条是别的任务，不测")
    examples = own[: args.max_examples] if args.max_examples > 0 else own
    if args.metric == "ner" and not is_ner([parse_answer(example["answer"]) for example in examples]):
        raise UserError(
            f"{dev_path}: most answers are no 实体_类型 lines; for another task give --metric=exact or none"
        )
    labels = (facts.get("labels") or labels_of(examples)) if args.metric == "ner" else None
    nested = facts.get("nested", nests(examples))
    out = adapter.parent if adapter else Path("checkpoint") / args.data_name / "base"
    remedy = "name a copy of the adapter in another folder with --lora_model" if adapter else "make its folder writable"
    plan = plan_confidences(args, adapter, train_args, dev_path, remedy)
    tokenizer = load_base_tokenizer(adapter, train_args, facts, args.base_model, args.tokenizer_path, args.template)

    processes, output = Processes(), nullcontext()
    if not processes.rank:
        task = {**columns, "labels": labels, "nested": nested, "metric": args.metric}
        made = made_with(args, adapter, train_args, tokenizer, dev_path, **task)
        outdated = [out / name for name in WRITTEN["ner"][1:]]
        output = row_file(out / "predictions.jsonl", made, len(examples), args.resume, remedy, outdated)
    with output as file:
        first = file.first if file else 0
        processes.begin(first)
        answer = load_answering(args, adapter, train_args, facts, tokenizer, labels, nested)
        if file:
            say_cuts(answer.cut(examples))
        rows = in_order(processes, enumerate(examples), len(examples), answer)
        for row, _ in progress_or_lines(rows, len(examples) - first, "回答", "条"):
            file.write(row)
        rated = settle_confidences(file.path, answer, examples, plan) if file and args.metric == "ner" else None
    if not processes.rank:
        measure(args, out, labels, nested, rated, f"数据 {dev_path}，LoRA {adapter or '无'}")


def measure(args, out, labels, nested, rated, subtitle):
    """Write what the rows on disk come to, then print it. rated: of settle_confidences."""
    rows = [row for _, row in read_jsonl(out / "predictions.jsonl")]
    metrics = score(rows, labels) | {"calibration": rated.figures} if args.metric == "ner" else exact(rows)
    if args.metric != "none":
        text = json.dumps(metrics, ensure_ascii=False, indent=2) + "\n"
        with written_whole(out / "metrics.json") as new:
            new.write_text(text, encoding="utf-8")
    if args.metric == "ner":
        write_report(out / "report.html", rows, metrics, rated, f"{args.data_name} 测试报告", subtitle)
    say(f"结果已写到 {out}/: {'、'.join(WRITTEN[args.metric])}")

    print("预测：", [row["prediction"] for row in rows[:SHOWN]], end="\n\n")
    print("真实：", [row["answer"] for row in rows[:SHOWN]], end="\n\n")
    if args.metric == "ner":
        print(score_table(metrics, perfect=score(as_answered_perfectly(rows, nested), labels)))
        print(calibration_text(metrics["calibration"]))
    elif args.metric == "exact":
        share, interval = metrics["exact"]["share"], percents(metrics["exact"]["interval"])
        print(f"与标准答案完全相同 {share:.2%}，95% 区间 {interval}，样本数 {metrics['examples']}")
    if too_long := sum(row["prediction"] is None for row in rows):
        print(f"{too_long} 条超过模型的长度上限，没有回答，按漏掉计分")
    if cut := metrics["cut"]:
        print(f"{cut} 条回答达到 max_new_tokens={args.max_new_tokens} 或模型的长度上限，被截断")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
