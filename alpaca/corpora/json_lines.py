"""JSON-lines corpora: one sentence with its entities a line, as the demo, MSRA and CLUENER have them."""

from alpaca.common.errors import UserError
from alpaca.corpora.records import read_records
from alpaca.corpora.sentences import Mark, Sentence

COLUMNS = ("instruct", "query", "answer")


def read_json_sentences(path, ends="exclusive"):
    """Yield each Sentence of JSON lines, or of an array of such objects. ends: inclusive where an entity_list's end is the last character."""
    behind = int(ends == "inclusive")
    for number, record in read_records(path):
        try:
            text = record["text"]
            if "label" in record and "entity_list" not in record:  # CLUENER's
                found = [(span, tag, e) for tag, spans in record["label"].items() for e in spans for span in spans[e]]
                places = [(begin, end + 1) for (begin, end), _, _ in found]
                names = [(tag, entity) for _, tag, entity in found]
            else:
                places = [
                    (e["entity_index"]["begin"], e["entity_index"]["end"] + behind) for e in record["entity_list"]
                ]
                names = [(e["entity_type"], e["entity"]) for e in record["entity_list"]]
        except KeyError as error:
            if record.keys() >= set(COLUMNS):
                raise UserError(
                    f"{path}:{number}: this is instruction data already; put it to data/<data_name>/instruct_data/ and "
                    "look at it with --audit_only"
                ) from None
            raise UserError(
                f"{path}:{number}: no key {error} (there are {', '.join(map(repr, record)) or 'none'}); "
                "process.py --help shows the format"
            ) from None
        except (TypeError, AttributeError, ValueError):
            raise UserError(f"{path}:{number}: wrong nesting; process.py --help shows the format") from None
        strings = [text, *(part for pair in names for part in pair)]
        if {type(part) for part in strings} != {str} or {type(part) for pair in places for part in pair} - {int}:
            raise UserError(f"{path}:{number}: begin and end must be integers, all else strings; see process.py --help")
        yield Sentence(number, text, [Mark(*place, *name, number) for place, name in zip(places, names, strict=True)])
