"""A prompt on its way to an answer: its tokens, and what the grammar and the lines of the answer say about it."""

import math
from collections import namedtuple

from alpaca.answering.grammar import checked
from alpaca.answering.prefixes import NO_PREFIX
from dataset import NO_ENTITY

# text: None if the prompt did not fit. ended: False if max_new_tokens or the model's positions cut it off. repeated,
# abandoned: how many lines a grammar left out since they were there already, or had no type. scores: for each line of
# text its log-probability, without the line's end; log_probability: that of all the model said. Both under the grammar.
# With the line's end a score tells right entities from wrong ones less well: the end says how many more follow.
Answer = namedtuple("Answer", "text ended repeated abandoned scores log_probability")


NO_ANSWER = Answer(None, False, 0, 0, [], None)


class Row:
    """A prompt on its way to an answer. ids: its tokens and the answer's; the keys and values of the first `read` of
    them are kept: those of its prefix once for many rows, its own in the slots from `first` on.

    tokenizer: None for a row that gets no answer. text: what a grammar holds the answer to; None: the answer is free. given:
    the tokens of an answer that is not chosen, only scored; -inf is the log-probability of one that the grammar does not
    allow.
    """

    def __init__(self, number, prompt, limit, tokenizer=None, text=None, given=None):
        self.number, self.prompt, self.limit, self.tokenizer = number, prompt, limit, tokenizer
        self.text, self.given = text, given
        self.ids, self.prefix, self.read, self.first, self.width = list(prompt), NO_PREFIX, 0, None, 0
        self.matcher, self.begun = None, False  # matcher: LLMatcher; a Future of one until the answer begins
        self.lines, self.scores, self.log_probability = [b""], [0.0], 0.0  # scores: of each line
        self.ended, self.stale, self.noted, self.said = False, 0, len(prompt), []  # said: not noted yet

    def begin(self):
        """Begin the answer, with what the grammar leaves no choice about: the probability of these tokens is 1."""
        self.begun = True
        if self.matcher:
            self.matcher = self.matcher.result()
            for token in () if self.given else self.matcher.compute_ff_tokens():
                if not self.over:
                    self.take(token, 0.0)
            self.note()

    @property
    def over(self):
        return self.ended or len(self.ids) >= self.limit

    def own(self, tokens):
        """How many of its first tokens are not its prefix."""
        return tokens - len(self.prefix.tokens)

    def take(self, token, log_probability):
        """Go on with a token of the answer."""
        self.said.append((token, log_probability))
        if token in self.tokenizer.ends:
            self.ended = True
        else:
            self.ids.append(token)

    def note(self):
        """Write down what was taken, which can wait until after the next step. The lines may say that the answer is over:
        a loop."""
        for token, log_probability in self.said:
            self._note(token, log_probability)
        self.said = []

    def _note(self, token, log_probability):
        self.log_probability += log_probability
        if token in self.tokenizer.ends or self.log_probability == -math.inf:
            return
        piece = self.tokenizer.token_bytes[token]
        if self.matcher:
            self.matcher.consume_token(token)
            checked(self.matcher)
            if self.noted == len(self.prompt):
                piece = piece.removeprefix(self.tokenizer.before_answer)
        self.noted += 1
        for i, part in enumerate(piece.split(b"\n")):
            if i:
                self._end_line()
            if part:
                self.lines[-1] += part
                self.scores[-1] += log_probability

    def _end_line(self):
        """Begin another line; under a grammar, two lines in a row that were there before are the end: a loop."""
        self.stale = self.stale + 1 if self.lines[-1] in self.lines[:-1] else 0
        self.ended = self.ended or self.matcher is not None and self.stale == 2
        self.lines.append(b"")
        self.scores.append(0.0)

    def certain(self, grammar):
        """What of the text is certain while the answer goes on."""
        if not grammar or self.text is None:
            return self.tokenizer.decode(self.ids[len(self.prompt) : self.noted]).rstrip("\ufffd")
        return b"\n".join(dict.fromkeys(filter(grammar.states_entity, self.lines[:-1]))).decode()

    def answer(self, grammar):
        if not grammar or self.text is None:
            text = self.tokenizer.decode(self.ids[len(self.prompt) : self.noted])
            return Answer(text, self.ended, 0, 0, self.scores, self.log_probability)
        stated, repeated, abandoned = {}, 0, 0
        for i, (line, score) in enumerate(zip(self.lines, self.scores, strict=True)):
            if line in stated:
                repeated += 1
            elif grammar.states_entity(line):
                stated[line] = score
            elif line and line.decode(errors="replace") != NO_ENTITY and (self.ended or i < len(self.lines) - 1):
                abandoned += 1
        text = b"\n".join(stated).decode() or NO_ENTITY
        return Answer(text, self.ended, repeated, abandoned, list(stated.values()), self.log_probability)
