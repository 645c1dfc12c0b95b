"""python -m pytest tests/corpora/test_exports.py: what annotators' tools export through process.py, and back to them."""

import json
import os
import re
from pathlib import Path

import pytest

from alpaca.common.errors import UserError
from alpaca.corpora.formats import FORMATS, detect_format, read_corpus
from alpaca.corpora.problems import Problems
from config_utils import run_script
from process import CONFIG, main

PROCESS = Path(__file__).resolve().parent.parent.parent / "process.py"
TEXT = "上周三，梁小雨到了洛阳市图书馆。"
PERSON, LIBRARY = ("梁小雨", "人名", 4, 7), ("洛阳市图书馆", "机构名", 9, 15)
REGION = {"start": 4, "end": 7, "text": "梁小雨", "labels": ["PER"]}


def task(*regions, text=TEXT, **more):
    """A task of Label Studio with one annotation."""
    result = [{"type": "labels", "from_name": "label", "to_name": "text", "value": region} for region in regions]
    return {"id": 1, "data": {"text": text}, "annotations": [{"was_cancelled": False, "result": result}], **more}


def dumped(value):
    return json.dumps(value, ensure_ascii=False)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")
    return path


def process(path, *argv):
    """Run process.py on one file -> its examples, through a dev file that shares none."""
    write("data/t/ori_data/dev.txt", '{"text": "别的句子", "entity_list": []}\n')
    run_script(main, CONFIG, str(PROCESS), ["--data_name=t", f"--train_file={path}", *argv])
    with open("data/t/instruct_data/train.txt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def entities(examples):
    """[(text, [(entity, type, begin, end)])]"""
    return [(e["text"], [tuple(entity.values()) for entity in e["entities"]]) for e in examples]


def left_out(out):
    """{title: count} of the summary's last lines, without the zeros and what any file in columns has."""
    counts = re.findall(r"(.+?) (\d+)(?:，|\n|$)", out.split("丢弃：")[-1].replace("另外：", ""))
    return {title: int(n) for title, n in counts if n != "0" and "列" not in title and "-DOCSTART-" not in title}


ONE = [(TEXT, [PERSON])]
CASES = {  # name of the file: (format, content, sentences)
    "array.json": (
        "cmeee",
        '[{"text": "TEXT", "entities": [{"start_idx": 4, "end_idx": 6, "type": "PER", "entity": "梁小雨"}]}]',
        ONE,
    ),
    "characters.jsonl": (
        "characters",
        '{"id": "A1", "text": ["梁", "小", "雨", "来"], "labels": ["B-PER", "I-PER", "I-PER", "O"]}\n',
        [("梁小雨来", [("梁小雨", "人名", 0, 3)])],
    ),
    "tokens.jsonl": (
        "characters",
        '{"tokens": ["雪"], "ner_tags": ["O"]}\n{"tokens": ["梁小雨", "来"], "ner_tags": ["B-PER", "O"]}\n',
        [("雪", []), ("梁小雨来", [("梁小雨", "人名", 0, 3)])],
    ),
    "string_and_tags.json": (
        "characters",
        '[{"text": "梁小雨来", "labels": ["B-PER", "M-PER", "E-PER", "O"]}]',
        [("梁小雨来", [("梁小雨", "人名", 0, 3)])],
    ),
    "doccano_entities.jsonl": (
        "doccano",
        '{"id": 1, "text": "TEXT", "entities": [{"id": 1, "label": "PER", "start_offset": 4, "end_offset": 7}], '
        '"relations": [], "Comments": []}\n',
        ONE,
    ),
    "doccano_label.jsonl": (
        "doccano",
        '{"id": 2, "text": "下雪了。", "label": []}\n'
        '{"id": 1, "text": "TEXT", "label": [[4, 7, "PER"], [9, 15, "ORG"]], "Comments": []}\n',
        [("下雪了。", []), (TEXT, [PERSON, LIBRARY])],
    ),
    "doccano_old.jsonl": ("doccano", '{"text": "TEXT", "labels": [[4, 7, "PER"]], "meta": {}}\n', ONE),
    "doccano_2021.jsonl": (
        "doccano",
        '{"id": 1, "data": "雪", "label": []}\n{"id": 2, "data": "TEXT", "label": [[4, 7, "PER"]]}\n',
        [("雪", []), *ONE],
    ),
    "doccano_intents.jsonl": ("doccano", '{"text": "TEXT", "entities": [[4, 7, "PER"]], "cats": []}\n', ONE),
    "label_studio.conll": (
        "conll",
        "-DOCSTART- -X- O\n梁 -X- _ B-PER\n小 -X- _ I-PER\n雨 -X- _ I-PER\n来 -X- _ O\n\n雪 -X- _ O\n\n",
        [("梁小雨来", [("梁小雨", "人名", 0, 3)]), ("雪", [])],
    ),
    "three_columns.txt": (
        "conll",
        "梁\tnr\tB-PER\n小\tnr\tI-PER\n-DOCSTART- O\n雪\tn\tO\n",
        [("梁小", [("梁小", "人名", 0, 2)]), ("雪", [])],
    ),
    "label_studio.json": ("labelstudio", json.dumps([task(REGION)], indent=1), ONE),
    "label_studio_old.json": (
        "labelstudio",
        dumped([{"id": 1, "data": {"sentence": TEXT}, "completions": task(REGION)["annotations"]}]),
        ONE,
    ),
    "label_studio_min.json": ("labelstudio_min", dumped([{"id": 1, "text": TEXT, "label": [REGION]}]), ONE),
    "label_studio_min_2.json": (
        "labelstudio_min",
        dumped(
            [
                {"id": 1, "sentence": "下雪了。", "annotation_id": 1, "created_at": "2026-11-27", "annotator": "a@b.c"},
                {"id": 2, "sentence": TEXT, "ner": [REGION], "annotation_id": 2},
            ]
        ),
        [("下雪了。", []), (TEXT, [PERSON])],
    ),
    "prodigy.jsonl": (
        "spans",
        '{"text": "TEXT", "spans": [{"start": 4, "end": 7, "label": "PER", "token_start": 4, "token_end": 6}], '
        '"tokens": [{"text": "上", "start": 0, "end": 1, "id": 0}], "answer": "accept"}\n'
        '{"text": "雪", "answer": "accept"}\n',
        [*ONE, ("雪", [])],
    ),
    "spacy.json": (
        "spans",
        '[["TEXT", {"entities": [[4, 7, "PER"]]}], ["雪", {"entities": []}]]',
        [*ONE, ("雪", [])],
    ),
    "dicts.json": ("spans", '[{"text": "TEXT", "entities": [{"start": 4, "end": 7, "type": "PER"}]}]', ONE),
    "ours.json": (
        "jsonl",
        '[\n{"text": "雪", "entity_list": []},\n{"text": "梁小雨来", "entity_list": [{"entity_index": {"begin": 0, '
        '"end": 3}, "entity_type": "PER", "entity": "梁小雨"}]}\n]\n',
        [("雪", []), ("梁小雨来", [("梁小雨", "人名", 0, 3)])],
    ),
}


CASES = {name: (form, content.replace("TEXT", TEXT), expected) for name, (form, content, expected) in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_formats(name, capsys):
    form, content, expected = CASES[name]
    path = write(name, content)
    assert entities(process(path)) == expected
    out = capsys.readouterr().out
    assert f"格式：{path} 是 {form}，" in out and left_out(out) == {}
    assert entities(process(path, f"--dev_file={path}", f"--format={form}", "--keep_leaked")) == expected


def test_the_help_names_all_formats():
    comment = next(line for line in PROCESS.read_text(encoding="utf-8").splitlines() if '"format": ' in line)
    assert comment.split(": ")[-1].split() == " | ".join(["auto", *FORMATS]).split()


def test_a_format_is_not_taken_for_another():
    """Every format is asked in turn, so none may claim what is another's."""
    for name, (form, content, _) in CASES.items():
        assert detect_format(write(name, content)) == form, name
    for content in (
        '{"text": "雪", "label": {"name": {}}}',
        '{"instruct": "", "query": "", "answer": "", "entities": []}',
    ):
        assert detect_format(write("json.txt", content)) == "jsonl"
    assert detect_format(write("bio.txt", "{ O\n")) == "bio"
    assert detect_format(write("bio.txt", "-DOCSTART- -X- O O\n\n雪 O\n")) == "bio"
    assert detect_format(write("bio.txt", "# 一\n雪 n O\n")) == "conll"


ANN = "T1\tPER 4 7\t梁小雨\nT2\tORG 9 15\t洛阳市图书馆\n"


@pytest.mark.parametrize("path", ["brat/a.ann", "brat/a.txt", "brat"])
def test_brat(path, capsys):
    write("brat/a.txt", TEXT + "\n\n下雪了。\n")
    write("brat/a.ann", ANN)
    assert entities(process(Path(path))) == [(TEXT, [PERSON, LIBRARY]), ("下雪了。", [])]
    out = capsys.readouterr().out
    assert f"格式：{Path(path)} 是 brat，" in out and left_out(out) == {}


def test_a_folder_of_brat(capsys):
    write("brat/b.txt", "下雪了。\n")
    write("brat/b.ann", "")
    write("brat/sub/a.txt", "雨。\n" + TEXT)
    write("brat/sub/a.ann", "T1\tPER 7 10\t梁小雨\nT2\tPER 3 5\t梁小\n")
    write("brat/c.txt", "还没有标。\n")
    assert entities(process(Path("brat"))) == [("下雪了。", []), ("雨。", []), (TEXT, [PERSON])]
    out, err = capsys.readouterr()
    assert left_out(out) == {"还没有标注的任务（不读）": 1, "与文本不符的实体（已从答案去掉）": 1}
    assert f"{Path('brat/sub/a.ann')}:2: 与文本不符的实体" in err
    assert f"{Path('brat/c.txt')}:1: 还没有标注的任务（不读）：没有 c.ann" in err


def test_what_brat_holds_besides(capsys):
    write("a.txt", "雨。\n" + TEXT + "\n下雪了。\n")
    write(
        "a.ann",
        "T1\tPER 7 10\t梁小雨\nT2\tORG 12 14;16 18\t洛阳 书馆\nR1\tRel Arg1:T1 Arg2:T2\nE1\tGo:T1 Who:T1\n"
        "*\tEquiv T1 T2\nA1\tSure T1\n#1\tAnnotatorNotes T1\t对吗？\nT3\tTIME 18 22\t。 下雪\nT4\tPER 7 9\t小雨\n"
        "T5\tPER 90 92\t小雨\nT6\tPER 2 3\t雨\n",
    )
    assert entities(process(Path("a.ann"))) == [("雨。", []), (TEXT, [PERSON]), ("下雪了。", [])]
    out, err = capsys.readouterr()
    assert left_out(out) == {
        "不连续的实体（已从答案去掉）": 1,
        "关系和事件（不读）": 3,
        "属性和备注（不读）": 2,
        "含换行的实体（已从答案去掉）": 1,
        "与文本不符的实体（已从答案去掉）": 3,
    }
    for number in (2, 8, 9, 10, 11):
        assert f"a.ann:{number}: " in err


@pytest.mark.parametrize("counted", [1, 2])
def test_windows_line_ends_in_brat(counted, capsys):
    """brat counts a Windows line end as one character or two, as its version and what made the .ann see it."""
    write("a.txt", f"雨。\r\n{TEXT}\r\n")
    begin = 2 + counted + 4
    write("a.ann", f"T1\tPER {begin} {begin + 3}\t梁小雨\r\n")
    assert entities(process(Path("a.ann"))) == [("雨。", []), (TEXT, [PERSON])]
    out, err = capsys.readouterr()
    assert left_out(out) == {"Windows 换行的文档（已换算）": 1} and f"算作 {counted} 个字符" in err


@pytest.mark.parametrize("begin", [4, 5])
def test_a_byte_order_mark_in_brat(begin):
    write("a.txt", "\ufeff" + TEXT)
    write("a.ann", f"T1\tPER {begin} {begin + 3}\t梁小雨\n")
    assert entities(process(Path("a.ann"))) == ONE


def test_doccano_relations_comments_and_intents(capsys):
    record = {"text": TEXT, "entities": [{"id": 1, "label": "PER", "start_offset": 4, "end_offset": 7}]}
    record |= {"relations": [{"id": 1}, {"id": 2}], "Comments": [{"id": 1, "comment": "？"}], "cats": ["go"]}
    assert entities(process(write("a.jsonl", dumped(record)))) == ONE
    counts = {"关系和事件（不读）": 2, "属性和备注（不读）": 1, "整句的分类、评分和文字（不读）": 1}
    assert left_out(capsys.readouterr().out) == counts


def test_what_label_studio_holds_besides(capsys):
    relation, choice = (
        {"type": "relation", "from_id": "a", "to_id": "b"},
        {"type": "choices", "value": {"choices": ["x"]}},
    )
    box = {"type": "rectanglelabels", "value": {"x": 1, "rectanglelabels": ["PER"]}}
    first, second = task(REGION)["annotations"][0], task()["annotations"][0]
    cancelled = {**second, "was_cancelled": True}
    tasks = [
        task(REGION, {"start": 0, "end": 1, "text": "上", "labels": []}),
        {"id": 2, "data": {"text": "二"}, "annotations": [cancelled]},
        {"id": 3, "data": {"text": "三"}, "annotations": [], "predictions": [first]},
        {"id": 4, "data": {"text": TEXT + "四"}, "annotations": [cancelled, first, second]},
        {"id": 5, "data": {"text": TEXT + "五"}, "annotations": [second, {**first, "ground_truth": True}]},
        task({**REGION, "labels": ["PER", "ORG"]}, text=TEXT + "六"),
    ]
    tasks[0]["annotations"][0]["result"] += [relation, choice, box]
    person = ("梁小雨", "机构名", 4, 7)
    expected = [(TEXT, [PERSON]), (TEXT + "四", [PERSON]), (TEXT + "五", [PERSON]), (TEXT + "六", [PERSON, person])]
    assert entities(process(write("a.json", json.dumps(tasks, indent=1)))) == expected
    out, err = capsys.readouterr()
    assert left_out(out) == {
        "没有标签或不是文本区间的标注（不读）": 2,
        "关系和事件（不读）": 1,
        "整句的分类、评分和文字（不读）": 1,
        "标注不止一份的句子（只取一份）": 2,
        "跳过或拒绝的任务（不读）": 1,
        "还没有标注的任务（不读）": 1,
    }
    for name in ("task 2", "task 3", "task 4，2 份", "task 5，2 份"):
        assert name in err


def test_label_studio_before_anybody_has_annotated(capsys):
    predictions = [{"model_version": "m", "score": 0.9, "result": task(REGION)["annotations"][0]["result"]}]
    tasks = [{"data": {"text": TEXT}, "predictions": predictions}, {"data": {"text": "雪"}}]
    assert entities(process(write("a.json", dumped(tasks)))) == ONE
    counts = {"只有预标注的任务（当作标注读）": 1, "还没有标注的任务（不读）": 1}
    assert left_out(capsys.readouterr().out) == counts


@pytest.mark.parametrize("begin", [8, 9])
def test_emoji_in_label_studio(begin, capsys):
    """It counted UTF-16 units before it counted characters."""
    text = "🌧下雨了，" + TEXT
    region = {**REGION, "start": begin + 1, "end": begin + 4}
    for form in ([task(region, text=text)], [{"id": 1, "text": text, "label": [region]}]):
        assert entities(process(write("a.json", dumped(form)))) == [(text, [("梁小雨", "人名", 9, 12)])]
        counts = {"下标按 UTF-16 数的实体（已换算）": 1} if begin == 9 else {}
        assert left_out(capsys.readouterr().out) == counts


def test_several_annotators_in_json_min_and_prodigy(capsys):
    rows = [{"id": 1, "text": TEXT, "label": [REGION], "annotator": n, "sure": {"choices": ["a", "b"]}} for n in (1, 2)]
    assert entities(process(write("a.json", dumped(rows)))) == ONE
    counts = {"标注不止一份的句子（只取一份）": 1, "整句的分类、评分和文字（不读）": 1}
    assert left_out(capsys.readouterr().out) == counts
    span = {"start": 4, "end": 7, "label": "PER"}
    rows = [
        {"text": TEXT, "spans": [span], "_input_hash": 7, "answer": answer, "relations": [{}], "_annotator_id": answer}
        for answer in ("reject", "accept", "ignore", "accept")
    ]
    assert entities(process(write("a.jsonl", "\n".join(map(dumped, rows))))) == ONE
    counts = {"标注不止一份的句子（只取一份）": 1, "跳过或拒绝的任务（不读）": 2, "关系和事件（不读）": 1}
    assert left_out(capsys.readouterr().out) == counts


def test_latin_words_in_conll(capsys):
    """The file does not hold the blanks between words; a character a line has none to put back."""
    path = write("a.conll", "-DOCSTART- -X- O\nNew -X- _ B-LOC\nYork -X- _ I-LOC\n的 -X- _ O\nK -X- _ O\n9 -X- _ O\n")
    assert entities(process(path)) == [("New York的K9", [("New York", "地名", 0, 8)])]
    assert left_out(capsys.readouterr().out) == {"英文词之间丢失的空格（已补上）": 1}


def test_regions_without_a_label_in_json_min(capsys):
    """Beside labelled ones they are counted, and the labelled ones stay."""
    rows = [{"id": 1, "text": TEXT, "label": [{"start": 0, "end": 1, "text": "上"}, REGION]}]
    assert entities(process(write("a.json", dumped(rows)))) == ONE
    assert left_out(capsys.readouterr().out) == {"没有标签或不是文本区间的标注（不读）": 1}


BAD = {  # name: (files, what is named as --train_file, parts of the error)
    "no text": ({"a.ann": ANN}, "a.ann", ["a.ann: a.txt is missing"]),
    "no ann": ({"d/a.txt": "雪"}, "d", ["d: no .ann file in this folder"]),
    "ann row": ({"a.txt": TEXT, "a.ann": "T1 PER 4 7 梁小雨\n"}, "a.ann", ["a.ann:1: expected T1<tab>TYPE begin end"]),
    "ann gb": ({"a.txt": TEXT.encode("gb18030"), "a.ann": ANN}, "a.ann", ["a.txt:1: not UTF-8"]),
    "ann empty": ({"a.txt": TEXT, "a.ann": ""}, "a.ann", ["read as brat, but no entity is in it"]),
    "ann other": ({"a.txt": TEXT, "a.ann": "R1\tRel Arg1:T1\n"}, "a.txt", ["no entity", "关系和事件（不读） 1"]),
    "cut off": ({"a.json": '[{"text": "雪", "label": []}'}, "a.json", ["a.json:1: the array is not closed"]),
    "cut inside": ({"a.json": '[\n{"text": "雪", "la'}, "a.json", ["a.json:2: not valid JSON"]),
    "empty array": ({"a.json": "[]"}, "a.json", ["a.json: read as jsonl, but no sentence"]),
    "behind": ({"a.json": dumped([task(REGION)]) + "[]"}, "a.json", ["a.json:1: something stands behind"]),
    "all skipped": (
        {"a.json": dumped([{"data": {"text": "雪"}, "annotations": [{"skipped": True, "result": []}]}])},
        "a.json",
        ["read as labelstudio, but no sentence is in it", "跳过或拒绝的任务（不读） 1"],
    ),
    "images": (
        {
            "a.json": dumped(
                [{"data": {"image": "/a.png"}, "annotations": [{"result": [{"type": "brush", "value": {}}]}]}]
            )
        },
        "a.json",
        ["read as labelstudio, but no entity is in it", "不是文本区间"],
    ),
    "two texts": (
        {"a.json": dumped([task(REGION) | {"data": {"a": "一", "b": "二"}}])},
        "a.json",
        ["(a, b) is the text?"],
    ),
    "a dialogue": (
        {"a.json": dumped([task(REGION, text=[{"author": "a"}])])},
        "a.json",
        ["a.json:1: the text must be"],
    ),
    "an odd task": ({"a.json": dumped([task(REGION), {"annotations": 3}])}, "a.json", ["a.json:1: wrong nesting"]),
    "a start": (
        {"a.json": dumped([{"text": "雪", "label": [{**REGION, "start": "4"}]}])},
        "a.json",
        ["read as labelstudio_min, but no entity", "不是文本区间"],
    ),
    "old doccano": (
        {"a.jsonl": '{"text": "雪", "annotations": [{"label": 5, "start_offset": 0, "end_offset": 1, "user": 1}]}'},
        "a.jsonl",
        ["a.jsonl:1: the labels are numbers"],
    ),
    "a doccano triple": (
        {"a.jsonl": '{"text": "雪", "label": [[0, 1, "PER"]]}\n{"text": "雪", "label": [[0, 1]]}'},
        "a.jsonl",
        ["a.jsonl:2: wrong nesting"],
    ),
    "two lists": (
        {"a.jsonl": '{"text": "雪", "label": [[0, 1, "PER"]], "entities": [[0, 1, "LOC"]]}'},
        "a.jsonl",
        ["a.jsonl:1: both 'label' and 'entities' hold entities"],
    ),
    "a null label": ({"a.jsonl": '{"text": "雪", "label": [[0, 1, null]]}'}, "a.jsonl", ["a.jsonl:1: type and entity"]),
    "half an emoji": (
        {"a.json": '[\n["\\ud83d雪", {"entities": [[0, 1, "PER"]]}]]'},
        "a.json",
        ["a.json:2: half a character"],
    ),
    "tags as numbers": (
        {"a.jsonl": '{"tokens": ["雪"], "ner_tags": [0]}'},
        "a.jsonl",
        ["a.jsonl:1: the tags are numbers"],
    ),
    "fewer tags": ({"a.jsonl": '{"tokens": ["雪", "白"], "ner_tags": ["O"]}'}, "a.jsonl", ["2 characters, but 1 tags"]),
    "an odd tag": (
        {"a.jsonl": '{"tokens": ["雪"], "ner_tags": ["X-PER"]}'},
        "a.jsonl",
        ["a.jsonl:1: expected a character"],
    ),
    "a clause": (
        {"a.conll": f"-DOCSTART- -X- O\n{TEXT} -X- _ B-PER\n"},
        "a.conll",
        ["a.conll:2: '上周三，", "export JSON instead"],
    ),
    "a column": ({"a.conll": "-DOCSTART- -X- O\n雪 -X- _ B-PER\n白\n"}, "a.conll", ["a.conll:3: expected"]),
    "numbers": ({"a.json": "[[1], 2]"}, "a.json", ["a.json:1: a record must be an object"]),
    "no array": ({"a.json": "[笑]一句话"}, "a.json", ["a.json: neither JSON lines nor"]),
    "CMeEE": (
        {"a.json": '[{"text": "雪", "entities": [{"start_idx": 0, "type": "PER"}]}]'},
        "a.json",
        ["a.json:1: no key 'end_idx'"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_exports_are_one_line(name, capsys):
    files, path, parts = BAD[name]
    for file, content in files.items():
        write(file, "").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match="2"):
        process(path)
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("error: ") and all(part in last for part in parts), last
    assert not Path("data/t/instruct_data").exists()


@pytest.mark.parametrize("name", CASES)
def test_another_format_by_force_is_read_or_an_error(name):
    path = write(name, CASES[name][1])
    for form in FORMATS:
        try:
            assert list(read_corpus(path, form, Problems())), form
        except UserError as error:
            assert path.stem in str(error), form


def rows(count=50):
    """Rows as predict.py writes them: a person twice, a place in the other half, an emoji in every fifth text."""
    made = []
    for i in range(count):
        person, place = ["王明", "李华"][i % 2], ["北京", "上海"][i // 2 % 2]
        text = f"{'🌧' * (i % 5 == 0)}第{i}天，{person}在{place}见到{person}。"
        found = [(person, "人名")] + [(place, "地名")] * (i < count // 2)
        entities = [
            {"entity": entity, "type": kind, "spans": spans_of(text, entity), "confidence": 0.9}
            for entity, kind in found
        ]
        prediction = "\n".join(f"{entity}_{kind}" for entity, kind in found)
        made.append({"text": text, "prediction": prediction, "entities": entities, "log_probability": -0.1})
    return made


def spans_of(text, entity):
    return [[i, i + len(entity)] for i in range(len(text)) if text.startswith(entity, i)]


def predicted(row):
    """A row in the shape of `entities`."""
    found = [(e["entity"], e["type"], *span) for e in row["entities"] for span in e["spans"]]
    return row["text"], sorted(found, key=lambda entity: entity[2:])


# A person corrects three sentences in the exported file: of 3 the first mark goes, of 10 it becomes an ORG, 40 gets one
# at its first two characters behind an emoji.


def corrected(marks, i):
    """The marks of sentence i, (begin, end, tag), as the person leaves them."""
    if i == 3:
        return marks[1:]
    if i == 10:
        return [(*marks[0][:2], "ORG"), *marks[1:]]
    return [(1, 3, "LOC"), *marks] if i == 40 else marks


def correct_doccano(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for i, record in enumerate(records):
        record["label"] = [list(mark) for mark in corrected([tuple(label) for label in record["label"]], i)]
    path.write_text("\n".join(map(dumped, records)), encoding="utf-8")


def correct_label_studio(path, submit=False):
    tasks = json.loads(path.read_text(encoding="utf-8"))
    for i, one in enumerate(tasks):
        (prediction,) = one["predictions"]
        marks = [(v["start"], v["end"], v["labels"][0]) for v in (region["value"] for region in prediction["result"])]
        values = [
            {"start": begin, "end": end, "text": one["data"]["text"][begin:end], "labels": [tag]}
            for begin, end, tag in corrected(marks, i)
        ]
        result = [{"type": "labels", "from_name": "label", "to_name": "text", "value": value} for value in values]
        if submit:
            one["annotations"] = [{"id": i, "was_cancelled": False, "result": result}]
        else:
            prediction["result"] = result
    path.write_text(json.dumps(tasks, indent=2), encoding="utf-8")


def submit_label_studio(path):
    """What comes back from Label Studio: the predictions as they were, beside what the person submitted."""
    correct_label_studio(path, submit=True)


def correct_brat(path):
    text, ann = path / "0001.txt", path / "0001.ann"
    lines, marks = text.read_text(encoding="utf-8").splitlines(), ann.read_text(encoding="utf-8").splitlines()
    starts = [sum(len(line) + 1 for line in lines[:i]) for i in range(len(lines))]
    rows = [mark.split("\t") for mark in marks]
    first = {}
    for row in rows:
        begin = int(row[1].split()[1])
        first.setdefault(max(i for i, start in enumerate(starts) if start <= begin), row)
    rows.remove(first[3])
    first[10][1] = "ORG" + first[10][1][3:]
    rows.append(["T999", f"LOC {starts[40] + 1} {starts[40] + 3}", lines[40][1:3]])
    ann.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    "tool, path, correct, counted",
    [
        ("doccano", "p.doccano.jsonl", correct_doccano, {}),
        ("labelstudio", "p.labelstudio.json", correct_label_studio, {"只有预标注的任务（当作标注读）": 50}),
        ("labelstudio", "p.labelstudio.json", submit_label_studio, {}),
        ("brat", "p.brat", correct_brat, {}),
    ],
)
def test_the_loop(tool, path, correct, counted, capsys):
    """Predictions of 50 sentences go to the tool, three are corrected there, and those three differ when read again."""
    write("p.jsonl", "".join(dumped(row) + "\n" for row in rows()))
    run_script(main, CONFIG, str(PROCESS), [f"--export={tool}", "--predictions=p.jsonl"])
    assert capsys.readouterr().out.startswith(f"{path}：50 句，125 个预标注，来自 p.jsonl\n")
    before = [predicted(row) for row in rows()]
    assert entities(process(path)) == before
    correct(Path(path))
    capsys.readouterr()
    after = entities(process(path))
    out = capsys.readouterr().out
    assert f"{path} 是 {tool}，" in out and left_out(out) == counted
    assert [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new] == [3, 10, 40]
    assert after[3] == (before[3][0], before[3][1][1:])
    assert after[10] == (before[10][0], [("王明", "机构名", *before[10][1][0][2:]), *before[10][1][1:]])
    assert after[40] == (before[40][0], [("第4", "地名", 1, 3), *before[40][1]])


def test_what_label_studio_imports():
    """Predictions with scores; a text that was not answered is a task without any."""
    unanswered = {"text": "雪", "prediction": None, "entities": []}
    write("p.jsonl", "".join(dumped(row) + "\n" for row in [rows()[49], unanswered]))
    run_script(main, CONFIG, str(PROCESS), ["--export=labelstudio", "--predictions=p.jsonl"])
    first, second = json.loads(Path("p.labelstudio.json").read_text(encoding="utf-8"))
    (prediction,) = first["predictions"]
    assert prediction["score"] == 0.9048 and len(prediction["result"]) == 2
    assert prediction["result"][0] == {
        "id": "e1",
        "from_name": "label",
        "to_name": "text",
        "type": "labels",
        "value": {"start": 5, "end": 7, "text": "李华", "labels": ["PER"]},
        "score": 0.9,
    }
    assert second == {"data": {"text": "雪"}}


def test_the_newest_predictions_are_exported(capsys):
    for age, name in ((20, "train_trainer"), (10, "shipped")):
        path = write(f"checkpoint/t/{name}/predictions.jsonl", dumped({"text": name, "entities": []}) + "\n")
        os.utime(path, (1e9 - age, 1e9 - age))
    run_script(main, CONFIG, str(PROCESS), ["--data_name=t", "--export=doccano"])
    assert (
        json.loads(Path("checkpoint/t/shipped/predictions.doccano.jsonl").read_text(encoding="utf-8"))["text"]
        == "shipped"
    )
    assert list(Path("checkpoint/t/train_trainer").iterdir()) == [Path("checkpoint/t/train_trainer/predictions.jsonl")]


ENTITY = {"entity": "雪", "type": "人名", "spans": [[0, 1]]}


@pytest.mark.parametrize(
    "row, argv, parts",
    [
        (
            {"text": "雪", "entities": []},
            ["--export=excel"],
            ["--export: expected doccano, labelstudio, brat, got 'excel'"],
        ),
        ({"text": "雪", "entities": []}, ["--predictions=none.jsonl"], ["none.jsonl: no such file"]),
        ({"text": "雪", "entities": []}, ["--predictions=", "--data_name=x"], ["checkpoint/x: no predictions.jsonl"]),
        (
            {"text": "雪", "entities": [{**ENTITY, "type": "时间"}]},
            [],
            ["p.jsonl:1: types without a tag", ",时间:时间"],
        ),
        ({"text": "雪", "entities": [{**ENTITY, "spans": [[0, 9]]}]}, [], ["p.jsonl:1: not a row that predict.py"]),
        ({"text": "雪", "entities": [{**ENTITY, "spans": [[0.0, 1]]}]}, [], ["p.jsonl:1: not a row that predict.py"]),
        ({"text": "雪", "entities": [{**ENTITY, "spans": [3]}]}, [], ["p.jsonl:1: not a row that predict.py"]),
        ({"text": ["雪"], "entities": [ENTITY]}, [], ["p.jsonl:1: not a row that predict.py"]),
        ({"text": "雪", "entity_list": []}, [], ["p.jsonl:1: not a row that predict.py"]),
        ({"text": "雪\n雨", "entities": []}, ["--export=brat"], ["p.jsonl: row 1", "--export=doccano"]),
        ({"text": "雪", "entities": []}, ["--export=brat", "--labels=A B:人名"], ["--labels", "'A B'"]),
    ],
)
def test_bad_predictions_are_one_line(row, argv, parts, capsys):
    write("p.jsonl", dumped(row) + "\n")
    with pytest.raises(SystemExit, match="2"):
        run_script(main, CONFIG, str(PROCESS), ["--export=doccano", "--predictions=p.jsonl", *argv])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert all(part in err for part in parts), err
    assert [path.name for path in Path().iterdir()] == ["p.jsonl"]


def test_an_export_is_not_written_over(capsys):
    write("p.jsonl", dumped(rows()[0]) + "\n")
    path = write("p.doccano.jsonl", "corrected")
    with pytest.raises(SystemExit, match="2"):
        run_script(main, CONFIG, str(PROCESS), ["--export=doccano", "--predictions=p.jsonl"])
    assert "p.doccano.jsonl: is there already" in capsys.readouterr().err and path.read_text() == "corrected"
