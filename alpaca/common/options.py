"""One option: a leaf of a nested dict, its flat name, its kind, and its value from the text of a command line."""

import difflib
import math
import re
from typing import NamedTuple

from alpaca.common.errors import ConfigError

QUOTES = str.maketrans("", "", "“”‘’")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


class Option(NamedTuple):
    path: tuple  # keys from the root of CONFIG, or of the DeepSpeed file
    default: object
    kind: str  # as shown to the user: "int", "str or None", "list of float", "auto or bool", …
    in_deepspeed: bool = False


def flatten(nested, root=()):
    """Nested dict -> {flat name: path}; ConfigError where two keys, group names included, share a flat name."""
    leaves, groups = {}, {}

    def walk(node, path):
        for key, value in node.items():
            here = (*path, str(key))
            name = "_".join(here)
            if isinstance(value, dict):
                groups[name] = here
                walk(value, here)
            elif name in leaves:
                raise ConfigError(f"{dotted(leaves[name])} and {dotted(here)} are both --{name}; rename one")
            else:
                leaves[name] = here

    walk(nested, root)
    for name in leaves.keys() & groups.keys():
        raise ConfigError(f"{dotted(leaves[name])} and {dotted(groups[name])} are both --{name}; rename one")
    return leaves


def dotted(path):
    return repr(".".join(path))


def value_at(nested, path):
    for key in path:
        nested = nested[key]
    return nested


def kind_of(default):
    if default is None:
        return "str or None"
    if isinstance(default, list):
        items = [type(item).__name__ for item in default] or ["str"]
        return "list of " + ("float" if "float" in items else items[0])
    return type(default).__name__


def closest(name, names, sentence):
    close = difflib.get_close_matches(name.lower(), list(names), n=1)
    return sentence.format(close[0]) if close else ""


def value_of(text, kind):
    """Text of an option -> value; ValueError if it is not of that kind."""
    if kind.startswith("list of "):
        text = text.translate(QUOTES).strip().replace("，", ",")  # as a Chinese keyboard types it
        items = [item.strip() for item in text.split(",")] if text else []
        if "" in items:
            raise ValueError
        return [value_of(item, kind.removeprefix("list of ")) for item in items]
    if kind.startswith("auto or "):
        return text if text == "auto" else value_of(text, kind.removeprefix("auto or "))
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    if kind in ("int", "number") and re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    if kind == "int":
        raise ValueError
    if kind in ("float", "number"):
        if "_" in text or not text.isascii() or not math.isfinite(float(text)):
            raise ValueError
        return float(text)
    return None if kind == "str or None" and text == "None" else text


def text_of(value):
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("\n", "\\n")
