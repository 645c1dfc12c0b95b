"""Text <-> ids <-> entities.     python -m pytest tests/models/test_dataset.py"""

import hashlib
import json
import random

import pytest
import sentencepiece
from transformers import AutoTokenizer

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_jsonl
from alpaca.corpora.inputs import read_texts
from alpaca.models.templates import TEMPLATES, TokenizedExample, encode_examples, message_of
from alpaca.models.tokenizer import EOS, load_tokenizer, save_tokenizer
from dataset import (
    INSTRUCT,
    example_of_input,
    fit_length,
    format_answer,
    gold_entities,
    labels_of,
    locate,
    nests,
    parse_answer,
    read_examples,
    without_rehearsal,
)
from harness import INSTRUCTION, make_records, write_jsonl

ALPACA = TEMPLATES["alpaca"]
HARD_TEXTS = [
    "北京大学生去年在上海说新闻记者被评为北京市日报",  # overlapping words of equal score
    "a</s>b<s>c<unk>[PAD]<0x0A>",
    "### Response: 没有_人名",
    "😀🤖👨‍👩‍👧",
    "ＡＢＣ１２３，．！",
    "龘靐齉爩𠀀",
    "两个  空格\t制表\n换行\r\n",
    " 开头的空格",
    "",
]


def test_prompt_is_the_one_that_adapters_are_trained_with():
    digest = "a1b69f862f7831a2ab09cf66284726dafd2a67985c514b4e88e8a9a5766bc901"
    assert hashlib.sha256(ALPACA.prompt("{instruction}").encode()).hexdigest() == ALPACA.sha256 == digest
    assert message_of("指令", "文本：甲") == "指令\n文本：甲" and message_of("指令", "") == "指令"
    assert ALPACA.prompt("").endswith("Response: ") and not ALPACA.prompt("").endswith("  ")
    assert "Instruction:\n{query} {0}\n\n###" in ALPACA.prompt("{query} {0}")


def test_default_instruction_is_the_original_one():
    assert INSTRUCT.replace("{labels}", "人名、地名、机构名") == INSTRUCTION


@pytest.mark.parametrize("name", ["base", "merged", "alpaca"])
def test_ids_and_text_are_sentencepieces(tokenizer_models, tmp_path, name):
    model = tokenizer_models / f"{name}.model"
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model))
    save_tokenizer(model, tmp_path / "saved")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.model").write_bytes(model.read_bytes())
    bare, saved = load_tokenizer(tmp_path / "bare"), load_tokenizer(tmp_path / "saved")
    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    prompts = [ALPACA.prompt(message_of(INSTRUCT, f"文本：{text}")) for text in HARD_TEXTS]
    assert bare.encode_texts(prompts) == expected.encode(prompts)
    for text in HARD_TEXTS + prompts:
        ids = expected.encode(text)
        for tokenizer in (bare, saved, auto):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, (tokenizer, text)
        assert bare.decode(ids) == expected.decode(ids) == text
        assert bare.decode([1, *ids, 2], skip_special_tokens=True) == text
    for tokenizer in (bare, saved, auto):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        assert tokenizer.pad_token_id == (expected.get_piece_size() - 1 if name == "alpaca" else 0)


def test_scores_are_tied_so_that_the_stock_tokenizer_errs(tokenizer_models, tmp_path):
    """Otherwise the test above would prove nothing."""
    from transformers import LlamaTokenizer

    save_tokenizer(tokenizer_models / "merged.model", tmp_path)
    stock, exact = LlamaTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    text = "江大学"  # of two pieces that overlap sentencepiece takes the left one, LlamaTokenizer the one added first
    assert stock(text, add_special_tokens=False)["input_ids"] != exact.encode_texts([text])[0]


def test_missing_tokenizer_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"chinese-alpaca-tiny/tokenizer.model: no such file; .*make tiny"):
        load_tokenizer(tmp_path / "chinese-alpaca-tiny")
    with pytest.raises(UserError, match="merge_llama_with_chinese_lora"):
        load_tokenizer(tmp_path / "chinese-alpaca-7b")
    for content, reason in (
        (b"<html>404</html>", "is an HTML page"),
        (b"\xff\x00nothing", "not a SentencePiece model"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=f"tokenizer.model: {reason}"):
            load_tokenizer(tmp_path)


def test_example_is_bos_prompt_answer_eos(tokenizer_models, tmp_path):
    save_tokenizer(tokenizer_models / "alpaca.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    sp = tokenizer.sp_model
    (example,) = encode_examples(tokenizer, [{"instruct": "指令", "query": "文本：</s>", "answer": "北京_地名"}])
    assert example.prompt_ids == [1, *sp.encode(ALPACA.prompt("指令\n文本：</s>"))]
    assert example.answer_ids == [*sp.encode("北京_地名"), 2]
    assert sp.id_to_piece(example.prompt_ids[-1]) == "▁" and sp.id_to_piece(example.prompt_ids[-2]) == ":"


# ---------------------------------------------------------------------------------------------------------------------
# reading


def test_read_examples(tmp_path):
    records = [{"instruct": "指", "query": "文本：甲_乙", "answer": "没有"}, make_records(2, 0)[0]]
    path = write_jsonl(tmp_path / "data.txt", records)
    path.write_text("\ufeff" + path.read_text(encoding="utf-8").replace("\n", "\r\n"), encoding="utf-8", newline="")
    first, second = read_examples(path)
    assert first == {
        "instruct": "指",
        "query": "文本：甲_乙",
        "answer": "没有",
        "text": "甲_乙",
        "entities": None,
        "task": None,
        "line": 1,
    }
    assert second["entities"] == records[1]["entities"] and second["text"] == records[1]["text"]
    assert without_rehearsal([first, second]) == [second] and without_rehearsal([first, first]) == [first, first]
    stated, titled = read_examples(write_jsonl(path, [{**records[0], "text": "甲"}, {**records[1], "entities": None}]))
    assert without_rehearsal([stated, second, first]) == [stated, second, first]  # of one instruction is of one task
    assert without_rehearsal([{**first, "instruct": "别的"}, stated, titled]) == [stated, titled]


def test_rehearsal_is_what_says_so(tmp_path):
    """Of three keys alone, of the same instruction and even with a text: "task" decides; another task's name does not."""
    row = {"instruct": "指", "query": "文本：甲", "answer": "甲_乙"}
    rows = [row, {**row, "task": "rehearsal"}, {**row, "task": "ner"}, {**row, "text": "甲", "task": "rehearsal"}]
    examples = read_examples(write_jsonl(tmp_path / "data.txt", rows))
    assert [example["task"] for example in examples] == [None, "rehearsal", None, "rehearsal"]
    assert without_rehearsal(examples) == [examples[0], examples[2]]
    assert without_rehearsal(examples[1:2]) == examples[1:2]  # a file of nothing else is for that task


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"data.txt: the file is empty"),
        (b"\n\n", r"data.txt: the file holds no record"),
        (b'{"instruct": "a", "query": "b", "answer": "c"}\n{"instruct": ', r"data.txt:2: not valid JSON .*column"),
        (b"[1]\n", r"data.txt:1: expected a JSON object, got list"),
        (b'{"instruct": "a", "query": "b"}\n', r"data.txt:1: no column 'answer' .*--response_column"),
        (b'{"instruct": "a", "query": "b", "answer": 3}\n', r"data.txt:1: column 'answer' must be a string, got 3"),
        (b'{"instruct": "a", "query": "b", "answer": "\xff"}\n', r"data.txt:1: not UTF-8"),
        (b'{"instruct": "a", "query": "b", "answer": "\\ud83d"}\n', r"data.txt:1: half a character"),
        (b'{"instruct": "a", "query": "b", "answer": "c", "text": 3}\n', r"data.txt:1: `text` must be a string, got 3"),
        (b'{"instruct": "a", "query": "b", "answer": "c", "entities": ["d"]}\n', r"data.txt:1: `entities` must be obj"),
        (b'{"instruct": "a", "query": "b", "answer": "c", "entities": 3}\n', r"data.txt:1: `entities` must be a list"),
        (
            b'{"instruct": "a", "query": "b", "answer": "c", "entities": '
            b'[{"entity": "b", "type": "d", "begin": "0", "end": 1}]}\n',
            r"data.txt:1: .*two strings, two integers",
        ),
        (
            b'{"instruct": "a", "query": "xyz", "answer": "y_d", "entities": '
            b'[{"entity": "y", "type": "d", "begin": 1, "end": 1}]}\n',
            r"data.txt:1: the entity 'y' is not at \[1, 1\) of the text.*end exclusive",
        ),
        (b'{"instruct": ' + b"[" * 100_000, r"data.txt:1: not JSON that can be read"),
        (b'{"instruct": ' + b"1" * 5000 + b"}", r"data.txt:1: not JSON that can be read"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "data.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / "data.txt")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt: no such file"):
        list(read_jsonl(tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match="make it with `python process.py --data_name=mine`"):
        read_examples(tmp_path / "mine" / "instruct_data" / "dev.txt")


# ---------------------------------------------------------------------------------------------------------------------
# answers


def test_format_answer_orders_and_removes_repeats():
    entities = [
        {"entity": "北京", "type": "地名", "begin": 4, "end": 6},
        {"entity": "京", "type": "地名", "begin": 0, "end": 1},
        {"entity": "京华大学", "type": "机构名", "begin": 0, "end": 4},
        {"entity": "北京", "type": "地名", "begin": 9, "end": 11},
    ]
    assert format_answer(entities) == "京华大学_机构名\n京_地名\n北京_地名"
    assert format_answer([]) == "没有"


def test_labels_of():
    answers = ["王明_人名\n北京_地名", "没有", "长江_地名"]
    assert labels_of([{"instruct": "地名、人名", "answer": answer} for answer in answers]) == ["地名", "人名"]
    answers = ["a_b is a name", "The end.", "Yes.", "No."]  # not NER
    assert labels_of([{"instruct": "Translate", "answer": answer} for answer in answers]) == []
    answers = ["王明_人名\n北京_micro", "没有"]  # metrics.json has another use for that name
    with pytest.raises(UserError, match="北京_micro.*rename"):
        labels_of([{"instruct": "找", "answer": answer} for answer in answers])


def test_parse_answer():
    answer = "王_明_人名\n北京_地名\n\n北京_地名\n乱写\n_地名\n上海_\n长沙_动物\n"
    parsed = parse_answer(answer, text="王_明在长沙", labels=["人名", "地名"])
    assert parsed.entities == [("王_明", "人名"), ("北京", "地名"), ("长沙", "动物")]
    assert parsed.malformed == ["乱写", "_地名", "上海_"]
    assert parsed.unknown_type == [("长沙", "动物")]
    assert parsed.not_in_text == [("北京", "地名")]
    assert parsed.repeated == [("北京", "地名")]
    assert parse_answer("没有") == ([], [], [], [], []) == parse_answer("")
    assert parse_answer("北京_地名\n没有").malformed == ["没有"]


def test_format_and_parse_are_inverse():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("甲乙_丙 没有") for _ in range(12))
        entities = []
        for _ in range(draw.randint(0, 4)):
            begin = draw.randrange(11)
            end = draw.randint(begin + 1, 12)
            if text[begin:end].strip():
                entities.append({"entity": text[begin:end], "type": draw.choice("人地"), "begin": begin, "end": end})
        parsed = parse_answer(format_answer(entities), text, ["人", "地"])
        assert set(parsed.entities) == {(e["entity"], e["type"]) for e in entities}
        assert not (parsed.malformed or parsed.unknown_type or parsed.not_in_text)


def test_locate_leaves_out_what_lies_in_a_longer_entity():
    text = "北京大学在北京，北京大学生"
    located = locate(text, [("北京大学", "机构名"), ("北京", "地名"), ("上海", "地名")])
    assert located == [
        {"entity": "北京大学", "type": "机构名", "spans": [[0, 4], [8, 12]]},
        {"entity": "北京", "type": "地名", "spans": [[5, 7]]},
        {"entity": "上海", "type": "地名", "spans": []},
    ]
    assert locate(text, [("北京", "地名")])[0]["spans"] == [[0, 2], [5, 7], [8, 10]]


def test_nested_entities_have_spans_where_the_corpus_nests():
    text = "洛阳市图书馆在洛阳市"
    pairs = [("洛阳市图书馆", "机构名"), ("洛阳市", "地名")]
    assert [found["spans"] for found in locate(text, pairs, nested=True)] == [[[0, 6]], [[0, 3], [7, 10]]]

    def example(*places):
        found = [{"entity": text[b:e], "type": "地名", "begin": b, "end": e} for b, e in places]
        return {"text": text, "entities": found, "answer": format_answer(found)}

    nesting, flat = example((0, 6), (0, 3), (7, 10)), example((0, 6), (7, 10))
    assert nests([nesting]) and not nests([flat]) and not nests([]) and not nests([example((7, 10))])
    assert nests([nesting, nesting, flat]) and not nests([nesting, flat, flat])  # a few mistakes change nothing
    assert not nests([{**nesting, "entities": None}])
    gold = gold_entities({**nesting, "entities": None}, nested=True)
    assert [found["spans"] for found in gold] == [[[0, 6]], [[0, 3], [7, 10]]]


def test_gold_entities_prefer_exact_offsets():
    text = "中美和中国"
    exact = {"entity": "中", "type": "地名", "begin": 0, "end": 1}
    example = {"text": text, "answer": "中_地名", "entities": [exact]}
    assert gold_entities(example) == [{"entity": "中", "type": "地名", "spans": [[0, 1]]}]
    assert gold_entities({**example, "entities": None})[0]["spans"] == [[0, 1], [3, 4]]


def test_labels_stand_in_the_order_of_the_instruction():
    answers = ["甲_机构名", "乙_别的", "丙_人名\n丁_地名", "没有"]
    examples = [{"instruct": INSTRUCTION, "answer": answer} for answer in answers]
    assert labels_of(examples) == ["人名", "地名", "机构名", "别的"]


# ---------------------------------------------------------------------------------------------------------------------
# lengths


def example(prompt, answer):
    return TokenizedExample(list(range(10, 10 + prompt)), [*range(30, 30 + answer - 1), EOS])


def test_nothing_is_cut():
    examples = [example(5, 2), example(9, 2), example(4, 4)]
    assert fit_length(examples, "f", 8) == [examples[0], examples[2]]
    with pytest.raises(UserError, match="f: 1 of 3 examples exceed max_seq_length=8; the longest has 11 tokens"):
        fit_length(examples, "f", 8, "error")
    with pytest.raises(UserError, match="f: no example fits into max_seq_length=3"):
        fit_length(examples, "f", 3)
    assert fit_length(examples, "f", 3, needed=False) == []
    with pytest.raises(UserError, match="--too_long=cut: expected drop or error"):
        fit_length(examples, "f", 8, "cut")


def test_jsonl_keeps_line_numbers_over_blank_lines(tmp_path):
    (tmp_path / "x.txt").write_text('\n{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert list(read_jsonl(tmp_path / "x.txt")) == [(2, {"a": 1}), (4, {"a": 2})]
    assert json.dumps(list(read_jsonl(tmp_path / "x.txt")))


def test_the_text_of_a_query_is_what_follows_the_prefix_of_the_training_data(tmp_path):
    queries = [
        {"query": "句子：王明"},
        {"query": "文本：王明"},
        {"query": "问：王明", "text": "王明"},
        {"text": "王明"},
    ]
    read = read_texts(write_jsonl(tmp_path / "texts.txt", queries))
    examples = [example_of_input(record, "", "句子：") for record in read]
    assert [example["text"] for example in examples] == ["王明"] * 4
    assert [example["query"] for example in examples] == ["句子：王明", "文本：王明", "问：王明", "句子：王明"]
