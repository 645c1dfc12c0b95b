"""Prompts -> answers: greedy, free-running generation. Never teacher forcing.

What prompts begin with together is computed once. Up to `batch_size` rows are answered at a time; a row that has ended
leaves at once and waiting prompts take its place, so that nothing waits for the longest answer. A row's tokens stand in
the cache from position 0 on without padding, and a token sees the positions up to its own: which rows are computed
together changes no answer but by rounding (in float32 none, which a test asserts).
"""

import re
import time
from collections import deque
from contextlib import closing
from typing import NamedTuple

import torch

from alpaca.answering.engine import Engine
from alpaca.answering.prefixes import LEAST_ROWS
from alpaca.answering.row import NO_ANSWER, Row
from alpaca.common.console import progress
from alpaca.models.layers import positions_of

AUTO_ROWS = {"cuda": 128, "cpu": 64}  # 256 of a 7B were 4 % faster at most, and took 15 GiB more
IDLE_SECONDS = 0.01  # between two looks whether there are requests again
SORTED_BATCHES = 4  # prompts are sorted by length within so many batches


class Request(NamedTuple):
    """A prompt to answer."""

    key: object  # what its answer comes back with
    prompt: list  # [bos] + ids, of int
    text: str | None = None  # what a grammar lets the answer quote; None: the answer is free
    given: list | None = None  # the tokens of an answer that is only scored, up to its end, of int


def answer_requests(model, tokenizer, requests, max_new_tokens, batch_size, grammar=None, expected=None, standby=None):
    """Yield, after every step, [(key, Answer)] of the requests that have ended, in whatever order they do; often none.

    requests: an iterator of Requests; None from it means that there are none for now, which is no end. They are drawn as
    there is room, and nothing of one is kept once its answer is out. expected: how many there will be, about; without
    it, all are drawn at once. A prompt that fills the model's positions gets NO_ANSWER. At most batch_size rows (auto:
    what is fast on the device) are computed at a time, fewer where their cache does not fit into the free memory.
    standby: for more than one call with a model (standby.py).
    """
    batch_size = AUTO_ROWS.get(model.device.type, 64) if batch_size == "auto" else int(batch_size)
    requests, positions, chunk = iter(requests), positions_of(model.config), SORTED_BATCHES * batch_size
    most = batch_size if expected else None  # at first, so that the first answers are soon there
    engine, waiting, drawn, held, over = None, deque(), 0, [], False
    try:
        while True:
            if not over and not held and len(waiting) < (engine.most_rows if engine else batch_size):
                came, over = draw(requests, most)
                while not expected and not over:
                    more, over = draw(requests, None)
                    came += more
                # the first ones in their order, since the first answer is waited for
                together = 1 if expected and not drawn else chunk
                held, too_long = rows_of(came, tokenizer, max_new_tokens, positions, drawn, together)
                drawn, most = drawn + len(came), chunk if drawn else most
                yield [(key, NO_ANSWER) for key in too_long]
            busy = waiting or engine and engine.busy
            if held and (not busy or known_prefixes(engine, held)):
                if not engine or not known_prefixes(engine, held):
                    at_once = standby.at_once if standby else batch_size if expected else min(batch_size, len(held))
                    first = held + openings(engine)
                    engine = Engine(
                        model, tokenizer, first, at_once, grammar, None, standby, None if over else expected
                    )
                waiting.extend(held)
                held, first, busy = [], None, True
            if busy:
                yield [(row.number, row.answer(grammar)) for row in engine.advance(waiting)]
            elif over and not held:
                return
            elif not held:
                time.sleep(IDLE_SECONDS)
    finally:
        if engine:
            engine.close()


def draw(items, most):
    """(the next of an iterator's items, at most so many and up to a None; whether these are the last)."""
    drawn = []
    for item in items:
        if item is None:
            return drawn, False
        drawn.append(item)
        if len(drawn) == most:
            return drawn, False
    return drawn, True


def rows_of(requests, tokenizer, max_new_tokens, positions, drawn, chunk):
    """(the Rows of the requests that fit, the longest of a chunk first; the keys of the others). drawn: how many came
    before these."""
    numbered = [(i // chunk, r) for i, r in enumerate(requests, drawn) if len(r.prompt) < positions]
    # What is left when nothing waits any more is short.
    numbered.sort(key=lambda pair: (pair[0], -len(pair[1].prompt)))
    limits = [min(len(r.prompt) + (len(r.given) if r.given else max_new_tokens), positions) for _, r in numbered]
    rows = [
        Row(r.key, r.prompt, limit, tokenizer, r.text, r.given) for (_, r), limit in zip(numbered, limits, strict=True)
    ]
    return rows, [r.key for r in requests if len(r.prompt) >= positions]


def known_prefixes(engine, rows):
    """Give later rows their prefixes; whether most have one, so that no other engine is worth it."""
    for row in rows:
        engine.give_prefix(row)
    return 2 * sum(len(row.prefix.tokens) > 0 for row in rows) >= len(rows)


def openings(engine):
    """Rows that only say how prompts of an earlier engine began."""
    known = [list(prefix.tokens) for prefix in engine.slots.prefixes if prefix.tokens] if engine else []
    prompts = [tokens + [token] for tokens in known for token in range(LEAST_ROWS)]
    return [Row(None, prompt, len(prompt) + 1) for prompt in prompts]


def generate(model, tokenizer, prompts, max_new_tokens, batch_size, grammar=None, texts=None, standby=None):
    """Yield the greedy Answer of each prompt ([bos] + ids, lists of int), in the order given.

    With a grammar (grammar.py) an answer can only say what its text allows. Else as answer_requests.
    """
    requests = [Request(i, prompt, texts and texts[i]) for i, prompt in enumerate(prompts)]
    answers, number, options = {}, 0, {"grammar": grammar, "standby": standby}
    with progress(total=len(prompts), desc="生成", unit="条") as bar:
        for ended in answer_requests(model, tokenizer, requests, max_new_tokens, batch_size, **options):
            answers.update(ended)
            bar.update(len(ended))
            while number in answers:
                yield answers.pop(number)
                number += 1


def stream(model, tokenizer, prompt, max_new_tokens, grammar=None, text=None, pick=None, standby=None):
    """Yield what the answer to one prompt ([bos] + ids) says so far, whenever it has grown, as str.

    Each begins with the one before, the last is the text of generate's Answer. A character whose bytes are not all
    there yet is held back; under a grammar only whole lines are shown. Nothing where the prompt fills the model's
    positions. `pick`: chooses each token, as `sampler` makes it; None: the likeliest one.
    """
    positions = positions_of(model.config)
    if len(prompt) >= positions:
        return
    row = Row(0, prompt, min(len(prompt) + max_new_tokens, positions), tokenizer, text)
    at_once, waiting, shown = standby.at_once if standby else 1, deque([row]), None
    with closing(Engine(model, tokenizer, [row], at_once, grammar, pick, standby)) as engine:
        while not engine.advance(waiting):
            said = row.certain(grammar)
            if said != (shown or ""):
                yield (shown := said)
    said = row.answer(grammar).text
    if said != shown:
        yield said


def without_template(texts, template):
    """What `stream` yields up to where the model begins another prompt, which one does that does not know when to end.

    As `stream`: each text begins with the one before. What may yet become a heading of the template waits.
    """
    text = shown = None
    headings = template.headings
    for text in texts:
        if headings and (heading := re.search("|".join(map(re.escape, headings)), text)):
            text = text[: heading.start()]
            break
        waiting = next((h[:n] for h in headings for n in range(len(h), 0, -1) if text.endswith(h[:n])), "")
        said = text.removesuffix(waiting)
        if said != (shown or ""):
            yield (shown := said)
    if text != shown:
        yield text


def sampler(temperature, top_p, seed):
    """A function from float32 logits [rows, vocabulary] to a token for each row: the likeliest one at temperature 0, else
    drawn from the likeliest ones whose probabilities add up to top_p."""
    draw = torch.Generator().manual_seed(seed)

    def pick(logits):
        if temperature == 0:
            return logits.argmax(dim=-1)
        probabilities, tokens = (logits / temperature).softmax(dim=-1).cpu().sort(dim=-1, descending=True)
        probabilities[probabilities.cumsum(dim=-1) - probabilities >= top_p] = 0  # what comes before is enough
        return tokens.gather(1, probabilities.multinomial(1, generator=draw)).squeeze(1).to(logits.device)

    return pick
