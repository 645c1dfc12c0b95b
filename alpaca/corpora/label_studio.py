"""Label Studio's export: JSON, and JSON_MIN.

    JSON      [{"id": 1, "data": {"text": "…"}, "annotations": [{"was_cancelled": false, "result": [
                {"type": "labels", "value": {"start": 4, "end": 7, "text": "梁小雨", "labels": ["PER"]}}]}],
                "predictions": []}]
    JSON_MIN  [{"id": 1, "text": "…", "label": [{"start": 4, "end": 7, "text": "梁小雨", "labels": ["PER"]}],
                "annotator": 1, "annotation_id": 1}]

The ends are exclusive; versions before 2022 count UTF-16 units, so that an emoji is two characters. Sources: Label
Studio's pages on the task format and its converter, read on 2026-11-27.
"""

from functools import partial

from alpaca.common.errors import UserError
from alpaca.corpora.records import checked_mark, checked_text, read_records, read_sentences
from alpaca.corpora.sentences import Sentence

OF_THE_TASK = {"annotator", "created_at", "updated_at"}  # strings of JSON_MIN that are not the data's


def is_label_studio(head):
    return any(
        isinstance(record, dict)
        and isinstance(record.get("data"), dict)
        and record.keys() & {"annotations", "completions", "predictions"}
        for record in head.records
    )


def read_label_studio(path, problems):
    """Yield each Sentence: of a task the ground truth, else the first annotation that was not skipped.

    Predictions are read only where no task of the file has an annotation: then it is a file of pre-annotations.
    """
    annotated = any(isinstance(task, dict) and _annotations(task) for _, task in read_records(path))
    yield from read_sentences(path, problems, partial(_sentence_of_task, annotated=annotated))


def _annotations(task):
    return task.get("annotations") or task.get("completions") or []


def _sentence_of_task(path, line, task, problems, annotated):
    annotations = _annotations(task)
    done = [a for a in annotations if not (a.get("was_cancelled") or a.get("skipped"))]
    if annotations and not done:
        problems.add("skipped", path, line, f"task {task.get('id')}")
        return None
    if not annotations and (annotated or not task.get("predictions")):
        problems.add("unannotated", path, line, f"task {task.get('id')}")
        return None
    text = _text(path, line, task["data"], set())
    if not done:
        problems["preannotated"] += 1
        return Sentence(line, text, list(_marks(path, line, text, task["predictions"][0]["result"], problems)))
    if len(done) > 1:
        problems.add("annotators", path, line, f"task {task.get('id')}，{len(done)} 份")
    chosen = next((a for a in done if a.get("ground_truth")), done[0])
    return Sentence(line, text, list(_marks(path, line, text, chosen["result"], problems)))


def _marks(path, line, text, result, problems):
    for item in result:
        value = item.get("value")
        if item.get("type") == "relation":
            problems["relation"] += 1
        elif isinstance(value, dict) and isinstance(value.get("labels"), list) and type(value.get("start")) is int:
            yield from _marks_of_region(path, line, text, value, problems)
        elif item.get("type") in ("choices", "textarea", "rating", "taxonomy", "number", "datetime"):
            problems["choice"] += 1
        else:
            problems.add("region", path, line, f"{item.get('type')} {str(value)[:60]}")


def _marks_of_region(path, line, text, value, problems):
    """The marks of one region: one a label."""
    if not value["labels"]:
        problems.add("region", path, line, str(value)[:60])
    for tag in value["labels"]:
        yield checked_mark(path, line, text, value["start"], value["end"], tag, value.get("text"))


def _text(path, line, data, others):
    """The text of a task: `text`, or the only string there is."""
    if "text" in data:
        return checked_text(path, line, data["text"])
    names = [name for name, value in data.items() if isinstance(value, str) and name not in others]
    if len(names) != 1:
        raise UserError(
            f"{path}:{line}: which of the strings ({', '.join(names) or 'none'}) is the text? rename it to `text`"
        )
    return data[names[0]]


def is_label_studio_min(head):
    return any(
        isinstance(record, dict)
        and ("annotation_id" in record and "annotations" not in record or any(_regions(v) for v in record.values()))
        for record in head.records
    )


def _regions(value):
    """The regions that a value of JSON_MIN lists; [] where it is something else."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return []
    return value if any({"start", "end", "labels"} <= item.keys() for item in value) else []


def read_label_studio_min(path, problems):
    """Yield each Sentence: of a task the first annotation in the file, which holds none that was skipped."""
    seen = set()

    def read_one(path, line, record, problems):
        task = record.get("id")
        if task is not None and task in seen:
            problems.add("annotators", path, line, f"task {task}")
            return None
        seen.add(task)
        text, marks = _text(path, line, record, OF_THE_TASK), []
        for name, value in record.items():
            regions = _regions(value)
            marks += _marks(path, line, text, [{"type": name, "value": region} for region in regions], problems)
            if not regions and value and isinstance(value, list | dict):
                problems["choice"] += 1
        return Sentence(line, text, marks)

    yield from read_sentences(path, problems, read_one)
