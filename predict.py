"""Extract the entities of given texts.

    python predict.py
    python predict.py --text=王小明昨天从北京去了上海。
    python predict.py --input_path=texts.txt --output_path=entities.jsonl
    python predict.py --input_path=texts.txt --output_path=entities.jsonl --resume      # after an interruption

Reads plain text, one a line, or JSON lines, a JSON array, CSV or an Excel sheet with `text` (or `query` and `instruct`)
and perhaps `answer`; without either option, three sentences of our own. Prints the answers, or writes them to
--output_path as JSON lines with offsets, as they come: a row for each row of the input, in its order, with its other keys
(`id`, …); that of a blank line has an empty answer. A text that is too long for the model is cut at sentence ends.
"""

from alpaca.common.start import start

start()

import json
from pathlib import Path

from tqdm import tqdm

from alpaca.answering.predictions import make_grammar, predict_rows
from alpaca.answering.windows import cut_examples, rows_of_texts
from alpaca.common.console import progress, say
from alpaca.common.errors import UserError
from alpaca.common.text_files import SURROGATE
from alpaca.corpora.inputs import read_texts
from alpaca.models.adapters import find_adapter, open_output
from alpaca.models.base import check_generation, load_for_inference
from alpaca.models.facts import with_task
from config_utils import run_script
from dataset import ROW_KEYS, example_of_input, task_of

CONFIG = {
    "data_name": "demo",  # name of the data set: its folder under checkpoint/
    "base_model": None,  # folder of the base model; None: the base that the adapter was trained on
    "lora_model": "auto",  # auto: the adapter of checkpoint/<data_name>/ written last | a folder | none: the base alone
    "instruct": None,  # what to ask of each text; None: what the adapter was trained with
    "labels": None,  # entity types of the answers, joined by commas | none: no entities; None: the adapter's own
    "tokenizer_path": None,  # folder of the tokenizer; None: the base model's
    "text": None,  # one text to predict; with neither text nor input_path: three sentences of our own
    "input_path": None,  # file of texts to predict: plain lines, JSON lines, a JSON array, CSV or .xlsx with a text column
    "output_path": None,  # file to write the results to, as JSON lines; None: print them
    "resume": False,  # True: continue after the rows that output_path already holds
    "batch_size": "auto",  # most texts answered at once; auto: 128 on a GPU, 64 on a CPU. Fewer where memory is short
    "max_new_tokens": 512,  # most tokens of an answer; answers cut there are counted and reported
    "constrained": "auto",  # True: answers name only parts of the text and known types | False: anything | auto: True for NER
    "precision": "auto",  # auto | bf16 | fp16 | fp32: number format to compute in; auto: the best that the device has
    "base_weights": "auto",  # auto | full | nf4 | fp8: how the base is held; auto: as the adapter was trained, where that is possible
}
SAMPLES = [
    {"text": "中美两国的专家上周在杭州参观了临江大学，校长许文舟主持了座谈。",
     "answer": "中_地名\n美_地名\n杭州_地名\n临江大学_机构名\n许文舟_人名"},
    {"text": "去年冬天，县图书馆新添了三千多册少儿读物，来借书的孩子比往年多了一倍。", "answer": "没有"},
    {"text": "记者苏晓岚从云南省气象局了解到，昆明明后两天有小雨。",
     "answer": "苏晓岚_人名\n云南省气象局_机构名\n昆明_地名"},
]  # fmt: skip


def texts_asked_for(args):
    """Those of --text or --input_path, else SAMPLES, as read_texts gives them."""
    if args.text is not None and args.input_path:
        raise UserError("--text and --input_path: give one of the two")
    if args.text is not None:
        if not args.text.strip():
            raise UserError("--text: is empty; give a sentence")
        if SURROGATE.search(args.text):
            raise UserError(f"--text: half a character in {args.text[:40]!r}; give UTF-8")
        return [{"text": args.text}]
    if not args.input_path:
        return SAMPLES
    return read_texts(args.input_path)


def rows_written(path, texts):
    """How many of the texts' rows the file holds; half a row at its end is cut off. UserError where they are others'."""
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines()):
        try:
            same = number < len(texts) and json.loads(line)["text"] == texts[number]
        except (ValueError, TypeError, KeyError):
            same = False
        if not same:
            raise UserError(f"{path}:{number + 1}: not the row of text {number + 1}; name another file, or no --resume")
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n")


def main(args):
    check_generation(args)
    records = texts_asked_for(args)
    if args.output_path and args.input_path and Path(args.output_path).resolve() == Path(args.input_path).resolve():
        raise UserError(f"--output_path={args.output_path}: is the input; name another file")
    if args.resume and not args.output_path:
        raise UserError("--resume needs --output_path, the file to go on with")
    adapter, train_args, facts = find_adapter(args.data_name, args.lora_model, args.base_model)
    facts = with_task(adapter, facts, args.instruct, args.labels)
    labels, instruct, query_prefix = task_of(facts)
    if len(facts.get("instructs", [])) > 1 and any(not record.get("instruct") for record in records):
        say(f"训练用过 {len(facts['instructs'])} 种指令，没有写 instruct 的文本用第一种：{instruct[:40]}")
    examples = [example_of_input(record, instruct, query_prefix) for record in records]
    if blank := sum(not example["asks"] for example in examples):
        say(f"{blank} 行是空的，不提问，结果里各占一行")
    if taken := sorted({key for r in records for key in ROW_KEYS[2:] if r.get(key) is not None}):
        say(f"输入的 {'、'.join(taken)} 与结果的键同名，不写进结果")
    output = open_output(args.output_path) if args.output_path else None
    done = rows_written(args.output_path, [e["text"] for e in examples]) if args.resume else 0
    model, tokenizer = load_for_inference(
        *(adapter, train_args, facts, args.base_model, args.tokenizer_path, args.precision),
        merge=True,
        base_weights=args.base_weights,
    )
    grammar = make_grammar(args.constrained, adapter or facts, tokenizer, labels)
    waiting = progress(examples[done:], desc="切分", unit="条")
    cuts = cut_examples(waiting, model, tokenizer, train_args, facts)
    parts = [part for cut in cuts for part in cut.parts]
    rows = predict_rows(
        model, tokenizer, parts, labels, args.max_new_tokens, args.batch_size, grammar, facts.get("nested", False)
    )

    if output and not args.resume:
        output.truncate(0)
    if not output:
        tqdm.write("=" * 100)
    cut_off = 0
    rows = rows_of_texts(examples[done:], cuts, rows)
    for number, (example, row, cut) in enumerate(zip(examples[done:], rows, cuts, strict=True), done + 1):
        cut_off += row.get("problems", {}).get("cut", 0)
        if cut.inside:
            say(f"第 {number} 条没有句末可切，在句子里面切开，位置 {', '.join(map(str, cut.inside))}")
        if row["prediction"] is None:
            say(f"第 {number} 条超过模型的长度上限，没有回答: {row['text'][:30]}…")
        if output:
            output.write(json.dumps(row, ensure_ascii=False) + "\n")
            output.flush()
            continue
        shown = (example["instruct"] + example["query"]).replace("\n", "\\n")
        lines = [f'文本 >>>  "{shown}"', f"预测 >>>  {row['prediction'] or ''}", ""]
        if row["answer"] is not None:
            lines.append(f"真实 >>>  {row['answer']}")
        tqdm.write("\n".join(lines))  # stdout; not through the bar
    if cut_off:
        say(f"{cut_off} 条回答达到 max_new_tokens={args.max_new_tokens} 或模型的长度上限，被截断")
    if output:
        output.close()
        say(f"{len(examples) - done} 条结果已写到 {args.output_path}" + (f"，之前已有 {done} 条" if done else ""))


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
