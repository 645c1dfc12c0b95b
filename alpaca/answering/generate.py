"""Prompts -> answers: greedy, free-running generation. Never teacher forcing.

What all prompts begin with is computed once. Up to `batch_size` rows are answered at a time; a row that has ended
leaves at once and waiting prompts take its place, so that nothing waits for the longest answer. A row's tokens stand in
the cache from position 0 on without padding, and a token sees the positions up to its own: which rows are computed
together changes no answer but by rounding (in float32 none, which a test asserts).
"""

import re
from collections import deque, namedtuple
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alpaca.answering.grammar import AnswerGrammar, checked, forbid
from alpaca.common.console import progress
from alpaca.common.errors import UserError
from alpaca.scoring.metrics import score
from alpaca.training.lora import merged_lora
from dataset import BOS, EOS, NO_ENTITY, PROMPT, UNK, build_prompt, encode_prompts, gold_entities, locate, parse_answer

# text: None if the prompt did not fit. ended: False if max_new_tokens or the model's positions cut it off. repeated,
# abandoned: how many lines a grammar left out since they were there already, or had no type. confidences: for each line
# of text the mean log-probability of its tokens; log_probability: that of all the model said. Both under the grammar.
Answer = namedtuple("Answer", "text ended repeated abandoned confidences log_probability")
NO_ANSWER = Answer(None, False, 0, 0, [], None)

HEADINGS = re.findall("### .*?:", PROMPT)
SORTED_BATCHES = 4  # prompts are sorted by length within so many batches
PLACES = 64  # tokens by which the cache grows
PROMPT_TOKENS = 8192  # prompts are read in portions of so many tokens: their activations need memory as well
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
LIMITS = {  # controllers of a line of /proc/self/cgroup, v2 and v1 -> limit, usage, what of it caches files
    "": ("memory.max", "memory.current", "active_file", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file"),
}
MEMORY_SHARE = 0.4  # of the free memory, for the cache; while it grows, the old one is still there


def generate(model, tokenizer, prompts, max_new_tokens, batch_size, grammar=None, texts=None):
    """Yield the greedy Answer of each prompt ([bos] + ids, lists of int), in the order given.

    With a grammar (constraint.py) an answer can only say what its text allows. A prompt that fills the model's
    positions gets NO_ANSWER. At most batch_size rows are computed at a time, fewer where their cache does not fit into
    the free memory.
    """
    positions = model.config.max_position_embeddings
    fits = [len(prompt) < positions for prompt in prompts]
    rows = [
        Row(i, prompt, min(len(prompt) + max_new_tokens, positions), texts and texts[i])
        for i, prompt in enumerate(prompts)
        if fits[i]
    ]
    # The longest of a chunk first: what is left when nothing waits any more is short.
    chunk = SORTED_BATCHES * batch_size
    waiting = deque(sorted(rows, key=lambda row: (row.number // chunk, -len(row.prompt))))
    batch = Batch(model, tokenizer, min(batch_size, len(rows)), grammar, common_prefix([row.prompt for row in rows]))
    answers = {}
    with progress(total=len(rows), desc="生成", unit="条") as bar:
        for i in range(len(prompts)):
            while fits[i] and i not in answers:
                for row in batch.advance(waiting):
                    answers[row.number] = row.answer(tokenizer, grammar)
                    bar.update()
            yield answers.pop(i, NO_ANSWER)


def stream(model, tokenizer, prompt, max_new_tokens, grammar=None, text=None, pick=None):
    """Yield what the answer to one prompt ([bos] + ids) says so far, whenever it has grown, as str.

    Each begins with the one before, the last is the text of generate's Answer. A character whose bytes are not all
    there yet is held back; under a grammar only whole lines are shown. Nothing where the prompt fills the model's
    positions. `pick`: chooses each token, as `sampler` makes it; None: the likeliest one.
    """
    positions = model.config.max_position_embeddings
    if len(prompt) >= positions:
        return
    row = Row(0, prompt, min(len(prompt) + max_new_tokens, positions), text)
    batch, waiting, shown = Batch(model, tokenizer, 1, grammar, [], pick), deque([row]), None
    while not batch.advance(waiting):
        said = row.said(tokenizer, grammar)
        if said != (shown or ""):
            yield (shown := said)
    said = row.answer(tokenizer, grammar).text
    if said != shown:
        yield said


def without_template(texts):
    """What `stream` yields up to where the model begins another prompt, which one does that does not know when to end.

    As `stream`: each text begins with the one before. What may yet become a heading of the template waits.
    """
    text = shown = None
    for text in texts:
        if heading := re.search("|".join(HEADINGS), text):
            text = text[: heading.start()]
            break
        waiting = next((h[:n] for h in HEADINGS for n in range(len(h), 0, -1) if text.endswith(h[:n])), "")
        said = text.removesuffix(waiting)
        if said != (shown or ""):
            yield (shown := said)
    if text != shown:
        yield text


def sampler(tokenizer, temperature, top_p, seed):
    """A function from float32 logits [rows, vocabulary] to a token for each row: the likeliest one at temperature 0, else
    drawn from the likeliest ones whose probabilities add up to top_p. Never one that has no text (bos, unk, pad)."""
    without_text = [BOS, UNK, tokenizer.pad_token_id]
    draw = torch.Generator().manual_seed(seed)

    def pick(logits):
        logits[:, without_text] = float("-inf")
        if temperature == 0:
            return logits.argmax(dim=-1)
        probabilities, tokens = (logits / temperature).softmax(dim=-1).cpu().sort(dim=-1, descending=True)
        probabilities[probabilities.cumsum(dim=-1) - probabilities >= top_p] = 0  # what comes before is enough
        return tokens.gather(1, probabilities.multinomial(1, generator=draw)).squeeze(1).to(logits.device)

    return pick


def common_prefix(prompts):
    """What all prompts begin with, without the last token of any; nothing where there is only one."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    longest = min(map(len, prompts)) - 1
    return first[: next((i for i in range(longest) if first[i] != last[i]), longest)]


def reach(rows):
    """How many places of the cache are taken when what it lacks of these rows is computed, in one step."""
    return max((row.read for row in rows), default=0) + max((len(row.ids) - row.read for row in rows), default=0)


def free_memory(device):
    """Bytes that can still be allocated on the device, here within what a container or a batch job may use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = (PROC / "meminfo").read_text(encoding="utf-8").splitlines()
    machine = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([machine, *left_by_cgroups()]))


def left_by_cgroups():
    """Yield the bytes that the limit of each control group, v1 or v2, of this process still allows: a container's, a
    batch job's. What caches files is free, as it is in MemAvailable. A container may not see the path, but its own root."""
    file = PROC / "self/cgroup"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        _, controllers, path = line.split(":", 2)
        group = CGROUPS / controllers / path[1:]
        for folder in (group, *group.parents) if controllers in LIMITS else ():
            with suppress(OSError, ValueError):  # no such group here; no limit, which v2 calls max
                limit, used = (int((folder / name).read_text(encoding="utf-8")) for name in LIMITS[controllers][:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
                yield limit - used + sum(int(stat[name]) for name in LIMITS[controllers][2:])


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


AttentionInterface.register("rows", row_attention)


# ---------------------------------------------------------------------------------------------------------------------
# answers -> rows of predictions.jsonl


def make_grammar(constrained, adapter, tokenizer, labels):
    """`--constrained` -> the AnswerGrammar of all answers, or None. auto: with an adapter that was trained on entities."""
    if constrained == "False" or constrained == "auto" and not (adapter and labels):
        return None
    if not labels:
        raise UserError(
            "--constrained=True: no entity types are known here; give data whose answers are 实体_类型 lines"
        )
    return AnswerGrammar(tokenizer, labels)


def predict_rows(model, tokenizer, examples, labels, max_new_tokens=512, batch_size=64, grammar=None):
    """Yield the row of predictions.jsonl of each example (dataset.read_examples), in order.

    A row: {"text", "answer", "prediction", "entities", "log_probability"}, "gold" where there is a right answer and
    "problems" where there are any. `gold` (exact spans) and `problems` (counts) let metrics be recomputed from the file.
    labels=None: another task than NER. Its rows have an "instruct", and neither entities nor gold.
    """
    prompts = encode_prompts(tokenizer, [build_prompt(e["instruct"], e["query"]) for e in examples])
    texts = [example["text"] for example in examples]
    answers = generate(model, tokenizer, prompts, max_new_tokens, batch_size, grammar, texts)
    for example, answer in zip(examples, answers, strict=True):
        yield _row(example, answer, labels)


def evaluate_f1(model, tokenizer, examples, labels):
    """Micro-F1 by string of a PEFT model that is being trained: what test.py will say of its adapter on these examples.

    Every rank answers its part. In half precision the parts of several ranks round differently than test.py's batches.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    with merged_lora(model):
        mine = examples[rank::ranks]
        rows = list(predict_rows(model, tokenizer, mine, labels, grammar=AnswerGrammar(tokenizer, labels)))
    parts = [rows]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, rows)
    return score([row for part in parts for row in part], labels)["string"]["micro"]["f1"]


def _row(example, answer, labels):
    ner = labels is not None
    parsed = parse_answer((ner and answer.text) or "", example["text"], labels)
    row = {
        **({} if ner else {"instruct": example["instruct"]}),
        "text": example["text"],
        "answer": example["answer"],
        "prediction": answer.text,
        "entities": locate(example["text"], parsed.entities),
    }
    if answer.text is not None:
        lines = [line.replace("\r", "") for line in answer.text.split("\n")]
        confidences = dict(reversed(list(zip(lines, answer.confidences, strict=False))))  # of a line's first occurrence
        for entity in row["entities"]:
            entity["confidence"] = round(confidences[f"{entity['entity']}_{entity['type']}"], 4)
        row["log_probability"] = round(answer.log_probability, 4)
    if ner and example["answer"] is not None:
        row["gold"] = gold_entities(example)
    problems = {name: len(getattr(parsed, name)) for name in ("malformed", "unknown_type", "not_in_text", "repeated")}
    problems["repeated"] += answer.repeated
    problems |= {"abandoned": answer.abandoned, "cut": int(answer.text is not None and not answer.ended)}
    problems = {name: count for name, count in problems.items() if count}
    return {**row, "problems": problems} if problems else row
