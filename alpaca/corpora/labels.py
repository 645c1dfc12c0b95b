"""The entity types of a corpus: the tag it writes and the name an answer gives."""

import re
import shlex

from alpaca.common.errors import UserError
from alpaca.common.options import value_of
from dataset import unusable_label

DEFAULT_LABELS = ["PER:人名", "LOC:地名", "ORG:机构名"]  # the demo corpus and MSRA
SHELL_SAFE = re.compile(r"[\w:,.@%+=/-]+")  # what no shell takes for more than a character


def read_labels(labels):
    """["PER:人名", "GPE:", …] -> {"PER": "人名", "GPE": None, …}; None: entities of that type are left out."""
    names = {}
    for label in labels:
        label = label.replace("：", ":")  # as a Chinese keyboard types it
        tag, colon, name = (part.strip() for part in label.rpartition(":"))  # a tag may hold a :
        if not tag or not colon:
            raise UserError(f"--labels: expected TAG:name, got {label!r}; e.g. --labels=PER:人名,LOC:地名")
        if "_" in name:
            raise UserError(f"--labels: {name!r} contains _, which parts entity and type in an answer; rename it")
        if reason := unusable_label(name):
            raise UserError(f"--labels: {reason}; rename {label!r}")
        if names.setdefault(tag, name or None) != (name or None):
            raise UserError(f"--labels: {tag!r} is named twice, {names[tag]!r} and {name!r}; leave one out")
    if not any(names.values()):
        raise UserError("--labels: at least one TAG:name is needed, e.g. --labels=PER:人名")
    return names


def can_be_named(tag):
    """Whether the option --labels can hold a type as the corpus writes it: without a comma, a full-width colon, …"""
    try:
        return read_labels(value_of(f"{tag}:x", "list of str")) == {tag: "x"}
    except (UserError, ValueError):
        return False


def refuse_unknown_types(labels, unknown, used):
    """UserError that names every entity type without a name, with the option to copy.

    labels: as read_labels gives them; unknown: {tag: where it stands first}; used: the tags of `labels` that occur.
    """
    if not unknown:
        return
    for tag, place in unknown.items():
        if not can_be_named(tag):
            raise UserError(f"{place}: --labels cannot name the entity type {tag!r}; rename it in the corpus")
    places = ", ".join(f"{tag!r} ({place})" for tag, place in unknown.items())
    known = [f"{tag}:{name or ''}" for tag, name in labels.items() if tag in used]
    option = "--labels=" + ",".join([*known, *(f"{tag}:{tag.replace('_', '-').replace(':', '-')}" for tag in unknown)])
    raise UserError(
        f"unknown entity types, each with its first place: {places}; name them, or leave one out with an empty name "
        f"as in {next(iter(unknown))}: {option if SHELL_SAFE.fullmatch(option) else shlex.quote(option)}"
    )
