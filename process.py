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
added to train.txt: an adapter that is trained on one task alone forgets what its base could do besides.

Every sentence stays, also those without an entity; only sentences of train that dev holds too are left out.
"""

import json
import os
import random
import re
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

from alpaca.training.audit import audit
from config_utils import UserError, run_script
from dataset import INSTRUCT, QUERY_PREFIX, TOTAL, format_answer, load_tokenizer, read_jsonl, read_lines

CONFIG = {
    "data_name": "demo",  # folder under data/
    "train_file": None,  # raw training data; None: data/<data_name>/ori_data/train.txt
    "dev_file": None,  # raw dev data; None: data/<data_name>/ori_data/dev.txt if there is one
    "dev_size": 0,  # sentences to take from train where there is no dev file
    "format": "auto",  # auto | jsonl | bio; auto: by the first line
    "instruct": INSTRUCT,  # the instruction; {labels}: the names joined by 、, a typed \n: a newline
    "query_prefix": QUERY_PREFIX,  # query = query_prefix + text
    "labels": ["PER:人名", "LOC:地名", "ORG:机构名"],  # tag:name; a name may not contain _
    "keep_leaked": False,  # keep sentences in train that dev holds too
    "seed": 42,  # of dev_size's draw
    "audit_only": False,  # write nothing, only check data/<data_name>/instruct_data/ as the trainers do
    "model_dir": "./model_hub/chinese-alpaca-tiny",  # whose tokenizer the audit counts with
    "max_seq_length": 512,  # tokens of prompt + answer; the audit says how many rows are longer
}

COLUMNS = ("instruct", "query", "answer")
SHOWN = 20  # problems of one kind that are printed one by one; the rest is only counted
TAG = re.compile(r"O|([BIMES])[-_](.+)")
PROBLEMS = {
    "mismatch": "与文本不符的实体（已从答案去掉）",
    "newline": "含换行的实体（已从答案去掉）",
    "empty": "空句（已跳过）",
    "repaired": "不合规的标签（已按新实体的开头处理）",
}


class Problems(Counter):
    """Counts by kind (a key of PROBLEMS); the first few of each are printed with file and line."""

    def add(self, kind, path, number, detail):
        self[kind] += 1
        if self[kind] <= SHOWN:
            tqdm.write(f"{path}:{number}: {PROBLEMS[kind]}：{detail}", file=sys.stderr)
        if self[kind] == SHOWN + 1:
            tqdm.write(f"{path}: 更多{PROBLEMS[kind]}，只在最后计数", file=sys.stderr)


def read_labels(labels):
    """["PER:人名", …] -> {"PER": "人名", …}"""
    names = {}
    for label in labels:
        tag, _, name = (part.strip() for part in label.partition(":"))
        if not tag or not name:
            raise UserError(f"--labels: expected TAG:name, got {label!r}; e.g. --labels=PER:人名,LOC:地名")
        if "_" in name:
            raise UserError(f"--labels: {name!r} contains _, which parts entity and type in an answer; rename it")
        if name == TOTAL:
            raise UserError(f"--labels: metrics.json calls all entity types together {name!r}; rename {label!r}")
        if names.setdefault(tag, name) != name:
            raise UserError(f"--labels: {tag!r} is named twice, {names[tag]!r} and {name!r}; leave one out")
    if not names:
        raise UserError("--labels: at least one TAG:name is needed, e.g. --labels=PER:人名")
    return names


def detect_format(path):
    """ "jsonl" or "bio", by the first line that is not empty."""
    line = next((line for _, line in read_lines(path) if line.strip()), "")
    if split_columns(line):
        return "bio"
    if line.lstrip().startswith("{"):
        return "jsonl"
    raise UserError(
        f"{path}: neither JSON lines nor 字<tab>标签, the first line is {line[:40]!r}; see process.py --help"
    )


def split_columns(line):
    """`字<tab or space>标签` -> (token, tag), None for any other line; a token that is lost was a blank."""
    token, _, tag = line.rstrip().rpartition("\t" if "\t" in line else " ")
    if len(token.split()) > 1 or not TAG.fullmatch(tag):
        return None
    return token or " ", tag


def read_json_sentences(path):
    """Yield (line number, text, [(begin, end, tag, entity, line number)]) of a JSON-lines corpus."""
    for number, record in read_jsonl(path):
        try:
            text = record["text"]
            if "label" in record and "entity_list" not in record:  # CLUENER's
                found = [(span, tag, e) for tag, spans in record["label"].items() for e in spans for span in spans[e]]
                places = [(begin, end + 1) for (begin, end), _, _ in found]
                names = [(tag, entity) for _, tag, entity in found]
            else:
                places = [(e["entity_index"]["begin"], e["entity_index"]["end"]) for e in record["entity_list"]]
                names = [(e["entity_type"], e["entity"]) for e in record["entity_list"]]
        except KeyError as error:
            if record.keys() >= set(COLUMNS):
                raise UserError(
                    f"{path}:{number}: this is instruction data already; put it to data/<data_name>/instruct_data/ and "
                    "look at it with --audit_only"
                ) from None
            raise UserError(f"{path}:{number}: no key {error}; process.py --help shows the format") from None
        except (TypeError, AttributeError, ValueError):
            raise UserError(f"{path}:{number}: wrong nesting; process.py --help shows the format") from None
        strings = [text, *(part for pair in names for part in pair)]
        if {type(part) for part in strings} != {str} or {type(part) for pair in places for part in pair} - {int}:
            raise UserError(f"{path}:{number}: begin and end must be integers, all else strings; see process.py --help")
        yield number, text, [(*place, *name, number) for place, name in zip(places, names, strict=True)]


def read_tagged_sentences(path, problems):
    """Yield (line number, text, [(begin, end, tag, entity, line number)]) of a two-column corpus."""
    rows = []
    for number, line in read_lines(path):
        columns = split_columns(line)
        if columns:
            rows.append((number, *columns))
        elif line.strip():
            raise UserError(
                f"{path}:{number}: expected 字<tab>标签, the tag O or B-, I-, M-, E- or S- and a type, got {line!r}"
            )
        elif rows:
            yield join_tokens(rows, path, problems)
            rows = []
    if rows:
        yield join_tokens(rows, path, problems)


def join_tokens(rows, path, problems):
    """[(line number, token, tag)] of one sentence -> (line number, text, entities)."""
    numbers, tokens, tags = zip(*rows, strict=True)
    text, ends = "".join(tokens), [0, *accumulate(map(len, tokens))]
    entities = []
    for first, last, tag, repaired in decode_tags(tags):
        begin, end = ends[first], ends[last]
        entities.append((begin, end, tag, text[begin:end], numbers[first]))
        if repaired:
            problems.add("repaired", path, numbers[first], f"{tokens[first]} {tags[first]}")
    return numbers[0], text, entities


def decode_tags(tags):
    """BIO, BMES(O) or BIOES tags -> [(first, last + 1, type, whether an opening tag had to be guessed)] in tokens."""
    spans, current = [], None
    for i, tag in enumerate(tags):
        prefix, kind = TAG.fullmatch(tag).groups()
        if prefix is None:
            current = None
            continue
        continues = prefix in "IME" and current == kind
        if continues:
            spans[-1][1] = i + 1
        else:
            spans.append([i, i + 1, kind, prefix in "IME"])
        current = None if prefix in "ES" else kind
    return [tuple(span) for span in spans]


def to_example(sentence, path, labels, instruct, query_prefix, problems):
    """A sentence of a reader -> an example; entities that cannot be answered with are left out and reported."""
    number, text, found = sentence
    entities = []
    for begin, end, tag, entity, line in found:
        if tag not in labels:
            known = ",".join(f"{key}:{name}" for key, name in labels.items())
            raise UserError(f"{path}:{line}: unknown entity type {tag!r}; name it: --labels={known},{tag}:名称")
        if not 0 <= begin < end <= len(text) or text[begin:end] != entity:
            problems.add(
                "mismatch", path, line, f"{entity!r}，文本 [{begin}, {end}) 处是 {text[max(begin, 0) : end]!r}"
            )
        elif "\n" in entity or "\r" in entity:
            problems.add("newline", path, line, repr(entity))
        else:
            entities.append({"entity": entity, "type": labels[tag], "begin": begin, "end": end})
    entities.sort(key=lambda e: (e["begin"], -e["end"]))
    return {
        "instruct": instruct,
        "query": query_prefix + text,
        "answer": format_answer(entities),
        "text": text,
        "entities": [e for i, e in enumerate(entities) if e not in entities[:i]],
    }


def convert(path, form, labels, instruct, query_prefix, problems):
    """A corpus file -> list of examples, in the order of the file."""
    form = detect_format(path) if form == "auto" else form
    sentences = read_json_sentences(path) if form == "jsonl" else read_tagged_sentences(path, problems)
    examples = []
    for sentence in tqdm(sentences, desc=str(path), unit=" 句", delay=1, disable=None):
        if sentence[1].strip():
            examples.append(to_example(sentence, path, labels, instruct, query_prefix, problems))
        else:
            problems.add("empty", path, sentence[0], repr(sentence[1]))
    if not examples:
        raise UserError(f"{path}: no sentence in it")
    return examples


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
        rows.append({key: record[key] for key in COLUMNS})
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
    return f"{path}：句子 {len(examples)}，无实体句 {empty}，实体 {kinds.total()}（{counts}）"


def main(args):
    if args.audit_only:
        folder = Path("data") / args.data_name / "instruct_data"
        tokenizer = load_tokenizer(args.model_dir)
        audit((folder / "train.txt", folder / "dev.txt"), tokenizer, args.max_seq_length, out=sys.stdout)
        return
    labels = read_labels(args.labels)
    if args.format not in ("auto", "jsonl", "bio"):
        raise UserError(f"--format: expected auto, jsonl or bio, got {args.format!r}")
    names = list(dict.fromkeys(labels.values()))  # two tags may mean one type
    instruct = args.instruct.replace("\\n", "\n").replace("{labels}", "、".join(names))
    train_file, dev_file = find_files(args)
    rehearse_file = Path("data") / args.data_name / "ori_data" / "rehearse.txt"
    rehearsal, problems = read_rehearsal(rehearse_file), Problems()
    train = convert(train_file, args.format, labels, instruct, args.query_prefix, problems)
    if dev_file:
        dev = convert(dev_file, args.format, labels, instruct, args.query_prefix, problems)
    else:
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
    print("丢弃：" + "，".join(f"{title} {problems[kind]}" for kind, title in PROBLEMS.items()))


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
