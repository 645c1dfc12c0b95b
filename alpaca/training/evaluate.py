"""F1 of a model's own answers while it is being trained."""

from contextlib import closing

import torch.distributed as dist

from alpaca.answering.grammar import AnswerGrammar
from alpaca.answering.texts import Answering
from alpaca.answering.windows import cutter
from alpaca.common.console import progress
from alpaca.scoring.metrics import score
from alpaca.training.lora import for_answers


def evaluate_f1(model, tokenizer, examples, args, facts, stop=lambda: False):
    """Micro-F1 by string of a PEFT model that is being trained: what test.py will say of its adapter on these examples.

    args, facts: the training's, as they will stand beside the adapter; they say which texts are cut into windows. None
    where `stop`, asked at each step, ended it on a rank. Every rank answers its part. The LoRA is not merged, so that no
    weight is copied. In half precision that, and the parts of several ranks, round differently than test.py's answers.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    with for_answers(model):
        mine, labels, rows = examples[rank::ranks], facts["labels"], []
        cut, grammar = cutter(model, tokenizer, args, facts), AnswerGrammar(tokenizer, labels)
        answer = Answering(model, tokenizer, cut, labels, grammar=grammar)
        with progress(total=len(mine), desc="生成", unit="条") as bar, closing(answer.in_turn(mine)) as steps:
            for ended in steps:
                if stop():
                    break
                rows += ended
                bar.update(len(ended))
        rows = rows if len(rows) == len(mine) else None
    parts = [rows]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, rows)
    if None in parts:
        return None
    return score([row for part in parts for row in part], labels)["string"]["micro"]["f1"]
