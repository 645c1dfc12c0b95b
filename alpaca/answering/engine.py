"""Which rows a step computes: those being answered, one token each, and of new ones the prompts, as room and slots allow."""

import math
from itertools import islice

import torch

from alpaca.answering.attention import LONGEST_PART, flash_works
from alpaca.answering.grammar import forbid
from alpaca.answering.graphs import CapturedStepper, step_sizes
from alpaca.answering.prefixes import begins, find_prefixes
from alpaca.answering.row import Row
from alpaca.answering.slots import Slots, device_runs
from alpaca.answering.standby import adapter_in_use
from alpaca.answering.step import Part, Stepper
from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.models.layers import positions_of

FILLING = 0.75  # of the way from one captured size to the next: a step that goes no further waits with what is beyond
MARGIN = 8  # places that a new row gets beyond its prompt, so that it need not move at once
# To capture a size costs as much time as three steps that are launched operation by operation, and a captured step saves
# four fifths of one. So it is done where so many steps are still to come for each size; a row is taken for so many.
CAPTURE_STEPS, ROW_STEPS = 8, 8
COMPILE_ROWS = 16384  # to compile all sizes takes some 10 s, and saves 0.55 to 0.74 ms a row of a 7B (H100)
NO_TOKEN = -1  # of a row that is never computed
# Where not all rows are known, so few are answered at first that the first of them has its answer soon: until then, but
# for no more than so many steps.
FIRST_ROWS, FIRST_STEPS = 8, 32
STEP_TOKENS = 4096  # in a step that is not captured: their activations need memory as well


class Engine:
    """The rows that are being answered, at most `at_once` of them at a time.

    rows: all that will be; with `expected`, how many there will be about, only the first of them. Steps are captured at
    once where all rows are known, else once the first has its answer. The engine keeps no row that waits.
    A grammar holds the answers to the rows that have a text; others are free.
    The model is merged, or PEFT's layers compute with the adapter in use, or without. standby: where slots and captured
    steps come from, and go back to with `close`.
    Where memory runs out they become fewer, and what was being answered goes on later. UserError if there is none for one.
    """

    def __init__(self, model, tokenizer, rows, at_once, grammar=None, pick=None, standby=None, expected=None):
        self.model, self.grammar, self.at_once = model, grammar, max(1, at_once)
        self.pieces = len(tokenizer.token_bytes)  # logits may be wider
        self.pick = pick or (lambda logits: logits.max(dim=-1).indices)
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's, or the bare one
        self.device, self.dtype, self.config = causal.lm_head.weight.device, causal.lm_head.weight.dtype, causal.config
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        self.runs = device_runs(causal.model.layers)
        self.flash = all(flash_works(device, self.dtype, size) for device, _ in self.runs)
        # they have no text: an answer without a grammar would hold something that nobody can read
        self.silent = torch.tensor(
            sorted({*tokenizer.controls.values()} - tokenizer.ends), dtype=torch.long, device=self.device
        )
        self.most_tokens, self.standby, self.expected, self.capture_later = STEP_TOKENS, standby, expected, False
        self.first_steps = FIRST_STEPS if expected else 0  # still to come
        # said: rows whose last token is not written down yet; behind: that waits until the next step is under way
        self.rows, self.ended, self.said, self.behind, self.answered = [], [], [], False, False
        self._make_room(rows)

    @property
    def busy(self):
        return bool(self.rows or self.said)

    @property
    def most_rows(self):
        """How many rows may be answered in the next step."""
        return min(FIRST_ROWS, self.at_once) if self.first_steps else self.at_once

    def give_prefix(self, row):
        """Let a row that was not known before begin with the longest prefix that fits it."""
        fits = [prefix for prefix in self.slots.prefixes if begins(row.prompt, prefix.tokens)]
        row.prefix = max(fits, key=lambda prefix: len(prefix.tokens))

    def drop(self, is_unwanted):
        """Answer some of the rows no further: those for which the function is_unwanted(row) is true."""
        for row in self.rows:
            if is_unwanted(row):
                self.slots.release(row)
        self.rows, self.said = ([row for row in rows if not is_unwanted(row)] for rows in (self.rows, self.said))

    def _make_room(self, rows):
        """Slots, prefixes and steps for these rows."""
        while not self._tried(self._prepare, rows):
            self._shrink()

    def _tried(self, function, rows):
        """Whether there was the memory for it."""
        try:
            function(rows)
        except torch.OutOfMemoryError:
            return False
        return True

    def _shrink(self):
        """Answer fewer rows at once from now on."""
        self.step = self.slots = None  # their memory
        self.captured = {}
        if self.at_once == 1:
            raise UserError(
                "there is no memory left for a single answer; free some, or give a smaller --max_new_tokens"
            )
        self.at_once, self.most_tokens = self.at_once // 2, max(self.most_tokens // 2, LONGEST_PART)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"内存不够，改为最多同时回答 {self.at_once} 条")

    @torch.inference_mode()
    def _prepare(self, rows):
        if self.expected:
            rows = [*rows, Row(None, [NO_TOKEN], 2)]  # begins as no prompt does: so there is a prefix for any later one
        prefixes, of_rows = find_prefixes([row.prompt for row in rows])
        for row, prefix in zip(rows, of_rows, strict=True):
            row.prefix = prefix
        self.slots, self.captured = self.standby.take(rows, prefixes) if self.standby else (None, {})
        if not self.slots:
            with torch.inference_mode(
                False
            ):  # an operation that writes into them wants tensors that count their versions
                spare = int(self.flash)
                longest = positions_of(self.config) if self.expected else None
                kind = self.config, self.runs, self.dtype
                self.slots = Slots(*kind, rows, self.at_once, not self.flash, spare, longest)
        self.at_once = min(self.at_once, self.slots.count)
        self.most = LONGEST_PART if self.flash else self.most_tokens  # tokens of one row in a step
        self.step, self.step_tokens, self.behind = Stepper(self.model, self.slots), self.most_tokens, False
        held = [self._read(prefix) for prefix in prefixes if prefix.tokens]
        if held:
            self.slots.share(prefixes, held)
        self.capture_later = bool(self.expected)
        if not self.capture_later:
            self.expect(len(rows))

    @torch.inference_mode()
    def expect(self, count):
        """So many more rows will come: steps are captured if they, and those that came before, repay it."""
        adapter = adapter_in_use(self.model)
        if self.standby:
            self.standby.rows[adapter] += count
            count = self.standby.rows[adapter]
        steps = count * ROW_STEPS / self.at_once
        enough = steps >= CAPTURE_STEPS * len(step_sizes(self.at_once))
        if self.flash and len(self.runs) == 1 and adapter not in self.captured and enough:
            self.capture(adapter, count >= COMPILE_ROWS)
        if adapter in self.captured:
            self.step, self.behind = self.captured[adapter], True
            self.step_tokens = self.step.sizes[-1]

    def capture(self, adapter, compiled):
        try:
            self.captured[adapter] = CapturedStepper(self.model, self.slots, self.at_once, compiled)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.compile's errors are RuntimeErrors too
            say(f"CUDA graph 不可用，改为逐个算子计算: {str(error).splitlines()[0][:200]}")

    def close(self):
        """Nothing is asked any more."""
        if self.standby and self.slots:
            self.standby.put(self.slots, self.captured)

    def _read(self, prefix):
        """The keys and values of a prefix."""
        row = Row(-1, prefix.tokens, len(prefix.tokens))
        assert self.slots.give(row, len(row.ids))  # they are all free
        while row.read < len(row.ids):
            count = min(len(row.ids) - row.read, self.most)
            self.step([Part(row, count)])
            row.read += count
        return self.slots.take_out(row)

    def advance(self, waiting):
        """One step; waiting rows (a deque of Row) come in as there is room. Returns the rows that have ended."""
        if not self._tried(self._advance, waiting):
            self._shrink()
            for row in self.rows:
                row.first, row.width, row.read = None, 0, 0
            waiting.extendleft(row for row in reversed(self.rows) if not row.over)
            self.rows = []
            if waiting:
                self._make_room([*waiting])
        ended, self.ended = self.ended, []
        self.answered = self.answered or bool(ended)
        return ended

    @torch.inference_mode()
    def _advance(self, waiting):
        if self.capture_later and self.answered and not self.first_steps:
            self.capture_later = False
            self.expect(self.expected)
        parts = self._parts(waiting)
        logits = self.step(parts)[:, : self.pieces] if parts else None
        self._write_down()  # of the step before, while a GPU computes this one
        self._begin_ahead(waiting)
        for row, count in parts:
            row.read += count
        complete = [row for row, _ in parts if row.read == len(row.ids)]
        if complete:
            self.choose(complete, logits)
        if not self.behind:
            self._write_down()
        self.first_steps = max(0, self.first_steps - 1) if self.rows and not self.rows[0].over else 0
        for row in self.rows:
            if row.over:
                self.slots.release(row)
        self.rows = [row for row in self.rows if not row.over]
        self._close_up()

    def choose(self, rows, logits):
        """Take each row's next token."""
        held = [i for i, row in enumerate(rows) if row.matcher]
        if len(held) < len(rows):
            logits.index_fill_(1, self.silent, -math.inf)
        if held:  # a GPU is still computing the logits
            masks = self.grammar.masks([rows[i].matcher for i in held])
            if len(held) == len(rows):
                forbid(logits, masks)
            else:
                logits[held] = forbid(logits[held], masks)
        tokens = self.pick(logits)
        if any(row.given for row in rows):
            given = [row.given[len(row.ids) - len(row.prompt)] if row.given else -1 for row in rows]
            given = torch.tensor(given, device=tokens.device)
            tokens = torch.where(given < 0, tokens, given)
        log_probabilities = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
        tokens, log_probabilities = torch.stack([tokens.double(), log_probabilities.double()]).tolist()
        if any(map(math.isnan, log_probabilities)):
            raise UserError(
                f"{self.config.name_or_path}: the model computes NaN, not probabilities; its weights or the adapter's hold "
                "NaN or infinite numbers (get or train them again), or are too large for --precision=fp16"
            )
        for row, token, log_probability in zip(rows, map(int, tokens), log_probabilities, strict=True):
            if not row.over:  # its lines may have said so while this step was under way
                row.take(token, log_probability)
                self.said.append(row)

    def _write_down(self):
        """Note what was chosen; the rows whose answers are whole have ended."""
        rows, self.said = self.said, []
        for row in rows:
            row.note()
        self.ended += [row for row in rows if row.over]

    def _parts(self, waiting):
        """The parts of the next step, by prefixes and slots: each row's next token, then of the prompts as much as there
        is room for."""
        for row in [*self.rows]:
            while row.first is not None and not self.slots.give(row, row.own(len(row.ids))):
                last = self.rows.pop()  # has the least to lose; it goes on, or begins again, when there is room
                self.slots.release(last)
                waiting.appendleft(last)
        room, parts = self.step_tokens, []
        for row in sorted(self.rows, key=lambda row: len(row.ids) - row.read > 1):
            if count := min(len(row.ids) - row.read, self.most, room):
                parts.append(Part(row, count))
                room -= count
        while waiting and len(self.rows) < self.most_rows and room:
            row = waiting[0]
            self._begin(row)
            if row.over:
                self.ended.append(waiting.popleft())
                continue
            if not self.slots.give(row, row.own(min(len(row.ids) + MARGIN, row.limit))):
                break
            row.read = len(row.prefix.tokens)
            self.rows.append(waiting.popleft())
            parts.append(Part(row, min(len(row.ids) - row.read, self.most, room)))
            room -= parts[-1].count
        return sorted(self._filled(parts), key=lambda part: (part.row.prefix.number, part.row.first))

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
        if self.grammar and row.matcher is None and row.text is not None:
            row.matcher = self.grammar.begin_matcher(row.text)
        if not row.begun:
            row.begin()

    def _begin_ahead(self, waiting):
        """Let threads make the matchers of the rows that come next."""
        for row in islice(waiting, self.at_once if self.grammar else 0):
            if row.matcher is None and row.text is not None:
                row.matcher = self.grammar.begin_matcher(row.text)
            elif not row.begun and row.matcher and row.matcher.done():
                row.begin()

    def _close_up(self):
        """A dense step computes all slots up to the last one in use, so many gaps cost more than to move rows."""
        last = max((row.first for row in self.rows), default=0)
        if self.slots.by_heads and last - len(self.rows) > len(self.rows) // 4:
            self.slots.close_up(self.rows)
