"""JSON-lines corpora: one sentence with its entities a line, as the demo, MSRA and CLUENER have them."""

from alpaca.common.errors import UserError
from alpaca.corpora.records import read_records
from alpaca.corpora.sentences import Mark, Sentence

COLUMNS = ("instruct", "query", "answer")
NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
SEE = "process.py --help shows the format"


def read_json_sentences(path, ends="exclusive"):
    """Yield each Sentence of JSON lines, or of an array of such objects. ends: inclusive where an entity_list's end is the last character."""
    behind = int(ends == "inclusive")
    for number, record in read_records(path):
        place = f"{path}:{number}"
        try:
            text = _checked(_checked(record, dict, "a record", place)["text"], str, "text", place)
            if "label" in record and "entity_list" not in record:
                marks = _marks_of_cluener(record["label"], place)
            else:
                marks = _marks(record["entity_list"], behind, place)
        except KeyError as error:
            if record.keys() >= set(COLUMNS):
                raise UserError(
                    f"{path}:{number}: this is instruction data already; put it to data/<data_name>/instruct_data/ and "
                    "look at it with --audit_only"
                ) from None
            if record.keys() >= {"prediction", "entities"}:
                raise UserError(
                    f"{place}: this is a row of predict.py or test.py; make it a file to correct: process.py --export=doccano "
                    f"--predictions={path}, and read that"
                ) from None
            raise UserError(
                f"{place}: no key {error} (there are {', '.join(map(repr, record)) or 'none'}); {SEE}"
            ) from None
        yield Sentence(number, text, [Mark(*mark, number) for mark in marks])


def _marks(entities, behind, place):
    """(begin, end, type, entity) of each object in an entity_list; `behind` is added to its ends."""
    marks = []
    for item in _checked(entities, list, "entity_list", place):
        item = _checked(item, dict, "an entity of entity_list", place)
        index = _checked(item["entity_index"], dict, "entity_index", place)
        begin, end = (_checked(index[key], int, key, place) for key in ("begin", "end"))
        tag, entity = (_checked(item[key], str, key, place) for key in ("entity_type", "entity"))
        marks.append((begin, end + behind, tag, entity))
    return marks


def _marks_of_cluener(label, place):
    """The same of CLUENER's {type: {entity: [[begin, last character], …]}}."""
    marks = []
    for tag, names in _checked(label, dict, "label", place).items():
        for entity, spans in _checked(names, dict, tag, place).items():
            for span in _checked(spans, list, entity, place):
                if not isinstance(span, list) or [type(number) for number in span] != [int, int]:
                    raise UserError(f"{place}: {entity!r} must be at [begin, end], got {span!r}; {SEE}")
                marks.append((span[0], span[1] + 1, tag, entity))
    return marks


def _checked(value, kind, key, place):
    """The value, which must be of that type."""
    if type(value) is not kind:
        raise UserError(f"{place}: {key} must be {NAMES[kind]}, got {str(value)[:40]!r}; {SEE}")
    return value
