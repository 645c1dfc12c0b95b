"""An answer -> its row of predictions.jsonl."""

from alpaca.answering.grammar import AnswerGrammar
from alpaca.common.errors import UserError
from dataset import gold_entities, locate, parse_answer, unusable_label


def make_grammar(constrained, adapter, tokenizer, labels):
    """`--constrained` -> the AnswerGrammar of all answers, or None. auto: with an adapter that was trained on entities."""
    if constrained == "False" or constrained == "auto" and not (adapter and labels):
        return None
    if not labels:
        raise UserError(
            "--constrained=True: no entity types are known here; give data whose answers are 实体_类型 lines"
        )
    for name in labels:
        if reason := unusable_label(name):
            raise UserError(f"entity type {name!r}: {reason}; rename it and train again, or give --constrained=False")
    return AnswerGrammar(tokenizer, labels)


def held_instructs(constrained, facts):
    """The instructions whose answers a grammar holds, for predict.py and the page as for chat_ner.py: what is asked with
    another one is no question about entities. None: those of all, with --constrained=True or where none is known."""
    return None if constrained == "True" else facts.get("instructs")


def quoted_text(example, instructs):
    """The text that a grammar holds an example's answer to; None: it is free. instructs: of held_instructs."""
    return example["text"] if instructs is None or example["instruct"] in instructs else None


def row_of(example, answer, labels, nested):
    """The row of predictions.jsonl of an example (dataset.read_examples) with its Answer.

    A row: {"text", "answer", "prediction", "entities", "log_probability"}, "gold" where there is a right answer and
    "problems" where there are any; its entities have a "log_probability", and confidences once the windows of a text are
    joined (windows.py). `gold` (exact spans) and `problems` (counts) let metrics be recomputed from the file.
    labels=None: another task than NER. Its rows have an "instruct", and neither entities nor gold. nested: whether
    entities inside longer ones have spans (dataset.nests).
    """
    ner = labels is not None
    parsed = parse_answer((ner and answer.text) or "", example["text"], labels)
    row = {
        **({} if ner else {"instruct": example["instruct"]}),
        "text": example["text"],
        "answer": example["answer"],
        "prediction": answer.text,
        "entities": locate(example["text"], parsed.entities, nested),
    }
    if answer.text is not None:
        lines = [line.replace("\r", "") for line in answer.text.split("\n")]
        scores = dict(reversed(list(zip(lines, answer.scores, strict=False))))  # of a line's first occurrence
        for entity in row["entities"]:
            entity["log_probability"] = round(scores[f"{entity['entity']}_{entity['type']}"], 6)
        row["log_probability"] = round(answer.log_probability, 4)
    if ner and example["answer"] is not None:
        row["gold"] = gold_entities(example, nested)
    problems = {name: len(getattr(parsed, name)) for name in ("malformed", "unknown_type", "not_in_text", "repeated")}
    problems["repeated"] += answer.repeated
    problems |= {"abandoned": answer.abandoned, "cut": int(answer.text is not None and not answer.ended)}
    problems = {name: count for name, count in problems.items() if count}
    return {**row, "problems": problems} if problems else row
