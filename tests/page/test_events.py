"""What ends a job of the page, and what is too long for it; without a server.     python -m pytest tests/page/test_events.py"""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from alpaca.common.errors import UserError
from alpaca.page.events import make_events
from alpaca.page.models import Answered, when_written
from alpaca.scoring.calibration import CALIBRATION
from harness import write_jsonl

MAX_TEXT = 20
REQUEST = SimpleNamespace(session_hash="mine")


def events_of(answer_texts, answer_question=None):
    """The page's functions, answered by these; with what they take of gradio where no answer is shown."""
    models = SimpleNamespace(answer_texts=answer_texts, answer_question=answer_question)
    models.choice = lambda name: SimpleNamespace(name=name, labels=[])
    gr = SimpleNamespace(Request=object, Progress=lambda: None, Error=lambda said, **options: UserError(said))
    gr.Info, gr.skip = lambda said, title: None, lambda: None
    return make_events(gr, models, MAX_TEXT)


def progress(done, **said):
    pass


@pytest.mark.parametrize(
    "pressed, session, ended",
    [
        ("stop_text", "mine", {"text"}),
        ("stop_file", "mine", {"file"}),
        ("stop_chat", "mine", {"chat"}),
        ("leave", "mine", {"text", "file", "chat"}),
        ("leave", "other", set()),
    ],
)
def test_each_button_ends_the_job_of_its_tab(tmp_path, pressed, session, ended):
    """Pressed while a question, a text and a file are answered. That the text and the file end does not end the question."""
    file, stops = write_jsonl(tmp_path / "texts.jsonl", [{"text": "北京"}]), {}

    def those_that_end():
        return {tab for tab, stop in stops.items() if stop.is_set()}

    def answer_question(choice, question, stop):
        stops["chat"] = stop
        yield "答"

    def answer_texts(choice, records, stop):
        stops[choice.name] = stop
        if choice.name == "text":
            list(events.answer_file(str(file), "file", REQUEST, progress))
        else:
            assert len(stops) == 3 and not those_that_end()
            asyncio.run(getattr(events, pressed)(SimpleNamespace(session_hash=session)))
        yield Answered(0, 1, [])

    events = events_of(answer_texts, answer_question)
    answer = events.chat("问", [], "chat", REQUEST)
    next(answer), next(answer)
    events.mark_text("北京", "text", REQUEST, progress)
    assert those_that_end() == ended
    assert ("（已停止）" in str([*answer])) == ("chat" in ended)


def test_a_text_may_be_as_long_as_max_text(tmp_path):
    """In a file each part of a question is looked at: a text, a query, an instruction."""
    asked = []

    def answer_texts(choice, records, stop):
        asked.extend(records)
        yield Answered(0, 1, [])

    events = events_of(answer_texts)
    events.mark_text("京" * MAX_TEXT, "", REQUEST, progress)
    assert asked == [{"text": "京" * MAX_TEXT}]
    for key in ("text", "query", "instruct"):
        file = write_jsonl(tmp_path / "texts.jsonl", [{"text": "京"} | {key: "长" * (MAX_TEXT + 1)}])
        with pytest.raises(UserError, match=f"第 1 条：文本有 {MAX_TEXT + 1} 个字，最多 {MAX_TEXT} 个"):
            list(events.answer_file(str(file), "", REQUEST, progress))
    assert len(asked) == 1


def test_a_full_disk_is_said_on_the_page(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": "京"}])
    (tmp_path / "texts.entities.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda: nullcontext(tmp_path))
    events = events_of(lambda *_: iter([Answered(1, 1, [{"text": "京", "entities": []}])]))
    with pytest.raises(UserError, match="^texts.entities.jsonl: No space left on device; free some space"):
        list(events.answer_file(str(file), "", REQUEST, progress))


def test_an_adapter_that_is_calibrated_anew_is_read_anew(tmp_path):
    (tmp_path / "train_args.json").touch()
    before = when_written(tmp_path)
    (tmp_path / CALIBRATION).touch()
    assert when_written(tmp_path) != before == when_written(tmp_path)[:1] + (None,)
