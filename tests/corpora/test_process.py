"""python -m pytest tests/corpora/test_process.py: corpora of a few lines through process.py."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alpaca.common.console import forgive_encoding
from alpaca.corpora.tagged_columns import decode_tags
from alpaca.models.templates import encode_examples
from alpaca.models.tokenizer import load_tokenizer
from config_utils import run_script
from process import CONFIG, main

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROCESS = os.path.join(ROOT, "process.py")
INSTRUCT = (
    "你现在是一个实体识别模型，你需要提取文本里面的人名、地名、机构名，如果存在结果，返回'实体_实体类型'，"
    "不同实体间用\n分隔。如果没有结果，回答'没有'。"
)


def sentence(text, *entities):
    """A line of a JSON-lines corpus; an entity is (begin, end, type) or (begin, end, type, entity)."""
    found = [
        {
            "entity_index": {"begin": begin, "end": end},
            "entity_type": kind,
            "entity": name[0] if name else text[begin:end],
        }
        for begin, end, kind, *name in entities
    ]
    return json.dumps({"text": text, "entity_list": found}, ensure_ascii=False)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Write ori_data of the data set t; a corpus is a list of lines."""
    monkeypatch.chdir(tmp_path)

    def write(train, dev=None):
        folder = tmp_path / "data" / "t" / "ori_data"
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in (("train", train), ("dev", dev)):
            if lines is not None:
                (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    return write


def process(*argv):
    """Run process.py in this process on the data set t -> examples of train and of dev."""
    run_script(main, CONFIG, PROCESS, ["--data_name=t", *argv])
    return read("train"), read("dev")


def read(name):
    with open(f"data/t/instruct_data/{name}.txt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answers(examples):
    return [example["answer"] for example in examples]


DEV = [sentence("在上海", (1, 3, "LOC"))]


def test_cluener(corpus):
    """CLUENER's schema: ends are inclusive, an entity may stand in several places, a sentence without any is {}."""
    text = "北京的王明去北京看《秋》"
    label = {"address": {"北京": [[0, 1], [6, 7]]}, "name": {"王明": [[3, 4]]}, "book": {"《秋》": [[9, 11]]}}
    lines = [json.dumps({"text": t, "label": found}, ensure_ascii=False) for t, found in ((text, label), ("晴天", {}))]
    corpus(lines, DEV)
    train, _ = process("--labels=address:地址,name:姓名,book:书名,LOC:地名")
    assert answers(train) == ["北京_地址\n王明_姓名\n《秋》_书名", "没有"]
    assert [(e["begin"], e["end"]) for e in train[0]["entities"]] == [(0, 2), (3, 5), (6, 8), (9, 12)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": ["a"]}, "label must be an object, got \"['a']\""),
        ({"label": {"name": ["王明"]}}, "name must be an object, got \"['王明']\""),
        ({"label": {"name": {"王明": 3}}}, "王明 must be a list, got '3'"),
        ({"label": {"name": {"王明": [3]}}}, "'王明' must be at [begin, end], got 3"),
        ({"label": {"name": {"王明": [[1, 2, 3]]}}}, "'王明' must be at [begin, end], got [1, 2, 3]"),
        ({"text": None}, "text must be a string, got 'None'"),
        ({"entity_list": None}, "entity_list must be a list, got 'None'"),
        ({"entity_list": ["王明"]}, "an entity of entity_list must be an object, got '王明'"),
        ({"begin": "2"}, "begin must be an integer, got '2'"),
        ({"end": True}, "end must be an integer, got 'True'"),
    ],
)
def test_a_value_of_another_type_is_named(corpus, capsys, changes, message):
    index = {"begin": 0, "end": 2} | {key: changes[key] for key in ("begin", "end") if key in changes}
    entities = [{"entity_index": index, "entity_type": "name", "entity": "王明"}]
    record = {"text": "王明"} | ({} if "label" in changes else {"entity_list": entities}) | changes
    corpus([json.dumps(record, ensure_ascii=False)], DEV)
    with pytest.raises(SystemExit, match="2"):
        process("--labels=name:姓名,LOC:地名")
    assert f"train.txt:1: {message}; process.py --help shows the format" in capsys.readouterr().err


def test_what_is_processed_already(corpus, capsys):
    corpus(['{"instruct": "问答", "query": "水？", "answer": "是"}'], DEV)
    with pytest.raises(SystemExit, match="2"):
        process()
    assert "train.txt:1: this is instruction data already; put it to data/" in capsys.readouterr().err


def test_json_lines(corpus, capsys):
    text = "因有关日寇在京掠夺文物详情，藏界较为重视，也是我们收藏北京史料中的要件之一。"
    corpus([sentence(text, (27, 29, "LOC"), (3, 4, "LOC"), (6, 7, "LOC")), sentence("今天晴。")], DEV)
    train, dev = process()
    assert train[0] == {
        "instruct": INSTRUCT,
        "query": "文本：" + text,
        "answer": "日_地名\n京_地名\n北京_地名",
        "text": text,
        "entities": [
            {"entity": "日", "type": "地名", "begin": 3, "end": 4},
            {"entity": "京", "type": "地名", "begin": 6, "end": 7},
            {"entity": "北京", "type": "地名", "begin": 27, "end": 29},
        ],
    }
    assert list(train[0]) == ["instruct", "query", "answer", "text", "entities"]
    assert (train[1]["answer"], train[1]["entities"]) == ("没有", [])
    assert answers(dev) == ["上海_地名"]
    out = capsys.readouterr().out
    assert "句子 2，无实体句 1，实体 3（人名 0，地名 3，机构名 0）" in out
    assert "泄漏：验证数据中 0 句" in out


def test_adjacent_nested_and_repeated_entities(corpus, capsys):
    corpus(
        [
            sentence("中美会谈", (0, 1, "LOC"), (1, 2, "LOC")),
            sentence("北京大学在北京", (0, 2, "LOC"), (0, 4, "ORG"), (5, 7, "LOC"), (5, 7, "LOC")),
        ],
        DEV,
    )
    train, _ = process()
    assert answers(train) == ["中_地名\n美_地名", "北京大学_机构名\n北京_地名"]
    assert [len(example["entities"]) for example in train] == [2, 3]
    train_line, dev_line = capsys.readouterr().out.splitlines()[:2]
    assert train_line.endswith("；有嵌套的实体，预测和测试时长实体里面的位置也算") and "嵌套" not in dev_line


def test_bad_entities_are_reported_and_dropped(corpus, capsys):
    corpus(
        [
            sentence("在北京", (0, 2, "LOC", "北京"), (1, 3, "LOC")),
            sentence("张\n三来了", (0, 3, "PER")),
            sentence("短", (0, 9, "PER", "短"), (-1, 1, "PER", "短")),
            *[sentence("在苏州", (1, 3, "LOC"))] * 2,
        ],
        DEV,
    )
    train, _ = process()
    assert answers(train)[:3] == ["北京_地名", "没有", "没有"]
    assert train[1]["text"] == "张\n三来了"
    out, err = capsys.readouterr()
    lines = err.splitlines()
    path = os.path.join("data", "t", "ori_data", "train.txt")
    assert [line.split("：")[0] for line in lines] == [
        f"{path}:1: 与文本不符的实体（已从答案去掉）",
        f"{path}:2: 含换行的实体（已从答案去掉）",
        *[f"{path}:3: 与文本不符的实体（已从答案去掉）"] * 2,
    ]
    assert "与文本不符的实体（已从答案去掉） 3，含换行的实体（已从答案去掉） 1" in out


def test_many_problems_are_counted_but_not_all_printed(corpus, capsys):
    corpus([sentence(f"第{i}句", (0, 1, "LOC", "错"), (0, 1, "LOC"), (1, 2, "LOC")) for i in range(100)], DEV)
    process()
    out, err = capsys.readouterr()
    assert err.count("\n") == 4
    assert "与文本不符的实体（已从答案去掉） 100" in out


BIO = ["中\tB-LOC", "美\tB-LOC", "谈\tO", "", "", "我\tO", "爱\tO", "北\tB-LOC", "京\tI-LOC", "张\tB-PER", "三\tI-PER"]
BMES = ["中 S-LOC", "美 S-LOC", "谈 O", "", "我 O", "爱 O", "北 B-LOC", "京 E-LOC", "张 B-PER", "小 M-PER", "三 E-PER"]


@pytest.mark.parametrize("form", ["auto", "bio"])
@pytest.mark.parametrize("lines, person", [(BIO, "张三"), (BMES, "张小三")])
def test_two_columns(lines, person, form, corpus):
    corpus(["", *lines], DEV if form == "auto" else BIO[:3])
    train, _ = process(f"--format={form}", "--keep_leaked")
    assert answers(train) == ["中_地名\n美_地名", f"北京_地名\n{person}_人名"]
    assert train[1]["text"] == "我爱北京" + person
    assert train[1]["entities"][1] == {"entity": person, "type": "人名", "begin": 4, "end": 4 + len(person)}


def test_two_columns_with_words_blanks_and_windows_line_ends(corpus):
    corpus(["\ufeff在\tO\r", "New\tB-LOC\r", " \tI-LOC\r", "York\tI-LOC\r", "　\tO\r", "\r", "{\tO\r", "}\tO"], DEV)
    train, _ = process()
    assert [example["text"] for example in train] == ["在New York　", "{}"]
    assert answers(train) == ["New York_地名", "没有"]


def test_brace_as_first_character_of_two_columns(corpus):
    corpus(["{ O", "京 B-LOC"], DEV)
    assert answers(process()[0]) == ["京_地名"]


@pytest.mark.parametrize(
    "tags, spans",
    [
        ("O O", []),
        ("B-A I-A O B-A", [(0, 2, "A", False), (3, 4, "A", False)]),
        ("B-A B-A I-A", [(0, 1, "A", False), (1, 3, "A", False)]),
        ("I-A I-A O I-A", [(0, 2, "A", True), (3, 4, "A", True)]),
        ("B-A I-B", [(0, 1, "A", False), (1, 2, "B", True)]),
        ("B-A M-A E-A S-A", [(0, 3, "A", False), (3, 4, "A", False)]),
        ("B-A E-A E-A", [(0, 2, "A", False), (2, 3, "A", True)]),
        ("S-A I-A", [(0, 1, "A", False), (1, 2, "A", True)]),
        ("B_A I_A", [(0, 2, "A", False)]),
    ],
)
def test_decode_tags(tags, spans):
    assert decode_tags(tags.split()) == spans


def test_repaired_tags_are_counted(corpus, capsys):
    corpus(["北\tI-LOC", "京\tI-LOC"], DEV)
    assert answers(process()[0]) == ["北京_地名"]
    out, err = capsys.readouterr()
    assert ":1: " in err and "北 I-LOC" in err
    assert "不合规的标签（已按新实体的开头处理） 1" in out


def test_leaks(corpus, capsys):
    corpus([sentence("甲"), sentence("在上海"), sentence("在上海"), sentence("乙")], [*DEV, sentence("丙")])
    train, dev = process()
    assert [example["text"] for example in train] == ["甲", "乙"]
    assert len(dev) == 2
    assert "泄漏：验证数据中 1 句也在训练数据中，从训练数据去掉 2 句" in capsys.readouterr().out
    train, _ = process("--keep_leaked")
    assert len(train) == 4
    assert "泄漏：验证数据中 1 句也在训练数据中，保留" in capsys.readouterr().out


REHEARSE = os.path.join("data", "t", "ori_data", "rehearse.txt")


def test_rehearsal_goes_to_train_alone(corpus, capsys):
    corpus([sentence(f"第{i}句") for i in range(10)])
    rows = [{"query": "文本：甲", "answer": "甲_乙", "instruct": "说"}, {"instruct": "问", "query": "", "answer": "答"}]
    Path(REHEARSE).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    train, dev = process("--dev_size=2")
    assert train[8:] == [{**row, "task": "rehearsal"} for row in rows]
    assert list(train[8]) == ["instruct", "query", "answer", "task"]
    assert {example["text"] for example in train[:8] + dev} == {f"第{i}句" for i in range(10)}
    out = capsys.readouterr().out
    assert "train.txt：句子 8，" in out and f"别的任务：{REHEARSE} 的 2 条也写进了 train.txt，占 20.0%" in out


@pytest.mark.parametrize(
    "line, parts",
    [
        ("{", ["JSON"]),
        ('{"instruct": "说", "query": "甲"}', ["exactly the keys instruct, query, answer, got instruct, query;"]),
        (
            '{"instruct": "说", "query": "甲", "answer": "乙", "text": "甲", "entities": []}',
            ["got instruct, query, answer, text, entities;", "train.txt"],
        ),
        ('{"instruct": "说", "query": "甲", "answer": 3}', ["'answer' must be a string, got 3"]),
    ],
)
def test_bad_rehearsal_is_one_line(line, parts, corpus, capsys):
    corpus([sentence("甲")], DEV)
    good = '{"instruct": "说", "query": "甲", "answer": "乙"}'
    Path(REHEARSE).write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        process()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {REHEARSE}:2: ") and all(part in err for part in parts), err
    assert not os.path.exists("data/t/instruct_data")


def test_dev_size(corpus):
    corpus([sentence(f"第{i}句") for i in range(50)])
    train, dev = process("--dev_size=10")
    assert (len(train), len(dev)) == (40, 10)
    assert {e["text"] for e in train} | {e["text"] for e in dev} == {f"第{i}句" for i in range(50)}
    assert process("--dev_size=10") == (train, dev)
    assert process("--dev_size=10", "--seed=1") != (train, dev)


def test_ten_labels_and_an_own_instruction(corpus):
    labels = [f"T{i}:类型{i}" for i in range(10)]
    corpus([sentence("甲乙", (0, 1, "T9"), (1, 2, "T0"))], [sentence("丙")])
    train, _ = process("--labels=" + ",".join(labels), "--instruct=找{labels}：\\n一行一个", "--query_prefix=")
    assert train[0]["answer"] == "甲_类型9\n乙_类型0"
    assert train[0]["instruct"] == "找" + "、".join(f"类型{i}" for i in range(10)) + "：\n一行一个"
    assert train[0]["query"] == "甲乙"


def test_two_tags_of_one_type(corpus):
    corpus([sentence("甲乙", (0, 1, "LOC"), (1, 2, "GPE"))], [sentence("丙")])
    train, _ = process("--labels=LOC:地名,GPE:地名", "--instruct={labels}")
    assert (train[0]["answer"], train[0]["instruct"]) == ("甲_地名\n乙_地名", "地名")


def test_output_is_deterministic_and_leaves_no_temporary_file(corpus):
    corpus([sentence(f"第{i}句在京", (len(f"第{i}句在"), len(f"第{i}句在") + 1, "LOC")) for i in range(30)])
    process("--dev_size=5")
    folder = Path("data/t/instruct_data")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    process("--dev_size=5")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert sorted(first) == ["dev.txt", "train.txt"]


TRAIN = os.path.join("data", "t", "ori_data", "train.txt")


@pytest.mark.parametrize(
    "train, dev, argv, parts",
    [
        ([sentence("甲"), sentence("在晨", (1, 2, "TIME"))], DEV, [], ["'TIME'", f"({TRAIN}:2)", ",TIME:TIME"]),
        (["晨\tO", "光\tB-TIME"], DEV, [], ["'TIME'", f"({TRAIN}:2)", ",TIME:TIME"]),
        ([sentence("甲"), '{"text": '], DEV, [], [f"{TRAIN}:2:", "JSON"]),
        (['{"text": "甲"}'], DEV, [], [f"{TRAIN}:1:", "entity_list"]),
        (['{"text": 3, "entity_list": []}'], DEV, [], [f"{TRAIN}:1:", "text must be a string, got '3'"]),
        (['{"text": "甲", "entity_list": [3]}'], DEV, [], [f"{TRAIN}:1:", "--help"]),
        ([sentence("甲", ("0", 1, "PER", "甲"))], DEV, [], [f"{TRAIN}:1:", "begin must be an integer"]),
        (['{"text": "\\ud800", "entity_list": []}'], DEV, [], [f"{TRAIN}:1:", "surrogate"]),
        (["甲\tO", "乙"], DEV, [], [f"{TRAIN}:2:", "'乙'"]),
        (["甲\tO", "乙\tX-PER"], DEV, [], [f"{TRAIN}:2:", "X-PER"]),
        (["只是一句话"], DEV, [], [TRAIN, "--help"]),
        ([], DEV, [], [TRAIN, "empty"]),
        ([sentence("")], DEV, ["--format=jsonl"], [TRAIN]),
        (None, DEV, [], [TRAIN, "--train_file"]),
        ([sentence("甲")], None, [], ["dev.txt", "--dev_size"]),
        ([sentence("甲")], DEV, ["--dev_file=none.txt"], ["none.txt", "--dev_file"]),
        ([sentence("甲")], None, ["--dev_size=1"], ["--dev_size=1", "1 sentences"]),
        (DEV, DEV, [], [TRAIN, "--keep_leaked"]),
        ([sentence("甲")], DEV, ["--format=csv"], ["--format", "jsonl", "'csv'"]),
        ([sentence("甲")], DEV, ["--labels=PER"], ["--labels", "'PER'"]),
        ([sentence("甲")], DEV, ["--labels=PER:,LOC:"], ["--labels: at least one TAG:name"]),
        ([sentence("甲")], DEV, ["--ends=last"], ["--ends: expected exclusive or inclusive, got 'last'"]),
        (["甲\tO"], DEV, ["--ends=inclusive"], ["--ends=inclusive", TRAIN, "is bio"]),
        (['{"text": "甲", "text": "乙", "entity_list": []}'], DEV, [], [f"{TRAIN}:1:", "'text' stands twice"]),
        ([sentence("甲")], DEV, ["--labels=PER:人_名"], ["--labels", "'人_名'"]),
        ([sentence("甲")], DEV, ["--labels=MIC:micro"], ["--labels", "'MIC:micro'", "metrics.json", "rename"]),
        ([sentence("甲")], DEV, ["--labels=PER:人名,PER:人"], ["--labels", "twice"]),
        ([sentence("甲")], DEV, ["--labels="], ["--labels"]),
    ],
)
def test_bad_input_is_one_line(train, dev, argv, parts, corpus, capsys):
    corpus(train, dev)
    with pytest.raises(SystemExit) as stop:
        process(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and all(part in last for part in parts), last
    assert err.count("\n") == 1 or "空句" in err
    assert not os.path.exists("data/t/instruct_data")


@pytest.mark.slow
def test_as_a_program(corpus):
    """With an output that cannot show Chinese: it is escaped, and nothing is lost."""
    corpus([sentence("在北京𠮷", (1, 3, "LOC"))], DEV)
    done = subprocess.run(
        [sys.executable, PROCESS, "--data_name=t"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        encoding="ascii",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert answers(read("train")) == ["北京_地名"] and answers(read("dev")) == ["上海_地名"]
    counts = "句子 1，无实体句 0，实体 1（人名 0，地名 1，机构名 0）"
    assert counts.encode("ascii", "backslashreplace").decode() in done.stdout


def test_an_unknown_option_is_one_line(corpus, capsys):
    corpus([sentence("甲")], DEV)
    with pytest.raises(SystemExit, match="2"):
        process("--dev_sise=3")
    assert capsys.readouterr() == ("", "error: unknown option --dev_sise, did you mean --dev_size?\n")


def test_a_test_file(corpus, capsys):
    """Beside train and dev; train keeps neither's sentences; without the file there is none."""
    corpus([sentence("甲"), sentence("在上海"), sentence("在洛阳", (1, 3, "LOC"))], DEV)
    folder = Path("data/t/ori_data")
    (folder / "test.txt").write_text(sentence("在洛阳", (1, 3, "LOC")) + "\n", encoding="utf-8")
    train, _ = process()
    assert [example["text"] for example in train] == ["甲"] and answers(read("test")) == ["洛阳_地名"]
    out = capsys.readouterr().out
    assert "data/t/instruct_data/test.txt：句子 1，" in out
    assert "泄漏：验证数据中 1 句也在训练数据中，测试数据中 1 句也在训练数据中，从训练数据去掉 2 句" in out
    (folder / "test.txt").rename("other.txt")
    process("--test_file=other.txt")
    assert answers(read("test")) == ["洛阳_地名"]
    with pytest.raises(SystemExit, match="2"):
        process("--test_file=none.txt")
    assert "none.txt: no such file" in capsys.readouterr().err


def test_all_files_or_none(corpus, monkeypatch, capsys):
    """A disk that is full when the second file is written leaves the files of before, and no half ones."""
    corpus([sentence("甲"), sentence("乙")], DEV)
    process()
    before = {path.name: path.read_bytes() for path in Path("data/t/instruct_data").iterdir()}
    corpus([sentence("丙")], DEV)
    dumps, written = json.dumps, []

    def full(example, **options):
        written.append(example)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "data/t/instruct_data/dev.txt.new")
        return dumps(example, **options)

    monkeypatch.setattr("process.json.dumps", full)
    with pytest.raises(SystemExit, match="2"):
        process()
    assert "No space left on device; free some space there" in capsys.readouterr().err and len(written) == 2
    assert {path.name: path.read_bytes() for path in Path("data/t/instruct_data").iterdir()} == before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
def test_an_output_that_cannot_show_chinese_loses_nothing(corpus, monkeypatch, encoding):
    corpus([sentence("在洛阳𠮷", (1, 3, "LOC"))], DEV)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    forgive_encoding()  # start() does this, which test_as_a_program shows
    train, dev = process("--labels=LOC:地𠮷名")
    with pytest.raises(SystemExit, match="0"):
        process("--help")
    sys.stdout.flush()
    out = sys.stdout.buffer.getvalue().decode(encoding)
    assert answers(train) == ["洛阳_地𠮷名"] and answers(dev) == ["上海_地𠮷名"]
    assert "\\U00020bb7" in out and "--keep_leaked" in out


def test_chinese_punctuation_in_options(corpus):
    corpus([sentence("甲乙", (0, 1, "PER"), (1, 2, "ORG"))], DEV)
    train, _ = process("——labels＝“PER：人，LOC:地，ORG：社”", "－－instruct＝找{labels}，一行一个＝", "—seed＝3")
    assert (train[0]["answer"], train[0]["instruct"]) == ("甲_人\n乙_社", "找人、地、社，一行一个＝")


def test_another_working_folder_is_named(corpus, capsys):
    corpus([sentence("甲")], DEV)
    with pytest.raises(SystemExit, match="2"):
        run_script(main, CONFIG, PROCESS, ["--data_name=demo"])
    err = capsys.readouterr().err
    where = f"in {os.getcwd()} (relative paths count from there; the project is in {ROOT}, where data/demo"
    assert f"error: data/demo/ori_data/train.txt: no such file {where}/ori_data/train.txt exists); put" in err


def test_no_right_to_write_is_one_line(corpus, capsys, monkeypatch):
    """Before the corpus is read. Root may write everywhere, so the system's answer is made here."""
    corpus(["{"], DEV)
    monkeypatch.setattr("alpaca.common.folders.os.access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="2"):
        process()
    assert capsys.readouterr().err == (
        f"error: {os.getcwd()}/data/t: no right to write there; change its owner or mode, or work in another folder\n"
    )


def test_a_refused_corpus_leaves_nothing_behind(corpus, capsys):
    """No folder of a data set that is not there, and no part of one whose file cannot be written."""
    corpus(["{"], DEV)
    with pytest.raises(SystemExit, match="2"):
        process("--data_name=other", "--train_file=data/t/ori_data/train.txt", "--dev_size=1")
    assert os.listdir("data") == ["t"]
    corpus([sentence("甲")], DEV)
    Path("data/t/instruct_data/dev.txt").mkdir(parents=True)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        process()
    assert capsys.readouterr().err.startswith("error: data/t/instruct_data/dev.txt: is a folder, and the data is")
    assert os.listdir("data/t/instruct_data") == ["dev.txt"]


def test_an_error_of_the_system_is_one_line(corpus, capsys, monkeypatch):
    """As which user the tests run decides whether a file can be made unreadable: the system's answer is made here."""
    corpus([sentence("甲")], DEV)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("alpaca.common.text_files.refuse_other_kinds", refuse)
    with pytest.raises(SystemExit, match="2"):
        process()
    assert capsys.readouterr().err == (
        f"error: {TRAIN}: Permission denied; you have no right to it: change its owner or mode, or name another path\n"
    )


def test_columns_of_other_names_are_audited(corpus, base_dir, capsys):
    corpus([sentence("甲")], DEV)
    row = {"instruction": "回答问题。", "input": "一年有几个月？", "output": "十二个月"}
    Path("data/t/instruct_data").mkdir()
    for name in ("train", "dev"):
        Path(f"data/t/instruct_data/{name}.txt").write_text(json.dumps(row) + "\n", encoding="utf-8")
    columns = ["--instruct_column=instruction", "--query_column=input", "--response_column=output"]
    run_script(main, CONFIG, PROCESS, ["--data_name=t", "--audit_only", f"--model_dir={base_dir}", *columns])
    assert "train.txt: 1 条" in capsys.readouterr().out


SENTENCE = "第{}段，患者梁小雨主诉乏力{}天，既往在洛阳市医院就诊，查体未见异常。"


def test_long_documents_are_cut_at_sentence_ends(corpus, base_dir, capsys):
    """Those of train, into examples that fit, without a character or an entity lost; scores are of whole documents."""
    text = "".join(SENTENCE.format(i, i) for i in range(60))
    found = [(m.start(), m.end(), "PER") for m in re.finditer("梁小雨", text)]
    found += [(m.start(), m.end(), "ORG") for m in re.finditer("洛阳市医院", text)]
    whole = sentence("往" + text, *((b + 1, e + 1, kind) for b, e, kind in found))
    corpus([sentence(text, *found), sentence("在洛阳", (1, 3, "LOC"))], [*DEV, whole])
    train, dev = process(f"--model_dir={base_dir}", "--max_seq_length=700")
    *parts, short = train
    assert len(dev) == len(DEV) + 1 and dev[-1]["text"] == "往" + text and len(dev[-1]["entities"]) == 120
    assert "".join(part["text"] for part in parts) == text and short["answer"] == "洛阳_地名"
    assert len(parts) > 3 and all(part["text"].endswith("。") for part in parts)
    assert sum(len(part["entities"]) for part in parts) == 120
    for part in parts:
        assert all(part["text"][e["begin"] : e["end"]] == e["entity"] for e in part["entities"])
        assert part["query"] == "文本：" + part["text"] and part["answer"] == "梁小雨_人名\n洛阳市医院_机构名"
    lengths = [len(e.prompt_ids) + len(e.answer_ids) for e in encode_examples(load_tokenizer(base_dir), train)]
    assert max(lengths) <= 700
    out = capsys.readouterr().out
    assert f"train.txt 有 1 条超过 max_seq_length=700 个 token，在句末切成 {len(parts)} 条（0 处在句子里面，0 个" in out


def test_no_entity_is_cut_through(corpus, base_dir):
    """Of one sentence without an end, crowded with entities that hold what a text may be cut after."""
    name = "《洛，阳。志》"
    text = "往" + name * 80
    found = [(m.start(), m.end(), "ORG") for m in re.finditer(re.escape(name), text)]
    corpus([sentence(text, *found)], DEV)
    train, _ = process(f"--model_dir={base_dir}", "--max_seq_length=700")
    assert len(train) > 1 and "".join(example["text"] for example in train) == text
    assert sum(len(example["entities"]) for example in train) == 80


def test_answers_longer_than_texts_make_smaller_windows(corpus, base_dir):
    text = "".join(chr(0x4E00 + i) + "。" * (i % 10 == 9) for i in range(300))
    found = [(i, i + 1, "ORG") for i, char in enumerate(text) if char != "。"]
    corpus([sentence(text, *found)], DEV)
    train, _ = process(f"--model_dir={base_dir}", "--max_seq_length=700")
    lengths = [len(e.prompt_ids) + len(e.answer_ids) for e in encode_examples(load_tokenizer(base_dir), train)]
    assert max(lengths) <= 700 and sum(len(example["entities"]) for example in train) == 300


def test_without_a_tokenizer_long_documents_are_named(corpus, capsys):
    corpus([sentence("往" * 600)], DEV)
    train, _ = process("--model_dir=nowhere")
    assert len(train) == 1
    out = capsys.readouterr().out
    assert "长文本：没有分词器，没有检查也没有切开，最长的一条有 605 个字（nowhere/tokenizer.model: no such file" in out
