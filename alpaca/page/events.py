"""What a click on the page does, and what its HTTP API offers."""

import json
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from html import escape
from pathlib import Path
from types import SimpleNamespace

from alpaca.common.errors import UserError, line_of
from alpaca.common.text_files import SURROGATE
from alpaca.common.whole_files import named
from alpaca.corpora.inputs import ASKED, read_texts
from alpaca.page.marks import PREVIEWED, colours_of, entity_lines, heads_of, odd_answer, pieces_of

STOPPED = "已停止"


class Stops:
    """An event for each job that the page runs, so that 停止 ends that one and no other."""

    def __init__(self):
        self.running = {}  # (session, tab of the page) -> threading.Event

    @contextmanager
    def job(self, session, tab):
        """The event of a new job; the earlier one of that tab, whose results nobody would see any more, is stopped."""
        stop = threading.Event()
        if earlier := self.running.get((session, tab)):
            earlier.set()
        self.running[session, tab] = stop
        try:
            yield stop
        finally:
            if self.running.get((session, tab)) is stop:
                del self.running[session, tab]

    def stop(self, session, tab=None):
        """Stop the job of a tab; of all tabs, where None is named."""
        for key, event in list(self.running.items()):
            if key[0] == session and tab in (None, key[1]):
                event.set()


def make_events(gr, models, max_text):
    """The functions that gradio calls; gr: the module, which only the page needs to have."""
    stops = Stops()

    @contextmanager
    def refusing(path="", shown=escape):
        """A UserError, and what a full disk raises, becomes a message on the page, with the name of an uploaded file instead
        of its path here. shown: str for the HTTP API, where it is no HTML."""
        try:
            yield
        except (UserError, OSError) as error:
            message = line_of(error) if isinstance(error, OSError) else str(error)
            if message is None:
                raise
            message = message.replace(path, Path(path).name) if path else message
            raise gr.Error(shown(message), title="不行", duration=None, print_exception=False) from None

    def checked(text, where=""):
        if SURROGATE.search(text):
            raise UserError(f"{where}half a character in {text[:40]!r}; give UTF-8")
        if len(text) > max_text:
            raise UserError(f"{where}文本有 {len(text)} 个字，最多 {max_text} 个（max_text）")
        return text

    def asked(text, what):
        """A text that somebody typed."""
        if not text.strip():
            raise UserError(f"请先输入{what}。")
        return checked(text)

    def texts_of(path):
        for number, record in enumerate(read_texts(path), 1):
            for key in ASKED:
                checked(record.get(key) or "", f"{path}，第 {number} 条：")
            yield record

    def answers_to_file(path, choice, stop, output):
        """Yield (texts that are done, all texts, rows), the rows written into `output`; none is computed of a bad file."""
        total = sum(not stop.is_set() for _ in texts_of(path))
        done = 0
        with named(output.name), open(output, "w", encoding="utf-8") as file:
            for step in models.answer_texts(choice, texts_of(path), stop):
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in step.rows)
                done += len(step.rows)
                yield done, total, step.rows

    # -----------------------------------------------------------------------------------------------------------------
    # the page

    def mark_text(text, name, request: gr.Request, progress=gr.Progress()):  # noqa: B008
        """Returns the marked text, the entities as a table, and what the model said where that is neither."""
        rows = []
        with refusing(), stops.job(request.session_hash, "text") as stop:
            choice = models.choice(name)
            for step in models.answer_texts(choice, [{"text": asked(text, "文本")}], stop):
                rows += step.rows
                progress((step.done, step.total), desc="识别", unit="段")
        if not rows:
            gr.Info(STOPPED, title="停止")
            return gr.skip(), gr.skip(), gr.skip()
        row, labels = rows[0], choice.labels
        if row["prediction"] is None:
            gr.Warning("文本超过模型的长度上限，没有回答", title="没有回答")
        if row.get("problems", {}).get("cut"):
            gr.Warning("回答达到长度上限，被截断", title="不完整")
        said = odd_answer(row, labels)
        return (
            gr.HighlightedText(pieces_of(row), color_map=colours_of(labels)),
            gr.Dataframe(entity_lines(row), headers=heads_of(row), visible=labels is not None),
            gr.Textbox(said, visible=said is not None),
        )

    def answer_file(path, name, request: gr.Request, progress=gr.Progress()):  # noqa: B008
        """Yields once: a line of figures, the entities of the first texts as a table, and the file to download."""
        first, counts, done, total = [], Counter(), 0, None
        with refusing(path), stops.job(request.session_hash, "file") as stop, tempfile.TemporaryDirectory() as folder:
            choice, output = models.choice(name), Path(folder) / f"{Path(path).stem}.entities.jsonl"
            progress(0, desc="读文件")
            for done, total, rows in answers_to_file(path, choice, stop, output):
                first += rows[: PREVIEWED - len(first)]
                counts.update(kind for row in rows for kind in spans_by_type(row))
                progress((done, total), desc="识别", unit="条")
            if done != total:
                gr.Info(STOPPED, title="停止")
                yield gr.skip(), gr.skip(), gr.skip()
                return
            figures = [f"{done} 条文本", *(f"{kind} {count} 处" for kind, count in counts.most_common())]
            table = [[number, *line] for number, row in enumerate(first, 1) for line in entity_lines(row)]
            heads = ["第几条", *heads_of(first[0])]
            label = f"前 {len(first)} 条的实体" if done > len(first) else "实体"
            yield (
                "，".join(figures),
                gr.Dataframe(table, headers=heads, label=label, visible=choice.labels is not None),
                gr.DownloadButton(f"下载 {output.name}", value=str(output), visible=True),
            )  # gradio has copied the file when it asks for more; ours goes

    def chat(question, before, name, request: gr.Request):
        """before: the chat's messages so far. Yields the emptied question and all messages, for the chat and to be kept."""
        with refusing(), stops.job(request.session_hash, "chat") as stop:
            choice, asked_now = models.choice(name), {"role": "user", "content": escape(asked(question, "问题"))}

            def with_answer(answer):
                said = {"role": "assistant", "content": escape(f"【{choice.name}】\n{answer}")}
                return "", [*before, asked_now, said], [*before, asked_now, said]

            answer = None
            yield with_answer("…")
            for answer in models.answer_question(choice, question, stop):
                yield with_answer(answer)
            if stop.is_set():
                yield with_answer(f"{answer or ''}（{STOPPED}）")
            elif answer is None:
                yield with_answer("（没有回答：问题超过模型的长度上限）")

    async def stop_text(request: gr.Request):
        stops.stop(request.session_hash, "text")

    async def stop_file(request: gr.Request):
        stops.stop(request.session_hash, "file")

    async def stop_chat(request: gr.Request):
        stops.stop(request.session_hash, "chat")

    async def leave(request: gr.Request):
        """The page was closed."""
        stops.stop(request.session_hash)

    # -----------------------------------------------------------------------------------------------------------------
    # the HTTP API. Generators: gradio closes one whose client has gone, and then nothing more is computed for it.

    def recognize(text: str, lora: str = "") -> dict:
        """The entities of a text: its row as predict.py writes it. lora: one of /loras; empty: the first."""
        with refusing(shown=str):
            records = [{"text": asked(text, "文本")}]
            rows = []
            steps = models.answer_texts(models.choice(lora), records, threading.Event())
            yield from every_second(rows.extend(step.rows) for step in steps)
            yield rows[0]

    def recognize_file(file, lora):
        """What predict.py writes for a file. lora: one of /loras; empty: the first."""
        with refusing(file, str), tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / f"{Path(file).stem}.entities.jsonl"
            yield from every_second(answers_to_file(file, models.choice(lora), threading.Event(), output))
            yield str(output)

    def ask(question: str, lora: str = "") -> str:
        """The model's free answer to a question, growing. lora: one of /loras; empty: the first."""
        with refusing(shown=str):
            yield from models.answer_question(models.choice(lora), asked(question, "问题"), threading.Event())

    def loras() -> list[str]:
        """The names that the other functions take for `lora`, those trained since the start too."""
        return models.names()

    return SimpleNamespace(
        **{"mark_text": mark_text, "answer_file": answer_file, "chat": chat},
        **{"stop_text": stop_text, "stop_file": stop_file, "stop_chat": stop_chat, "leave": leave},
        **{"recognize": recognize, "recognize_file": recognize_file, "ask": ask, "loras": loras},
    )


def every_second(steps):
    """None for the steps of each second, so that gradio sees whether its client is still there."""
    last = time.monotonic()
    for _ in steps:
        if time.monotonic() - last >= 1:
            yield None
            last = time.monotonic()


def spans_by_type(row):
    """The type of each place where an entity stands."""
    return [entity["type"] for entity in row["entities"] for _ in entity["spans"]]
