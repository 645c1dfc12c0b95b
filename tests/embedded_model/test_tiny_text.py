"""python -m pytest tests/embedded_model/test_tiny_text.py: the text and the tasks that the embedded model is pretrained on."""

import importlib.util
import json
import re

import numpy as np
import pytest
import sentencepiece

from harness import ROOT

pytest.importorskip("jieba", reason="only the training of the embedded model needs jieba's dictionary")
from alpaca.common.errors import UserError
from dataset import NO_ENTITY
from embedded_model import dictionary, documents, tasks
from embedded_model.rough_text import RoughTextMaker
from embedded_model.sources import ENTITY_TYPES, TEMPLATES, is_held_out
from embedded_model.tasks import TASKS, find_things
from embedded_model.text_maker import any_text, plain_text


@pytest.fixture(scope="module")
def maker():
    return RoughTextMaker(3, "train", walk_share=0.25, rough_share=0.7)


def test_without_jieba_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install jieba==") as error:
        dictionary.find_dictionary()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_ordinary_words_are_no_names():
    words = {word for pool in dictionary.pools().values() for word in pool}
    assert len(words) > 50000 and {"高兴", "成功", "方向", "咖啡"} <= words
    assert not words & {"北京", "中国", "长江", "新华社", "毛泽东", "石首", "北京烤鸭"}


def test_segment():
    assert (
        dictionary.segment("这家医院的大夫医术高明，马上就来。")
        == "这家 医院 的 大夫 医术 高明 ， 马上 就 来 。".split()
    )


def test_things_are_found_by_their_form_and_never_in_names():
    segments = [
        ("1998年5月3日，", None),
        ("第12中学", "ORG"),
        ("花300万元买了《", None),
        ("家", "作品"),
        ("》等7本书，占20%。", None),
    ]
    things = [("1998年5月3日", "日期"), ("300万元", "金额"), ("家", "作品"), ("7", "数字"), ("20%", "比例")]
    assert find_things(segments) == things


def test_names_and_clauses_are_of_the_train_side(maker):
    segments = [segment for _ in range(500) for segment in any_text(maker)]
    assert not [s for s, kind in segments if kind in ("PER", "ORG") and is_held_out("name:" + s)]
    held_out = [line for _, line in TEMPLATES if "{" not in line and is_held_out("sentence:" + line)]
    kept = "\n".join(line for _, line in TEMPLATES if not is_held_out("sentence:" + line))
    assert not [c for line in held_out for c in re.split("[，。]", line) if c in dictionary.clauses() and c not in kept]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_tasks_can_be_answered_and_are_not_the_demos(maker, task):
    asked = 0
    while asked < 60:
        segments = any_text(maker)
        example = task(maker, segments)
        if not example:
            continue
        asked += 1
        instruct, query, answer = example
        assert instruct and query.startswith("文本：") and answer
        assert not re.search("_(?:人名|地名|机构名)$", answer, re.MULTILINE)
        if task is tasks.list_proper_names:
            names = list(dict.fromkeys(s for s, kind in segments if kind in ENTITY_TYPES))
            assert answer == ("\n".join(names) or NO_ENTITY) and query == "文本：" + plain_text(segments)


def test_the_demos_rehearsal_is_what_the_script_writes():
    lines = (ROOT / "data" / "demo" / "ori_data" / "rehearse.txt").read_text(encoding="utf-8").splitlines()
    assert tasks.rehearsal_rows() == [json.loads(line) for line in lines], "tasks.py --help tells how"


def test_a_batch_depends_on_its_seed_alone():
    base, merged = (
        sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "model_hub" / folder / "tokenizer.model"))
        for folder in ("tiny", "chinese-llama-plus-lora-tiny")
    )
    first, again, other = (documents.make_batch("base", seed, 2, base, merged) for seed in ("1-0", "1-0", "1-1"))
    assert first.shape == (2, documents.ROW_LENGTH) and (first == again).all() and (first != other).any()
    assert np.all((first & (documents.NO_LOSS - 1)) < merged.get_piece_size())
