"""Many users' jobs in one batch: whose turn it is, who is stopped, whose error it is.

python -m pytest tests/answering/test_shared.py
"""

import threading
import time

import pytest
import torch

from alpaca.answering import shared as sharing
from alpaca.answering.engine import Engine
from alpaca.answering.generate import Request, generate, stream
from alpaca.answering.grammar import AnswerGrammar
from alpaca.answering.row import NO_ANSWER, Row
from alpaca.answering.shared import SharedEngine
from alpaca.common.errors import UserError
from alpaca.models.base_weights import load_base
from alpaca.models.templates import encode_prompts, message_of
from alpaca.models.tokenizer import load_tokenizer
from harness import INSTRUCTION, make_records

TOKENS, AT_ONCE = 12, 4


@pytest.fixture(scope="module")
def loaded(base_dir):
    tokenizer = load_tokenizer(base_dir)
    return load_base(base_dir, torch.float32, "cpu").eval(), tokenizer, AnswerGrammar(tokenizer, ["人名", "地名"])


@pytest.fixture
def shared(loaded):
    """`turns`: the adapters whose turn it was. One called `none` cannot be used."""
    model, tokenizer, grammar = loaded

    def use(adapter):
        shared.turns.append(adapter)
        if adapter == "none":
            raise UserError("none: does not fit")
        (prompt,) = encode_prompts(tokenizer, [message_of(INSTRUCTION, "文本：新")])
        return model, grammar, [Row(None, prompt, len(prompt) + TOKENS, tokenizer)]

    shared = SharedEngine(use, tokenizer, model.config.max_position_embeddings, TOKENS, AT_ONCE)
    shared.turns = []
    yield shared
    shared.close()
    assert not shared.thread.is_alive()


def requests_of(tokenizer, texts):
    prompts = encode_prompts(tokenizer, [message_of(INSTRUCTION, "文本：" + text) for text in texts])
    return [Request(i, prompt, text) for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))]


def many(tokenizer, count, mark=""):
    return requests_of(tokenizer, [f"{mark}第{i}天王明在北京" for i in range(count)])


def in_threads(*functions):
    """What each of them returns, all run at the same time."""
    found = [None] * len(functions)

    def keep(i, function):
        found[i] = function()

    threads = [threading.Thread(target=keep, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def all_of(steps):
    return dict(item for ended in steps for item in ended)


def test_answers_of_many_users_are_those_of_each_alone(shared, loaded):
    """Constrained ones and a free one in the same batch; one prompt is too long."""
    model, tokenizer, grammar = loaded
    texts = [record["text"] for record in make_records(12, 5)]
    first, second = requests_of(tokenizer, texts[:9]), requests_of(tokenizer, texts[9:])
    second.append(Request(3, [1] * model.config.max_position_embeddings))
    (question,) = encode_prompts(tokenizer, ["北京在哪里？"])
    found = in_threads(
        lambda: all_of(shared.answer("a", iter(first), threading.Event())),
        lambda: all_of(shared.answer("a", iter(second), threading.Event())),
        lambda: list(shared.stream("a", question, threading.Event())),
    )
    prompts = [request.prompt for request in [*first, *second[:3]]]
    alone = [answer[:5] for answer in generate(model, tokenizer, prompts, TOKENS, 1, grammar, texts)]
    assert [found[0][i][:5] for i in range(9)] + [found[1][i][:5] for i in range(3)] == approximate(alone)
    assert found[1][3] == NO_ANSWER
    free = list(stream(model, tokenizer, question, TOKENS))
    assert found[2][-1] == free[-1] and 1 < len(found[2]) == len({*found[2]} & {*free})
    assert shared.turns == ["a"]


def approximate(answers):
    return [(*answer[:4], pytest.approx(answer[4], abs=1e-4)) for answer in answers]


def test_one_line_does_not_wait_for_the_file_of_another(shared, loaded, monkeypatch):
    """It is the very next row, and the file's rows lose nothing by it."""
    _, tokenizer, _ = loaded
    advance, places, late = Engine.advance, [], []

    def noting(self, waiting):
        late.extend(row for job in shared.jobs for row in job.waiting if row.text.startswith("又"))
        places.extend(i for i, row in enumerate(waiting) if row.text.startswith("又"))
        return advance(self, waiting)

    monkeypatch.setattr(Engine, "advance", noting)
    done, file = [], shared.answer("a", iter(many(tokenizer, 60)), threading.Event())
    while not done:
        done += next(file)
    line = all_of(shared.answer("a", iter(many(tokenizer, 1, "又")), threading.Event()))
    assert len(line) == 1 and places and {*places} == {0} and not late
    assert {key for key, _ in done} | all_of(file).keys() == {*range(60)}


def test_who_stops_stops_nobody_else(shared, loaded, monkeypatch):
    """And nothing more is computed of it."""
    _, tokenizer, _ = loaded
    dropped, drop = [], Engine.drop
    monkeypatch.setattr(
        Engine, "drop", lambda self, unwanted: dropped.extend(map(unwanted, self.rows)) or drop(self, unwanted)
    )
    stop, steps = threading.Event(), []

    def stopped():
        for ended in shared.answer("a", iter(many(tokenizer, 60)), stop):
            steps.extend(ended)
            if steps:
                stop.set()

    _, other = in_threads(
        stopped, lambda: all_of(shared.answer("a", iter(many(tokenizer, 10, "又")), threading.Event()))
    )
    assert len(other) == 10 and 0 < len(steps) < 60 and any(dropped)
    deadline = time.monotonic() + 20
    while shared.jobs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not shared.jobs and not shared.engine.rows and not any(shared.engine.slots.taken)
    again = all_of(shared.answer("a", iter(many(tokenizer, 2)), threading.Event()))
    assert len(again) == 2


def test_it_ends_while_it_is_asked(shared, loaded):
    """What was asked is not answered to its end before the page can close."""
    file = shared.answer("a", iter(many(loaded[1], 60)), threading.Event())
    next(file)
    closing = threading.Thread(target=shared.close)
    closing.start()
    closing.join(20)
    has_ended = not closing.is_alive() and shared.jobs
    file.close()
    assert has_ended


def test_adapters_take_turns(shared, loaded, monkeypatch):
    """The one that waited longest is next, and a short job is done before a long one of the other adapter."""
    monkeypatch.setattr(sharing, "TURN_SECONDS", 0.05)
    _, tokenizer, _ = loaded
    order = []

    def job(adapter, count):
        found = all_of(shared.answer(adapter, iter(many(tokenizer, count, adapter)), threading.Event()))
        order.append(adapter)
        return len(found)

    counts = in_threads(lambda: job("a", 50), lambda: job("b", 50), lambda: job("c", 1))
    assert counts == [50, 50, 1] and order[0] == "c"
    assert {*shared.turns[:3]} == {"a", "b", "c"} and len(shared.turns) > 3


def test_an_error_is_that_of_its_own_job(shared, loaded, monkeypatch):
    _, tokenizer, _ = loaded

    def ask(adapter):
        try:
            return len(all_of(shared.answer(adapter, iter(many(tokenizer, 5)), threading.Event())))
        except (UserError, RuntimeError) as error:
            return str(error)

    monkeypatch.setattr(sharing, "TURN_SECONDS", 0)
    file = shared.answer("a", iter(many(tokenizer, 60)), threading.Event())
    next(file)
    assert ask("none") == "none: does not fit" and len(all_of(file)) > 50
    advance = Engine.advance

    def broken(self, waiting):
        monkeypatch.setattr(Engine, "advance", advance)
        raise RuntimeError("broken")

    monkeypatch.setattr(Engine, "advance", broken)
    assert ask("a") == "broken" and ask("a") == 5
    assert shared.turns[-2:] == ["a", "a"]  # with another engine: what became of the broken one, nobody knows
