"""A script's CONFIG dict + its command line + a DeepSpeed file -> args, and args <-> train_args.json.

    CONFIG = {"data_name": "demo", "lora": {"r": 8}}       # --data_name=msra --lora_r=16
    def main(args): print(args.lora_r)
    if __name__ == "__main__":
        run_script(main, CONFIG, __file__)

Nested keys are joined by `_`, on the command line and as attributes. The type of the default decides the type of an
option. Where CONFIG holds `deepspeed_json_path`, the leaves of the DeepSpeed file are options as well
(`--deepspeed_optimizer_params_lr=1e-4`) and `args.deepspeed` is the merged dict. Only the standard library is imported,
and nothing here knows a device. The command line is read here rather than by argparse, whose rule for values that start
with `-` differs between Python versions and whose errors are not one line.
"""

import copy
import json
import os
import sys
from typing import NamedTuple

from alpaca.common.deepspeed_file import checked_settings, deepspeed_options, deepspeed_path
from alpaca.common.errors import ConfigError, UserError, fail, line_of
from alpaca.common.option_help import help_text
from alpaca.common.options import Option, closest, dotted, flatten, kind_of, text_of, value_at, value_of

RUNTIME_KEYS = ("local_rank",)  # set by the launcher for one run, so never saved
BARE_MEANS_TRUE = ("resume", "compile", "constrained")  # strings whose option may stand alone, as that of a bool may

# Names that people type out of habit -> the option that holds that number here.
ALIASES = {
    "lr": "deepspeed_optimizer_params_lr",
    "learning_rate": "deepspeed_optimizer_params_lr",
    "weight_decay": "deepspeed_optimizer_params_weight_decay",
    "betas": "deepspeed_optimizer_params_betas",
    "adam_beta1": "deepspeed_optimizer_params_betas",
    "adam_beta2": "deepspeed_optimizer_params_betas",
    "eps": "deepspeed_optimizer_params_eps",
    "adam_epsilon": "deepspeed_optimizer_params_eps",
    "optim": "deepspeed_optimizer_type",
    "max_grad_norm": "deepspeed_gradient_clipping",
    "gradient_clipping": "deepspeed_gradient_clipping",
    "zero_stage": "deepspeed_zero_optimization_stage",
    "fp16": "precision",
    "bf16": "precision",
    "dtype": "precision",
    "torch_dtype": "precision",
    "deepspeed_fp16_enabled": "precision",
    "deepspeed_bf16_enabled": "precision",
    "batch_size": "train_batch_size",
    "micro_batch_size": "train_batch_size",
    "per_device_train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "train_batch_size",
    "per_device_eval_batch_size": "batch_size",
    "warmup_steps": "warmup_ratio",
    "num_warmup_steps": "warmup_ratio",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "logging_steps": "log_steps",
    "output_dir": "save_dir",
    "model_name_or_path": "model_dir",
    "lora_path": "lora_model",
    "lora_rank": "lora_r",
    "cutoff_len": "max_seq_length",
    "resume_from_checkpoint": "resume",
    "deepspeed": "deepspeed_json_path",
    "deepspeed_config": "deepspeed_json_path",
    "deepspeed_jaon_path": "deepspeed_json_path",
}


# What a Chinese keyboard types in place of - and =.
DASHES, EQUALS = "-—–－−", "＝"


class Config:
    """Frozen settings: every leaf of a nested dict by its option name; `str()` lists them, one aligned line each.

    `nested` is the nested dict, `deepspeed` the merged DeepSpeed settings (None for a script without); both are copies.
    """

    def __init__(self, nested, deepspeed=None):
        leaves = flatten(nested)
        self.__dict__["_nested"] = copy.deepcopy(nested)
        self.__dict__["_deepspeed"] = copy.deepcopy(deepspeed)
        settings = flatten(deepspeed or {}, ("deepspeed",))
        self.__dict__["_values"] = {name: value_at(nested, path) for name, path in leaves.items()}
        self.__dict__["_values"] |= {name: value_at(deepspeed, path[1:]) for name, path in settings.items()}

    @property
    def nested(self):
        return copy.deepcopy(self._nested)

    @property
    def deepspeed(self):
        return copy.deepcopy(self._deepspeed)

    def _unknown(self, name):
        return f"no setting {name!r}" + closest(name, self._values, ", did you mean {!r}?")

    def __getattr__(self, name):
        # copy and pickle probe underscore names on an object whose __dict__ is still empty
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(self._unknown(name))
        return copy.deepcopy(self._values[name])

    def __setattr__(self, name, value):
        raise AttributeError("settings are frozen")

    def __delattr__(self, name):
        raise AttributeError("settings are frozen")

    def __eq__(self, other):
        same = isinstance(other, Config)
        return same and (self._nested, self._deepspeed) == (other._nested, other._deepspeed)

    __hash__ = None

    def __str__(self):
        width = max(map(len, self._values), default=0)
        return "\n".join(f"{name:<{width}}  {text_of(value)}" for name, value in self._values.items())

    def __repr__(self):
        return f"Config({self._nested!r}, deepspeed={self._deepspeed!r})"


def parse_config(config, file, argv=None):
    """CONFIG of the script `file` + command line (default sys.argv[1:]) -> Config; `config` is not changed.

    Bad input prints one line on stderr and exits with 2, `--help` prints and exits with 0. Two keys with one flat name
    are a ConfigError (a ValueError), since the script itself is wrong then.
    """
    options = options_of(config)
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        settings, path = None, None
        if "deepspeed_json_path" in options:
            early = _read_options(argv, options, only=("data_name", "deepspeed_json_path"))
            path = deepspeed_path({name: option.default for name, option in options.items()} | early, file)
            settings = _read_json(path, "repair it, or name another with --deepspeed_json_path")
            options |= deepspeed_options(settings, path, options)
        if "--help" in argv or "-h" in argv:
            print(help_text(config, file, options, path))
            raise SystemExit(0)
        config, settings = copy.deepcopy(config), copy.deepcopy(settings)
        for name, value in _read_options(argv, options).items():
            *groups, key = options[name].path
            value_at(settings if options[name].in_deepspeed else config, groups)[key] = value
        if settings is None:
            return Config(config)
        args = Config(config, checked_settings(settings, Config(config), path))
    except UserError as error:
        fail(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"DeepSpeed 配置: {path}", file=sys.stderr)
    return args


def run_script(main, config, file, argv=None):
    """Parse, call `main(args)`, and end bad input in one line and exit code 2, Ctrl-C in exit code 130.

    So does a path that cannot be read or written, and a full disk; a reader of the output that has gone, as `head`, ends
    it in exit code 1.
    """
    try:
        try:
            main(parse_config(config, file, argv))
        finally:
            sys.stdout.flush()  # here rather than at exit
    except UserError as error:
        fail(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where what is left goes at exit
        raise SystemExit(1) from None
    except OSError as error:
        if (line := line_of(error)) is None:
            raise
        fail(line)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def save_config(args, path, deepspeed=None, **facts):
    """Write {"config": nested CONFIG without runtime keys, "deepspeed": settings if any, **facts} as JSON.

    `deepspeed`: the settings as they were run, where the device filled in more than args.deepspeed knows.
    """
    saved = {"config": {key: value for key, value in args.nested.items() if key not in RUNTIME_KEYS}}
    deepspeed = args.deepspeed if deepspeed is None else deepspeed
    if deepspeed is not None:
        saved["deepspeed"] = deepspeed
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**saved, **facts}, file, ensure_ascii=False, indent=2)
        file.write("\n")


def load_config(path):
    """What save_config wrote -> (Config, facts dict)."""
    remedy = "train an adapter first, e.g. `deepspeed train_trainer.py`"
    saved = _read_json(path, remedy)
    config, deepspeed = saved.pop("config", None), saved.pop("deepspeed", None)
    if config is None and saved.keys() & {"lora_r", "data_name", "deepspeed_jaon_path", "deepspeed_json_path"}:
        raise UserError(
            f"{path}: an adapter of the original scripts, whose prompt put bos between prompt and answer; its answers "
            "would be wrong with this prompt, so it must be retrained: `deepspeed train_trainer.py`"
        )
    if not isinstance(config, dict) or not isinstance(deepspeed, dict | None):
        raise UserError(f'{path}: no "config" of a training run in it; {remedy}')
    return Config(config, deepspeed), saved


def options_of(config):
    options = {}
    for name, path in flatten(config).items():
        default = value_at(config, path)
        if not isinstance(default, bool | int | float | str | list | None):
            raise ConfigError(f"CONFIG key {dotted(path)}: a {type(default).__name__} cannot be an option")
        if hasattr(Config, name) or name.startswith("_"):
            raise ConfigError(f"CONFIG key {dotted(path)}: --{name} is reserved; choose another name")
        options[name] = Option(path, default, kind_of(default))
    return options


class Argument(NamedTuple):
    """One option of a command line."""

    token: str  # as typed, without its value where that was a word of its own
    name: str
    text: str | None  # its value; None: it stands alone


def _arguments(argv):
    """Yield the Arguments of a command line: --name=value, --name value, or --name alone."""
    rest = list(reversed(argv))
    while rest:
        token = _typed_in_chinese(rest.pop())
        name, has_value, text = token.removeprefix("--").partition("=")
        if not has_value:
            value_follows = token.startswith("-") and rest and not rest[-1].startswith("-")
            text = rest.pop() if value_follows else None
        yield Argument(token, name, text)


def _read_options(argv, options, only=None):
    """Command line -> {option name: value}, the last of a name wins; `only`: leave all other options for later."""
    values = {}
    for token, name, text in _arguments(argv):
        if only is not None and name not in only:
            continue
        if name in RUNTIME_KEYS and name not in options and (text or "").removeprefix("-").isdigit():
            continue  # the launcher gives it to every command; the process group knows its rank from the environment
        if not token.startswith("--") or name not in options:
            raise UserError(unknown_option(token, options))
        values[name] = _option_value(name, options[name], text)
    return values


def _option_value(name, option, text):
    """The value of an option from its text, None where it stands alone; UserError where that is no value of its kind."""
    if text is None and option.kind != "bool" and name not in BARE_MEANS_TRUE:
        raise UserError(f"--{name}: expected a value; one that starts with - needs the =: --{name}=-…")
    try:
        return value_of("True" if text is None else text, option.kind)
    except ValueError:
        kind = option.kind.replace("bool", "bool (True or False)")
        raise UserError(f"--{name}: expected {kind}, got {text!r}") from None


def _typed_in_chinese(token):
    """An argument with its leading dashes and its first = as ASCII: ——data_name＝msra is --data_name=msra."""
    start = token[: len(token) - len(token.lstrip(DASHES))]
    if not start or start.strip("-") == "" and EQUALS not in token:
        return token
    name, equals, value = token[len(start) :].partition(EQUALS)
    return "--" + (f"{name}={value}" if equals and "=" not in name else token[len(start) :])


def unknown_option(token, options):
    if not token.startswith("-"):
        return f"unexpected argument {token!r}; options are written --name=value"
    typed = token.partition("=")[0]
    name = typed.lstrip("-").replace("-", "_")
    alias = ALIASES.get(name)
    if alias in options:
        return f"unknown option {typed}; here it is --{alias}" + _home(options[alias])
    if name in options:
        return f"unknown option {typed}, did you mean --{name}?"
    return f"unknown option {typed}" + (closest(name, options, ", did you mean --{}?") or "; --help lists the options")


def _home(option):
    return f", {text_of(option.default)} in the DeepSpeed file" if option.in_deepspeed else ""


def _read_json(path, remedy):
    """JSON object of a file; UserError naming file, line and column."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows editors write a byte order mark
            value = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; {remedy}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, brackets a thousand deep; NUL in the path
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(value).__name__}; {remedy}")
    return value
