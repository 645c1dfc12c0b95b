"""The tokenizer of a model's folder: exactly sentencepiece's, or the folder's fast one (fast_tokenizer.py)."""

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
from alpaca.common.whole_files import written_whole
from alpaca.models.fast_tokenizer import FastTokenizer, read_settings
from alpaca.models.templates import CHAT, TEMPLATES, chat_template, check_name, choose_name, make_frame

BOS, EOS, UNK = 1, 2, 0  # the ids of every LLaMA vocabulary
FAST_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")
FAST_FILES += ("special_tokens_map.json", "chat_template.jinja", "generation_config.json")
LLAMA_3 = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")  # its tokenizer.model is tiktoken's: a piece in base64, its number


class ExactTokenizer(SentencePieceBackend):
    """A LLaMA tokenizer whose ids and text are exactly those of `sentencepiece`, with which the weights were trained.

    transformers' LlamaTokenizer re-derives merges from piece scores; the added Chinese pieces all score 0, so its ids
    are wrong. SentencePieceBackend encodes right, but decodes byte pieces literally (`<0x0A>`), hence `_decode`.
    What the project reads of a tokenizer is what FastTokenizer has too.
    """

    begin, ends = [BOS], frozenset([EOS])
    before_answer = b" "  # sentencepiece begins every text with a space

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            special = set(self.all_special_ids)
            token_ids = [i for i in token_ids if i not in special]
        return self.sp_model.decode(token_ids)

    def encode_texts(self, texts):
        """Ids of many texts at once, without specials: list of str -> list of list of int."""
        texts = list(texts)
        if len(texts) == 1:  # for a list SentencePiece starts threads, which take far longer than one short text
            return [self.sp_model.encode(texts[0])]
        return self.sp_model.encode(texts)

    @cached_property
    def token_bytes(self):
        """What each id adds to a text, as UTF-8: `<0xE7>` is that one byte, `▁` a space."""
        sp = self.sp_model
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        return [
            bytes([int(p[3:5], 16)]) if sp.is_byte(i) else p.replace("▁", " ").encode() for i, p in enumerate(pieces)
        ]

    @cached_property
    def controls(self):
        """{piece: id} of what no text is encoded to."""
        sp = self.sp_model
        ids = [i for i in range(sp.vocab_size()) if sp.is_control(i) or sp.is_unknown(i) or i == self.pad_token_id]
        return {sp.id_to_piece(i): i for i in ids}

    @property
    def source(self):
        """The file that decides the ids."""
        return Path(self.vocab_file)

    @cached_property
    def sha256(self):
        """Of that file: an adapter only fits the vocabulary it was trained with."""
        return hashlib.sha256(self.source.read_bytes()).hexdigest()


def _is_llama_3(vocab_file):
    return LLAMA_3.match(Path(vocab_file).read_bytes()[:200]) is not None


def _special_tokens(vocab_file):
    """bos, eos, unk and pad as tokenizer_config.json names them; pad is [PAD] where the vocabulary has it."""
    try:
        sp = SentencePieceProcessor(model_file=str(vocab_file))
    except RuntimeError:
        refuse_failed_download(vocab_file)
        if _is_llama_3(vocab_file):
            raise UserError(
                f"{vocab_file}: LLaMA-3's; put the tokenizer.json of its Hugging Face folder there"
            ) from None
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
        return "make the embedded model with `make tiny`"
    return (
        f"put the model there, or make {name} with model_hub/convert_llama_weights_to_hf.py and "
        "model_hub/merge_llama_with_chinese_lora.py (README.md)"
    )


def load_sentencepiece(model_dir):
    """The tokenizer of a folder that holds a `tokenizer.model`; other tokenizer files are not needed or read."""
    path = _vocab_file(model_dir)
    return ExactTokenizer(vocab_file=str(path), **_special_tokens(path))


def has_sentencepiece(folder):
    """Whether a folder has a tokenizer.model that is SentencePiece's, or meant to be."""
    path = Path(folder) / "tokenizer.model"
    return path.is_file() and not _is_llama_3(path)


def load_tokenizer(model_dir, template="auto"):
    """The tokenizer with which a folder's weights were trained, and `.template`, `.frame`: how the base is asked.

    tokenizer.model, where it is SentencePiece's; else, and for a chat template beside a tokenizer.json, the fast tokenizer.
    template: `--template`. UserError where it must be named.
    """
    folder = Path(model_dir)
    check_name(template)
    fast = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    tokenizer = load_sentencepiece(folder) if has_sentencepiece(folder) or not fast else None
    pieces, chat = len(tokenizer) if tokenizer else None, _chat_source(folder)
    name = choose_name(template, folder, pieces, chat is not None)
    known = any(pieces in one.pieces for one in TEMPLATES.values())  # Chinese vocabularies, see ExactTokenizer
    if tokenizer is None or name == CHAT and fast and not known:
        tokenizer = FastTokenizer(folder, behind_controls=name == CHAT)
    if name == CHAT and chat is None:
        raise UserError(f"{folder}: has no chat template; see --template")
    tokenizer.template = chat_template(tokenizer, chat, folder) if name == CHAT else TEMPLATES[name]
    tokenizer.frame = make_frame(tokenizer, tokenizer.template)
    return tokenizer


def _chat_source(folder):
    """A folder's chat template, or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = read_settings(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):  # several, each with a name
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return source


def tokenizer_files(tokenizer):
    """The files that a tokenizer is copied with. generation_config.json: it names the ids that end an answer."""
    if tokenizer.source.name == "tokenizer.model":
        return [tokenizer.source]
    return [file for name in FAST_FILES if (file := tokenizer.source.with_name(name)).is_file()]


def save_tokenizer(vocab_file, out_dir):
    """Write tokenizer.model and a tokenizer_config.json with which plain AutoTokenizer gives exact ids too.

    A chat template beside vocab_file goes with it.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if Path(vocab_file).resolve() != (out_dir / "tokenizer.model").resolve():
        with written_whole(out_dir / "tokenizer.model") as new:
            copyfile(vocab_file, new)
    config = {"tokenizer_class": "SentencePieceBackend", **_special_tokens(vocab_file), "backend": "sentencepiece"}
    if chat := _chat_source(Path(vocab_file).parent):
        config["chat_template"] = chat
    with written_whole(out_dir / "tokenizer_config.json") as new:
        new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
