"""A raw NER corpus -> instruction data.

    python process.py
    python process.py --data_name=msra --train_file=msra_train.txt --dev_file=msra_dev.txt
    python process.py --data_name=mine --dev_size=500 --labels=PER:人名,LOC:地名,ORG:机构名,TIME:时间
    python process.py --data_name=mine --audit_only=True           # check what it wrote, as the trainers will

Reads data/<data_name>/ori_data/{train,dev}.txt, in one of two formats:

    jsonl  {"text": "…", "entity_list": [{"entity_index": {"begin": 3, "end": 4}, "entity_type": "LOC", "entity": …}]}
           or CLUENER's {"text": "…", "label": {"address": {"北京": [[3, 4]]}}}, where end is the last character
    bio    one `字<tab or space>标签` a line, an empty line after each sentence; BIO, BMES(O) or BIOES tags

Writes data/<data_name>/instruct_data/{train,dev}.txt, one object a line; offsets are characters, end exclusive:

    {"instruct", "query", "answer", "text", "entities": [{"entity", "type", "begin", "end"}]}

If there is a data/<data_name>/ori_data/rehearse.txt, rows of other tasks as {"instruct", "query", "answer"}, they are
added to train.txt with "task": "rehearsal": an adapter that is trained on one task alone forgets what its base could do besides.

Every sentence stays, also those without an entity; only sentences of train that dev holds too are left out.
"""

from alpaca.common.start import start

start()

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_jsonl
from alpaca.corpora.convert import Task, convert
from alpaca.corpora.json_lines import COLUMNS
from alpaca.corpora.labels import DEFAULT_LABELS, read_labels, refuse_unknown_types
from alpaca.corpora.problems import LOSSES, REMARKS, Problems
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.audit import audit
from config_utils import run_script
from dataset import INSTRUCT, QUERY_PREFIX, REHEARSAL, nests

CONFIG = {
    "data_name": "demo",  # name of the data set: its folder under data/
    "train_file": None,  # raw training data; None: data/<data_name>/ori_data/train.txt
    "dev_file": None,  # raw dev data; None: data/<data_name>/ori_data/dev.txt if there is one
    "dev_size": 0,  # sentences to move from the training to the dev data, at random; only where there is no dev file
    "format": "auto",  # format of the raw data: jsonl | bio | auto (seen from the first line)
    "ends": "exclusive",  # what `end` counts in an entity_list: exclusive | inclusive (the entity's last character)
    "instruct": INSTRUCT,  # instruction of every example; {labels}: the types' names joined by 、, a typed \n: a newline
    "query_prefix": QUERY_PREFIX,  # what stands before the text in a query
    "labels": DEFAULT_LABELS,  # TAG:NAME: a type's raw tag, its name in answers; no _ in NAME; TAG: without a name leaves the type out
    "keep_leaked": False,  # True: training sentences that the dev data holds too are kept | False: they are left out
    "seed": 42,  # random seed of the choice of dev_size sentences
    "audit_only": False,  # True: write nothing, only check data/<data_name>/instruct_data/ as the trainers do
    "model_dir": "./model_hub/chinese-alpaca-tiny",  # for audit_only: folder of the model whose tokenizer counts the tokens
    "max_seq_length": 512,  # for audit_only: examples with more tokens of prompt + answer are counted as too long
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
    """Paths of train and dev; dev is None if it is to be split off train."""
    folder = Path("data") / args.data_name / "ori_data"
    train, dev = Path(args.train_file or folder / "train.txt"), Path(args.dev_file or folder / "dev.txt")
    if not train.is_file():
        raise UserError(f"{train}: no such file; put the corpus there or name it with --train_file")
    if dev.is_file():
        if args.dev_size:
            print(f"已有验证数据 {dev}，不用 --dev_size", file=sys.stderr)
        return train, dev
    if args.dev_file:
        raise UserError(f"{dev}: no such file; name another with --dev_file, or split one off with --dev_size=500")
    if args.dev_size <= 0:
        raise UserError(f"{dev}: no such file; name one with --dev_file, or split one off train with --dev_size=500")
    return train, None


def split_off(examples, size, seed):
    """Examples -> (the rest, `size` random ones), both in the order of the file."""
    if size >= len(examples):
        raise UserError(f"--dev_size={size}: train has only {len(examples)} sentences; choose fewer")
    chosen = set(random.Random(seed).sample(range(len(examples)), size))
    return [e for i, e in enumerate(examples) if i not in chosen], [examples[i] for i in sorted(chosen)]


def write_examples(path, examples):
    """Write JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    os.replace(new, path)


def summary(path, examples, names):
    """One line: sentences, sentences without entity, entities by type."""
    kinds = Counter(e["type"] for example in examples for e in example["entities"])
    empty = sum(not example["entities"] for example in examples)
    counts = "，".join(f"{name} {kinds[name]}" for name in names)
    nested = "；有嵌套的实体，预测和测试时长实体里面的位置也算" if nests(examples) else ""
    return f"{path}：句子 {len(examples)}，无实体句 {empty}，实体 {kinds.total()}（{counts}）{nested}"


def main(args):
    if args.audit_only:
        folder = Path("data") / args.data_name / "instruct_data"
        tokenizer = load_tokenizer(args.model_dir)
        audit((folder / "train.txt", folder / "dev.txt"), tokenizer, args.max_seq_length, out=sys.stdout)
        return
    labels = read_labels(args.labels)
    if args.format not in ("auto", "jsonl", "bio"):
        raise UserError(f"--format: expected auto, jsonl or bio, got {args.format!r}")
    if args.ends not in ("exclusive", "inclusive"):
        raise UserError(f"--ends: expected exclusive or inclusive, got {args.ends!r}")
    names = list(dict.fromkeys(filter(None, labels.values())))  # two tags may mean one type
    instruct = args.instruct.replace("\\n", "\n").replace("{labels}", "、".join(names))
    train_file, dev_file = find_files(args)
    rehearse_file = Path("data") / args.data_name / "ori_data" / "rehearse.txt"
    rehearsal, problems = read_rehearsal(rehearse_file), Problems()
    task = Task(labels, instruct, args.query_prefix)
    train = convert(train_file, args.format, task, problems, args.ends)
    if dev_file:
        dev = convert(dev_file, args.format, task, problems, args.ends)
    refuse_unknown_types(labels, problems.unknown_types, problems.used_types)
    if not dev_file:
        train, dev = split_off(train, args.dev_size, args.seed)

    dev_texts, train_texts = ({example["text"] for example in part} for part in (dev, train))
    leaked = sum(example["text"] in train_texts for example in dev)
    kept = [example for example in train if args.keep_leaked or example["text"] not in dev_texts]
    if not kept:
        raise UserError(f"{train_file}: dev holds every sentence of it; give other dev data or pass --keep_leaked")

    folder = Path("data") / args.data_name / "instruct_data"
    for name, examples in (("train", kept), ("dev", dev)):
        write_examples(folder / f"{name}.txt", examples + rehearsal if name == "train" else examples)
        print(summary(folder / f"{name}.txt", examples, names))
    if rehearsal:
        share = len(rehearsal) / (len(rehearsal) + len(kept))
        print(f"别的任务：{rehearse_file} 的 {len(rehearsal)} 条也写进了 train.txt，占 {share:.1%}")
    action = "保留（--keep_leaked）" if args.keep_leaked else f"从训练数据去掉 {len(train) - len(kept)} 句"
    print(f"泄漏：验证数据中 {leaked} 句也在训练数据中，{action}")
    print("丢弃：" + "，".join(f"{title} {problems[kind]}" for kind, title in LOSSES.items()))
    if remarks := [f"{title} {problems[kind]}" for kind, title in REMARKS.items() if problems[kind]]:
        print("另外：" + "，".join(remarks))


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
