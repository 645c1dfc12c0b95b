"""The rows that are being answered together: their places in one cache, one forward for all of them, one token each."""

from collections import namedtuple

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alpaca.answering.grammar import checked, forbid
from alpaca.answering.memory import free_memory
from dataset import EOS, NO_ENTITY

# text: None if the prompt did not fit. ended: False if max_new_tokens or the model's positions cut it off. repeated,
# abandoned: how many lines a grammar left out since they were there already, or had no type. confidences: for each line
# of text the mean log-probability of its tokens; log_probability: that of all the model said. Both under the grammar.
Answer = namedtuple("Answer", "text ended repeated abandoned confidences log_probability")


NO_ANSWER = Answer(None, False, 0, 0, [], None)
PLACES = 64  # tokens by which the cache grows
PROMPT_TOKENS = 8192  # prompts are read in portions of so many tokens: their activations need memory as well
MEMORY_SHARE = 0.4  # of the free memory, for the cache; while it grows, the old one is still there


def reach(rows):
    """How many places of the cache are taken when what it lacks of these rows is computed, in one step."""
    return max((row.read for row in rows), default=0) + max((len(row.ids) - row.read for row in rows), default=0)


class Row:
    """A prompt on its way to an answer. ids: its tokens and the answer's; `read` of them stand in the cache."""

    def __init__(self, number, prompt, limit, text=None):
        self.number, self.prompt, self.limit, self.text = number, prompt, limit, text

    def start(self, read, matcher):
        """Begin the answer. `read` tokens of the prompt, which all rows share, are in the cache already."""
        self.ids, self.read, self.matcher = list(self.prompt), read, matcher
        self.lines, self.scores, self.log_probability = [b""], [[]], 0.0  # scores: of the tokens of each line
        self.ended, self.stale = False, 0

    @property
    def over(self):
        return self.ended or len(self.ids) >= self.limit

    def add(self, token, log_probability, piece):
        """Go on with a token of the answer; `piece`: what it adds to the text, as bytes."""
        self.log_probability += log_probability
        if token == EOS:
            self.ended = True
            return
        if self.matcher:
            self.matcher.consume_token(token)
            checked(self.matcher)
            piece = piece[1:] if len(self.ids) == len(self.prompt) else piece  # the answer begins with a dummy space
        self.ids.append(token)
        for i, part in enumerate(piece.split(b"\n")):
            if i:
                self._end_line()
            if part:
                self.lines[-1] += part
                self.scores[-1].append(log_probability)

    def _end_line(self):
        """Begin another line; under a grammar, two lines in a row that were there before are the end: a loop."""
        self.stale = self.stale + 1 if self.lines[-1] in self.lines[:-1] else 0
        self.ended = self.matcher is not None and self.stale == 2
        self.lines.append(b"")
        self.scores.append([])

    def add_forced(self, pieces):
        """Go on with the tokens that the grammar leaves no choice about: their probability is 1."""
        for token in self.matcher.compute_ff_tokens() if self.matcher and not self.over else []:
            if not self.over:
                self.add(token, 0.0, pieces[token])

    def said(self, tokenizer, grammar):
        """What of the text is certain while the answer goes on."""
        if not grammar:
            return tokenizer.decode(self.ids[len(self.prompt) :]).rstrip("\ufffd")
        return b"\n".join(dict.fromkeys(filter(grammar.states_entity, self.lines[:-1]))).decode()

    def answer(self, tokenizer, grammar):
        means = [sum(scores) / len(scores) if scores else 0.0 for scores in self.scores]
        if not grammar:
            text = tokenizer.decode(self.ids[len(self.prompt) :])
            return Answer(text, self.ended, 0, 0, means, self.log_probability)
        confidences, repeated, abandoned = {}, 0, 0
        for i, (line, mean) in enumerate(zip(self.lines, means, strict=True)):
            if line in confidences:
                repeated += 1
            elif grammar.states_entity(line):
                confidences[line] = mean
            elif line and line.decode(errors="replace") != NO_ENTITY and (self.ended or i < len(self.lines) - 1):
                abandoned += 1
        text = b"\n".join(confidences).decode() or NO_ENTITY
        return Answer(text, self.ended, repeated, abandoned, list(confidences.values()), self.log_probability)


class Batch:
    """The rows that are being answered, and their cache: [layers, key or value, rows, heads, places, size].

    Row i of `rows` has row i of the cache. To transformers' layers a Batch is what they call past_key_values: all that
    they ask of it is `update`.
    """

    def __init__(self, model, tokenizer, limit, grammar, prefix, pick=None):
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's, or the bare one
        self.body, self.head, config = causal.model, causal.lm_head, causal.config
        self.pieces, self.limit, self.grammar = tokenizer.token_bytes, limit, grammar
        self.pick = pick or (lambda logits: logits.max(dim=-1).indices)
        self.device, dtype = self.head.weight.device, self.head.weight.dtype
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, 0, size)
        self.prefix = torch.zeros(shape, dtype=dtype, device=self.device)
        self.rows, self.cache = [], self.prefix[:, :, :0]
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * size * dtype.itemsize
        self.places_in_all = int(MEMORY_SHARE * free_memory(self.device)) // token_bytes
        # A GPU reads its weights once a step, however many tokens they are for; a CPU pays for every token.
        self.skips_forced = self.device.type != "cpu"
        if prefix:
            self._read_prefix(prefix)

    @torch.inference_mode()
    def _read_prefix(self, ids):
        row = Row(-1, ids, len(ids))
        row.start(0, None)
        self.rows = [row]
        self._fit(len(ids))
        self._read(self.rows)
        self.prefix, self.rows = self.cache[:, :, :1, :, : len(ids)].clone(), []
        self.cache = self.cache[:, :, :0, :, :0]

    @torch.inference_mode()
    def advance(self, waiting):
        """Let waiting rows (a deque of Row) in, if it is time, and give them their first token; else give every row its
        next. Returns the rows that have ended. Rows for which the cache becomes too small begin again later."""
        count = len(self.rows)
        self._admit(waiting)
        first = count if len(self.rows) > count else 0
        rows = self.rows[first:]
        waiting.extendleft(self._fit(max(reach(rows), reach(self.rows[:first]))))  # the others keep their places
        rows = self.rows[first:] or self.rows
        logits = self._read(rows)
        if self.grammar:  # a GPU is still computing the logits
            forbid(logits, self.grammar.masks([row.matcher for row in rows]))
        tokens = self.pick(logits)
        log_probabilities = (logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)).tolist()
        for row, token, log_probability in zip(rows, tokens.tolist(), log_probabilities, strict=True):
            row.read = len(row.ids)
            if not row.over:  # forced tokens may have been its last
                row.add(token, log_probability, self.pieces[token])
            if self.skips_forced:
                row.add_forced(self.pieces)
        ended = [row for row in rows if row.over]
        self._leave([row.over for row in self.rows])
        return ended

    def _capacity(self, longest):
        """How many rows fit into memory if the longest has so many tokens, and how many places each of them gets."""
        places = (longest // PLACES + 2) * PLACES
        return max(1, min(self.limit, self.places_in_all // places)), places

    def _admit(self, waiting):
        """Start as many waiting rows as there is room for, if there is for a quarter of the batch."""
        capacity, new = self.cache.shape[2], []
        if 4 * (capacity - len(self.rows)) < capacity:
            return
        shared = self.prefix.shape[4]
        longest = max((len(row.ids) for row in self.rows), default=0)
        portion = 0
        while waiting:
            longest = max(longest, len(waiting[0].prompt))
            portion = max(portion, len(waiting[0].prompt) - shared)
            full = len(self.rows) + len(new) >= self._capacity(longest)[0]
            if (self.rows or new) and (full or portion * (len(new) + 1) > PROMPT_TOKENS):
                break
            new.append(waiting.popleft())
        matchers = self.grammar.matchers([row.text for row in new]) if self.grammar else [None] * len(new)
        for row, matcher in zip(new, matchers, strict=True):
            row.start(shared, matcher)
            row.add_forced(self.pieces)
        self.rows += new

    def _fit(self, longest):
        """Make the cache large enough, or smaller where half is enough; returns the rows that have no place any more."""
        count, places = self._capacity(longest)
        old = self.cache
        if longest <= old.shape[4] < 2 * places and len(self.rows) <= old.shape[2]:
            return []
        self.rows, evicted = self.rows[:count], self.rows[count:]
        # Zeros: what a row has not written yet is multiplied by 0, and 0 times not-a-number would not be 0.
        self.cache = old.new_zeros(*old.shape[:2], count, old.shape[3], places, old.shape[5])
        self.cache[:, :, :, :, : self.prefix.shape[4]] = self.prefix
        kept, rows = min(places, old.shape[4]), min(len(self.rows), old.shape[2])
        self.cache[:, :, :rows, :, :kept] = old[:, :, :rows, :, :kept]
        return evicted

    def _read(self, rows):
        """Compute what the cache lacks of `rows`, the last of self.rows: float32 logits [rows, vocabulary] of what
        follows each row's last token."""
        counts = [len(row.ids) - row.read for row in rows]
        longest, first = max(counts), len(self.rows) - len(rows)
        # Behind a row's last token stand tokens of no meaning; what they leave in the cache is written over later.
        ids = [row.ids[row.read :] + [0] * (longest - count) for row, count in zip(rows, counts, strict=True)]
        starts = [row.read for row in rows]
        ids, starts, counts = (torch.tensor(values, device=self.device) for values in (ids, starts, counts))
        positions = starts.unsqueeze(1) + torch.arange(longest, device=self.device)
        # What `update` needs: the rows' part of the cache, up to a multiple of 8, which kernels like, and in it the
        # places of the new tokens.
        _, _, _, heads, places, _ = self.cache.shape
        visible = min(-(-max(row.read + longest for row in rows) // 8) * 8, places)
        self.part = slice(first, len(self.rows)), slice(None), slice(visible)
        own = torch.arange(first * heads, len(self.rows) * heads, device=self.device).view(-1, heads, 1)
        self.written = (own * places + positions.unsqueeze(1)).flatten()
        mask = torch.arange(visible, device=self.device) <= positions.unsqueeze(-1)
        implementation, self.body.config._attn_implementation = self.body.config._attn_implementation, "rows"
        try:
            hidden = self.body(
                input_ids=ids, attention_mask=mask.unsqueeze(1), position_ids=positions, past_key_values=self
            ).last_hidden_state
        finally:
            self.body.config._attn_implementation = implementation
        hidden = hidden[torch.arange(len(rows), device=self.device), counts - 1]
        return self.head(hidden)[:, : len(self.pieces)].float()

    def update(self, key, value, layer, *args, **kwargs):
        """Keep new keys and values, [rows, heads, tokens, size], and return all that the rows have, shaped alike."""
        for kept, new in zip(self.cache[layer], (key, value), strict=True):
            kept.flatten(0, 2).index_copy_(0, self.written, new.flatten(0, 2))
        return self.cache[layer, 0][self.part], self.cache[layer, 1][self.part]

    def _leave(self, over):
        """Let rows go: the last ones take their places in the cache. over: a bool for each row."""
        staying = over.count(False)
        gaps = [i for i in range(staying) if over[i]]
        movers = [i for i in range(staying, len(over)) if not over[i]]
        if gaps:
            self.cache[:, :, gaps] = self.cache[:, :, movers]
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows[gap] = self.rows[mover]
        del self.rows[staying:]


def row_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention interface, [rows, heads, tokens, size] -> [rows, tokens, heads, size], without gradients."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # torch 2.13's kernel takes twice as long as these products (64 rows of 152 tokens, 4 heads)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (key, value))
    scores = (query @ key.mT * scaling).masked_fill_(~attention_mask, float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None
