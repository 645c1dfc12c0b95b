"""Records -> examples, and answers <-> entities: what instruct data say.

An answer is written and parsed here and nowhere else, so training, testing, predicting and chatting cannot disagree about
it. Nothing here knows a model or reads the command line; prompts and ids are made in alpaca/models/templates.py.
"""

from pathlib import Path
from typing import NamedTuple

from alpaca.common.errors import UserError
from alpaca.common.text_files import keep_or_raise, read_jsonl

QUERY_PREFIX = "文本："
NO_ENTITY = "没有"
# What predictions.jsonl says itself; a key of an input that has one of these names is not kept.
ROW_KEYS = (
    *("text", "answer", "prediction", "entities", "gold", "problems", "log_probability", "margin"),
    *("confidence", "calibrated"),
)
REHEARSAL = "rehearsal"  # the `task` of rows of instruct data that belong to another task
INSTRUCT = (  # {labels}: the names of the types, joined by 、
    "你现在是一个实体识别模型，你需要提取文本里面的{labels}，如果存在结果，返回'实体_实体类型'，"
    "不同实体间用\n分隔。如果没有结果，回答'没有'。"
)
LABELS = ["人名", "地名", "机构名"]  # what the base alone is asked for
TOTAL = "micro"  # all types together, as metrics.json names them beside the types: the name of none


# ---------------------------------------------------------------------------------------------------------------------
# records


def read_examples(path, instruct_column="instruct", query_column="query", response_column="answer", malformed=None):
    """Instruct data as a list of {"instruct", "query", "answer", "text", "entities", "task", "line"}; entities may be None.

    Only the three columns are required. `text` falls back to the query without its prefix. `task`: "rehearsal" where the
    row says so, "ner" where it has a text or entities of its own, else None. `malformed`: as in text_files.read_lines.
    """
    columns = {"instruct": instruct_column, "query": query_column, "answer": response_column}
    if not Path(path).exists() and Path(path).parent.name == "instruct_data":
        name = Path(path).absolute().parent.parent.name
        raise UserError(f"{path}: no such file; make it with `python process.py --data_name={name}`")
    examples = []
    for number, record in read_jsonl(path, malformed):
        try:
            example = _three_columns(f"{path}:{number}", record, columns)
            example |= optional_columns(f"{path}:{number}", record, example["query"])
        except UserError as error:
            keep_or_raise(str(error), malformed)
        else:
            stated = "ner" if record.get("text") is not None or record.get("entities") is not None else None
            task = REHEARSAL if record.get("task") == REHEARSAL else stated
            examples.append({**example, "task": task, "line": number})
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


def optional_columns(where, record, query):
    """A record's text (else the query without its prefix) and entities (else None), checked. where: file and line."""
    text, entities = record.get("text"), record.get("entities")
    if not isinstance(text, str | None):
        raise UserError(f"{where}: `text` must be a string, got {text!r}")
    if not isinstance(entities, list | None):
        raise UserError(f"{where}: `entities` must be a list, got {entities!r}")
    text = query.removeprefix(QUERY_PREFIX) if text is None else text
    kinds = {"entity": str, "type": str, "begin": int, "end": int}
    for entity in entities or []:
        if not isinstance(entity, dict) or any(not isinstance(entity.get(k), kind) for k, kind in kinds.items()):
            raise UserError(
                f"{where}: `entities` must be objects with entity, type, begin, end (two strings, two "
                f"integers); got {entity!r}"
            )
        begin, end = entity["begin"], entity["end"]
        if not 0 <= begin < end <= len(text) or text[begin:end] != entity["entity"]:
            raise UserError(
                f"{where}: the entity {entity['entity']!r} is not at [{begin}, {end}) of the text, where "
                f"{text[max(begin, 0) : end]!r} is; begin and end count characters from 0, end exclusive"
            )
    return {"text": text, "entities": entities}


def without_rehearsal(examples):
    """The examples of the task that the data are for, without those that only keep a model from forgetting other tasks.

    These are the rows with "task": "rehearsal". In older files, which have no such key, rows that have neither `text` nor
    `entities` count as rehearsal where other rows do and the instruction is another.
    """
    own = [example for example in examples if example.get("task") != REHEARSAL]
    instructs = {example["instruct"] for example in own if example.get("task") == "ner"}
    return [example for example in own if example["instruct"] in instructs] or own or examples


def example_of_input(record, instruct, query_prefix):
    """A record of corpora/inputs.py's read_texts in the shape of read_examples, with two keys more: `asks` and `own`.

    query_prefix: what stands before the text in training. asks: False for a blank row, which is not put to the model.
    own: what the record holds besides, which stands in its row of predictions.jsonl, too.
    """
    query, text = record.get("query"), record["text"]
    return {
        "instruct": record.get("instruct") or instruct,
        "query": query or (query_prefix + text if text else ""),
        "answer": record.get("answer"),
        "text": text.removeprefix(query_prefix) if text == query else text,
        "entities": record.get("entities"),
        "asks": any((record.get(key) or "").strip() for key in ("query", "text", "instruct")),
        "own": {key: value for key, value in record.items() if key not in ROW_KEYS},
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


class ParsedAnswer(NamedTuple):
    """An answer's entities and what is wrong with it. A pair is (entity, type)."""

    entities: list  # the distinct pairs in order, also those of an unknown type or not in the text
    malformed: list  # lines that are not 实体_类型
    unknown_type: list  # pairs whose type is none of the labels
    not_in_text: list  # pairs whose entity does not occur in the text
    repeated: list  # pairs that come again, once for each time


def format_answer(entities):
    """The answer that states entities ({"entity", "type", "begin", "end"}): `实体_类型` lines, without repeats."""
    ordered = sorted(entities, key=lambda e: (e["begin"], -e["end"]))
    return "\n".join(dict.fromkeys(f"{e['entity']}_{e['type']}" for e in ordered)) or NO_ENTITY


def parse_answer(answer, text=None, labels=None):
    """An answer -> ParsedAnswer; without `labels` no type is unknown, without `text` no entity is missing in it."""
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


def locate(text, pairs, nested=False):
    """Where entities stand: [(entity, type)] -> [{"entity", "type", "spans": [[begin, end], …]}], end exclusive.

    The answer format has no offsets, so spans are every occurrence. Unless the corpus nests, those that lie inside an
    occurrence of a longer entity of the same answer are left out: 北京 in 北京大学 is no place when 北京大学 is named too.
    """
    inside = {} if nested else _inside_longer(text, {entity for entity, _ in pairs})
    return [
        {"entity": e, "type": kind, "spans": [span for span in _occurrences(text, e) if span not in inside.get(e, ())]}
        for e, kind in pairs
    ]


def _inside_longer(text, names):
    """{entity: those of its occurrences in the text that lie inside an occurrence of a longer one of `names`}."""
    found = {name: _occurrences(text, name) for name in names}
    inside = {}
    for name, spans in found.items():
        longer = [span for other, places in found.items() if len(other) > len(name) for span in places]
        inside[name] = [[b, e] for b, e in spans if any(first <= b and e <= last for first, last in longer)]
    return inside


def nests(examples):
    """Whether the corpus marks entities inside longer ones (so that `locate` is to find them there, too).

    Of the places where an entity of a sentence lies inside a longer one of it, most are marked. A few may be mistakes.
    """
    places = marked = 0
    for example in examples:
        entities = example.get("entities") or []
        spans = {(e["begin"], e["end"]) for e in entities}
        for inside in _inside_longer(example["text"], {e["entity"] for e in entities}).values() if entities else ():
            places += len(inside)
            marked += sum((begin, end) in spans for begin, end in inside)
    return 2 * marked > places


def _occurrences(text, entity):
    spans, begin = [], text.find(entity)
    while begin >= 0:
        spans.append([begin, begin + len(entity)])
        begin = text.find(entity, begin + len(entity))
    return spans


def gold_entities(example, nested=False):
    """What is right for an example, in the shape of `locate`: exact offsets where known, else located by the answer."""
    if example["entities"] is None:
        return locate(example["text"], parse_answer(example["answer"]).entities, nested)
    spans = {}
    for e in example["entities"]:
        spans.setdefault((e["entity"], e["type"]), []).append([e["begin"], e["end"]])
    return [{"entity": entity, "type": kind, "spans": sorted(s)} for (entity, kind), s in spans.items()]


def is_ner(parsed):
    """Whether most of the ParsedAnswers are entity lines; where they are not, the data are of another task than NER."""
    return 2 * sum(bool(answer.malformed) for answer in parsed) <= len(parsed)


def unusable_label(name):
    """Why an entity type cannot have this name; None where it can."""
    if name == TOTAL:
        return f"metrics.json calls all entity types together {TOTAL}"
    if "▁" in name:
        return "▁ (U+2581) is a space to the tokenizer, so that no answer can hold it"
    return None


def labels_of(examples):
    """The entity types that occur in the answers, in the order in which the instruction names them.

    None of them, [], where the answers are of another task than NER. UserError for a type that cannot be used.
    """
    parsed = [parse_answer(example["answer"]) for example in examples]
    if not is_ner(parsed):
        return []
    kinds = dict.fromkeys(kind for answer in parsed for _, kind in answer.entities)
    for kind in kinds:
        if reason := unusable_label(kind):
            line = next(f"{entity}_{kind}" for answer in parsed for entity, other in answer.entities if other == kind)
            raise UserError(f"the answer {line!r}: {reason}; rename this type")
    instruct = examples[0]["instruct"]
    return sorted(kinds, key=lambda kind: instruct.find(kind) % (len(instruct) + 1))


# ---------------------------------------------------------------------------------------------------------------------
# lengths


def fit_length(examples, path, max_seq_length, too_long="drop", needed=True, otherwise=""):
    """Leave out what is longer than max_seq_length (audit.py says how many): a cut answer would teach none to end.

    Returns the examples that fit; UserError when too_long is "error" and one does not, or when none does and one is
    needed. otherwise: what can be done then, besides raising max_seq_length.
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
    if needed and not kept:
        raise UserError(f"{path}: no example fits into max_seq_length={max_seq_length}; {remedy}{otherwise}")
    return kept
