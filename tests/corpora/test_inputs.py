"""python -m pytest tests/corpora/test_inputs.py: the files of texts that predict.py is given."""

import json
import zipfile
from xml.sax.saxutils import quoteattr

import pytest

from alpaca.answering.windows import cutter, row_of_text
from alpaca.common.errors import UserError
from alpaca.corpora.inputs import read_texts
from alpaca.corpora.sheets import read_workbook
from dataset import example_of_input

ROWS = [{"id": 7, "text": "周五上午，程立群到了苏州。"}, {"id": 8, "text": "天气渐渐凉了。"}]


def read(path, content):
    path.write_text(content, encoding="utf-8", newline="")
    return [{key: value for key, value in record.items() if value is not None} for record in read_texts(path)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n "])
def test_a_json_array(tmp_path, indent, mark):
    rows = read(tmp_path / "texts.json", mark + json.dumps(ROWS, ensure_ascii=False, indent=indent))
    assert rows == ROWS
    texts = [row["text"] for row in ROWS]
    assert read(tmp_path / "texts.json", json.dumps(texts, ensure_ascii=False, indent=indent)) == [
        {"text": text} for text in texts
    ]


def test_plain_lines_keep_their_places(tmp_path):
    lines = ["[1] 程立群到了苏州。", "", "{ 是括号", "   ", "text，逗号", "[图]晴"]
    assert read(tmp_path / "a.txt", "\r\n".join(lines)) == [{"text": line} for line in lines]


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("name", ["texts.csv", "texts.txt"])
def test_csv(tmp_path, name, delimiter):
    lines = ["\ufeffid,text,note", '7,"程立群到了苏州,""走""了\n又回来。",a', "8,,b", "", "9,天,"]
    rows = read(tmp_path / name, "\r\n".join(lines).replace(",", delimiter))
    assert rows == [
        {"id": "7", "text": f'程立群到了苏州{delimiter}"走"了\n又回来。', "note": "a"},
        {"id": "8", "text": "", "note": "b"},
        {"id": "", "text": "", "note": ""},
        {"id": "9", "text": "天", "note": ""},
    ]


def test_csv_of_one_column(tmp_path):
    rows = read(tmp_path / "texts.csv", '\ntext\n"甲，乙"\n\n丙\n')
    assert rows == [{"text": "甲，乙"}, {"text": ""}, {"text": "丙"}]


MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def write_workbook(path, *sheets, strings="", styles="", properties=""):
    """A workbook; a sheet is the XML of its rows."""
    names = "".join(f'<sheet name="表{i}" sheetId="{i}" r:id="rId{i}"/>' for i in range(len(sheets)))
    ids = "".join(f'<Relationship Id="rId{i}" Target="worksheets/s{i}.xml"/>' for i in range(len(sheets)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "xl/workbook.xml",
            f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}">{properties}<sheets>{names}</sheets></workbook>',
        )
        archive.writestr("xl/styles.xml", f'<styleSheet xmlns="{MAIN}">{styles}</styleSheet>')
        archive.writestr("xl/_rels/workbook.xml.rels", f"<Relationships>{ids}</Relationships>")
        archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{MAIN}">{strings}</sst>')
        for i, rows in enumerate(sheets):
            archive.writestr(
                f"xl/worksheets/s{i}.xml", f'<worksheet xmlns="{MAIN}"><sheetData>{rows}</sheetData></worksheet>'
            )
    return path


def test_excel(tmp_path):
    """The sheet with a column `text`; rich text, a phonetic guide, numbers, gaps, an escaped carriage return."""
    strings = (
        "<si><t>id</t></si><si><t>text</t></si>"
        '<si><r><t>程立群</t></r><r><t>到了苏州。</t></r><rPh sb="0" eb="1"><t>cheng</t></rPh></si>'
    )
    rows = (
        '<row r="1"><c r="A1" t="s"><v>0</v></c><c r="C1" t="s"><v>1</v></c></row>'
        '<row r="2"><c r="A2"><v>7</v></c><c r="B2"><v>5</v></c><c r="C2" t="s"><v>2</v></c></row>'
        '<row r="4"><c r="A4"><v>1.5</v></c><c r="C4"/></row>'
        '<row r="5"><c r="C5" t="inlineStr"><is><t>天_x000D_\nA</t></is></c></row>'
        '<row r="6"><c r="C6"><v>110</v></c></row>'
    )
    path = write_workbook(tmp_path / "a.xlsx", "", rows, "<row><c r='A1'><v>3</v></c></row>", strings=strings)
    found = [{key: value for key, value in record.items() if value is not None} for record in read_texts(path)]
    assert found == [
        {"id": 7, "text": "程立群到了苏州。"},
        {"text": ""},
        {"id": 1.5, "text": ""},
        {"text": "天\nA"},
        {"text": "110"},
    ]
    with pytest.raises(UserError, match="a.xlsx: no sheet has a column 'text' or .*表0: empty; 表1: empty"):
        list(read_texts(write_workbook(tmp_path / "a.xlsx", "", "")))
    with pytest.raises(UserError, match="a.xlsx: more than one sheet holds texts \\('表0', '表1'\\); keep one"):
        list(read_texts(write_workbook(tmp_path / "a.xlsx", rows, rows, strings=strings)))
    write_workbook(tmp_path / "a.xlsx", "<row>")
    with pytest.raises(UserError, match="a.xlsx: not a workbook that can be read"):
        list(read_texts(tmp_path / "a.xlsx"))


def test_a_stray_cell_far_below_makes_no_rows(tmp_path):
    """Beside the table, or a space in it; a space between others stays where it is."""

    def cell(place, text):
        row = place.lstrip("ABZ")
        return f'<row r="{row}"><c r="{place}" t="inlineStr"><is><t>{text}</t></is></c></row>'

    rows = cell("B1", "text") + cell("B2", "天") + cell("B4", " ") + cell("Z5", "x") + cell("B6", "地")
    for stray in ("", cell("Z1000000", "x"), cell("B1000000", " ")):
        path = write_workbook(tmp_path / "a.xlsx", rows + stray)
        numbers, found = zip(*read_workbook(path, ["text"]), strict=True)
        assert numbers == (2, 3, 4, 5, 6) and [row["text"] for row in found] == ["天", None, " ", None, "地"]


def test_cells_of_excel_without_a_value(tmp_path):
    """A formula that nothing has computed and an error: no text of anybody's, in another column as they are shown."""
    formula, error = '<c r="A2" t="str"><f>B2&amp;C2</f></c>', '<c r="A2" t="e"><f>1/0</f><v>#DIV/0!</v></c>'
    for cell, shown in ((formula, "=B2&C2"), (error, "#DIV/0!")):
        for names in (("id", "text"), ("text", "id")):
            head = "".join(f'<c t="inlineStr"><is><t>{name}</t></is></c>' for name in names)
            head = head.replace("<c ", '<c r="A1" ', 1).replace("<c t", '<c r="B1" t', 1)
            row = f'<row r="2">{cell}<c r="B2" t="str"><f>D2</f><v>天</v></c></row>'
            path = write_workbook(tmp_path / "a.xlsx", f'<row r="1">{head}</row>{row}')
            if names[1] == "text":
                assert [(record["id"], record["text"]) for record in read_texts(path)] == [(shown, "天")]
            else:
                with pytest.raises(UserError, match="a.xlsx, row 2: `text` is '.*', an error or a formula without"):
                    list(read_texts(path))
    with zipfile.ZipFile(tmp_path / "strict.xlsx", "w") as archive:
        archive.writestr("xl/_rels/workbook.xml.rels", "<Relationships/>")
        archive.writestr("xl/workbook.xml", '<workbook xmlns="http://purl.oclc.org/ooxml/spreadsheetml/main"/>')
    with pytest.raises(UserError, match="strict.xlsx: not a workbook .*Strict Open XML.*save the sheet as CSV"):
        list(read_texts(tmp_path / "strict.xlsx"))


def test_dates_of_excel(tmp_path):
    """Numbers to the file, dates to who sees them; both systems of counting days."""
    codes = ['yyyy"年"m"月"d"日"', "[$-804]h:mm:ss AM/PM;@", "[h]:mm", '0.0"d";[Red]\\-0', "yyyy/m/d h:mm", "mmm"]
    formats = "".join(f'<numFmt numFmtId="{164 + i}" formatCode={quoteattr(code)}/>' for i, code in enumerate(codes))
    used = [0, 14, 22, 46, 57, *range(164, 164 + len(codes))]
    xfs = "".join(f'<xf numFmtId="{number}"/>' for number in used)
    styles = f'<numFmts>{formats}</numFmts><cellStyleXfs><xf numFmtId="14"/></cellStyleXfs><cellXfs>{xfs}</cellXfs>'
    cells = [(0, 45413), (1, 45413), (2, 45413.75), (3, 1.25), (4, 59), (5, 45413), (6, 0.5), (6, 45413.5), (7, 1.5)]
    cells += [(8, 45413), (9, 45413.0000001), (10, 61), (1, -1)]
    shown = [45413, "2024-05-01", "2024-05-01 18:00:00", "30:00:00", "1900-02-28", "2024-05-01", "12:00:00"]
    shown += ["2024-05-01 12:00:00", "36:00:00", 45413, "2024-05-01", "1900-03-01", -1]
    head = "".join(f'<c t="inlineStr"><is><t>{name}</t></is></c>' for name in ["text", *range(len(cells))])
    row = "".join(f'<c s="{style}"><v>{number}</v></c>' for style, number in [(0, 7), *cells])
    rows = f"<row>{head}</row><row>{row}</row>"
    for properties, expected in (("", shown), ('<workbookPr date1904="1"/>', None)):
        path = write_workbook(tmp_path / "a.xlsx", rows, styles=styles, properties=properties)
        (record,) = read_texts(path)
        assert record["text"] == "7" and expected in (None, [record[str(i)] for i in range(len(cells))])
    assert (record["1"], record["3"], record["4"]) == ("2028-05-02", "30:00:00", "1904-02-29")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", '天气。\n{"text": "程"}\n', "a.txt:2: a JSON object among lines of plain text"),
        ("a.txt", '{"text": "程"}\n天气。\n', "a.txt:2: not valid JSON"),
        ("a.json", '[\n{"text": }\n]', "a.json: not valid JSON .*line 2, column 10"),
        ("a.json", '[{"text": "程"}, 3]', "a.json, item 2: expected an object or a text, got int"),
        ("a.json", '[{"txt": "程"}]', "a.json, item 1: needs a `text`.*; there are txt"),
        ("a.json", '[{"text": 3}]', "a.json, item 1: `text` must be a string, got 3"),
        ("a.json", "[]", "a.json: the file holds only blank lines"),
        ("a.json", '{\n "data": []\n}', "a.json: an object over several lines; give one object a line, or a list"),
        ("a.jsonl", '{"id": 1}', "a.jsonl:1: needs a `text`"),
        ("a.csv", "id,句子\n7,天\n", "a.csv: no column text, query, instruct in the header 'id,句子'"),
        ("a.csv", "id,text\n7,天,地\n", "a.csv:2: 3 columns, but the header has 2; put a text that holds ','"),
        ("a.csv", 'id,text\n7,"天"地\n', "a.csv:2: not CSV"),
        ("a.csv", "text,text\n7,天\n", "a.csv: two columns are named 'text'"),
        ("a.txt", "天\r地\r", "a.txt:1: a carriage return in the line"),
        ("a.txt", "<!doctype html>", "a.txt: is an HTML page"),
        ("a.txt", "天\tO\n\n程\tB-PER\n群\tI-PER\n", "a.txt: a corpus of characters and tags, .*process.py reads"),
    ],
)
def test_what_is_no_file_of_texts_is_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, content)


def test_a_row_for_each_row_with_its_own_keys(tmp_path):
    """Blank rows too, which no model is asked; what the input calls as a result is called gives way."""
    lines = [
        '{"id": "a-7", "text": "程立群"}',
        '{"id": "a-8", "text": ""}',
        '{"n": 3, "text": "天", "prediction": "x"}',
    ]
    (tmp_path / "ids.jsonl").write_text("\n".join(lines), encoding="utf-8")
    examples = [example_of_input(record, "找", "文本：") for record in read_texts(tmp_path / "ids.jsonl")]
    cuts = cutter(Model, None, None, {"labels": [], "instructs": ["找"]})(examples)
    parts = [part for cut in cuts for part in cut.parts]
    assert [part["query"] for part in parts] == ["文本：程立群", "文本：天"]
    answers = [{"text": part["text"], "answer": None, "prediction": "没有", "entities": []} for part in parts]
    each = iter(answers)
    rows = [
        row_of_text(example, cut, [next(each) for _ in cut.parts]) for example, cut in zip(examples, cuts, strict=True)
    ]
    common = {"answer": None, "entities": [], "calibrated": False}
    assert rows == [
        {"id": "a-7", "text": "程立群", "prediction": "没有", **common},
        {"id": "a-8", "text": "", "prediction": "", **common},
        {"n": 3, "text": "天", "prediction": "没有", **common},
    ]


class Model:
    class config:
        max_position_embeddings = 512
