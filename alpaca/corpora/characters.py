"""JSON with a list of characters (or words) and a list of tags: {"text": ["梁", "来"], "labels": ["B-PER", "O"]}.

The keys of either list vary (TOKENS, TAGS); the text may also be a string with a tag for each character. W2NER's files
name the places of an entity's tokens instead, so that entities may nest:

{"sentence": ["梁", "来"], "ner": [{"index": [0], "type": "PER"}]}
"""

from alpaca.common.errors import UserError
from alpaca.corpora.records import checked_mark, read_sentences
from alpaca.corpora.sentences import Sentence
from alpaca.corpora.tagged_columns import TAG, join_tokens, needs_blank

TOKENS = ("tokens", "text", "words", "chars", "sentence")
TAGS = ("ner_tags", "labels", "tags", "label")


def _lists(record):
    """(tokens, tags) of a record, None where it has no such lists."""
    tags = next((record[key] for key in TAGS if isinstance(record.get(key), list)), None)
    tokens = next((record[key] for key in TOKENS if isinstance(record.get(key), list)), None)
    if tokens is None and tags and all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in tags):
        tokens = next((list(record[key]) for key in TOKENS if isinstance(record.get(key), str)), None)
    return None if tokens is None or tags is None else (tokens, tags)


def _has_places(record):
    ner, tokens = record.get("ner"), record.get("sentence")
    return isinstance(tokens, list) and isinstance(ner, list) and all(isinstance(e, dict) and "index" in e for e in ner)


def is_characters(head):
    """Whether tokens and tags are lists; a list of spans beside a string is another format."""
    if any(isinstance(record, dict) and _has_places(record) for record in head.records):
        return True
    found = [_lists(record) for record in head.records if isinstance(record, dict)]
    return any(lists and all(isinstance(tag, str | int) for tag in lists[1]) for lists in found)


def read_characters(path, problems):
    """Yield each Sentence."""
    yield from read_sentences(path, problems, _sentence)


def _sentence(path, line, record, problems):
    if _has_places(record):
        return _sentence_of_places(path, line, record, problems)
    lists = _lists(record)
    if lists is None:
        raise UserError(f"{path}:{line}: expected a list of characters and a list of tags, such as tokens and ner_tags")
    tokens, tags = lists
    if len(tokens) != len(tags):
        raise UserError(f"{path}:{line}: {len(tokens)} characters, but {len(tags)} tags; correct the line")
    for token, tag in zip(tokens, tags, strict=True):
        if type(tag) is int:
            raise UserError(f"{path}:{line}: the tags are numbers; write their names (O, B-PER, …) in their place")
        if not isinstance(token, str) or not isinstance(tag, str) or not TAG.fullmatch(tag):
            raise UserError(
                f"{path}:{line}: expected a character and O or B-, I-, M-, E- or S- and a type, got {token!r}, {tag!r}"
            )
    if not tokens:
        problems.add("empty", path, line, "''")
        return None
    return join_tokens([(line, token, tag) for token, tag in zip(tokens, tags, strict=True)], path, problems)


def _sentence_of_places(path, line, record, problems):
    tokens, text, starts, marks = record["sentence"], "", [], []
    for before, token in zip(["", *tokens], tokens, strict=False):
        if not isinstance(token, str):
            raise UserError(f"{path}:{line}: the tokens must be strings, got {token!r}")
        if needs_blank(before, token):
            text += " "
            problems["blank"] += 1
        starts.append(len(text))
        text += token
    for entity in record["ner"]:
        places = entity["index"]
        if places != list(range(places[0], places[0] + len(places))):
            problems.add("discontinuous", path, line, f"{entity.get('type')} {places}")
            continue
        if not 0 <= places[0] <= places[-1] < len(tokens):
            raise UserError(f"{path}:{line}: there is no token {places[-1]}, the sentence has {len(tokens)}")
        end = starts[places[-1]] + len(tokens[places[-1]])
        marks.append(checked_mark(path, line, text, starts[places[0]], end, entity["type"]))
    return Sentence(line, text, marks)
