"""Prompts -> answers: greedy, free-running generation in batches. Never teacher forcing."""

from collections import namedtuple

import torch
from tqdm import tqdm

from dataset import EOS, build_prompt, encode_prompts, gold_entities, locate, parse_answer

Answer = namedtuple("Answer", "text ended")  # text: None if the prompt did not fit; ended: the model said eos itself


@torch.inference_mode()
def generate(model, tokenizer, prompts, max_new_tokens, batch_size):
    """Greedy answers to prompts ([bos] + ids, lists of int), as a list of Answer in the order given.

    Similar lengths go together, so that little is padded. A prompt that fills the model's positions gets Answer(None);
    one that leaves less than max_new_tokens is answered alone, as far as they go, so that no other is cut for it.
    """
    positions = model.config.max_position_embeddings
    order = sorted((i for i, p in enumerate(prompts) if len(p) < positions), key=lambda i: len(prompts[i]))
    roomy = [i for i in order if len(prompts[i]) + max_new_tokens <= positions]
    chunks = [roomy[k : k + batch_size] for k in range(0, len(roomy), batch_size)]
    chunks += [[i] for i in order[len(roomy) :]]
    answers = [Answer(None, False)] * len(prompts)
    with tqdm(total=len(order), desc="生成", unit="条", disable=len(order) < 2, dynamic_ncols=True) as bar:
        for chunk in chunks:
            rows = _generate_batch(
                model, tokenizer.pad_token_id, [prompts[i] for i in chunk], max_new_tokens, positions
            )
            for i, ids in zip(chunk, rows, strict=True):
                ended = EOS in ids
                answers[i] = Answer(tokenizer.decode(ids[: ids.index(EOS)] if ended else ids), ended)
            bar.update(len(chunk))
    return answers


def _generate_batch(model, pad_id, prompts, max_new_tokens, positions):
    """New ids of each prompt, eos included. Rows are padded on the left, where nothing attends to the padding."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (length - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=min(max_new_tokens, positions - length),
        do_sample=False,
        temperature=None,  # a generation_config.json beside the model may set these; greedy means greedy
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=EOS,
        pad_token_id=pad_id,
    )
    return output[:, length:].tolist()


def predict_rows(model, tokenizer, examples, labels, max_new_tokens, batch_size):
    """Examples (dataset.read_examples) -> rows of predictions.jsonl, and how many answers max_new_tokens cut off.

    A row: {"text", "answer", "prediction", "entities", "gold" and "problems" where there are any}. `gold` (exact spans)
    and `problems` (counts) let metrics be recomputed from the file alone.
    """
    prompts = encode_prompts(tokenizer, [build_prompt(e["instruct"], e["query"]) for e in examples])
    answers = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    rows = [_row(example, answer.text, labels) for example, answer in zip(examples, answers, strict=True)]
    return rows, sum(not answer.ended and answer.text is not None for answer in answers)


def _row(example, prediction, labels):
    parsed = parse_answer(prediction or "", example["text"], labels)
    row = {
        "text": example["text"],
        "answer": example["answer"],
        "prediction": prediction,
        "entities": locate(example["text"], parsed.entities),
    }
    if example["answer"] is not None:
        row["gold"] = gold_entities(example)
    problems = {name: len(getattr(parsed, name)) for name in ("malformed", "unknown_type", "not_in_text")}
    problems = {name: count for name, count in problems.items() if count}
    return {**row, "problems": problems} if problems else row
