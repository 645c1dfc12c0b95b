"""Records <-> prompts <-> token ids, and answers <-> entities: the one place where text meets the model.

The prompt is built, encoded and parsed here and nowhere else, so training, testing, predicting and chatting cannot
disagree about a byte of it. Nothing here loads weights or reads the command line.
"""

import hashlib
import json
import re
from collections import namedtuple
from pathlib import Path

from alpaca.common.errors import UserError

# The template that Chinese-Alpaca was tuned with (Stanford Alpaca's, for an instruction without a separate input).
# The one space at its end is a token of its own ("▁"): the answer is encoded separately behind it.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response: "
)
PROMPT_SHA256 = hashlib.sha256(PROMPT.encode("utf-8")).hexdigest()
QUERY_PREFIX = "文本："
NO_ENTITY = "没有"
SURROGATE = re.compile("[\ud800-\udfff]")  # json reads it, but it is no character: no file or tokenizer takes it
INSTRUCT = (  # {labels}: the names of the types, joined by 、
    "你现在是一个实体识别模型，你需要提取文本里面的{labels}，如果存在结果，返回'实体_实体类型'，"
    "不同实体间用\n分隔。如果没有结果，回答'没有'。"
)
LABELS = ["人名", "地名", "机构名"]  # what the base alone is asked for
TOTAL = "micro"  # all types together, as metrics.json names them beside the types: the name of none
BOS, EOS, UNK = 1, 2, 0  # the ids of every LLaMA vocabulary


def build_prompt(instruct, query):
    """The prompt of one example, without bos; an empty query adds no newline."""
    return PROMPT.replace("{instruction}", f"{instruct}\n{query}" if query else instruct)


# ---------------------------------------------------------------------------------------------------------------------
# records


def read_lines(path, malformed=None):
    """Yield (line number, text without line end) of a UTF-8 file; UserError for a missing or empty one.

    An undecodable line is a UserError too, or, where there is a list `malformed`, is left out and appended to it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # most files are read twice
        raise UserError(f"{path}: is a {'folder' if path.is_dir() else 'pipe or device'}; name a file")
    if not path.is_file():
        made = "; make it with `python process.py --data_name=…`" if path.parent.name == "instruct_data" else ""
        raise UserError(f"{path}: no such file{made}")
    number = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                _refuse(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); re-encode it", malformed)
                continue
            yield number, line
    if not number:
        raise UserError(f"{path}: the file is empty")


def _refuse(message, malformed):
    if malformed is None:
        raise UserError(message) from None
    malformed.append(message)


def read_jsonl(path, malformed=None):
    """Yield (line number, object) of a JSON-lines file; blank lines are skipped. UserError names file and line.

    `malformed`: as in read_lines.
    """
    found = False
    for number, line in read_lines(path, malformed):
        if not line.strip():
            continue
        found = True
        try:
            record = _parse_record(f"{path}:{number}", line)
        except UserError as error:
            _refuse(str(error), malformed)
        else:
            yield number, record
    if not found:
        raise UserError(f"{path}: the file holds no record")


def _parse_record(where, line):
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise UserError(f"{where}: not JSON that can be read ({error}); correct the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}; one object a line")
    for value in record.values():
        if isinstance(value, str) and SURROGATE.search(value):
            raise UserError(f"{where}: half a character (a lone surrogate) in {value[:40]!r}; correct the text")
    return record


def read_examples(path, instruct_column="instruct", query_column="query", response_column="answer", malformed=None):
    """Instruct data as a list of {"instruct", "query", "answer", "text", "entities", "bare", "line"}; entities may be None.

    Only the three columns are required. `text` falls back to the query without its prefix. `bare`: whether the row has
    neither text nor entities of its own. `malformed`: as in read_lines.
    """
    columns = {"instruct": instruct_column, "query": query_column, "answer": response_column}
    examples = []
    for number, record in read_jsonl(path, malformed):
        try:
            example = _three_columns(f"{path}:{number}", record, columns)
            example |= optional_columns(path, number, record, example["query"])
        except UserError as error:
            _refuse(str(error), malformed)
        else:
            bare = record.get("text") is None and record.get("entities") is None
            examples.append({**example, "bare": bare, "line": number})
    return examples


def _three_columns(where, record, columns):
    option = {"instruct": "instruct_column", "query": "query_column", "answer": "response_column"}
    for key, column in columns.items():
        if column not in record:
            raise UserError(
                f"{where}: no column {column!r} (there are {', '.join(map(repr, record))}); "
                f"name it with --{option[key]}=… or make the file with process.py"
            )
        if not isinstance(record[column], str):
            raise UserError(f"{where}: column {column!r} must be a string, got {record[column]!r}")
    return {key: record[column] for key, column in columns.items()}


def optional_columns(path, number, record, query):
    """A record's text (else the query without its prefix) and entities (else None), checked."""
    text, entities = record.get("text"), record.get("entities")
    if not isinstance(text, str | None):
        raise UserError(f"{path}:{number}: `text` must be a string, got {text!r}")
    if not isinstance(entities, list | None):
        raise UserError(f"{path}:{number}: `entities` must be a list, got {entities!r}")
    text = query.removeprefix(QUERY_PREFIX) if text is None else text
    kinds = {"entity": str, "type": str, "begin": int, "end": int}
    for entity in entities or []:
        if not isinstance(entity, dict) or any(not isinstance(entity.get(k), kind) for k, kind in kinds.items()):
            raise UserError(
                f"{path}:{number}: `entities` must be objects with entity, type, begin, end (two strings, two "
                f"integers); got {entity!r}"
            )
        begin, end = entity["begin"], entity["end"]
        if not 0 <= begin < end <= len(text) or text[begin:end] != entity["entity"]:
            raise UserError(
                f"{path}:{number}: the entity {entity['entity']!r} is not at [{begin}, {end}) of the text, where "
                f"{text[max(begin, 0) : end]!r} is; begin and end count characters from 0, end exclusive"
            )
    return {"text": text, "entities": entities}


def without_rehearsal(examples):
    """The examples of the task that the data are for.

    Where some examples have a `text` or `entities`, the bare ones of other instructions only keep the model from
    forgetting other tasks (process.py's rehearse.txt). A file of nothing but bare ones is all for its own task.
    """
    instructs = {example["instruct"] for example in examples if not example.get("bare")}
    return [example for example in examples if example["instruct"] in instructs] or examples


def read_inputs(path):
    """The lines of a text file that are not blank; UserError where there is none."""
    lines = [line for _, line in read_lines(path) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file holds only blank lines")
    return lines


def read_texts(path):
    """Texts to answer, as a list of dicts with `text` or `query`, and `instruct` and `answer` where given.

    The file holds plain text, one a line, or JSON lines.
    """
    lines = read_inputs(path)
    if not lines[0].lstrip().startswith("{"):
        return [{"text": line} for line in lines]
    records = []
    for number, record in read_jsonl(path):
        for key in ("query", "instruct", "answer"):
            if not isinstance(record.get(key), str | None):
                raise UserError(f"{path}:{number}: `{key}` must be a string, got {record[key]!r}")
        record |= optional_columns(path, number, record, record.get("query") or "")
        if not record["text"] and not record.get("query") and not record.get("instruct"):
            raise UserError(f"{path}:{number}: needs a `text`, a `query` or an `instruct`")
        records.append(record)
    return records


def to_example(record, instruct, query_prefix):
    """A record of read_texts in the shape of read_examples. query_prefix: what stands before the text in training."""
    query, text = record.get("query"), record["text"]
    return {
        "instruct": record.get("instruct") or instruct,
        "query": query or (query_prefix + text if text else ""),
        "answer": record.get("answer"),
        "text": text.removeprefix(query_prefix) if text == query else text,
        "entities": record.get("entities"),
    }


def task_of(facts):
    """What to ask of new texts: (labels, instruct, query prefix), the adapter's own, or with none LABELS.

    labels: None where the adapter was trained on another task than NER.
    """
    if not facts:
        return LABELS, INSTRUCT.replace("{labels}", "、".join(LABELS)), QUERY_PREFIX
    return facts.get("labels", LABELS) or None, facts["instructs"][0], facts.get("query_prefix", QUERY_PREFIX)


def query_prefix_of(records):
    """What stands before the text in every query: a new text needs the same. "" where queries have nothing in common."""
    prefixes = {r["query"].removesuffix(r["text"]) for r in records if r["query"].endswith(r["text"])}
    return prefixes.pop() if len(prefixes) == 1 else ""


# ---------------------------------------------------------------------------------------------------------------------
# answers


ParsedAnswer = namedtuple("ParsedAnswer", "entities malformed unknown_type not_in_text repeated")


def format_answer(entities):
    """The answer that states entities ({"entity", "type", "begin", "end"}): `实体_类型` lines, without repeats."""
    ordered = sorted(entities, key=lambda e: (e["begin"], -e["end"]))
    return "\n".join(dict.fromkeys(f"{e['entity']}_{e['type']}" for e in ordered)) or NO_ENTITY


def parse_answer(answer, text=None, labels=None):
    """An answer's entities and what is wrong with it.

    entities: the distinct (entity, type) pairs in order, also those of an unknown type or not in the text.
    malformed: lines that are not `实体_类型`; unknown_type and not_in_text: pairs that `labels` and `text` refute;
    repeated: pairs that come again, once for each time.
    """
    pairs, malformed = [], []
    lines = [line for line in answer.replace("\r", "").split("\n") if line.strip()]
    for line in [] if lines == [NO_ENTITY] else lines:
        entity, _, kind = line.rpartition("_")
        if entity and kind:
            pairs.append((entity, kind))
        else:
            malformed.append(line)
    repeated = [pair for i, pair in enumerate(pairs) if pair in pairs[:i]]
    pairs = list(dict.fromkeys(pairs))
    unknown = [p for p in pairs if labels is not None and p[1] not in labels]
    absent = [p for p in pairs if text is not None and p[0] not in text]
    return ParsedAnswer(pairs, malformed, unknown, absent, repeated)


def locate(text, pairs):
    """Where entities stand: [(entity, type)] -> [{"entity", "type", "spans": [[begin, end], …]}], end exclusive.

    The answer format has no offsets, so spans are every occurrence that does not lie inside an occurrence of a longer
    entity of the same answer: 北京 in 北京大学 is no place when 北京大学 is named too.
    """
    found = {entity: _occurrences(text, entity) for entity, _ in pairs}
    located = []
    for entity, kind in pairs:
        longer = [span for other, spans in found.items() if len(other) > len(entity) for span in spans]
        spans = [[b, e] for b, e in found[entity] if not any(lb <= b and e <= le for lb, le in longer)]
        located.append({"entity": entity, "type": kind, "spans": spans})
    return located


def _occurrences(text, entity):
    spans, begin = [], text.find(entity)
    while begin >= 0:
        spans.append([begin, begin + len(entity)])
        begin = text.find(entity, begin + len(entity))
    return spans


def gold_entities(example):
    """What is right for an example, in the shape of `locate`: exact offsets where known, else located by the answer."""
    if example["entities"] is None:
        return locate(example["text"], parse_answer(example["answer"]).entities)
    spans = {}
    for e in example["entities"]:
        spans.setdefault((e["entity"], e["type"]), []).append([e["begin"], e["end"]])
    return [{"entity": entity, "type": kind, "spans": sorted(s)} for (entity, kind), s in spans.items()]


def is_ner(parsed):
    """Whether most of the ParsedAnswers are entity lines; where they are not, the data are of another task than NER."""
    return 2 * sum(bool(answer.malformed) for answer in parsed) <= len(parsed)


def labels_of(examples):
    """The entity types that occur in the answers, in the order in which the instruction names them.

    None of them, [], where the answers are of another task than NER. UserError for a type named TOTAL.
    """
    parsed = [parse_answer(example["answer"]) for example in examples]
    if not is_ner(parsed):
        return []
    kinds = dict.fromkeys(kind for answer in parsed for _, kind in answer.entities)
    if TOTAL in kinds:
        line = next(f"{entity}_{kind}" for answer in parsed for entity, kind in answer.entities if kind == TOTAL)
        raise UserError(f"the answer {line!r}: metrics.json calls all entity types together {TOTAL}; rename this one")
    instruct = examples[0]["instruct"]
    return sorted(kinds, key=lambda kind: instruct.find(kind) % (len(instruct) + 1))


# ---------------------------------------------------------------------------------------------------------------------
# token ids


# Lists of int, answer_ids ends with eos; line: that of the file, for messages.
TokenizedExample = namedtuple("TokenizedExample", "prompt_ids answer_ids line", defaults=[None])


def encode_prompts(tokenizer, prompts):
    """Ids of prompts as the model is to read them: list of str -> list of list of int, each `[bos] + ids`."""
    return [[BOS, *ids] for ids in tokenizer.encode_texts(prompts)]


def encode_examples(tokenizer, examples):
    """Examples -> list of TokenizedExample. Prompt and answer are encoded separately; only the answer carries loss."""
    prompts = encode_prompts(tokenizer, [build_prompt(e["instruct"], e["query"]) for e in examples])
    answers = tokenizer.encode_texts([e["answer"] for e in examples])
    lines = [e.get("line") for e in examples]
    return [TokenizedExample(p, [*a, EOS], line) for p, a, line in zip(prompts, answers, lines, strict=True)]


def fit_length(examples, path, max_seq_length, too_long="drop"):
    """Leave out what is longer than max_seq_length (audit.py says how many): a cut answer would teach none to end.

    Returns the examples that fit; UserError when none does, or when too_long is "error" and one does not.
    """
    if too_long not in ("drop", "error"):
        raise UserError(f"--too_long={too_long}: expected drop or error")
    lengths = [len(e.prompt_ids) + len(e.answer_ids) for e in examples]
    kept = [e for e, n in zip(examples, lengths, strict=True) if n <= max_seq_length]
    dropped = len(examples) - len(kept)
    remedy = f"the longest has {max(lengths)} tokens; raise --max_seq_length"
    if dropped and too_long == "error":
        raise UserError(
            f"{path}: {dropped} of {len(examples)} examples exceed max_seq_length={max_seq_length}; {remedy}"
        )
    if not kept:
        raise UserError(f"{path}: no example fits into max_seq_length={max_seq_length}; {remedy}")
    return kept
