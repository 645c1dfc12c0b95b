"""Which adapter a command takes."""

from pathlib import Path

from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.common.folders import hint_below, hint_of_folders, no_folder
from alpaca.models.facts import read_facts

DEFAULT_BASE = "./model_hub/chinese-alpaca-tiny"  # the trainers' default model_dir
TRAINERS = ("train_trainer", "train_deepspeed")


def find_adapter(data_name, lora_model, base_model=None):
    """`--lora_model` and `--base_model` -> (the adapter's folder, the training's Config, the facts beside it).

    `auto`: the adapter of data_name that was written last, else the shipped one. The base alone: (None, None, {}), or
    what stands beside a base that an adapter was merged into. An adapter that another tool wrote: (its folder, None, {}).
    """
    if lora_model in (None, "none", "None"):
        return None, *read_facts(Path(base_model or DEFAULT_BASE))
    folder = _adapter_folder(data_name, lora_model)
    return folder, *read_facts(folder)


def _adapter_folder(data_name, lora_model):
    if lora_model != "auto":
        folder = adapter_or_old(Path(lora_model).resolve())
        if folder is None:
            if Path(lora_model).is_file():
                raise UserError(f"{lora_model}: {no_folder(lora_model)}")
            other = f"{hint_of_folders(lora_model)}; train one or name another"
            remedy = hint_below("adapter_config.json", lora_model) or other
            raise UserError(f"{lora_model}: no adapter here (adapter_config.json is missing){remedy}")
        return folder
    root = Path("checkpoint") / data_name
    trained = [folder for name in TRAINERS if (folder := adapter_or_old(root / name / "adapter_model"))]
    shipped = adapter_or_old(root / "shipped" / "adapter_model")
    if not trained and not shipped:
        remedy = f"train one with `deepspeed train_trainer.py --data_name={data_name}`"
        raise UserError(f"{root}: no adapter here{hint_of_folders(root)}; {remedy}")
    return max(trained, key=lambda p: (p / "adapter_config.json").stat().st_mtime) if trained else shipped


def adapter_or_old(folder):
    """The folder, or what a save that was cut short between its two renames left of it, or None."""
    old = folder.with_name(folder.name + ".old")
    if (folder / "adapter_config.json").is_file():
        return folder
    if (old / "adapter_config.json").is_file():
        say(f"{folder} 不存在，使用上一次保存的 {old}")
        return old
    return None


def open_output(path, remedy="name another file"):
    """A file to write answers to, opened before they are computed: a path that cannot be written costs nothing then.

    Its old content stays until the caller truncates it, so a failure before the first answer loses nothing.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from None
