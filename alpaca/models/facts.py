"""train_args.json: how an adapter was trained, and what it must be asked. It goes with a model the adapter is merged into."""

from alpaca.common.errors import UserError
from alpaca.models.templates import NAMES
from config_utils import load_config
from dataset import INSTRUCT

TRAIN_ARGS = "train_args.json"
NUMBERED = "a whole number, 0 or more"
# key -> (what it must be, whether a value is that); the training's facts first, then its settings
FACTS = {
    "prompt_sha256": ("a string", lambda value: isinstance(value, str)),
    "tokenizer_sha256": ("a string", lambda value: isinstance(value, str)),
    "instructs": ("a list of instructions", lambda value: bool(value) and _all_text(value)),
    "labels": ("a list of entity types, or null", lambda value: value is None or _all_text(value)),
    "query_prefix": ("a string", lambda value: isinstance(value, str)),
    "text_tokens": (
        NUMBERED,
        lambda value: type(value) is int and value >= 0,
    ),  # 0: every text is empty, the question stands in the instruction
    "template": (f"one of {', '.join(NAMES)}", lambda value: value in NAMES),
}
OPTIONAL = ("labels", "query_prefix", "text_tokens", "template")  # adapters of earlier versions have none
# the option that names a column -> the name that process.py gives it
COLUMN_OPTIONS = {"instruct_column": "instruct", "query_column": "query", "response_column": "answer"}
SETTINGS = {
    **dict.fromkeys(("model_dir", *COLUMN_OPTIONS), str),
    "max_seq_length": int,
}


def _all_text(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def read_facts(folder):
    """(the training's Config, its facts as a dict) of an adapter's or a merged model's folder.

    None, {} where it has no train_args.json; UserError where a key is missing or of another type.
    """
    path = folder / TRAIN_ARGS
    if not path.is_file():
        return None, {}
    train_args, facts = load_config(path)
    for key, (kind, fits) in FACTS.items():
        if key not in facts and key in OPTIONAL:
            continue
        if key not in facts or not fits(facts[key]):
            raise UserError(
                f'{path}: "{key}" must be {kind}, got {facts.get(key)!r}; get the file again, or train again'
            )
    for key, kind in SETTINGS.items():
        value = getattr(train_args, key, None)
        if type(value) is not kind:
            raise UserError(
                f'{path}: "config" has no {key} of type {kind.__name__}; get the file again, or train again'
            )
    return train_args, facts


def columns_of(args, train_args):
    """{instruct_column, query_column, response_column: its name}: what args say, else as in training, else process.py's."""
    own = {key: getattr(train_args, key) if train_args else name for key, name in COLUMN_OPTIONS.items()}
    return {key: getattr(args, key) or name for key, name in own.items()}


def template_of(facts, asked):
    """`--template` and an adapter's facts ({}: it has none) -> the name of its template, or auto. UserError for another."""
    own = facts.get("template", "alpaca") if "prompt_sha256" in facts else asked
    if asked not in ("auto", own):
        raise UserError(f"--template={asked}: the adapter was trained with {own}; leave --template out")
    return own


def with_task(adapter, facts, instruct, labels):
    """The facts with what --instruct and --labels say instead; an adapter of another tool has no other facts.

    instruct: the instruction; a typed \\n in it is a line feed, {labels} the types. labels: entity types, joined by
    commas; none: the answers are no entities.
    """
    if labels is not None:
        names = [name.strip() for name in labels.split(",") if name.strip()]
        facts = {**facts, "labels": None if labels == "none" else names}
        if names and not adapter and not facts.get("instructs"):  # the base alone
            instruct = instruct or INSTRUCT
    if instruct is not None:
        instruct = instruct.replace("\\n", "\n").replace("{labels}", "、".join(facts.get("labels") or ()))
        facts = {"labels": None, **facts, "instructs": [instruct]}
    if adapter and not facts.get("instructs"):
        raise UserError(
            f"{adapter}: has no {TRAIN_ARGS}, for another tool made it; say what it was trained to be asked, with "
            "--instruct=…, and --labels=人名,地名 where it names entities"
        )
    return facts
