"""Which rows a step computes: those being answered, one token each, and of new ones the prompts, as room and slots allow."""

from itertools import islice

import torch

from alpaca.answering.attention import LONGEST_PART, flash_works
from alpaca.answering.grammar import forbid
from alpaca.answering.graphs import CapturedStepper
from alpaca.answering.row import Row
from alpaca.answering.slots import Slots
from alpaca.answering.step import Part, Stepper
from alpaca.common.console import say

FILLING = 0.75  # of the way from one captured size to the next: a step that goes no further waits with what is beyond
MARGIN = 8  # places that a new row gets beyond its prompt, so that it need not move at once
# What capturing the steps costs, a second or less a size, so many rows win back; and so many that of compiling too.
CAPTURE_ROWS, COMPILE_ROWS = 128, 1024
STEP_TOKENS = 4096  # in a step that is not captured: their activations need memory as well


class Engine:
    """The rows that are being answered. rows: all that will be, at most `at_once` of them at a time."""

    def __init__(self, model, tokenizer, rows, at_once, grammar=None, pick=None):
        self.pieces, self.grammar, self.at_once = tokenizer.token_bytes, grammar, max(1, at_once)
        self.pick = pick or (lambda logits: logits.max(dim=-1).indices)
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's, or the bare one
        device, dtype, config = causal.lm_head.weight.device, causal.lm_head.weight.dtype, causal.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        flash = flash_works(device, dtype, size)
        prefix = common_prefix([row.prompt for row in rows])
        self.shared = len(prefix)
        self.slots = Slots(config, device, dtype, rows, self.at_once, self.shared, not flash, spare=int(flash))
        self.most = LONGEST_PART if flash else STEP_TOKENS  # tokens of one row in a step
        # said: rows whose last token is not written down yet; behind: that waits until the next step is under way
        self.rows, self.said, self.behind = [], [], False
        if prefix:
            self._read_prefix(model, prefix)
        self.step, self.step_tokens = Stepper(model, self.slots, self.shared), STEP_TOKENS
        if flash and len(rows) >= CAPTURE_ROWS:
            self.capture(model, len(rows) >= COMPILE_ROWS)

    @torch.inference_mode()
    def capture(self, model, compiled):
        try:
            self.step = CapturedStepper(model, self.slots, self.shared, self.at_once, compiled)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.compile's errors are RuntimeErrors too
            say(f"CUDA graph 不可用，改为逐个算子计算: {str(error).splitlines()[0][:200]}")
            return
        self.step_tokens, self.behind = self.step.sizes[-1], True

    @torch.inference_mode()
    def _read_prefix(self, model, prefix):
        row, step = Row(-1, prefix, len(prefix)), Stepper(model, self.slots)
        assert self.slots.give(row, len(prefix))  # they are all free
        while row.read < len(prefix):
            count = min(len(prefix) - row.read, self.most)
            step([Part(row, count)])
            row.read += count
        self.slots.share(row)

    @torch.inference_mode()
    def advance(self, waiting):
        """One step; waiting rows (a deque of Row) come in as there is room. Returns the rows that have ended."""
        parts, ended = self._parts(waiting)
        logits = self.step(parts)[:, : len(self.pieces)] if parts else None
        ended += self._write_down()  # of the step before, while a GPU computes this one
        self._begin_ahead(waiting)
        for row, count in parts:
            row.read += count
        complete = [row for row, _ in parts if row.read == len(row.ids)]
        if complete:
            self._choose(complete, logits)
        if not self.behind:
            ended += self._write_down()
        for row in self.rows:
            if row.over:
                self.slots.release(row)
        self.rows = [row for row in self.rows if not row.over]
        self._close_up()
        return ended

    def _choose(self, rows, logits):
        """Take each row's next token."""
        if self.grammar:  # a GPU is still computing the logits
            forbid(logits, self.grammar.masks([row.matcher for row in rows]))
        tokens = self.pick(logits)
        log_probabilities = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
        tokens, log_probabilities = torch.stack([tokens.double(), log_probabilities.double()]).tolist()
        for row, token, log_probability in zip(rows, map(int, tokens), log_probabilities, strict=True):
            if not row.over:  # its lines may have said so while this step was under way
                row.take(token, log_probability)
                self.said.append(row)

    def _write_down(self):
        """Note what was chosen. Returns the rows whose answers are whole."""
        rows, self.said = self.said, []
        for row in rows:
            row.note(self.pieces)
        return [row for row in rows if row.over]

    def _parts(self, waiting):
        """(the parts of the next step, by slots; rows that have ended without one).

        Each row's next token, then of the prompts as much as there is room for.
        """
        for row in [*self.rows]:
            while row.first is not None and not self.slots.give(row, len(row.ids) - self.shared):
                last = self.rows.pop()  # has the least to lose; it goes on, or begins again, when there is room
                self.slots.release(last)
                waiting.appendleft(last)
        room, parts, ended = self.step_tokens, [], []
        for row in sorted(self.rows, key=lambda row: len(row.ids) - row.read > 1):
            if count := min(len(row.ids) - row.read, self.most, room):
                parts.append(Part(row, count))
                room -= count
        while waiting and len(self.rows) < self.at_once and room:
            row = waiting[0]
            self._begin(row)
            if row.over:
                ended.append(waiting.popleft())
                continue
            if not self.slots.give(row, min(len(row.ids) + MARGIN, row.limit) - self.shared):
                break
            row.read = self.shared
            self.rows.append(waiting.popleft())
            parts.append(Part(row, min(len(row.ids) - row.read, self.most, room)))
            room -= parts[-1].count
        return sorted(self._filled(parts), key=lambda part: part.row.first), ended

    def _filled(self, parts):
        """A step of a captured size without the last tokens of prompts, where these would make it one that is half empty."""
        total = sum(part.count for part in parts)
        lower, upper = self.step.size_around(total) if self.behind else (total, total)
        answered = sum(part.count == 1 for part in parts)
        excess = total - lower if lower > answered and total - lower < FILLING * (upper - lower) else 0
        while excess:
            row, count = parts.pop()
            if count > excess:
                parts.append(Part(row, count - excess))
            excess -= min(count, excess)
        return parts

    def _begin(self, row):
        """Begin a row's answer, once its matcher is there."""
        if self.grammar and row.matcher is None:
            row.matcher = self.grammar.begin_matcher(row.text)
        if not row.begun:
            row.begin(self.pieces)

    def _begin_ahead(self, waiting):
        """Let threads make the matchers of the rows that come next."""
        for row in islice(waiting, self.at_once if self.grammar else 0):
            if row.matcher is None:
                row.matcher = self.grammar.begin_matcher(row.text)
            elif not row.begun and row.matcher.done():
                row.begin(self.pieces)

    def _close_up(self):
        """A dense step computes all slots up to the last one in use, so many gaps cost more than to move rows."""
        last = max((row.first for row in self.rows), default=0)
        if self.slots.by_heads and last - len(self.rows) > len(self.rows) // 4:
            self.slots.close_up(self.rows)


def common_prefix(prompts):
    """What all prompts begin with, without the last token of any; nothing where there is only one."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    longest = min(map(len, prompts)) - 1
    return first[: next((i for i in range(longest) if first[i] != last[i]), longest)]
