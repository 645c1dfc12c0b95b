"""JSON with a list of characters (or words) and a list of tags: {"text": ["梁", "来"], "labels": ["B-PER", "O"]}.

The keys of either list vary (TOKENS, TAGS); the text may also be a string with a tag for each character.
"""

from alpaca.common.errors import UserError
from alpaca.corpora.records import read_sentences
from alpaca.corpora.tagged_columns import TAG, join_tokens

TOKENS = ("tokens", "text", "words", "chars", "sentence")
TAGS = ("ner_tags", "labels", "tags", "label")


def _lists(record):
    """(tokens, tags) of a record, None where it has no such lists."""
    tags = next((record[key] for key in TAGS if isinstance(record.get(key), list)), None)
    tokens = next((record[key] for key in TOKENS if isinstance(record.get(key), list)), None)
    if tokens is None and tags and all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in tags):
        tokens = next((list(record[key]) for key in TOKENS if isinstance(record.get(key), str)), None)
    return None if tokens is None or tags is None else (tokens, tags)


def is_characters(head):
    """Whether tokens and tags are lists; a list of spans beside a string is another format."""
    found = [_lists(record) for record in head.records if isinstance(record, dict)]
    return any(lists and all(isinstance(tag, str | int) for tag in lists[1]) for lists in found)


def read_characters(path, problems):
    """Yield each Sentence."""
    yield from read_sentences(path, problems, _sentence)


def _sentence(path, line, record, problems):
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
