"""What an answer may say, by brute force and at random.     python -m pytest tests/answering/test_constraint.py"""

import itertools
import random

import pytest
import torch

from alpaca.answering.grammar import AnswerGrammar, forbid
from alpaca.answering.predictions import make_grammar
from alpaca.answering.row import Row
from alpaca.common.errors import UserError
from alpaca.corpora.convert import Task, convert
from alpaca.corpora.labels import read_labels
from alpaca.corpora.problems import Problems
from alpaca.models.tokenizer import EOS, load_tokenizer
from dataset import format_answer, labels_of, parse_answer
from process import CONFIG

LABELS = ["人", "人名", "x"]  # one begins like another
ODD_TEXTS = [
    *("王明去年在北京说。", "没有", "没有_人名", "a_人名_b", "_", " _", "  北京  大学 ", "### Response: 没有\n北京"),
    *("👨‍👩‍👧去👍🏽", "𠮷㐂龘𩸽", "１２３4", "\t\r\n\r\n", "", '"\\u5317\\" 引号', "北" * 300, "\u2028\u2581\u0000a"),
]


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return load_tokenizer(base_dir)


@pytest.fixture(scope="module")
def grammar(tokenizer):
    return AnswerGrammar(tokenizer, LABELS)


def is_line(line, text, labels=LABELS):
    """What the grammar is to say, written out: a part of the text, which may be nothing, with a type or without."""
    entity, bar, kind = line.rpartition("_")
    return line == "没有" or line in text or bool(bar) and kind in labels and entity in text


def allowed(grammar, matcher):
    logits = forbid(torch.zeros(1, len(matcher_vocabulary(grammar))), grammar.masks([matcher]))[0]
    return (logits == 0).nonzero().flatten().tolist()


def matcher_vocabulary(grammar):
    return range(grammar.vocabulary.vocab_size)


def accepts(grammar, text, ids):
    """(whether the ids are an answer, whether every one of them was in the mask)."""
    (matcher,), in_masks = grammar.matchers([text]), True
    for token in ids:
        in_masks &= token in allowed(grammar, matcher)
        if not matcher.validate_tokens([token]):
            return False, False
        matcher.consume_token(token)
    return matcher.is_accepting(), in_masks and matcher.is_accepting()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, alphabet", [("ab", "abx_\n"), ("a_", "a_x\n "), ("a ", " ax_\n"), ("a\nb", "abx_\n"), ("人没", "人没有_名")]
)
def test_brute_force(grammar, tokenizer, text, alphabet):
    """Every string of one to four characters, in the tokenizer's own pieces and spelled in bytes."""
    pieces, count = tokenizer.token_bytes, 0
    for length in range(1, 5):
        for characters in itertools.product(alphabet, repeat=length):
            answer = "".join(characters)
            expected = all(is_line(line, text) for line in answer.split("\n"))
            count += expected
            assert accepts(grammar, text, tokenizer.encode_texts([answer])[0]) == (expected, expected), repr(answer)
            in_bytes = [pieces.index(b" "), *(pieces.index(bytes([byte]), 3) for byte in answer.encode())]
            assert accepts(grammar, text, in_bytes)[0] == expected, repr(answer)
    assert count >= 9


def test_every_right_answer_can_be_given(grammar, tokenizer):
    """All of the demo's dev set, every token in the mask."""
    labels = read_labels(CONFIG["labels"])
    examples = convert("data/demo/ori_data/dev.txt", "jsonl", Task(labels, "", ""), Problems())
    names = AnswerGrammar(tokenizer, labels.values())
    for example in examples[:150]:
        assert accepts(names, example["text"], tokenizer.encode_texts([example["answer"]])[0]) == (True, True)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_spans_of_odd_texts(grammar, tokenizer, text):
    """Each substring can be an entity of every type, whatever pieces it takes; and what is not one cannot."""
    spans = {text[i:j] for i in range(len(text)) for j in range(i + 1, min(i + 4, len(text)) + 1)}
    for span in sorted(spans)[:30]:
        lines = f"{span}_人名\n{span}_x"
        if {*span} & {*"\r\n\u2581"}:  # ends of lines, and SentencePiece's own sign for a space, which it cannot spell
            continue
        assert accepts(grammar, text, tokenizer.encode_texts([lines])[0]) == (True, True), repr(lines)
        assert say(grammar, tokenizer, text, lines).text == lines
    for lines in ("没有_y", "乙_人名", f"{text}乙_人名", "没有\n没有x"):
        assert not accepts(grammar, text, tokenizer.encode_texts([lines])[0])[0], repr(lines)


def go_on(row, token, log_probability):
    row.take(token, log_probability)
    row.note()


def answer_at_random(grammar, tokenizer, text, draw):
    """An answer of tokens drawn from the masks."""
    row = Row(0, [1], 60, tokenizer, text)
    row.matcher = grammar.matchers([text])[0]
    while not row.over:
        token = draw.choice(allowed(grammar, row.matcher))
        go_on(row, token, -0.5)
    return row.answer(grammar)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_nothing_else_can_be_said(grammar, tokenizer, text):
    draw = random.Random(text)
    for _ in range(40):
        answer = answer_at_random(grammar, tokenizer, text, draw)
        parsed = parse_answer(answer.text, text, LABELS)
        assert parsed == (parsed.entities, [], [], [], []), answer
        assert len(answer.scores) == len(parsed.entities) and all(score <= -0.5 for score in answer.scores)
        assert answer.text == format_answer(
            [{"entity": entity, "type": kind, "begin": i, "end": 0} for i, (entity, kind) in enumerate(parsed.entities)]
        )


def say(grammar, tokenizer, text, answer, scores=False):
    """The Answer that says this. scores: each token is as much less probable as those before it, by 1 %."""
    row = Row(0, [1], 100, tokenizer, text)
    row.matcher = grammar.matchers([text])[0]
    for i, token in enumerate([*tokenizer.encode_texts([answer])[0], EOS]):
        if not row.over:
            go_on(row, token, -0.01 * i * scores)
    return row.answer(grammar)


def test_lines_that_are_left_out(grammar, tokenizer):
    answer = say(grammar, tokenizer, "王明在北京", "王明_人名\n王\n王明_人名\n北京_x")
    assert answer[:4] == ("王明_人名\n北京_x", True, 1, 1)
    assert say(grammar, tokenizer, "王明", "王明\n没有")[:4] == ("没有", True, 0, 1)
    assert say(grammar, tokenizer, "王明", "没有\n王明_x")[:4] == ("王明_x", True, 0, 0)
    assert say(grammar, tokenizer, "王明", "_x\n\n王_x")[:4] == ("王_x", True, 0, 1)
    assert say(grammar, tokenizer, "王\r\n明", "王\n明_x")[:4] == ("明_x", True, 0, 1)
    assert say(grammar, tokenizer, "王\n\n明", "王\n明_x")[:4] == ("明_x", True, 0, 1)
    # a line that comes again keeps the score that it had first
    scored = say(grammar, tokenizer, "王明", "王明_人名\n王明_人名\n明_x", scores=True)
    first = sum(range(len(tokenizer.encode_texts(["王明_人名"])[0])))
    assert scored.text == "王明_人名\n明_x" and scored.scores[0] == pytest.approx(-0.01 * first)
    # a loop: the second line in a row that was there before is the end
    loop = say(grammar, tokenizer, "王明在北京", "王明_人名\n北京_x\n王明_人名\n北京_x\n在_x\n")
    assert loop[:4] == ("王明_人名\n北京_x", True, 2, 0)


def test_an_answer_cut_off_ends_with_its_last_whole_line(grammar, tokenizer):
    ids = tokenizer.encode_texts(["王明_人名\n北京_x"])[0]
    row = Row(0, [1], len(ids), tokenizer, "王明在北京")  # bos and all tokens but the last
    row.matcher = grammar.matchers([row.text])[0]
    for token in ids[:-1]:
        go_on(row, token, 0.0)
    assert row.over and row.answer(grammar)[:4] == ("王明_人名", False, 0, 0)


def test_as_many_threads_as_cores_may_be_used(tokenizer, monkeypatch):
    """Not as many as the machine has: a container or taskset leaves fewer, and more would be in each other's way."""
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    for cores in (3, 8):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: {*range(cores)})
        made = AnswerGrammar(tokenizer, LABELS)
        assert made.threads._max_workers == cores and bool(made.executor) == (cores == 8)


def test_a_type_that_no_answer_can_hold_is_refused(tokenizer):
    """▁ in it is a space to the tokenizer; where labels are read, where data are, and of an adapter that has one."""
    example = {"instruct": "找", "answer": "王明_人▁名"}
    for refuse in (
        lambda: read_labels(["PER:人▁名"]),
        lambda: labels_of([example]),
        lambda: make_grammar("auto", "folder", tokenizer, ["人▁名"]),
    ):
        with pytest.raises(UserError, match="▁ .U.2581. is a space to the tokenizer.*rename"):
            refuse()
    with pytest.raises(UserError, match="metrics.json calls all entity types together micro; rename"):
        labels_of([{**example, "answer": "王明_micro"}])


def test_when_answers_are_constrained(tokenizer):
    assert make_grammar("auto", "folder", tokenizer, ["人名"]) and make_grammar("True", None, tokenizer, ["人名"])
    assert (
        make_grammar("False", "folder", tokenizer, ["人名"]) is make_grammar("auto", None, tokenizer, ["人名"]) is None
    )
    assert make_grammar("auto", "folder", tokenizer, []) is None  # an adapter for another task
    with pytest.raises(UserError, match="--constrained=True: no entity types"):
        make_grammar("True", "folder", tokenizer, [])
