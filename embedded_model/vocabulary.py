"""The three vocabularies of the embedded model, built as the real ones were.

base: English, bytes and few Chinese characters. llama: base and Chinese pieces whose scores are all 0. alpaca: llama
and, as its last piece, [PAD].
"""

import collections
import io
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from alpaca.models.templates import TEMPLATES
from embedded_model import dictionary
from embedded_model.rough_text import RoughTextMaker
from embedded_model.sources import HANZI, LEXICON
from embedded_model.tasks import NER_WORDS
from embedded_model.text_maker import any_text, plain_text

BASE_PIECES, LLAMA_PIECES = 2000, 6000
BASE_HANZI = 700  # Chinese characters of the base vocabulary
RARE_HANZI = 400  # characters beyond GB2312 level 1; most of them stand in names
SAMPLE_TEXTS = 60000
LONGEST_CHINESE_PIECE = 4  # characters
# The settings of LLaMA's own tokenizer.
TRAINER_SETTINGS = dict(
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=True,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    character_coverage=1.0,
    hard_vocab_limit=False,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    num_threads=2,
    minloglevel=2,
)


def is_hanzi(character):
    return "\u4e00" <= character <= "\u9fff"


def train_bpe(lines, pieces, **settings):
    """A sentencepiece model (ModelProto) with so many pieces, trained on `lines`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=pieces, **TRAINER_SETTINGS, **settings
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def base_lines(texts, rng):
    """Text that makes the base vocabulary: English words, the prompt, and single Chinese characters and marks.

    Spaces stand between the characters, so that no two of them become one piece.
    """
    frequency = collections.Counter(character for text in texts for character in text)
    hanzi = [c for c, _ in frequency.most_common() if is_hanzi(c)]
    needed = [c for c in dict.fromkeys("".join(NER_WORDS)) if c in frequency]
    hanzi = list(dict.fromkeys(needed + hanzi))[:BASE_HANZI]
    marks = [c for c, count in frequency.most_common() if not is_hanzi(c) and count > 20 and not c.isspace()]
    lines = []
    for _ in range(20000):
        words = [rng.choice(LEXICON["英文"]) for _ in range(rng.randint(4, 12))]
        lines.append(" ".join(words).capitalize() + rng.choice([".", "?", "!", f", {rng.randint(0, 2024)}."]))
    lines += [line for line in TEMPLATES["alpaca"].prompt("").split("\n") if line] * 2000
    lines += [" ".join(hanzi[i : i + 50]) for i in range(0, len(hanzi), 50)] * 20
    lines += [" ".join(marks), "".join(map(chr, range(33, 127)))] * 20
    return lines


def chinese_pieces(texts, existing, room):
    """`room` pieces that are not in `existing`.

    Every character of GB2312 level 1, the most frequent others, and for the rest words, those of the dictionary first.
    """
    frequency = collections.Counter(c for text in texts for c in text if is_hanzi(c))
    others = [c for c, _ in frequency.most_common() if c not in set(HANZI)][:RARE_HANZI]
    characters = [c for c in HANZI + others if c not in existing]
    trained = train_bpe(texts, 8000, max_sentencepiece_length=LONGEST_CHINESE_PIECE)
    trained = [p.piece for p in trained.pieces if len(p.piece) > 1 and all(map(is_hanzi, p.piece))]
    listed = set(dictionary.frequent_words())
    words = [w for w in NER_WORDS if len(w) > 1]
    words += [w for w in trained if w in listed] + [w for w in trained if w not in listed and len(w) == 2]
    words = [w for w in dict.fromkeys(words) if w not in existing]
    room -= len(characters)
    while True:  # merging joins two pieces, so a word that is not the sum of two pieces would never be used
        pieces = existing | set(characters) | set(words[:room])
        unreachable = {
            w for w in words[:room] if not any(w[:i] in pieces and w[i:] in pieces for i in range(1, len(w)))
        }
        if not unreachable:
            return words[:room] + characters
        words = [w for w in words if w not in unreachable]


def add_pieces(proto, pieces):
    """Add pieces to a sentencepiece model, each with score 0 and type NORMAL, as in the published vocabularies.

    [PAD] too is of that type, so a "[PAD]" that somebody types stays text.
    """
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0)
    proto.trainer_spec.vocab_size = len(proto.pieces)


def build_vocabularies(seed):
    """{"base", "llama", "alpaca"}: the bytes of their tokenizer.model."""
    maker = RoughTextMaker(seed, "train", walk_share=0.0, rough_share=0.5)
    texts = [plain_text(any_text(maker)) for _ in range(SAMPLE_TEXTS)]
    proto = train_bpe(base_lines(texts, random.Random(seed)), BASE_PIECES)
    models = {"base": proto.SerializeToString()}
    existing = {piece.piece for piece in proto.pieces}
    add_pieces(proto, chinese_pieces(texts, existing, LLAMA_PIECES - len(proto.pieces)))
    models["llama"] = proto.SerializeToString()
    add_pieces(proto, ["[PAD]"])
    models["alpaca"] = proto.SerializeToString()
    return models
