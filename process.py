"""A raw NER corpus -> instruction data.

    python process.py
    python process.py --data_name=msra --train_file=msra_train.txt --dev_file=msra_dev.txt
    python process.py --data_name=mine --dev_size=500 --labels=PER:人名,LOC:地名,ORG:机构名,TIME:时间
    python process.py --export=doccano                             # predictions, to be corrected in a tool
    python process.py --data_name=mine --audit_only=True           # check what it wrote, as the trainers will

Reads data/<data_name>/ori_data/{train,dev,test}.txt (test.txt if there is one), or the files named, in one of these formats:

    jsonl  {"text": "…", "entity_list": [{"entity_index": {"begin": 3, "end": 4}, "entity_type": "LOC", "entity": …}]}
           or CLUENER's {"text": "…", "label": {"address": {"北京": [[3, 4]]}}}, where end is the last character
    bio    one `字<tab or space>标签` a line, an empty line after each sentence; BIO, BMES(O) or BIOES tags
    or what doccano, Label Studio, brat and others export: docs/en/data.md lists the formats, and what is left out of each

Writes the same names in data/<data_name>/instruct_data/, one object a line; offsets are characters, end exclusive:

    {"instruct", "query", "answer", "text", "entities": [{"entity", "type", "begin", "end"}]}

If there is a data/<data_name>/ori_data/rehearse.txt, rows of other tasks as {"instruct", "query", "answer"}, they are
added to train.txt with "task": "rehearsal": an adapter that is trained on one task alone forgets what its base could do besides.

Every sentence stays, also those without an entity; only sentences of train that dev or test hold too are left out. A
training text of more than max_seq_length tokens is cut at sentence ends, with the tokenizer of model_dir; those of dev
and test stay whole, and test.py answers them in windows, as predict.py does.
"""

from alpaca.common.start import start

start()

import json
import random
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.common.folders import check_writable, hint_of_folders
from alpaca.common.locks import locked
from alpaca.common.paths import user_path
from alpaca.common.text_files import read_jsonl
from alpaca.common.whole_files import written_whole
from alpaca.corpora.convert import Task, convert
from alpaca.corpora.export import export_predictions, newest_predictions
from alpaca.corpora.formats import FORMATS, detect_format
from alpaca.corpora.json_lines import COLUMNS
from alpaca.corpora.labels import DEFAULT_LABELS, read_labels, refuse_unknown_types
from alpaca.corpora.long_texts import cut_long
from alpaca.corpora.problems import LOSSES, REMARKS, Problems
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.audit import audit
from config_utils import run_script
from dataset import INSTRUCT, QUERY_PREFIX, REHEARSAL, nests

CONFIG = {
    "data_name": "demo",  # name of the data set: its folder under data/
    "train_file": None,  # raw training data; None: data/<data_name>/ori_data/train.txt
    "dev_file": None,  # raw dev data; None: data/<data_name>/ori_data/dev.txt if there is one
    "test_file": None,  # raw test data; None: data/<data_name>/ori_data/test.txt if there is one
    "dev_size": 0,  # sentences to move from the training to the dev data, at random; only where there is no dev file
    "format": "auto",  # format of the raw data: auto | brat | conll | bio | labelstudio | labelstudio_min | characters | doccano | cmeee | spans | jsonl
    "ends": "exclusive",  # what `end` counts in an entity_list: exclusive | inclusive (the entity's last character)
    "instruct": INSTRUCT,  # instruction of every example; {labels}: the types' names joined by 、, a typed \n: a newline
    "query_prefix": QUERY_PREFIX,  # what stands before the text in a query
    "labels": DEFAULT_LABELS,  # TAG:NAME: a type's raw tag, its name in answers; no _ in NAME; TAG: without a name leaves the type out
    "keep_leaked": False,  # True: training sentences that the dev data holds too are kept | False: they are left out
    "seed": 42,  # random seed of the choice of dev_size sentences
    "export": None,  # doccano | labelstudio | brat: write predictions for that tool, and nothing else
    "predictions": None,  # for export: predictions.jsonl to write; None: the one below checkpoint/<data_name>/ written last
    "audit_only": False,  # True: write nothing, only check data/<data_name>/instruct_data/ as the trainers do
    "model_dir": "./model_hub/chinese-alpaca-tiny",  # folder of the model whose tokenizer counts the tokens
    "template": "auto",  # the prompt around the instruction: auto | alpaca | alpaca2 | chat; auto: that of the base
    "max_seq_length": 512,  # most tokens of prompt + answer: longer training texts are cut at sentence ends
    "instruct_column": "instruct",  # for audit_only: name of the column that holds the instruction
    "query_column": "query",  # for audit_only: name of the column that holds the query
    "response_column": "answer",  # for audit_only: name of the column that holds the answer
}


def read_rehearsal(path):
    """The rows of other tasks in rehearse.txt; none if there is no such file."""
    rows = []
    for number, record in read_jsonl(path) if path.is_file() else ():
        if record.keys() != set(COLUMNS):
            raise UserError(
                f"{path}:{number}: expected exactly the keys {', '.join(COLUMNS)}, got {', '.join(record) or 'none'}; "
                "sentences with entities belong in train.txt"
            )
        for key, value in record.items():
            if not isinstance(value, str):
                raise UserError(f"{path}:{number}: {key!r} must be a string, got {value!r}; correct the line")
        rows.append({key: record[key] for key in COLUMNS} | {"task": REHEARSAL})
    return rows


def find_files(args):
    """Paths of {"train", "dev", "test"}; dev is None if it is to be split off train, test is None if there is none."""
    folder = Path("data") / args.data_name / "ori_data"
    named = {"train": args.train_file, "dev": args.dev_file, "test": args.test_file}
    files = {name: user_path(file) if file else folder / f"{name}.txt" for name, file in named.items()}
    for name, file in files.items():
        if not file.exists() and (named[name] or name == "train"):
            remedy = "put the corpus there or name it" if name == "train" else "name another"
            split = ", or split some off train with --dev_size=500" if name == "dev" else ""
            raise UserError(f"{file}: no such file{hint_of_folders(file)}; {remedy} with --{name}_file{split}")
    if files["dev"].exists() and args.dev_size:
        print(f"已有验证数据 {files['dev']}，不用 --dev_size", file=sys.stderr)
    if not files["dev"].exists() and args.dev_size <= 0:
        raise UserError(
            f"{files['dev']}: no such file{hint_of_folders(files['dev'])}; name one with --dev_file, or split one off train with --dev_size=500"
        )
    return {name: file if file.exists() else None for name, file in files.items()}


def split_off(examples, size, seed):
    """Examples -> (the rest, `size` random ones), both in the order of the file."""
    if size >= len(examples):
        raise UserError(f"--dev_size={size}: train has only {len(examples)} sentences; choose fewer")
    chosen = set(random.Random(seed).sample(range(len(examples)), size))
    return [e for i, e in enumerate(examples) if i not in chosen], [examples[i] for i in sorted(chosen)]


def write_examples(files):
    """Write {path: examples} as JSON lines, all of the files or none."""
    with ExitStack() as stack:
        for path, examples in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = stack.enter_context(written_whole(path))
            with new.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def summary(path, examples, names):
    """One line: sentences, sentences without entity, entities by type."""
    kinds = Counter(e["type"] for example in examples for e in example["entities"])
    empty = sum(not example["entities"] for example in examples)
    counts = "，".join(f"{name} {kinds[name]}" for name in names)
    nested = "；有嵌套的实体，预测和测试时长实体里面的位置也算" if nests(examples) else ""
    return f"{path}：句子 {len(examples)}，无实体句 {empty}，实体 {kinds.total()}（{counts}）{nested}"


def remove_leaks(parts, keep_leaked):
    """{"train", "dev", perhaps "test": examples} -> (train without what the others hold, a line that says how much)."""
    texts = {name: {example["text"] for example in examples} for name, examples in parts.items()}
    others = set().union(*(texts[name] for name in parts if name != "train"))
    kept = [example for example in parts["train"] if keep_leaked or example["text"] not in others]
    leaked = [
        f"{title}中 {sum(example['text'] in texts['train'] for example in parts[name])} 句也在训练数据中"
        for name, title in (("dev", "验证数据"), ("test", "测试数据"))
        if name in parts
    ]
    removed = len(parts["train"]) - len(kept)
    action = "保留（--keep_leaked）" if keep_leaked else f"从训练数据去掉 {removed} 句"
    return kept, f"泄漏：{'，'.join(leaked)}，{action}"


def cut_parts(parts, task, args):
    """Cut what of train is longer than max_seq_length -> (the parts, lines that say what was cut)."""
    try:
        tokenizer = load_tokenizer(args.model_dir, args.template)
    except UserError as error:
        longest = max(len(example["query"] + example["answer"]) for example in parts["train"])
        if longest + len(task.instruct) <= args.max_seq_length:
            return parts, []
        return parts, [f"长文本：没有分词器，没有检查也没有切开，最长的一条有 {longest} 个字（{error}）"]
    cut = cut_long(parts["train"], task, tokenizer, args.max_seq_length)
    line = (
        f"长文本：train.txt 有 {cut.documents} 条超过 max_seq_length={args.max_seq_length} 个 token，在句末切成 {cut.parts} 条"
        f"（{cut.inside} 处在句子里面，{cut.lost} 个实体放不下）"
    )
    return {**parts, "train": cut.examples}, [line] * bool(cut.documents)


def read_corpora(files, task, args):
    """{name: path} -> ({name: examples}, Problems, {path: format}); UserError for entity types that have no name."""
    problems = Problems()
    paths = {name: file for name, file in files.items() if file}
    forms = {file: detect_format(file) if args.format == "auto" else args.format for file in paths.values()}
    parts = {name: convert(file, forms[file], task, problems, args.ends) for name, file in paths.items()}
    refuse_unknown_types(task.labels, problems.unknown_types, problems.used_types)
    if "dev" not in parts:
        parts["train"], parts["dev"] = split_off(parts["train"], args.dev_size, args.seed)
    return parts, problems, forms


def main(args):
    folder = Path("data") / args.data_name / "instruct_data"
    if args.audit_only:
        columns = args.instruct_column, args.query_column, args.response_column
        tokenizer = load_tokenizer(args.model_dir, args.template)
        audit((folder / "train.txt", folder / "dev.txt"), tokenizer, args.max_seq_length, columns, out=sys.stdout)
        return
    labels = read_labels(args.labels)
    if args.export:
        source = args.predictions or newest_predictions(args.data_name)
        print(*export_predictions(args.export, source, labels), sep="\n")
        return
    if args.format != "auto" and args.format not in FORMATS:
        raise UserError(f"--format: expected auto, {', '.join(FORMATS)}, got {args.format!r}")
    if args.ends not in ("exclusive", "inclusive"):
        raise UserError(f"--ends: expected exclusive or inclusive, got {args.ends!r}")
    names = list(dict.fromkeys(filter(None, labels.values())))  # two tags may mean one type
    instruct = args.instruct.replace("\\n", "\n").replace("{labels}", "、".join(names))
    files = find_files(args)
    check_writable(folder)
    for path in (folder / f"{name}.txt" for name in files):
        if path.is_dir():
            raise UserError(f"{path}: is a folder, and the data is written there; move it away")
    with locked(folder):
        make_instruct_data(args, files, Task(labels, instruct, args.query_prefix), names, folder)


def make_instruct_data(args, files, task, names, folder):
    """Read the corpora in `files`, write the folder's train.txt, dev.txt and test.txt, and say what was done.

    names: those of the entity types, in the order of --labels.
    """
    rehearse_file = Path("data") / args.data_name / "ori_data" / "rehearse.txt"
    rehearsal = read_rehearsal(rehearse_file)
    parts, problems, forms = read_corpora(files, task, args)
    parts["train"], leaks = remove_leaks(parts, args.keep_leaked)
    if not parts["train"]:
        raise UserError(f"{files['train']}: dev and test hold every sentence of it; give others or pass --keep_leaked")
    parts, cuts = cut_parts(parts, task, args)

    write_examples({folder / f"{name}.txt": part + rehearsal * (name == "train") for name, part in parts.items()})
    for name, part in parts.items():
        print(summary(folder / f"{name}.txt", part, names))
    print("格式：" + "，".join(f"{file} 是 {form}" for file, form in forms.items()))
    if rehearsal:
        share = len(rehearsal) / (len(rehearsal) + len(parts["train"]))
        print(f"别的任务：{rehearse_file} 的 {len(rehearsal)} 条也写进了 train.txt，占 {share:.1%}")
    print(*cuts, leaks, sep="\n")
    print("丢弃：" + "，".join(f"{title} {problems[kind]}" for kind, title in LOSSES.items()))
    if remarks := [f"{title} {problems[kind]}" for kind, title in REMARKS.items() if problems[kind]]:
        print("另外：" + "，".join(remarks))


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
