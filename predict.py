"""Extract the entities of given texts.

    python predict.py
    python predict.py --text=王小明昨天从北京去了上海。
    python predict.py --input_path=texts.txt --output_path=entities.jsonl
    python predict.py --input_path=texts.txt --output_path=entities.jsonl --resume      # after an interruption
    deepspeed predict.py --input_path=texts.txt --output_path=entities.jsonl            # a process for each GPU

Reads plain text, one a line, or JSON lines, a JSON array, CSV or an Excel sheet with `text` (or `query` and `instruct`)
and perhaps `answer`; without either option, three sentences of our own. Prints the answers, or writes them to
--output_path as JSON lines with offsets, as they come: a row for each row of the input, in its order, with its other keys
(`id`, …); that of a blank line has an empty answer. A text that is too long for the model is cut at sentence ends.
"""

from alpaca.common.start import start

start()

from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from alpaca.answering.confidence import calibration_of
from alpaca.answering.in_order import in_order
from alpaca.answering.predictions import held_instructs
from alpaca.answering.row_file import made_with, row_file
from alpaca.answering.texts import load_answering
from alpaca.common.console import progress_or_lines, say
from alpaca.common.errors import UserError
from alpaca.common.processes import Processes
from alpaca.common.text_files import SURROGATE
from alpaca.corpora.inputs import look_through, read_texts
from alpaca.models.adapters import find_adapter
from alpaca.models.base import check_generation, load_base_tokenizer
from alpaca.models.facts import with_task
from config_utils import run_script
from dataset import example_of_input, task_of

CONFIG = {
    "data_name": "demo",  # name of the data set: its folder under checkpoint/
    "base_model": None,  # folder of the base model; None: the base that the adapter was trained on
    "lora_model": "auto",  # auto: the adapter of checkpoint/<data_name>/ written last | a folder | none: the base alone
    "instruct": None,  # what to ask of each text; None: what the adapter was trained with
    "labels": None,  # entity types of the answers, joined by commas | none: no entities; None: the adapter's own
    "tokenizer_path": None,  # folder of the tokenizer; None: the base model's
    "template": "auto",  # the prompt around the instruction: auto | alpaca | alpaca2 | chat; auto: as in training, else the base's
    "text": None,  # one text to predict; with neither text nor input_path: three sentences of our own
    "input_path": None,  # file of texts to predict: plain lines, JSON lines, a JSON array, CSV or .xlsx with a text column
    "output_path": None,  # file to write the results to, as JSON lines; None: print them
    "resume": False,  # True: continue after the rows that output_path already holds
    "min_confidence": 0.0,  # leave out entities that are right with less probability, 0 to 1; 0: none
    "batch_size": "auto",  # most texts answered at once; auto: 128 on a GPU, 64 on a CPU. Fewer where memory is short
    "max_new_tokens": 512,  # most tokens of an answer; answers cut there are counted and reported
    "constrained": "auto",  # True: answers name only parts of the text and known types | False: anything | auto: True for NER
    "precision": "auto",  # auto | bf16 | fp16 | fp32: number format to compute in; auto: the best that the device has
    "base_weights": "auto",  # auto | full | nf4 | fp8: how the base is held; auto: as the adapter was trained, where that is possible
    "devices": "0",  # number of the GPU to use | auto: a base that is too large for one is spread over all
}
SAMPLES = [
    {"text": "中美两国的专家上周在杭州参观了临江大学，校长许文舟主持了座谈。",
     "answer": "中_地名\n美_地名\n杭州_地名\n临江大学_机构名\n许文舟_人名"},
    {"text": "去年冬天，县图书馆新添了三千多册少儿读物，来借书的孩子比往年多了一倍。", "answer": "没有"},
    {"text": "记者苏晓岚从云南省气象局了解到，昆明明后两天有小雨。",
     "answer": "苏晓岚_人名\n云南省气象局_机构名\n昆明_地名"},
]  # fmt: skip


def texts_asked_for(args):
    """Yield those of --text or --input_path, else SAMPLES, as read_texts does."""
    if args.text is not None:
        yield {"text": args.text}
    else:
        yield from read_texts(args.input_path) if args.input_path else SAMPLES


def check(args):
    check_generation(args)
    if args.text is not None and args.input_path:
        raise UserError("--text and --input_path: give one of the two")
    if args.text is not None and not args.text.strip():
        raise UserError("--text: is empty; give a sentence")
    if args.text is not None and SURROGATE.search(args.text):
        raise UserError(f"--text: half a character in {args.text[:40]!r}; give UTF-8")
    if args.output_path and args.input_path and Path(args.output_path).resolve() == Path(args.input_path).resolve():
        raise UserError(f"--output_path={args.output_path}: is the input; name another file")
    if args.resume and not args.output_path:
        raise UserError("--resume needs --output_path, the file to go on with")
    if not 0 <= args.min_confidence <= 1:
        raise UserError(f"--min_confidence={args.min_confidence}: expected 0 to 1")


def main(args):
    check(args)
    total, without_instruct = look_through(texts_asked_for(args))  # so that a bad line is found now
    adapter, train_args, facts = find_adapter(args.data_name, args.lora_model, args.base_model)
    facts = with_task(adapter, facts, args.instruct, args.labels)
    labels, instruct, query_prefix = task_of(facts)
    if len(facts.get("instructs", [])) > 1 and without_instruct:
        say(f"训练用过 {len(facts['instructs'])} 种指令，没有写 instruct 的文本用第一种：{instruct[:40]}")
    calibration = calibration_of(args, adapter, train_args)
    tokenizer = load_base_tokenizer(adapter, train_args, facts, args.base_model, args.tokenizer_path, args.template)
    processes, output = Processes(), nullcontext()

    def examples():
        return (example_of_input(record, instruct, query_prefix) for record in texts_asked_for(args))

    if args.output_path and not processes.rank:
        task = {"instruct": instruct, "labels": labels, "query_prefix": query_prefix}
        task |= {"min_confidence": args.min_confidence, "calibration": calibration and list(calibration)}
        made = made_with(args, adapter, train_args, tokenizer, args.input_path, **task)
        output = row_file(args.output_path, made, total, args.resume)
    cut_off = 0
    with output as file:
        first = file.first if file else 0
        processes.begin(first)
        rules = facts.get("nested", False), held_instructs(args.constrained, facts), calibration
        answer = load_answering(args, adapter, train_args, facts, tokenizer, labels, *rules)
        rows = progress_or_lines(in_order(processes, enumerate(examples()), total, answer), total - first, "回答", "条")
        if not file and not processes.rank:
            tqdm.write("=" * 100)
        shown = examples()
        for number, (row, inside) in enumerate(rows, first + 1):
            cut_off += row.get("problems", {}).get("cut", 0)
            row["entities"] = [e for e in row["entities"] if e["confidence"] >= args.min_confidence]
            if file:
                file.write(row)
            if inside:
                say(f"第 {number} 条没有句末可切，在句子里面切开，位置 {', '.join(map(str, inside))}")
            if row["prediction"] is None:
                say(f"第 {number} 条超过模型的长度上限，没有回答: {row['text'][:30]}…")
            if not file:
                show(next(shown), row)
    if cut_off:
        say(f"{cut_off} 条回答达到 max_new_tokens={args.max_new_tokens} 或模型的长度上限，被截断")
    if file:
        say(f"{total - first} 条结果已写到 {args.output_path}" + (f"，之前已有 {first} 条" if first else ""))


def show(example, row):
    shown = (example["instruct"] + example["query"]).replace("\n", "\\n")
    lines = [f'文本 >>>  "{shown}"', f"预测 >>>  {row['prediction'] or ''}", ""]
    if row["answer"] is not None:
        lines.append(f"真实 >>>  {row['answer']}")
    tqdm.write("\n".join(lines))  # stdout; not through the bar


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
