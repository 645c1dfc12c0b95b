"""--help of a command: its docstring, and a line for each option with the comment beside it in CONFIG."""

import ast
import io
import tokenize

from alpaca.common.options import text_of


def help_text(config, file, options, path):
    """Module docstring of the script, then a line for each option: name, kind, trailing comment, default."""
    doc, comments = source_of(file)
    lines = [doc, ""] if doc else []
    settings = {name: option for name, option in options.items() if option.in_deepspeed}
    lines += _help_lines({name: option for name, option in options.items() if name not in settings}, comments)
    if settings:
        lines += ["", f"DeepSpeed settings, from {path}:", *_help_lines(settings, {})]
    return "\n".join(lines)


def _help_lines(options, comments):
    width = max((len(name) for name in options), default=0)
    kinds = max((len(option.kind) for option in options.values()), default=0)
    for name, option in options.items():
        comment = comments.get(option.path, "")
        start = f"  --{name:<{width}}  {option.kind:<{kinds}}  "
        yield f"{start}{comment}{' ' if comment else ''}[{text_of(option.default)}]"


def source_of(file):
    """Docstring of a script and {path of a CONFIG key: its trailing comment}; nothing where there is no source."""
    try:
        with tokenize.open(file) as source:
            text = source.read()
        tree = ast.parse(text)
    except (OSError, SyntaxError):
        return "", {}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    notes = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    comments = {}

    def walk(node, path):
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):
                continue
            here = (*path, str(key.value))
            if isinstance(value, ast.Dict):
                walk(value, here)
            else:
                comments[here] = notes.get(value.end_lineno) or notes.get(key.lineno, "")

    for node in tree.body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if "CONFIG" in names and isinstance(node.value, ast.Dict):
            walk(node.value, ())
    return ast.get_docstring(tree) or "", comments
