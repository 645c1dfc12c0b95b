"""What an answer may say: a grammar over the characters of the text, as masks over the vocabulary.

    start: " " LINE ("\\n" LINE)*                   the space only where the tokenizer puts one before every text
    LINE:  SPAN ("_" TYPE)? | "没有"                 SPAN is a part of the text, TYPE one of the labels

The grammar knows characters and not tokens, so the model may spell a span with any pieces, byte pieces included.
llguidance compiles it for each text and says at every step which tokens can go on.

Only lines with a span and a type are lines of the answer. A model that begins a span in the wrong place may give it up, with a
newline, as it would without a constraint: were that forbidden, it would have to go on to some type, and take the next
entity into the span. generate.py leaves such lines out and counts them; without any other the answer is `没有`.
"""

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper

from alpaca.common.devices import cores
from dataset import NO_ENTITY

# A line is one token of the grammar: were it several, llguidance would read a `_` of the text always as part of the span,
# and a_b could not be answered with a_地名.
GRAMMAR = """\
start: {before}LINE ("\\n" LINE)*
LINE: SPAN ("_" TYPE)? | {nothing}
TYPE: {types}
SPAN: {within}SUBSTRING
SUBSTRING: %regex {substring}
"""
WITHIN_LINES = r"/[^\r\n]*/ & "  # only for texts of several lines, since it takes llguidance half as long again


class AnswerGrammar:
    """The answers that a tokenizer can spell with some types. A matcher keeps track of one answer to one text."""

    def __init__(self, tokenizer, labels):
        self.labels = {label.encode() for label in labels}
        self.before = _quoted(before) + " " if (before := tokenizer.before_answer.decode()) else ""
        self.types = " | ".join(_quoted(label) for label in dict.fromkeys(labels))
        # no slices: they speed up grammars that allow most of the vocabulary
        self.vocabulary = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=len(tokenizer), slices=[])
        self.words = -(-len(tokenizer) // 32)
        self.threads = ThreadPoolExecutor(cores())
        # on few cores, more threads and torch's own are in each other's way
        self.executor = LLExecutor() if cores() >= 8 else None

    def matchers(self, texts):
        """For each text an llguidance LLMatcher at the beginning of an answer. Takes a millisecond a text and core."""
        return [matcher.result() for matcher in map(self.begin_matcher, texts)]

    def begin_matcher(self, text):
        """A Future of the matcher of one text, which a thread begins to make."""
        return self.threads.submit(self._matcher, text)

    def _matcher(self, text):
        substring = json.dumps({"substring_chars": text}, ensure_ascii=False)
        within = WITHIN_LINES if {*text} & {*"\r\n"} else ""
        parts = {"before": self.before, "types": self.types, "within": within, "substring": substring}
        grammar = GRAMMAR.format(nothing=_quoted(NO_ENTITY), **parts)
        return checked(LLMatcher(self.vocabulary, LLMatcher.grammar_from_lark(grammar)))

    def masks(self, matchers):
        """The tokens that may come next: int32 [matchers, vocabulary / 32] on the CPU, bit i of word w: token 32 w + i."""
        bits = torch.empty(len(matchers), self.words, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        if self.executor:
            numbered = [(matcher, i) for i, matcher in enumerate(matchers)]
            self.executor.unsafe_compute_mask_ptr(numbered, bits.data_ptr(), 4 * self.words, len(matchers))
        else:
            for matcher, row in zip(matchers, bits, strict=True):
                matcher.unsafe_compute_mask_ptr(row.data_ptr(), 4 * self.words)
        return bits

    def states_entity(self, line):
        """Whether a line (bytes) that a matcher let pass is one of the answer, `实体_类型`."""
        entity, _, kind = line.rpartition(b"_")
        return bool(entity) and kind in self.labels


@functools.cache
def _bytes_on(device):
    """What a byte of a mask adds to the logits of its eight tokens: 0 or -inf."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return torch.where(bits > 0, 0.0, float("-inf")).to(device)


def forbid(logits, bits):
    """Set to -inf what `AnswerGrammar.masks` does not allow, in place. logits: float32 [rows, vocabulary]."""
    indices = bits.to(logits.device, non_blocking=True).view(torch.uint8).int()
    allowed = torch.nn.functional.embedding(indices, _bytes_on(logits.device))
    return logits.add_(allowed.flatten(1)[:, : logits.shape[1]])


def checked(matcher):
    """The matcher, if it is well: llguidance raises nothing by itself."""
    if matcher.is_error():
        raise RuntimeError(f"llguidance: {matcher.get_error()}")
    return matcher


def _quoted(text):
    return json.dumps(text, ensure_ascii=False)


class _Vocabulary:
    """The tokenizer as llguidance.TokenizerWrapper wants it."""

    def __init__(self, tokenizer):
        self.encode, self.tokens = tokenizer.encode_texts, tokenizer.token_bytes
        self.special_token_ids = sorted(tokenizer.controls.values())
        self.bos_token_id, self.eos_token_id = next(iter(tokenizer.begin), None), tokenizer.frame.end
        # what begins with a space of its own is encoded behind a newline: it stands in the middle of an answer
        self.lead = "\n" if tokenizer.before_answer else ""
        self.before = len(self.encode([self.lead])[0])

    def __call__(self, text):
        """Ids of a text in the middle of an answer. Where the grammar forces the next characters, the mask holds no other
        tokens than these."""
        text = text if isinstance(text, str) else text.decode("utf-8", "ignore")
        return self.encode([self.lead + text])[0][self.before :]
