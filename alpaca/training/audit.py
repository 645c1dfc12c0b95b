"""What is wrong with instruct data, found before any weight loads: errors stop a run, warnings are counted.

    python process.py --audit_only=True --data_name=msra

The trainers print the same on stderr. Errors are lines that cannot be read and files of which nothing is left to train
on; all else may be meant, and is a warning with its first three places.
"""

import math
import os
import sys
from collections import Counter

from alpaca.common.errors import UserError
from alpaca.models.templates import encode_examples
from dataset import NO_ENTITY, fit_length, is_ner, parse_answer, read_examples, without_rehearsal

SHOWN = 3  # places of each warning, and of malformed lines
KEPT = 0.999  # share of the rows that the proposed max_seq_length keeps
WARNINGS = {
    "empty": "空答案",
    "repeated": "重复的样本",
    "contradiction": "提示词相同而答案不同",
    "overlap": "文本在训练集中也有",
    "malformed": "答案里不是 实体_类型 的行",
    "unknown": "指令没有写出、或训练集没有的类型",
    "absent": "文本里没有的实体",
}


def load_audited_data(train_path, dev_path, tokenizer, args):
    """[(records, the TokenizedExamples of them that fit into args.max_seq_length)] of train and dev, audited.

    Dev may be all long documents, which process.py leaves whole: then there is no dev loss.
    """
    columns = args.instruct_column, args.query_column, args.response_column
    paths = train_path, dev_path
    out = sys.stderr if os.environ.get("RANK", "0") == "0" else None
    audited = audit(paths, tokenizer, args.max_seq_length, columns, out)
    (train_records, train), (dev_records, dev) = audited
    train = fit_length(train, train_path, args.max_seq_length, args.too_long)
    without = ", or train without the dev loss, --eval_steps=-1: test.py answers long texts in windows"
    dev = fit_length(dev, dev_path, args.max_seq_length, args.too_long, args.eval_steps > 0, without)
    return [(train_records, train), (dev_records, dev)]


def audit(paths, tokenizer, max_seq_length, columns=("instruct", "query", "answer"), out=None):
    """Read, tokenize and check instruct data: (train, dev) paths -> [(records, their TokenizedExamples)] of each.

    Prints the report to `out` (None: nothing). UserError for a missing or empty file and for malformed lines, of which
    the report names all kinds and the first three.
    """
    read, malformed = [], []
    for path in paths:
        malformed.append([])
        read.append(read_examples(path, *columns, malformed=malformed[-1]))
    reports, audited = [], []
    for path, records, bad in zip(paths, read, malformed, strict=True):
        examples = encode_examples(tokenizer, records)
        audited.append((records, examples))
        lengths = sorted(len(e.prompt_ids) + len(e.answer_ids) for e in examples)
        reports += [f"数据检查 {path}: {len(records)} 条"]
        reports += [f"  错误 {len(bad)} 行不能用:", *(f"    {message}" for message in bad[:SHOWN])] if bad else []
        if records:
            warnings = find_warnings(records, read[0] if records is not read[0] else None)
            reports += [describe_answers(records), describe_lengths(lengths, max_seq_length)]
            reports += describe_warnings(path, warnings)
    if out:
        print(*reports, sep="\n", file=out)
    count = sum(map(len, malformed))
    if count:
        first = next(message for messages in malformed for message in messages)
        raise UserError(f"{first} (malformed lines in all: {count})" if count > 1 else first)
    return audited


def find_warnings(records, train=None):
    """{key of WARNINGS: [(line, detail)]} of one file's records; `train`: the training records, if these are dev.

    Data of another task than NER need none of the checks of entities, nor does rehearsal.
    """
    found = {kind: [] for kind in WARNINGS}
    train_texts = {subject_of(r) for r in train or []}
    seen = {}
    for record in records:
        line, given = record["line"], record["answer"]
        if not given.strip():
            found["empty"].append((line, subject_of(record)))
        first = seen.setdefault((record["instruct"], record["query"]), record)
        if first is not record:
            kind = "repeated" if first["answer"] == given else "contradiction"
            found[kind].append((line, f"同第 {first['line']} 行: {subject_of(record)}"))
        if subject_of(record) in train_texts:
            found["overlap"].append((line, subject_of(record)))
    own = without_rehearsal(records)
    parsed = [parse_answer(r["answer"], r["text"]) for r in own]
    if not is_ner(parsed):
        return found
    kinds = {kind for answer in parsed for _, kind in answer.entities}
    instructs = {r["instruct"] for r in own}
    named = any(kind in instruct for kind in kinds for instruct in instructs)  # an own instruction may list no types
    answers = [] if train is None else [parse_answer(r["answer"]) for r in without_rehearsal(train)]
    trained = None if train is None else {kind for answer in answers for _, kind in answer.entities}
    for record, answer in zip(own, parsed, strict=True):
        line = record["line"]
        if answer.malformed:
            found["malformed"].append((line, answer.malformed[0]))
        unknown = [
            pair
            for pair in answer.entities
            if (named and pair[1] not in record["instruct"]) or (trained is not None and pair[1] not in trained)
        ]
        if unknown:
            found["unknown"].append((line, "_".join(unknown[0])))
        if answer.not_in_text:
            found["absent"].append((line, "_".join(answer.not_in_text[0])))
    return found


def subject_of(record):
    """What a record is about: its text, or its instruction where the text is empty (a question without an input)."""
    return record["text"] or record["instruct"]


def describe_warnings(path, warnings):
    """A count and the first places of each kind of warning that there is, as lines."""
    for kind, places in warnings.items():
        if places:
            yield f"  警告 {WARNINGS[kind]}: {len(places)} 条"
            yield from (f"    {path}:{line}: {_short(detail)}" for line, detail in places[:SHOWN])


def _short(text):
    text = text.replace("\n", "\\n")
    return text if len(text) <= 40 else text[:40] + "…"


def describe_answers(records):
    """The balance of labels and the share of 没有, as one line; of rehearsal only the count."""
    own = without_rehearsal(records)
    parsed = [parse_answer(record["answer"]) for record in own]
    others = len(records) - len(own)
    rest = f"；另有 {others} 条别的任务，不检查实体" if others else ""
    if not is_ner(parsed):
        return f"  答案大多不是 实体_类型，不检查实体{rest}"
    kinds = Counter(kind for answer in parsed for _, kind in answer.entities)
    none = sum(record["answer"].strip() == NO_ENTITY for record in own)
    balance = "，".join(f"{kind} {count}（{count / kinds.total():.1%}）" for kind, count in kinds.most_common())
    shares = f"  {NO_ENTITY} {none}（{none / len(own):.1%}）；实体 {kinds.total()}{'：' if balance else ''}{balance}"
    return shares + rest


def describe_lengths(lengths, max_seq_length):
    """Percentiles of ascending token lengths and what max_seq_length leaves out, as one line."""
    p50, p90, p99, kept = (lengths[math.ceil(share * len(lengths)) - 1] for share in (0.5, 0.9, 0.99, KEPT))
    dropped = sum(n > max_seq_length for n in lengths)
    return (
        f"  token 数 p50 {p50}，p90 {p90}，p99 {p99}，最长 {lengths[-1]}；"
        f"max_seq_length={max_seq_length} 去掉 {dropped} 条，保留 {KEPT:.1%} 要 {kept}"
    )
