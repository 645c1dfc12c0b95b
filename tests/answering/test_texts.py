"""Texts as a stream: what is asked, once; what is kept; in which order rows come.     python -m pytest tests/answering/test_texts.py"""

import gc
import random
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from alpaca.answering import generate as generating
from alpaca.answering import in_order as ordering
from alpaca.answering import texts as answering
from alpaca.answering.grammar import AnswerGrammar
from alpaca.answering.in_order import in_order
from alpaca.answering.predictions import row_of
from alpaca.answering.row import Row
from alpaca.answering.texts import Answering, prompt_encoder
from alpaca.answering.windows import cutter, row_of_text
from alpaca.common.processes import Processes
from alpaca.models.base_weights import load_base
from alpaca.models.cut_text import cut_text, token_ends
from alpaca.models.templates import encode_prompts, message_of
from alpaca.models.tokenizer import load_tokenizer
from dataset import example_of_input
from harness import INSTRUCTION, make_records

LABELS = ["人名", "地名"]


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return load_tokenizer(base_dir)


@pytest.fixture(scope="module")
def model(base_dir):
    return load_base(base_dir, torch.float32, "cpu").eval()


def alone():
    processes = Processes()
    processes.begin(0)
    return processes


def examples_of(texts, instruct=INSTRUCTION):
    return [example_of_input({"text": text, "id": i}, instruct, "文本：") for i, text in enumerate(texts)]


def answer_with(model, tokenizer, **changes):
    facts = {"labels": LABELS, "instructs": [INSTRUCTION], "text_tokens": 30}
    options = {"labels": LABELS, "max_new_tokens": 10, "batch_size": 4, "grammar": AnswerGrammar(tokenizer, LABELS)}
    return Answering(model, tokenizer, cutter(model, tokenizer, None, facts), **{**options, **changes}), facts


def test_rows_are_those_of_a_list_and_nothing_is_asked_twice(model, tokenizer, monkeypatch):
    """With blank, long and equal texts and two instructions; equal ones both while one is being answered and later."""
    texts = [record["text"] for record in make_records(30, 3)]
    texts[2], texts[4], texts[11], texts[29] = "", "王明去年在北京说。" * 30, texts[10], texts[0]
    examples = examples_of(texts[:20]) + examples_of(texts[20:], "找出人名" + "、" * 30)
    answer, facts = answer_with(model, tokenizer)
    asked, requests = [], generating.Request
    monkeypatch.setattr(answering, "Request", lambda *parts: asked.append(parts[0]) or requests(*parts))
    rows = []
    for row, _ in in_order(alone(), enumerate(examples), len(examples), answer):
        rows.append(row)
        if len(rows) == len(examples):  # the last is yielded, and nothing has ended yet
            kept = sum(type(thing) is Row for thing in gc.get_objects())
    cuts = cutter(model, tokenizer, None, facts)(examples)
    parts = [part for cut in cuts for part in cut.parts]
    prompts = encode_prompts(tokenizer, [message_of(part["instruct"], part["query"]) for part in parts])
    texts = [part["text"] for part in parts]
    answers = generating.generate(model, tokenizer, prompts, 10, 4, AnswerGrammar(tokenizer, LABELS), texts)
    each = (row_of(part, answer, LABELS, False) for part, answer in zip(parts, answers, strict=True))
    expected = [
        row_of_text(example, cut, [next(each) for _ in cut.parts]) for example, cut in zip(examples, cuts, strict=True)
    ]
    for row in (*rows, *expected):
        row["log_probability"] = round(row.get("log_probability", 0), 2)
        for entity in row["entities"]:
            entity.update({key: round(entity[key], 2) for key in ("log_probability", "confidence")})
    assert rows == expected and len(cuts[4].parts) > 3
    assert len(asked) == len(set(asked)) == len({(p["instruct"], p["text"]) for p in parts}) < len(parts)
    assert kept == 0  # and with each row went its matcher


def test_only_so_many_answers_are_remembered(model, tokenizer, monkeypatch):
    """And they are answered again where they come later than that."""
    monkeypatch.setattr(answering, "KNOWN", 5)
    asked, requests = [], generating.Request
    monkeypatch.setattr(answering, "Request", lambda *parts: asked.append(parts[0]) or requests(*parts))
    monkeypatch.setattr(answering, "ENCODED", 4)
    texts = [f"王明{'去年' * n}在北京" for n in range(12)]
    answer, _ = answer_with(model, tokenizer, max_new_tokens=3)
    rows = [row for row, _ in in_order(alone(), enumerate(examples_of([*texts, *texts])), 24, answer)]
    assert rows[12:] == [{**row, "id": row["id"] + 12} for row in rows[:12]] and 12 < len(asked) <= 24
    assert [row for ended in answer.in_turn(examples_of(texts)) for row in ended] == rows[:12]


def test_how_much_is_cut_and_encoded_at_a_time(monkeypatch):
    """So many texts or characters, so that a job can be stopped in between; and what there is for now."""
    monkeypatch.setattr(answering, "ENCODED", 3)
    monkeypatch.setattr(answering, "ENCODED_CHARACTERS", 10)
    sizes = iter([(0, 1), (1, 1), (2, 1), (3, 4), (4, 9), None, (5, 1)])
    numbered = iter([item and (item[0], {"text": "新" * item[1]}) for item in sizes])
    found = [answering.next_texts(numbered) for _ in range(4)]
    assert [[number for number, _ in items] for items, _, _ in found] == [[0, 1, 2], [3, 4], [], [5]]
    assert [ends for _, *ends in found] == [[False, False], [False, False], [True, False], [False, True]]


def test_a_row_that_takes_long_holds_the_others_back(monkeypatch):
    """They are not read further ahead than AHEAD; all come in order, and none is lost."""
    monkeypatch.setattr(ordering, "AHEAD", 40)
    monkeypatch.setattr(ordering, "SHARE", 10)
    drawn, waited = [], []

    def answer(numbered, expected):
        assert expected == 200
        first, idle = next(numbered), 0
        for item in numbered:
            idle = idle + 1 if item is None else 0
            yield [] if item is None else [(item[0], item[1])]
            if idle > 2 and first:  # nothing more is to be had
                waited.append(len(drawn))
                yield [(first[0], first[1])]
                first = None

    numbered = ((i, drawn.append(i) or str(i)) for i in range(200))
    assert list(in_order(alone(), numbered, 200, answer)) == [str(i) for i in range(200)]
    assert waited == [40]


def test_rank_0_stays_until_the_others_have_left():
    """Where little or nothing is left to do, another process may still be loading its model."""
    first, late, said = alone(), alone(), []
    first.count, first.received_from, late.rank, late.store = 2, [0, 0], 1, first.store
    numbered = ((i, str(i)) for i in range(3))
    rows = in_order(first, numbered, 3, lambda items, _: ([item] if item else [] for item in items))
    assert [next(rows) for _ in range(3)] == ["0", "1", "2"]
    threading.Timer(0.2, lambda: said.append("left") or late.leave()).start()
    assert list(rows) == [] and said == ["left"]


def test_sigterm_ends_between_two_answers_and_not_within_one():
    """An exception in the middle of an answer, or of an exit, could leave a lock held for ever."""
    earlier, done = signal.getsignal(signal.SIGTERM), []

    def answer(numbered, expected):
        for number, text in numbered:
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
            done.append(number)
            yield [(number, text)]

    rows = in_order(alone(), ((i, str(i)) for i in range(9)), 9, answer)
    with pytest.raises(SystemExit) as ended:
        list(rows)
    assert ended.value.code == 143 and done == [0, 1, 2]
    assert signal.getsignal(signal.SIGTERM) == earlier  # while the process ends, the signal is not ours


def test_an_instruction_is_encoded_once_and_prompts_are_the_same(tokenizer):
    draw, pieces = random.Random(0), [*"北京大学生 　▁\t\r。a1", "文本：", "\n", "\n\n", "  ", "😀", "### Response: "]
    examples = []
    for _ in range(300):
        instruct, query = ("".join(draw.choices(pieces, k=draw.randint(0, 12))) for _ in range(2))
        examples.append({"instruct": instruct, "query": query})
    expected = encode_prompts(tokenizer, [message_of(e["instruct"], e["query"]) for e in examples])
    assert prompt_encoder(tokenizer)(examples) == expected
    encoded = []
    counting = SimpleNamespace(
        frame=tokenizer.frame,
        token_bytes=tokenizer.token_bytes,
        encode_texts=lambda texts: encoded.extend(texts) or tokenizer.encode_texts(texts),
    )
    prompt_encoder(counting)(examples_of(["王明", "李华"] * 20))
    assert sum(INSTRUCTION in text for text in encoded) == 1


def test_windows_have_room_for_their_tokens_and_a_text_is_encoded_once(tokenizer):
    """Also where characters take several tokens, and parts have tokens of their own at their ends."""
    draw, read = random.Random(1), []

    def ends_of(part):
        read.append(len(part))
        return token_ends(tokenizer, part)

    for _ in range(60):
        text = "".join(draw.choices("北京大学生上海长江沙市😀鑫 a，。\n", k=draw.randint(1, 200)))
        ends, room = token_ends(tokenizer, text), draw.randint(6, 40)
        assert len(ends) == len(tokenizer.encode_texts([text])[0]) and ends[-1] == len(text) and ends == sorted(ends)
        read.clear()
        cut = cut_text(text, ends_of, room)
        parts = [text[begin:end] for begin, end in cut.windows]
        assert "".join(parts) == text
        assert max(len(ids) for ids in tokenizer.encode_texts(parts)) <= room
        assert sum(read) <= 4 * len(text)
    assert token_ends(tokenizer, "") == []
