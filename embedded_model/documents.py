"""What each stage of the pretraining reads: documents, and the rows of token ids that they are packed into."""

import numpy as np

from alpaca.models.templates import TEMPLATES, message_of
from embedded_model.rough_text import RoughTextMaker
from embedded_model.tasks import any_task
from embedded_model.text_maker import any_text, plain_text

ROW_LENGTH = 513  # tokens: 512 inputs, each with the token that follows it
NO_LOSS = 0x4000  # set in a token id of a row: the token is read, but not predicted
# The fraction of the tasks whose text and question are predicted too. The small network is to learn the answers first.
PREDICTED_QUESTIONS = 0.3
# What a stage reads, as fractions. text: documents of plain text, the others are tasks. framed: tasks in the project's
# prompt, the others stand in a shorter one, which saves tokens. base_vocabulary: documents encoded in it. walk, rough:
# sentences, as in RoughTextMaker.
STAGES = {
    "base": {"text": 0.20, "framed": 0.20, "base_vocabulary": 0.08, "walk": 0.25, "rough": 0.8},
    "llama": {"text": 0.80, "framed": 0.20, "base_vocabulary": 0.0, "walk": 0.15, "rough": 0.5},
    "alpaca": {"text": 0.05, "framed": 0.95, "base_vocabulary": 0.0, "walk": 0.2, "rough": 0.7},
}


def make_document(maker, stage):
    """A list of (string, whether its tokens are predicted); each string is encoded by itself."""
    if maker.chance(stage["text"]):
        return [("".join(plain_text(any_text(maker)) for _ in range(maker.random.randint(1, 4))), True)]
    instruct, query, answer = any_task(maker)
    prompt = TEMPLATES["alpaca"].prompt(message_of(instruct, query))
    if not maker.chance(stage["framed"]):
        prompt = "\n".join([query, instruct] if maker.chance(0.5) else [instruct, query]) + "\n回答："
    return [(prompt, maker.chance(PREDICTED_QUESTIONS)), (answer, True)]


def make_batch(stage_name, seed, rows, base_vocabulary, vocabulary):
    """int16 [rows, ROW_LENGTH]: token ids, with NO_LOSS set where a token is not predicted.

    The vocabularies are sentencepiece processors. The ids of the base vocabulary are the first ids of the larger one,
    so documents in either train one network. A row's last document is cut where the row ends.
    """
    stage = STAGES[stage_name]
    maker = RoughTextMaker(seed, "train", stage["walk"], stage["rough"])
    batch = np.zeros((rows, ROW_LENGTH), np.int16)
    for i in range(rows):
        row = []
        while len(row) < ROW_LENGTH:
            encoder = base_vocabulary if maker.chance(stage["base_vocabulary"]) else vocabulary
            row.append(encoder.bos_id())
            for string, predicted in make_document(maker, stage):
                ids = encoder.encode(string)
                row += ids if predicted else [token | NO_LOSS for token in ids]
            row.append(encoder.eos_id())
        batch[i] = row[:ROW_LENGTH]
    return batch
