"""Long texts in windows, and their rows joined.     python -m pytest tests/answering/test_windows.py"""

import random
import time
from types import SimpleNamespace

from alpaca.answering.windows import CutExample, cutter, join_rows, row_of_text
from alpaca.models.cut_text import cut_text
from alpaca.models.templates import encode_prompts, message_of
from alpaca.models.tokenizer import load_tokenizer
from dataset import example_of_input


def ends_of(text):
    """As if each character were a token."""
    return range(1, len(text) + 1)


def test_a_text_that_fits_is_one_window():
    assert cut_text("王明去了北京。他说好。", ends_of, 11) == ([(0, 11)], [])
    assert cut_text("", ends_of, 5) == ([(0, 0)], [])


def test_windows_end_with_sentences():
    text = "他说：“王明到了。”北京很冷！？\n没有雪……于是回家。"
    windows, inside = cut_text(text, ends_of, 12)
    assert [text[begin:end] for begin, end in windows] == ["他说：“王明到了。”", "北京很冷！？\n没有雪……", "于是回家。"]
    assert inside == []


def test_what_is_cut_inside_a_sentence_is_named():
    text = "王明在北京，李华在上海，都没有回来。" + "长" * 20 + "。好。"
    windows, inside = cut_text(text, ends_of, 10)
    assert [text[begin:end] for begin, end in windows] == [
        *("王明在北京，", "李华在上海，", "都没有回来。", "长" * 10, "长" * 10, "。好。"),
    ]
    assert inside == [6, 12, 28, 38]
    assert cut_text("v1.5 and 3.14. The end", ends_of, 16)[0] == [(0, 14), (14, 22)]


def test_windows_are_as_long_as_texts_usually_are():
    """Sentences are joined to the usual length; one that is longer stays whole as long as it fits."""
    text = "王明到了。他说好。" + "去年在北京，我们都说好。" + "好。好。"
    windows, inside = cut_text(text, ends_of, 15, 10)
    assert [text[begin:end] for begin, end in windows] == ["王明到了。他说好。", "去年在北京，我们都说好。", "好。好。"]
    assert inside == []
    assert cut_text("长" * 14, ends_of, 15, 10) == ([(0, 14)], [])
    windows, inside = cut_text("长" * 14 + "，好", ends_of, 15, 10)
    assert (windows, inside) == ([(0, 15), (15, 16)], [15])


def test_windows_of_random_texts():
    """They are the text, in order, each fits, and none could have gone on to its next sentence end."""
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("王明北京去年，。！\n ”", weights=[5] * 6 + [1] * 6, k=draw.randint(1, 300)))
        limit = draw.randint(1, 60)
        windows, inside = cut_text(text, ends_of, limit, draw.randint(1, limit))
        assert "".join(text[begin:end] for begin, end in windows) == text
        assert all(0 < end - begin <= limit for begin, end in windows)
        assert all(text[end - 1] in "。！\n”" for _, end in windows[:-1] if end not in inside)
        assert not any({*text[begin:end]} & {*"。！\n"} for begin, end in windows if end in inside)


def test_no_window_ends_across_what_is_to_be_kept():
    """Even where it would end anywhere; what is longer than a window is cut all the same."""
    assert cut_text("长" * 30, ends_of, 10, keep=[(8, 12), (6, 9), (12, 18)])[0] == [
        (0, 6),
        (6, 12),
        (12, 22),
        (22, 30),
    ]
    assert cut_text("长" * 30, ends_of, 10, keep=[(0, 30)])[0] == [(0, 10), (10, 20), (20, 30)]
    assert cut_text("好。长，长" * 2, ends_of, 5, keep=[(1, 3)])[0] == [(0, 4), (4, 7), (7, 10)]


def test_a_book_takes_no_time():
    text = "王明去年在北京，李华在上海。" * 1500
    start = time.perf_counter()
    windows, inside = cut_text(text, ends_of, 300)
    assert len(windows) == 72 and not inside and time.perf_counter() - start < 2


def test_joined_rows():
    text = "北京。上海北京。没有"

    def entity(name, score, *spans):
        return {"entity": name, "type": "地名", "spans": [list(span) for span in spans], "log_probability": score}

    rows = [
        {
            **{"text": "北京。", "prediction": "北京_地名", "entities": [entity("北京", -0.5, (0, 2))]},
            **{"log_probability": -1.0, "problems": {"repeated": 1}},
        },
        {
            **{"text": "上海北京。", "prediction": "上海_地名\n北京_地名", "log_probability": -0.25},
            **{"entities": [entity("上海", -1.0, (0, 2)), entity("北京", -0.1, (2, 4))], "problems": {"repeated": 2}},
        },
        {"text": "没有", "prediction": "没有", "entities": [], "log_probability": 0.0},
    ]
    joined = join_rows(text, [(0, 3), (3, 8), (8, 10)], rows)
    assert joined == {
        **{"text": text, "answer": None, "prediction": "北京_地名\n上海_地名", "log_probability": -1.25},
        "entities": [entity("北京", -0.1, (0, 2), (5, 7)), entity("上海", -1.0, (3, 5))],
        "problems": {"repeated": 3},
    }
    assert all(text[b:e] == found["entity"] for found in joined["entities"] for b, e in found["spans"])
    assert join_rows(text, [(8, 10)], rows[2:])["prediction"] == "没有"
    unanswered = {"text": "没有", "prediction": None, "entities": [], "problems": {}}
    joined = join_rows(text, [(0, 3), (3, 8), (8, 10)], [*rows[:2], unanswered])
    assert (joined["prediction"], joined["log_probability"]) == ("北京_地名\n上海_地名", -1.25)
    assert joined["problems"] == {"cut": 1, "repeated": 3} and len(joined["entities"]) == 2
    joined = join_rows(text, [(0, 8), (8, 10)], [unanswered, unanswered])
    assert joined == {"text": text, "answer": None, "prediction": None, "entities": []}


def test_windows_leave_room_for_their_answers(base_dir):
    """Half as many tokens as the text has, within what training had; and they use it."""
    tokenizer, text = load_tokenizer(base_dir), "王明去年在北京说新闻，" * 300
    example = example_of_input({"text": text}, "找", "文本：")
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
    facts = {"labels": ["人名"], "instructs": ["找"], "text_tokens": 500}
    for length, limit in ((300, 300), (900, 512)):
        (cut,) = cutter(model, tokenizer, SimpleNamespace(max_seq_length=length), facts)([example])
        prompts = encode_prompts(tokenizer, [message_of(part["instruct"], part["query"]) for part in cut.parts])
        texts = tokenizer.encode_texts([part["text"] for part in cut.parts])
        rooms = [limit - len(prompt) - len(ids) // 2 for prompt, ids in zip(prompts, texts, strict=True)]
        assert len(rooms) > 3 and -3 <= min(rooms) <= max(rooms[:-1]) < 40


def test_gold_of_a_text_in_windows_is_that_of_the_whole():
    """Where the corpus nests, with the places inside longer entities; rows without entities of their own say so, too."""
    text = "北京大学在北京。"
    example = {"text": text, "answer": "北京大学_机构名\n北京_地名", "entities": None, "instruct": "找"}
    rows = [{"prediction": "没有", "entities": [], "log_probability": -1.0}] * 2
    cut = CutExample([example] * 2, [(0, 4), (4, 8)], [])
    golds = [row_of_text(example, cut, rows, nested=nested)["gold"][1]["spans"] for nested in (True, False)]
    assert golds == [[[0, 2], [5, 7]], [[5, 7]]]


def test_an_instruction_that_leaves_no_room_is_cut_into_nothing(base_dir):
    example = example_of_input({"instruct": "说" * 600, "text": "王明到了。他说好。"}, "", "文本：")
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
    assert cutter(model, load_tokenizer(base_dir), None, {})([example]) == [([example], [(0, 9)], [])]
