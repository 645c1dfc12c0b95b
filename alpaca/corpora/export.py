"""Predictions -> pre-annotations that an annotator's tool imports, to be corrected there and read by process.py again.

    doccano      one object a line, {"text", "label": [[begin, end, type]]}; import as JSONL
    labelstudio  an array of tasks, {"data": {"text"}, "predictions": [{"model_version", "score", "result"}]}
    brat         a folder of .txt and .ann, DOCUMENT texts a document and one a line, and its annotation.conf

Offsets are characters, ends exclusive. Every type is written by its tag, so that the same --labels read it again.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_jsonl
from alpaca.common.whole_files import written_whole

DOCUMENT = 50  # texts of a brat document: it is shown on one page
INTERFACE = '<View><Labels name="label" toName="text">{labels}</Labels><Text name="text" value="$text"/></View>'


class Prediction(NamedTuple):
    """One row of predictions.jsonl."""

    text: str
    spans: list  # [(begin, end, tag, confidence or None)] in the order of the text
    score: object  # the model's probability of its answer, None where there is none
    answered: bool


def newest_predictions(data_name):
    """The predictions.jsonl of a data set that was written last."""
    found = sorted(Path("checkpoint").glob(f"{data_name}/*/predictions.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"checkpoint/{data_name}: no predictions.jsonl here; make one with `python test.py --data_name={data_name}`, "
            "or name what predict.py wrote with --predictions"
        )
    return found[-1]


def read_predictions(path, labels):
    """Rows of predict.py or test.py -> list of Prediction. labels: {tag: name}; UserError for a type it does not name."""
    tags = {name: tag for tag, name in reversed(labels.items())}  # of two tags of one name, the first
    predictions, unknown = [], {}
    for number, row in read_jsonl(path):
        try:
            spans = [
                (*span, entity["type"], entity.get("confidence"))
                for entity in row["entities"]
                for span in entity["spans"]
            ]
            for begin, end, kind, _ in spans:
                if type(begin) is not int or type(end) is not int or not 0 <= begin < end <= len(row["text"]):
                    raise ValueError
                if kind not in tags:
                    unknown.setdefault(kind, number)
            spans = [(begin, end, tags.get(kind, kind), confidence) for begin, end, kind, confidence in spans]
            score = None if row.get("log_probability") is None else round(math.exp(min(row["log_probability"], 0)), 4)
            if not isinstance(row["text"], str):
                raise TypeError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path}:{number}: not a row that predict.py or test.py wrote: it has a text, and entities with type and spans"
            ) from None
        predictions.append(
            Prediction(row["text"], sorted(spans, key=lambda span: span[:2]), score, row.get("prediction") is not None)
        )
    if unknown:
        added = ",".join(f"{kind}:{kind}" for kind in unknown)
        known = ",".join(f"{tag}:{name}" for tag, name in labels.items())
        raise UserError(f"{path}:{min(unknown.values())}: types without a tag; name them: --labels={known},{added}")
    return predictions


def write_doccano(path, predictions, labels):
    """JSON lines; doccano leaves overlapping spans out unless the project allows them."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in predictions:
            record = {"text": row.text, "label": [[begin, end, tag] for begin, end, tag, _ in row.spans]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_label_studio(path, predictions, labels):
    """An array, one task a line; a text that was not answered is a task without predictions."""
    tasks = []
    for row in predictions:
        result = []
        for number, (begin, end, tag, confidence) in enumerate(row.spans, 1):
            value = {"start": begin, "end": end, "text": row.text[begin:end], "labels": [tag]}
            region = {"id": f"e{number}", "from_name": "label", "to_name": "text", "type": "labels", "value": value}
            sure = isinstance(confidence, float) and 0 < confidence <= 1  # older rows hold its logarithm
            result.append({**region, "score": confidence} if sure else region)
        score = {} if row.score is None else {"score": row.score}
        prediction = {"model_version": "predictions.jsonl", **score, "result": result}
        task = {"data": {"text": row.text}} | ({"predictions": [prediction]} if row.answered else {})
        tasks.append(json.dumps(task, ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(tasks) + "\n]\n", encoding="utf-8", newline="\n")


def write_brat(path, predictions, labels):
    """A folder; the tags stand in annotation.conf, without which brat shows no types."""
    path.mkdir()
    entities = "".join(f"{tag}\n" for tag in labels)
    conf = f"[entities]\n{entities}[relations]\n[events]\n[attributes]\n"
    (path / "annotation.conf").write_text(conf, encoding="utf-8", newline="\n")
    for number in range(0, len(predictions), DOCUMENT):
        text, rows = "", []
        for row in predictions[number : number + DOCUMENT]:
            for begin, end, tag, _ in row.spans:
                rows.append(f"T{len(rows) + 1}\t{tag} {len(text) + begin} {len(text) + end}\t{row.text[begin:end]}\n")
            text += row.text + "\n"
        name = f"{number // DOCUMENT + 1:04}"
        (path / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
        (path / f"{name}.ann").write_text("".join(rows), encoding="utf-8", newline="\n")


EXPORTS = {  # the tool: (the end of the file's or folder's name, who writes it)
    "doccano": (".doccano.jsonl", write_doccano),
    "labelstudio": (".labelstudio.json", write_label_studio),
    "brat": (".brat", write_brat),
}


def export_predictions(tool, source, labels):
    """Write the rows of predictions.jsonl for a tool, beside it, and say in lines what was written.

    UserError before anything is written: what stands there already may hold somebody's corrections.
    """
    if tool not in EXPORTS:
        raise UserError(f"--export: expected {', '.join(EXPORTS)}, got {tool!r}")
    ending, write = EXPORTS[tool]
    labels = {tag: name for tag, name in labels.items() if name}  # without the types that are left out
    source = Path(source)
    path = source.with_name(source.name.removesuffix(".jsonl") + ending)
    if path.exists():
        raise UserError(f"{path}: is there already, and may hold corrections; move it away or delete it")
    predictions = read_predictions(source, labels)
    if tool == "brat":
        _check_brat(source, predictions, labels)
    with written_whole(path, folder=tool == "brat") as new:
        write(new, predictions, labels)
    spans = sum(len(row.spans) for row in predictions)
    lines = [f"{path}：{len(predictions)} 句，{spans} 个预标注，来自 {source}"]
    unanswered = sum(not row.answered for row in predictions)
    if unanswered:
        lines.append(f"其中 {unanswered} 句模型没有回答，没有预标注")
    if tool == "labelstudio":
        lines.append("标注界面：" + INTERFACE.format(labels="".join(f'<Label value="{tag}"/>' for tag in labels)))
    return lines


def _check_brat(source, predictions, labels):
    """UserError for what brat's two files cannot hold: a blank in a type, a text of several lines."""
    for tag in labels:
        if len(tag.split()) != 1:
            raise UserError(f"--labels: brat takes no type with a blank, {tag!r}; rename it")
    for number, row in enumerate(predictions, 1):
        if "\n" in row.text or "\r" in row.text or not row.text.strip() or row.text.startswith("\ufeff"):
            raise UserError(
                f"{source}: row {number}, {row.text[:40]!r}, is not one line, which is a sentence in brat; "
                "use --export=doccano or --export=labelstudio"
            )
