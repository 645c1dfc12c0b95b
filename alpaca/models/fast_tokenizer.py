"""The fast tokenizer of a folder (tokenizer.json), with what a user's text holds kept text."""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from alpaca.common.errors import UserError

# Added tokens that look like marks are marks, also where the file does not call them special, as Qwen3's <think>.
MARK = re.compile(r"<.*>|\[.*\]", re.DOTALL)
BYTE = re.compile("<0x([0-9A-F]{2})>")


class FastTokenizer:
    """A tokenizer of the tokenizers library. What the project reads of a tokenizer is what ExactTokenizer has too.

    controls: {text: id} of the tokens that only a template may write. Texts are encoded by a copy that lacks them:
    transformers' split_special_tokens would still read <think>, which is not special. begin: the ids before a text, bos
    or nothing. ends: the ids that end an answer. before_answer: what the first token of a text adds in front of it.
    """

    def __init__(self, folder, behind_controls=False):
        """UserError for a folder without such a tokenizer, or with code of its own. behind_controls: whether every text
        stands behind a control token, where some tokenizers put no space before it."""
        _refuse_code(folder)
        try:
            self.transformers = tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            state = json.loads(tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # the library raises plain Exceptions
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"{folder}: its tokenizer cannot be read ({first}); download it again") from None
        self.source = next(file for name in ("tokenizer.json", "vocab.json") if (file := Path(folder) / name).is_file())
        added, self.byte_level = state["added_tokens"], '"ByteLevel"' in json.dumps(state["decoder"])
        self.added = {token["content"] for token in added}
        self.controls = {t["content"]: t["id"] for t in added if t["special"] or MARK.fullmatch(t["content"])}
        if behind_controls:
            _never_first(state["pre_tokenizer"])
        words = [token for token in added if token["content"] not in self.controls]
        self.plain = Tokenizer.from_str(
            json.dumps({**state, "added_tokens": words, "post_processor": None, "padding": None, "truncation": None})
        )
        self.size = 1 + max(tokenizer.get_vocab().values())
        self.eos_token_id = tokenizer.eos_token_id
        if self.eos_token_id is None:
            raise UserError(
                f"{folder}: tokenizer_config.json names no eos_token, so no answer would end; name one there"
            )
        self.pad_token_id = self.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._check(words, tokenizer.unk_token_id)
        first = next(iter(tokenizer("a")["input_ids"]), None)
        self.begin = [first] if first is not None and first == tokenizer.bos_token_id else []
        self.ends = frozenset([self.eos_token_id, *_ends_of(folder)])

    def _check(self, words, unknown):
        """UserError where the copy would give other ids to words, or ids of controls to what a user says."""
        moved = [word["content"] for word in words if self.plain.token_to_id(word["content"]) != word["id"]]
        ids = {i for text in self.encode_texts(self.controls) for i in text} - {unknown}
        parsed = [text for text, i in self.controls.items() if i in ids]
        for text in [*moved, *parsed]:
            raise UserError(
                f"{self.source}: the added token {text!r} is of a kind that is not supported; use another base"
            )

    def __len__(self):
        return self.size

    @property
    def all_special_tokens(self):
        return list(self.controls)

    def apply_chat_template(self, messages, **settings):
        return self.transformers.apply_chat_template(messages, **settings)

    def encode_texts(self, texts):
        """Ids of many texts at once, without controls: list of str -> list of list of int."""
        return [encoding.ids for encoding in self.plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids):
        return self.transformers.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def before_answer(self):
        return b" " if self.token_bytes[self.encode_texts(["a"])[0][0]].startswith(b" ") else b""

    @cached_property
    def token_bytes(self):
        """What each id adds to a text, as UTF-8.

        A byte-level token has a letter for each byte (GPT-2's encoder.py), another one has ▁ for a space and `<0x0A>` for a byte.
        An added token says what it is. An id without a token adds nothing.
        """
        table, byte_of = [b""] * self.size, {letter: byte for byte, letter in bytes_to_unicode().items()}
        for token, i in self.transformers.get_vocab().items():
            if token in self.added:
                table[i] = token.encode()
            elif self.byte_level:
                table[i] = bytes(byte_of[letter] for letter in token)
            elif byte := BYTE.fullmatch(token):
                table[i] = bytes([int(byte[1], 16)])
            else:
                table[i] = token.replace("▁", " ").encode()
        return table

    @cached_property
    def sha256(self):
        """Of the file that decides the ids: an adapter only fits the vocabulary it was trained with."""
        digest = hashlib.sha256(self.source.read_bytes())
        merges = self.source.with_name("merges.txt")
        if self.source.name == "vocab.json" and merges.is_file():
            digest.update(merges.read_bytes())
        return digest.hexdigest()


def _never_first(splitter):
    """Change a pre_tokenizer of tokenizer.json: of those that put a space before the first text alone, none is first."""
    for part in (splitter or {}).get("pretokenizers", [splitter or {}]):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"


def read_settings(folder, name):
    """The object in a JSON file of a folder, {} where there is none."""
    file = Path(folder) / name
    try:
        return dict(json.loads(file.read_text(encoding="utf-8-sig"))) if file.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON object ({error}); get the file again") from None


def _refuse_code(folder):
    """UserError for a tokenizer that is a program in the folder."""
    code = read_settings(folder, "tokenizer_config.json").get("auto_map")
    if code:
        raise UserError(
            f"{folder}/tokenizer_config.json: its auto_map names code of its own ({code}), which is not run; use another base"
        )


def _ends_of(folder):
    """The eos ids of generation_config.json, or of config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = read_settings(folder, name).get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []
