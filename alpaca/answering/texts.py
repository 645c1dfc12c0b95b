"""Texts -> rows of predictions.jsonl, each as soon as its answer is there, with nothing kept of those that are done."""

import hashlib
import marshal
from collections import OrderedDict
from functools import lru_cache
from typing import NamedTuple

from alpaca.answering.generate import Request, answer_requests
from alpaca.answering.predictions import make_grammar, quoted_text, row_of
from alpaca.answering.row import Answer
from alpaca.answering.windows import cutter, row_of_text, whole
from alpaca.common.devices import pick_device
from alpaca.models.base import load_for_inference
from alpaca.models.templates import message_of

KNOWN = 100_000  # equal texts among so many are answered once; an answer takes some 400 bytes
ENCODED, ENCODED_CHARACTERS = 64, 20_000  # texts that are encoded together; in long ones there is more to do


def load_answering(args, adapter, train_args, facts, tokenizer, labels, nested, instructs=None, calibration=None):
    """The Answering that the options of test.py or predict.py, and what find_adapter returned, say. tokenizer: of
    load_base_tokenizer. Texts that are too long become windows; labels=None: another task than NER, of which nothing is cut."""
    model, _ = load_for_inference(
        *(adapter, train_args, facts, args.base_model, args.tokenizer_path, args.precision, pick_device(args.devices)),
        merge=True,
        base_weights=args.base_weights,
        tokenizer=tokenizer,
    )
    grammar = make_grammar(args.constrained, adapter or facts, tokenizer, labels)
    cut = uncut if labels is None else cutter(model, tokenizer, train_args, facts)
    limits = args.max_new_tokens, args.batch_size
    calibration = calibration if grammar else None
    return Answering(model, tokenizer, cut, labels, *limits, grammar, nested, instructs, calibration)


def uncut(examples):
    """What Answering takes for a cutter where no text is to be cut."""
    return [whole(example) for example in examples]


class Asked(NamedTuple):
    """A text that is being answered."""

    example: dict
    cut: tuple  # CutExample
    answers: list  # of each window; None: not there yet


class Answering(NamedTuple):
    """With what, and how, texts are answered.

    shared: SharedEngine.answer for an adapter, if others use the engine too; None: an engine of its own, made for a call.
    """

    model: object
    tokenizer: object
    cut: object  # windows.cutter, or a function from examples to CutExamples
    labels: list | None
    max_new_tokens: int = 512
    batch_size: object = "auto"
    grammar: object = None
    nested: bool = False
    instructs: list | None = None  # of predictions.held_instructs
    calibration: object = None  # of scoring/calibration.py
    shared: object = None

    def __call__(self, numbered, expected=None):
        """Yield lists of (number, [row, ends inside a sentence]) of the texts that are answered, in whatever order.

        numbered: an iterator of (number, dataset.example_of_input); None in it means that there is none for now.
        expected: how many there will be, about; None: all are drawn, and kept, at once, which is faster for a few.
        """
        asked, known, done = {}, OrderedDict(), []
        requests = self._requests(numbered, asked, known, done)
        limits = self.max_new_tokens, self.batch_size, self.grammar, expected if expected is None else max(1, expected)
        answers = self.shared(requests) if self.shared else answer_requests(*self[:2], requests, *limits)
        for ended in answers:
            for digest, answer in ended:
                for number, i in known[digest]:
                    asked[number].answers[i] = answer
                    if None not in asked[number].answers:
                        done.append(number)
                known[digest] = marshal.dumps(tuple(answer))
            yield [(number, self._row(asked.pop(number))) for number in done]
            done.clear()

    def in_turn(self, examples):
        """Yield lists, often empty, of the rows of these examples, in order."""
        rows, number = {}, 0
        for ended in self(enumerate(examples)):
            rows.update(ended)
            whole_rows = []
            while number in rows:
                whole_rows.append(rows.pop(number)[0])
                number += 1
            yield whole_rows

    def _row(self, text):
        parts = zip(text.cut.parts, text.answers, strict=True)
        rows = [row_of(part, answer, self.labels, self.nested) for part, answer in parts]
        rules = self.calibration, self.nested, self.instructs
        return [row_of_text(text.example, text.cut, rows, *rules), text.cut.inside]

    def _requests(self, numbered, asked, known, done):
        """The Requests of what was not asked before. asked: {number: Asked}; known: {digest: the answer, packed, or, while
        it is waited for, [(number, window)]}; done: numbers of texts whose answers are all there."""
        prompts_of, over = prompt_encoder(self.tokenizer), False
        while not over:
            items, pauses, over = next_texts(numbered)
            new, cuts = [], self.cut([example for _, example in items])
            for (number, example), cut in zip(items, cuts, strict=True):
                asked[number] = Asked(example, cut, [None] * len(cut.parts))
                for i, part in enumerate(cut.parts):
                    digest = digest_of(part)
                    found = known.setdefault(digest, [])
                    if isinstance(found, bytes):
                        asked[number].answers[i] = Answer(*marshal.loads(found))
                        continue
                    if not found:
                        new.append((digest, part))
                    found.append((number, i))
                if None not in asked[number].answers:
                    done.append(number)
            for (digest, part), prompt in zip(new, prompts_of([part for _, part in new]), strict=True):
                yield Request(digest, prompt, quoted_text(part, self.instructs))
            while len(known) > KNOWN and isinstance(known[oldest := next(iter(known))], bytes):
                del known[oldest]
            if pauses or not new:
                yield None


def next_texts(numbered):
    """(the items that are cut and encoded together; whether there is none for now; whether these are the last)."""
    items, characters = [], 0
    for item in numbered:
        if item is None:
            return items, True, False
        items.append(item)
        characters += len(item[1]["text"])
        if len(items) == ENCODED or characters >= ENCODED_CHARACTERS:
            return items, False, False
    return items, False, True


def digest_of(part):
    """Of all that its answer depends on."""
    asked = "\0".join((part["instruct"], part["query"], part["text"]))
    return hashlib.blake2b(asked.encode(), digest_size=16).digest()


def prompt_encoder(tokenizer):
    """A function from examples to prompts as templates.encode_prompts makes them, which encodes each instruction once.

    That can be done where a line feed is always a token of its own, as in LLaMA's vocabularies: what stands before it
    and behind it are then encoded as if each stood alone. Such a tokenizer puts a space before a text; that goes.
    """
    head, lead, trail, tail, _ = tokenizer.frame
    (feed,) = tokenizer.encode_texts(["\n"])
    pieces = [tokenizer.token_bytes[token] for token in feed]
    apart = pieces and pieces[-1] == b"\n" and not b"".join(pieces[:-1]).strip()
    apart = apart and sum(b"\n" in piece for piece in tokenizer.token_bytes) == 1

    @lru_cache(64)
    def ids_of(before):
        return tuple(tokenizer.encode_texts([before])[0])

    def encode(examples):
        befores, behinds = [], []
        for example in examples:
            text = lead + message_of(example["instruct"], example["query"]) + trail
            at = max(text.rfind("\n" + example["query"]), 0) if apart and example["query"] else 0
            befores.append(text[:at])
            behinds.append(text[at:])
        encoded = zip(befores, tokenizer.encode_texts(behinds), strict=True)
        ids = [[*ids_of(before), *ids[len(feed) - 1 :]] if before else ids for before, ids in encoded]
        return [[*head, *one, *tail] for one in ids]

    return encode
