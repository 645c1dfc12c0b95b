"""What a click on the page does: generators that gradio calls, each yielding what the page shows next."""

import json
import os
import tempfile
import time
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

from alpaca.common.errors import UserError
from alpaca.common.text_files import SURROGATE
from alpaca.corpora.inputs import read_texts
from alpaca.page.marks import Exchange, chat_html, escape, file_html, note_html, progress_html, row_html

STOPPED = "已停止。"


def make_events(gr, models):
    """The functions that the page's buttons call; gr: the module gradio, which only the page needs to have."""

    @contextmanager
    def refusing(path=""):
        """A UserError becomes a message on the page, with the name of an uploaded file instead of its path here."""
        try:
            yield
        except UserError as error:
            message = str(error).replace(path, Path(path).name) if path else str(error)
            raise gr.Error(str(escape(message)), title="不行", duration=None, print_exception=False) from None

    # The sessions in which 停止 was pressed. They end between two steps: what gradio cancels itself may end within
    # one, and then the page shows an error.
    stopped = set()

    def until_stopped(steps, session):
        stopped.discard(session)
        return takewhile(lambda _: session not in stopped, steps)

    def refuse_half_characters(text):
        if SURROGATE.search(text):
            raise UserError(f"half a character in {text[:40]!r}; give UTF-8")
        return text

    def mark_text(text, name, request: gr.Request):
        if not text.strip():
            raise gr.Error("请先输入文本。", title="没有文本", print_exception=False)
        with refusing():
            records = [{"text": refuse_half_characters(text)}]
            rows = None
            for step in now_and_then(until_stopped(models.answer_texts(name, records), request.session_hash)):
                rows = step.rows
                if not rows:
                    yield progress_html(step.done, step.total)
        yield row_html(rows[0], models.labels(name)) if rows else note_html(STOPPED)

    def answer_file(path, name, request: gr.Request):
        hidden = gr.DownloadButton(visible=False)
        yield note_html("正在读文件，切分……"), hidden
        with refusing(path):
            rows = None
            steps = models.answer_texts(name, list(read_texts(path)))
            for step in now_and_then(until_stopped(steps, request.session_hash)):
                rows = step.rows
                if not rows:
                    yield progress_html(step.done, step.total), hidden
        if not rows:
            yield note_html(STOPPED), hidden
            return
        output = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / f"{Path(path).stem}.entities.jsonl"
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        shown = file_html(rows, models.labels(name))
        yield shown, gr.DownloadButton(f"下载 {output.name}", value=output, visible=True)

    def chat(question, before, name, request: gr.Request):
        """before: the exchanges so far. Yields the emptied question, all exchanges as HTML, and as a list."""
        if not question.strip():
            raise gr.Error("请先输入问题。", title="没有问题", print_exception=False)

        def with_answer(answer):
            exchanges = [*before, Exchange(question, name, answer)]
            return "", chat_html(exchanges), exchanges

        answer = ""
        yield with_answer("…")
        with refusing():
            growing = models.answer_question(name, refuse_half_characters(question))
            for answer in until_stopped(growing, request.session_hash):
                yield with_answer(answer)
        if not answer:
            yield with_answer("（没有回答：停止了，或者问题超过模型的长度上限）")

    def stop(request: gr.Request):
        stopped.add(request.session_hash)

    return SimpleNamespace(mark_text=mark_text, answer_file=answer_file, chat=chat, stop=stop)


def now_and_then(steps, seconds=0.2):
    """Of many Answered those that are worth showing: one every `seconds`, and the last."""
    shown = 0
    for step in steps:
        if step.rows is not None or time.monotonic() - shown >= seconds:
            yield step
            shown = time.monotonic()
