"""Prompts -> answers: greedy, free-running generation. Never teacher forcing.

What prompts begin with together is computed once. Up to `batch_size` rows are answered at a time; a row that has ended
leaves at once and waiting prompts take its place, so that nothing waits for the longest answer. A row's tokens stand in
the cache from position 0 on without padding, and a token sees the positions up to its own: which rows are computed
together changes no answer but by rounding (in float32 none, which a test asserts).
"""

import re
from collections import deque
from contextlib import closing, nullcontext

import torch

from alpaca.answering.engine import Engine
from alpaca.answering.row import NO_ANSWER, Row
from alpaca.common.console import progress
from dataset import BOS, PROMPT, UNK

HEADINGS = re.findall("### .*?:", PROMPT)
AUTO_ROWS = {"cuda": 128, "cpu": 64}  # 256 of a 7B were 4 % faster at most, and took 15 GiB more
SORTED_BATCHES = 4  # prompts are sorted by length within so many batches


def generate(model, tokenizer, prompts, max_new_tokens, batch_size, grammar=None, texts=None, standby=None):
    """Yield the greedy Answer of each prompt ([bos] + ids, lists of int), in the order given.

    With a grammar (grammar.py) an answer can only say what its text allows. A prompt that fills the model's
    positions gets NO_ANSWER. At most batch_size rows (auto: what is fast on the device) are computed at a time, fewer
    where their cache does not fit into the free memory. standby: for more than one call with a model (standby.py).
    """
    batch_size = AUTO_ROWS.get(model.device.type, 64) if batch_size == "auto" else int(batch_size)
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
    at_once = standby.at_once if standby else min(batch_size, len(rows))
    engine = Engine(model, tokenizer, rows, at_once, grammar, standby=standby) if rows else None
    answers = {}
    with progress(total=len(rows), desc="生成", unit="条") as bar, closing(engine) if engine else nullcontext():
        for i in range(len(prompts)):
            while fits[i] and i not in answers:
                for row in engine.advance(waiting):
                    answers[row.number] = row.answer(tokenizer, grammar)
                    bar.update()
            yield answers.pop(i, NO_ANSWER)


def stream(model, tokenizer, prompt, max_new_tokens, grammar=None, text=None, pick=None, standby=None):
    """Yield what the answer to one prompt ([bos] + ids) says so far, whenever it has grown, as str.

    Each begins with the one before, the last is the text of generate's Answer. A character whose bytes are not all
    there yet is held back; under a grammar only whole lines are shown. Nothing where the prompt fills the model's
    positions. `pick`: chooses each token, as `sampler` makes it; None: the likeliest one.
    """
    positions = model.config.max_position_embeddings
    if len(prompt) >= positions:
        return
    row = Row(0, prompt, min(len(prompt) + max_new_tokens, positions), text)
    at_once, waiting, shown = standby.at_once if standby else 1, deque([row]), None
    with closing(Engine(model, tokenizer, [row], at_once, grammar, pick, standby)) as engine:
        while not engine.advance(waiting):
            said = row.certain(tokenizer, grammar)
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
