"""python -m pytest tests/corpora/test_odd_files.py: files as other tools write them, through process.py."""

import gzip
import json
import shlex
import zipfile
from pathlib import Path

import pytest

from config_utils import run_script
from process import CONFIG, main

ROOT = Path(__file__).resolve().parent.parent.parent
DEV = '{"text": "在上海", "entity_list": [{"entity_index": {"begin": 1, "end": 3}, "entity_type": "LOC", "entity": "上海"}]}'


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Run process.py on the bytes or text of train.txt -> its examples."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "t" / "ori_data"
    folder.mkdir(parents=True)
    (folder / "dev.txt").write_text(DEV, encoding="utf-8")

    def run(train, *options):
        train = train if isinstance(train, bytes) else train.encode("utf-8")
        (folder / "train.txt").write_bytes(train)
        run_script(main, CONFIG, str(ROOT / "process.py"), ["--data_name=t", *options])
        lines = Path("data/t/instruct_data/train.txt").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    return run


def refused(convert, capsys, train, *options):
    """The one line with which process.py refuses a file; nothing is written."""
    with pytest.raises(SystemExit, match="2"):
        convert(train, *options)
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(errors) == 1 and not Path("data/t/instruct_data").exists()
    return errors[0].removeprefix("error: ")


COLUMNS = "梁{0}B-PER\n小{0}I-PER\n雨{0}I-PER\n来{0}O\n了{0}O\n"


@pytest.mark.parametrize("between", ["  ", "\t\t", " \t", "\t ", " ", "\t", "   ", " NR ", "\t-X-\t_\t"])
@pytest.mark.parametrize("end", ["", " ", "\t", "\r"])
def test_any_run_of_blanks_and_tabs_parts_the_columns(convert, between, end):
    (example,) = convert(COLUMNS.format(between).replace("\n", end + "\n"))
    assert (example["text"], example["answer"]) == ("梁小雨来了", "梁小雨_人名")


@pytest.mark.parametrize("blank", [" \tO", "  O", " O", "\tO", "　\tO", "　 O", "\u00a0\tO", "\u2028\tO"])
def test_a_token_may_be_a_blank(convert, capsys, blank):
    (example,) = convert(f"梁\tB-PER\n{blank}\n来\tO\n")
    lost = " " if blank in (" O", "\tO") else blank[0]
    assert (example["text"], example["answer"]) == (f"梁{lost}来", "梁_人名")
    remark = "没有字的行（当作空格） 1"
    assert (remark in capsys.readouterr().out) == (blank in (" O", "\tO"))


def test_headings_comments_and_more_columns_are_counted(convert, capsys):
    lines = ["-DOCSTART- -X- O", "", "# id = 1", "梁 NR B-PER", "来 VV O", "", "# NR O", "-DOCSTART- -X- O", "雪 NN O"]
    examples = convert("\n".join(lines))
    assert [example["text"] for example in examples] == ["梁来", "#", "雪"]
    out, err = capsys.readouterr()
    assert "另外：注释和 -DOCSTART- 行（已跳过） 3，多于两列（第一列是字，最后一列是标签，其余不用） 1" in out
    assert "train.txt:4: 多于两列（第一列是字，最后一列是标签，其余不用）：3 列，'梁' 和 'B-PER'" in err


@pytest.mark.parametrize(
    "line, part",
    [
        ("京 NR B-LOC", ":2: 3 columns, but the lines before have 2"),
        ("New York\tB-LOC", ":2: expected 字<tab>标签"),
        ("京\u00a0B-LOC", ":2: expected"),
        ("京　B-LOC", ":2: expected"),
        ("京　\tB-LOC", ":2: expected"),
        ("京\u2028北\tB-LOC", ":2: expected"),
        ("京\tO\r北\tO", ":2: expected"),
        ("京", ":2: expected"),
        ("京\tB-LOC\t1", ":2: expected"),
    ],
)
def test_what_cannot_be_read_as_columns_is_refused_with_its_line(convert, capsys, line, part):
    assert f"train.txt{part}" in refused(convert, capsys, f"在\tO\n{line}\n")


def test_bilou(convert):
    (example,) = convert("梁\tB-PER\n小\tI-PER\n雨\tL-PER\n秦\tU-PER\n洛\tB-LOC\n阳\tL-LOC\n")
    assert example["answer"] == "梁小雨_人名\n秦_人名\n洛阳_地名"


def test_byte_order_marks_of_joined_files(convert):
    examples = convert("\ufeff梁\tB-PER\n\n\ufeff雪\tO\n")
    assert [example["text"] for example in examples] == ["梁", "雪"]
    (example,) = convert("\ufeff\n\ufeff" + DEV.replace("在", "去"))
    assert example["text"] == "去上海"


def test_invisible_characters_stay_and_are_counted(convert, capsys):
    (example,) = convert("梁\tB-PER\n\u200b雨\tI-PER\n来\tO\n")
    assert (example["text"], example["answer"]) == ("梁\u200b雨来", "梁\u200b雨_人名")
    out, err = capsys.readouterr()
    assert "另外：含零宽或控制字符的句子（照原样保留） 1" in out and "train.txt:1: 含零宽或控制字符" in err


def packed(name):
    """The bytes of a zip archive that holds one file of that name."""
    with zipfile.ZipFile("made.zip", "w") as archive:
        archive.writestr(name, DEV)
    return Path("made.zip").read_bytes()


TEXT = DEV + "\n" + DEV.replace("在", "的人去了")


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: packed("xl/sharedStrings.xml"), ["is an Excel workbook", "CSV or text, in UTF-8"]),
        (lambda: packed("word/document.xml"), ["is a Word document"]),
        (lambda: packed("content.xml"), ["is an OpenDocument file"]),
        (lambda: packed("train.txt"), ["is a zip archive; unpack it"]),
        (lambda: b"PK\x03\x04half", ["is a broken zip archive"]),
        (lambda: gzip.compress(TEXT.encode()), ["is a gzip file", "gunzip -k data/t/ori_data/train.txt"]),
        (lambda: b"%PDF-1.7\n", ["is a PDF"]),
        (lambda: b"PAR1\x15\x04", ["is a parquet file", "to_json"]),
        (lambda: b"\x80\x04\x95\x0b\x00\x00", ["is a pickle"]),
        (lambda: b"SQLite format 3\x00\x10", ["is an SQLite database"]),
        (lambda: bytes(2000), ["is no text", "NUL"]),
        (lambda: b"<?xml version='1.0'?><a>", ["is an XML file"]),
        (lambda: b"\n \n# id\n", ["holds only blank lines and comments"]),
        (lambda: b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>404", ["is an HTML page", "download"]),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid", ["Git LFS pointer", "git lfs pull"]),
        (lambda: TEXT.encode("utf-16"), ["is UTF-16 text", "iconv -f UTF-16 -t UTF-8"]),
        (lambda: b"\xfe\xff" + TEXT.encode("utf-16-be"), ["is UTF-16 text"]),
        (lambda: TEXT.encode("utf-16-le"), ["is UTF-16LE text", "iconv -f UTF-16LE"]),
        (lambda: TEXT.encode("utf-16-be"), ["is UTF-16BE text"]),
        (lambda: TEXT.encode("utf-32"), ["is UTF-32 text"]),
        (lambda: TEXT.encode("gb18030"), ["train.txt:1: not UTF-8", "GB18030 (GBK) text", "iconv -f GB18030 -t UTF-8"]),
        (lambda: TEXT.replace("人", "國").encode("big5"), ["train.txt:1: not UTF-8", "iconv -f BIG5-HKSCS -t UTF-8"]),
        (lambda: f"{TEXT}\n".encode() + TEXT.encode("gb18030"), ["train.txt:3: not UTF-8", "; re-encode it"]),
    ],
)
def test_the_first_bytes_say_what_a_file_is(convert, capsys, make, parts):
    error = refused(convert, capsys, make())
    assert "data/t/ori_data/train.txt:" in error and all(part in error for part in parts), error


def spans(text, *places):
    """A JSON line; a place is (begin, end, entity)."""
    found = [
        {"entity_index": {"begin": begin, "end": end}, "entity_type": "PER", "entity": entity}
        for begin, end, entity in places
    ]
    return json.dumps({"text": text, "entity_list": found}, ensure_ascii=False)


def test_ends_that_are_the_last_character(convert, capsys):
    lines = [spans("梁小雨和秦若兰来了", (0, 2, "梁小雨"), (4, 6, "秦若兰"))] * 3
    error = refused(convert, capsys, "\n".join(lines))
    assert "train.txt:1: '梁小雨' is not at [0, 2)" in error and "6 of the 6 entities" in error
    assert "6 of them fit with end + 1" in error and "--ends=inclusive" in error
    examples = convert("\n".join(lines), "--ends=inclusive", "--dev_file=" + inclusive_dev())
    assert [example["answer"] for example in examples] == ["梁小雨_人名\n秦若兰_人名"] * 3


def inclusive_dev():
    Path("dev.txt").write_text(spans("高志远", (0, 2, "高志远")), encoding="utf-8")
    return "dev.txt"


@pytest.mark.parametrize(
    "text, begin, end, cause",
    [
        ("去梁雨家", 2, 4, "both - 1: they count from 1"),
        ("去梁雨家", 2, 3, "begin - 1: they count from 1"),
        ("去梁雨家", 3, 9, "UTF-8 bytes: they count bytes"),
        ("在\n\n梁雨家", 5, 7, "CRLF: they count a line end as two"),
        ("去梁雨家", 0, 2, "are the offsets those of another version of the text?"),
    ],
)
def test_other_ways_to_count_are_named(convert, capsys, text, begin, end, cause):
    assert cause in refused(convert, capsys, "\n".join([spans(text, (begin, end, "梁雨"))] * 5))


def test_ends_that_are_exclusive_and_are_read_as_inclusive(convert, capsys):
    error = refused(convert, capsys, "\n".join([spans("去梁雨家", (1, 3, "梁雨"))] * 5), "--ends=inclusive")
    assert "fit with end - 1: end is the character behind already; leave out --ends=inclusive" in error
    cluener = json.dumps({"text": "去梁雨家", "label": {"PER": {"梁雨": [[1, 3]]}}}, ensure_ascii=False)
    assert "subtract 1 from each end" in refused(convert, capsys, "\n".join([cluener] * 5))


def test_offsets_in_utf_16_are_converted_and_counted(convert, capsys):
    lines = [spans("😀😀梁雨和秦若兰", (4, 6, "梁雨"), (7, 10, "秦若兰")), spans("梁雨来", (0, 2, "梁雨"))]
    examples = convert("\n".join(lines))
    assert [(e["entity"], e["begin"], e["end"]) for e in examples[0]["entities"]] == [("梁雨", 2, 4), ("秦若兰", 5, 8)]
    out, err = capsys.readouterr()
    assert "与文本不符的实体（已从答案去掉） 0" in out and "下标按 UTF-16 数的实体（已换算） 2" in out
    assert "train.txt:1: 下标按 UTF-16 数的实体（已换算）：'梁雨' [4, 6)" in err


def test_a_few_misfits_are_counted_and_three_shown(convert, capsys):
    lines = [spans("梁小雨和秦若兰来了", (0, 2, "梁小雨"), (4, 7, "秦若兰"), (0, 3, "梁小雨"))] * 4
    examples = convert("\n".join(lines))
    assert [example["answer"] for example in examples] == ["梁小雨_人名\n秦若兰_人名"] * 4
    out, err = capsys.readouterr()
    assert err.count("end + 1 就相符") == 3 and "与文本不符的实体（已从答案去掉） 4" in out


TYPES = "梁\tB-PERSON\n在\tO\n洛\tB-GPE\n周\tB-DATE\n十\tB-WORK_OF_ART\n沪\tB-LOC\n"


def test_all_unknown_types_at_once_ready_to_copy(convert, capsys):
    error = refused(convert, capsys, TYPES)
    path = "data/t/ori_data/train.txt"
    assert all(f"'{tag}' ({path}:{n})" in error for tag, n in (("PERSON", 1), ("GPE", 3), ("DATE", 4))), error
    option = error.split()[-1]
    assert option == "--labels=LOC:地名,PERSON:PERSON,GPE:GPE,DATE:DATE,WORK_OF_ART:WORK-OF-ART"
    (example,) = convert(TYPES, option)
    assert example["answer"] == "梁_PERSON\n洛_GPE\n周_DATE\n十_WORK-OF-ART\n沪_地名"


def test_types_may_be_left_out(convert, capsys):
    (example,) = convert(TYPES, "--labels=PERSON：人名,LOC:地名,GPE:,DATE:,WORK_OF_ART:", "--instruct={labels}")
    assert (example["answer"], example["instruct"]) == ("梁_人名\n沪_地名", "人名、地名")
    out, err = capsys.readouterr()
    assert (
        "不要的类型的实体（--labels=标签:） 3" in out
        and "train.txt:3: 不要的类型的实体（--labels=标签:）：'洛'，GPE" in err
    )


def test_types_with_a_colon_can_be_named_those_with_a_comma_not(convert, capsys):
    assert convert("梁\tB-A:x\n", "--labels=A:x:人名,LOC:地名")[0]["answer"] == "梁_人名"
    capsys.readouterr()
    for tag in ("A,x", "A：x", "“A”"):
        with pytest.raises(SystemExit, match="2"):
            convert(f"梁\tB-{tag}\n")
        assert f"train.txt:1: --labels cannot name the entity type {tag!r}; rename it" in capsys.readouterr().err


def test_the_option_to_copy_is_one_word_of_the_shell(convert, capsys):
    """Types with blanks (in columns that tabs part), colons and signs that a shell takes for its own."""
    tags = ["Person Name", "ns:ORG", "A&B (x)", "it's"]
    train = "".join(f"梁\tB-{tag}\n雨\tI-{tag}\n和\tO\n" for tag in tags)
    with pytest.raises(SystemExit, match="2"):
        convert(train)
    option = capsys.readouterr().err.partition(" as in Person Name: ")[2]
    (word,) = shlex.split(option)
    (example,) = convert(train, word)
    assert example["answer"] == "梁雨_Person Name\n梁雨_ns-ORG\n梁雨_A&B (x)\n梁雨_it's"


def test_an_entity_of_blanks_is_none(convert, capsys):
    (example,) = convert(spans("梁 来", (0, 1, "梁"), (1, 2, " ")))
    assert example["answer"] == "梁_人名"
    assert "只有空白的实体（已从答案去掉） 1" in capsys.readouterr().out


NUMBERED = (
    "科0\tO\n技1\tO\n2"
    + "0\tO\n梁0\tB-PER.NAM\n小1\tI-PER.NAM\n雨2\tI-PER.NAM\n"
    + "".join(f"{letter}{n}\tO\n" for n, letter in enumerate("homepage.org"))
)


def test_numbers_of_characters_in_words_are_no_text(convert, capsys):
    """As in the Weibo corpus: a digit has a number too, a number may have two digits, and one word lacks a character."""
    (example,) = convert(NUMBERED + "照0\tO\n越2\tO\n 0\tO\n", "--labels=PER.NAM:人名,LOC:地名")
    assert (example["text"], example["answer"]) == ("科技2梁小雨homepage.org照越 ", "梁小雨_人名")
    assert "字后面的词内序号（已去掉） 21" in capsys.readouterr().out
    assert convert("第\tO\n1\tO\n0\tO\n1\tO\n2\tO\n")[0]["text"] == "第1012"


def test_a_character_without_the_number_that_all_others_have_is_refused(convert, capsys):
    error = refused(convert, capsys, NUMBERED + "好\tO\n", "--labels=PER.NAM:人名,LOC:地名")
    assert "train.txt:19: the tokens before end in their number in a word, '好' does not" in error


def test_a_column_of_token_numbers_is_no_text(convert, capsys):
    error = refused(convert, capsys, "1\t梁\tB-PER\n2\t来\tO\n\n1\t在\tO\n2\t沪\tB-LOC\n")
    assert "train.txt: the first column numbers the tokens, it must hold them; leave it out: sed -E" in error


CHIP = "梁小雨在洛阳|||0    2    PER|||0    1    PER|||4    5    LOC|||\n今天|||\n"
YIDU = {"originalText": "梁小雨在洛阳", "entities": [{"label_type": "PER", "overlap": 0, "start_pos": 0, "end_pos": 3}]}
W2NER = [
    {
        "sentence": list("梁小雨"),
        "ner": [{"index": [0, 1, 2], "type": "PER"}, {"index": [1], "type": "PER"}],
        "word": [],
    },
    {"sentence": ["New", "York", "好"], "ner": [{"index": [0, 1], "type": "LOC"}, {"index": [0, 2], "type": "LOC"}]},
]


@pytest.mark.parametrize(
    "train, form, answers, remark",
    [
        (CHIP, "cmeee", ["梁小雨_人名\n梁小_人名\n洛阳_地名", "没有"], ""),
        ("\ufeff" + json.dumps(YIDU, ensure_ascii=False), "spans", ["梁小雨_人名"], ""),
        (
            json.dumps(W2NER, ensure_ascii=False),
            "characters",
            ["梁小雨_人名\n小_人名", "New York_地名"],
            "另外：不连续的实体（已从答案去掉） 1，英文词之间丢失的空格（已补上） 1",
        ),
    ],
)
def test_how_public_corpora_are_written(convert, capsys, train, form, answers, remark):
    """CHIP 2020 (CMeEE), yidu-s4k, and the files of W2NER."""
    assert [example["answer"] for example in convert(train)] == answers
    out = capsys.readouterr().out
    assert f"train.txt 是 {form}，" in out and remark in out


@pytest.mark.parametrize(
    "train, part",
    [
        (
            "#FORMAT=WebAnno TSV 3.3\n\n#Text=梁来\n1-1\t0-1\t梁\t_\tPER\n",
            "neither JSON lines nor 字<tab>标签, the first line is '1-1\\t0-1\\t梁\\t_\\tPER'; it is WebAnno's TSV",
        ),
        (
            "梁　B-PER\n来　O\n",
            "neither JSON lines nor 字<tab>标签, the first line is '梁\\u3000B-PER'; part the columns with tabs, not with",
        ),
        (
            "梁\tB-PER\r来\tO\r",
            "neither JSON lines nor 字<tab>标签, the first line is '梁\\tB-PER\\r来\\tO'; its lines end with a carriage return",
        ),
        (
            "梁\tPER-B\n",
            "neither JSON lines nor 字<tab>标签, the first line is '梁\\tPER-B'; a tag is O, or B-, I-, M-, E-, S-, L- or U- and",
        ),
        ("你好 世界\n", "neither JSON lines nor 字<tab>标签, the first line is '你好 世界'; see process.py --help"),
        (
            '{"text": "梁来", "answer": null, "prediction": "没有", "entities": []}',
            ":1: this is a row of predict.py or test.py; make it a file to correct: process.py --export=doccano --predictions=",
        ),
        ("梁\tB-PER\n来\to\n", ":2: expected 字<tab>标签, the tag O or B-"),
        ("梁\tB-PER\n来\t0\n", ":2: expected 字<tab>标签, the tag O or B-"),
        (f"{DEV}\n" + '{"text": "断\n' + DEV, ":2: not valid JSON (Unterminated string"),
        (f"{DEV},\n{DEV}\n", ":1: not valid JSON (Extra data"),
        (f'{{"data": [{DEV}]}}', ":1: no key 'text' (there are 'data')"),
        (('\ufeff["' + DEV).encode("utf-16"), "is UTF-16 text"),
        ("梁小雨来|||0    2    PER|||\n今天|||0 x PER|||\n", ":2: expected text|||begin end type|||"),
        ('{"sentence": ["梁"], "ner": [{"index": [1], "type": "PER"}]}', ":1: there is no token 1, the sentence has 1"),
        (
            "\n".join([spans("A&amp;B公司", (0, 5, "A&B公司"))] * 5),
            ":1: 'A&B公司' is not at [0, 5) of the text, and so it is with 5 of the 5",
        ),
        (
            "\n".join([spans("\u200b梁雨来", (0, 2, "梁雨"))] * 5),
            ":1: '梁雨' is not at [0, 2) of the text, and so it is with 5 of the 5",
        ),
    ],
)
def test_what_else_cannot_be_read_is_refused(convert, capsys, train, part):
    """Other tools' files: WebAnno, full-width blanks, a lower-case o, broken JSON, offsets of another text."""
    assert f"train.txt{part}" in refused(convert, capsys, train).replace("train.txt: ", "train.txt")


def test_what_other_tools_leave_in_a_file_changes_nothing(convert, capsys):
    """Blanks behind tags and on empty lines, a first tag I-, names of types with blanks, an entity without characters."""
    examples = convert("梁\tI-PER \t \n小\tI-PER\t\n来\tO   \n \t \n秦\tE-PER\n")
    assert [(e["text"], e["answer"]) for e in examples] == [("梁小来", "梁小_人名"), ("秦", "秦_人名")]
    assert "不合规的标签（已按新实体的开头处理） 2" in capsys.readouterr().out
    line = spans("梁来", (0, 1, "梁"), (0, 0, "")).replace("PER", "Person Name")
    assert convert(line, "--labels=Person Name:人名,LOC:地名")[0]["answer"] == "梁_人名"
    assert "与文本不符的实体（已从答案去掉） 1" in capsys.readouterr().out
