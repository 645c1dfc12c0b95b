"""The entity types of a corpus: the tag it writes and the name an answer gives."""

from alpaca.common.errors import UserError
from dataset import TOTAL

DEFAULT_LABELS = ["PER:人名", "LOC:地名", "ORG:机构名"]  # the demo corpus and MSRA


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
