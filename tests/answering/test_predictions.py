"""What a row says of an answer.     python -m pytest tests/answering/test_predictions.py"""

from alpaca.answering.predictions import held_instructs, quoted_text, row_of
from alpaca.answering.row import NO_ANSWER, Answer

EXAMPLE = {"instruct": "找", "text": "王明去北京", "answer": "王明_人名", "entities": None}


def test_scores_and_problems_have_their_names():
    """Each count is another number; a line that comes again has the score that it had first."""
    lines = [
        "王明_人名",
        "王明_人名",
        "北京_地名",
        "鬼_人名",
        "神_人名",
        "去_年",
        "x",
        "y",
        "z",
        "北京_地名",
        "北京_地名",
    ]
    scores = [-(i + 1) / 10 for i in range(len(lines))]
    row = row_of(EXAMPLE, Answer("\n".join(lines), False, 4, 6, scores, -9.123456), ["人名", "地名"], False)
    assert row["problems"] == {
        **{"malformed": 3, "unknown_type": 1, "not_in_text": 2, "repeated": 3 + 4, "abandoned": 6, "cut": 1}
    }
    found = {(e["entity"], e["type"]): e["log_probability"] for e in row["entities"]}
    assert found == {
        **{
            ("王明", "人名"): -0.1,
            ("北京", "地名"): -0.3,
            ("鬼", "人名"): -0.4,
            ("神", "人名"): -0.5,
            ("去", "年"): -0.6,
        }
    }
    assert row["log_probability"] == -9.1235 and row["gold"] == [{"entity": "王明", "type": "人名", "spans": [[0, 2]]}]
    row = row_of(EXAMPLE, Answer("没有", True, 0, 0, [-0.5], -0.5), ["人名"], False)
    assert "problems" not in row and row["entities"] == []
    assert row_of(EXAMPLE, NO_ANSWER, ["人名"], False)["prediction"] is None


def test_whose_answers_a_grammar_holds():
    """What an adapter was trained to be asked; with --constrained=True all."""
    facts = {"instructs": ["找", "找出"]}
    for instruct, text in (("找", "王明去北京"), ("找出", "王明去北京"), ("找出人名", None)):
        example = {**EXAMPLE, "instruct": instruct}
        assert quoted_text(example, held_instructs("auto", facts)) == text
        assert quoted_text(example, held_instructs("True", facts)) == "王明去北京"
        assert quoted_text(example, held_instructs("auto", {})) == "王明去北京"  # nobody knows what it was asked
