"""The tokenizer of a model's folder, exactly sentencepiece's."""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from shutil import copyfile

from sentencepiece import SentencePieceProcessor
from transformers import SentencePieceBackend

from alpaca.common.errors import UserError
from alpaca.common.file_kinds import refuse_failed_download
from alpaca.common.folders import hint_of_folders
from dataset import BOS, EOS, UNK

LLAMA_3 = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")  # its tokenizer.model is tiktoken's: a piece in base64, its number


class ExactTokenizer(SentencePieceBackend):
    """A LLaMA tokenizer whose ids and text are exactly those of `sentencepiece`, with which the weights were trained.

    transformers' LlamaTokenizer re-derives merges from piece scores; the added Chinese pieces all score 0, so its ids
    are wrong. SentencePieceBackend encodes right, but decodes byte pieces literally (`<0x0A>`), hence `_decode`.
    """

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            special = set(self.all_special_ids)
            token_ids = [i for i in token_ids if i not in special]
        return self.sp_model.decode(token_ids)

    def encode_texts(self, texts):
        """Ids of many texts at once, without specials: list of str -> list of list of int."""
        return self.sp_model.encode(list(texts))

    @cached_property
    def token_bytes(self):
        """What each id adds to a text, as UTF-8: `<0xE7>` is that one byte, `▁` a space."""
        sp = self.sp_model
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        return [
            bytes([int(p[3:5], 16)]) if sp.is_byte(i) else p.replace("▁", " ").encode() for i, p in enumerate(pieces)
        ]


def _special_tokens(vocab_file):
    """bos, eos, unk and pad as tokenizer_config.json names them; pad is [PAD] where the vocabulary has it."""
    try:
        sp = SentencePieceProcessor(model_file=str(vocab_file))
    except RuntimeError:
        refuse_failed_download(vocab_file)
        if LLAMA_3.match(Path(vocab_file).read_bytes()[:200]):
            raise UserError(f"{vocab_file}: LLaMA-3's, which is not supported; use a LLaMA-1 or LLaMA-2") from None
        raise UserError(f"{vocab_file}: not a SentencePiece model; was the download complete?") from None
    pieces = {name: sp.id_to_piece(i) for name, i in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", UNK))}
    has_pad = sp.id_to_piece(sp.piece_to_id("[PAD]")) == "[PAD]"
    # split_special_tokens: a user's text that contains `</s>` stays text; specials are only ever added by id.
    return {**pieces, "pad_token": "[PAD]" if has_pad else pieces["unk_token"], "split_special_tokens": True}


def _vocab_file(model_dir):
    path = Path(model_dir) / "tokenizer.model"
    if not path.is_file():
        raise UserError(f"{path}: no such file{hint_of_folders(path)}; {how_to_get(model_dir)}")
    return path


def how_to_get(model_dir):
    """The command that makes a model folder, for error messages."""
    name = Path(model_dir).name
    if "tiny" in name:
        return "make the embedded model with `make tiny` (README.md, 快速开始)"
    return (
        f"put the model there, or make {name} with model_hub/convert_llama_weights_to_hf.py and "
        "model_hub/merge_llama_with_chinese_lora.py (README.md)"
    )


def load_tokenizer(model_dir):
    """The tokenizer of a folder that holds a `tokenizer.model`; other tokenizer files are not needed or read."""
    path = _vocab_file(model_dir)
    return ExactTokenizer(vocab_file=str(path), **_special_tokens(path))


def save_tokenizer(vocab_file, out_dir):
    """Write tokenizer.model and a tokenizer_config.json with which plain AutoTokenizer gives exact ids too."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if Path(vocab_file).resolve() != (out_dir / "tokenizer.model").resolve():
        copyfile(vocab_file, out_dir / "tokenizer.model")
    config = {"tokenizer_class": "SentencePieceBackend", **_special_tokens(vocab_file), "backend": "sentencepiece"}
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tokenizer_sha256(model_dir):
    """Hex digest of tokenizer.model: an adapter only fits the vocabulary it was trained with."""
    return hashlib.sha256(_vocab_file(model_dir).read_bytes()).hexdigest()
