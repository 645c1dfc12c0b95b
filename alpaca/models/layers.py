"""Which bases are understood, by config.json alone, before any weight loads.

Training lays examples out as trees and answering calls the layers one by one. Both are right for layers that go through
transformers' attention interface and add nothing between them. These were tried; another kind may train without an error
and learn something else, so it is refused.
"""

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from alpaca.common.errors import UserError

TRIED = ("llama", "mistral", "qwen2", "qwen3")  # config.json's model_type


def check_layers(config, model_dir):
    """UserError for a base of another kind than TRIED, or with code of its own. config: config.json as a dict."""
    kind = config.get("model_type")
    if config.get("auto_map"):
        raise UserError(
            f"{model_dir}/config.json: its auto_map names code of its own, which is not run; use another base"
        )
    if kind not in TRIED:
        raise UserError(f'{model_dir}/config.json: "model_type" is {kind!r}; only {", ".join(TRIED)} can be used')


def check_window(config, model_dir, max_seq_length, packing):
    """UserError where an example may be longer than the layers look back: a tree row has no such window.

    config: a checked config.json as a dict.
    """
    window = getattr(AutoConfig.for_model(**config), "sliding_window", None) if "sliding_window" in config else None
    if window and window < max_seq_length and packing != "none":
        raise UserError(
            f"{model_dir}/config.json: its sliding_window of {window} is shorter than --max_seq_length={max_seq_length}; "
            f"give --max_seq_length={window}, or --packing=none"
        )


def meta_model(config):
    """The model of a config (transformers') without its weights. from_config would want to fill them under ZeRO-3."""
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def tensor_shapes(config):
    """{name: shape} of every tensor, from config.json as a dict; a head that is tied to the embeddings has its own name."""
    return {name: tuple(t.shape) for name, t in meta_model(AutoConfig.for_model(**config)).state_dict().items()}


def positions_of(config):
    """How many tokens a row of answering may have: all of them see each other. config: transformers'."""
    return min(
        config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings
    )
