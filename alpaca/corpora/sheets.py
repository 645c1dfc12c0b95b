"""Tables with a header: CSV and the sheets of an Excel workbook (.xlsx), as (row number, {column: value}).

An .xlsx file is a zip archive of XML (ECMA-376, part 1, chapter 18); what is needed of it takes the standard library.
"""

import csv
import re
import zipfile
from xml.etree import ElementTree

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_lines
from alpaca.corpora.excel_dates import kind_of_format, text_of_date

DELIMITERS = ",\t;"
LARGEST = 2**29  # bytes of one unpacked part of a workbook: an archive may hold far more than it takes
SHEETS = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
RELATIONS = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"


def csv_delimiter(header, columns):
    """The delimiter that makes one of `columns` a column of the header line; None where there is none."""
    for delimiter in DELIMITERS:
        fields = [field.strip().strip('"') for field in header.split(delimiter)]
        if len(fields) > 1 and set(fields) & set(columns):
            return delimiter
    return None


def read_csv(path, delimiter):
    """Yield (line number, {column: text}) of a CSV file with a header; UserError for a row of another length.

    A blank line is a row of empty cells, as a spreadsheet shows it: results can stand beside their rows.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses a field of 131,072 characters
    rows = csv.reader((line + "\n" for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    header = None
    try:
        for row in rows:
            if header is None and not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                check_header(path, header)
            elif row and len(row) != len(header):
                raise UserError(
                    f"{path}:{rows.line_num}: {len(row)} columns, but the header has {len(header)}; put a text that "
                    f"holds {delimiter!r} in double quotes"
                )
            else:
                yield rows.line_num, dict(zip(header, row or [""] * len(header), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not CSV ({error}); correct the line") from None


def check_header(where, header):
    """UserError for two columns of one name."""
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise UserError(f"{where}: two columns are named {repeated[0]!r}; rename one")


def read_workbook(path, columns):
    """Yield (row number, {column: value}) of the sheet of an .xlsx file whose header has one of `columns`.

    A value is a str, an int, a float or a bool, as the cell is; a date or a time is a str; None: an empty cell. Empty rows
    between others are rows too, those at the end are not. UserError where no sheet has such a header, or more than one, and
    for a cell of `columns` whose value is not in the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            shared, dated = shared_strings(archive), date_reader(archive)
            headers, fitting = {}, []
            for name, part in sheets_of(archive):
                rows = sheet_rows(archive, part, shared, dated)
                first, header = next(rows, (0, {}))
                headers[name] = [str(value).strip() for value in header.values() if value is not None]
                if set(headers[name]) & set(columns):
                    fitting.append((name, first, header, rows))
            if not headers:
                raise ValueError("it names no sheet; is it of the kind Strict Open XML?")
            if len(fitting) > 1:
                names = ", ".join(repr(name) for name, *_ in fitting)
                raise UserError(f"{path}: more than one sheet holds texts ({names}); keep one, or save each as CSV")
            if not fitting:
                found = "; ".join(f"{name}: {', '.join(header) or 'empty'}" for name, header in headers.items())
                raise UserError(
                    f"{path}: no sheet has a column {' or '.join(map(repr, columns))} in its first row ({found}); "
                    "name the column of the texts so"
                )
            name, last, header, rows = fitting[0]
            check_header(f"{path}, sheet {name}", headers[name])
            titles = {column: str(value).strip() for column, value in header.items() if value is not None}
            blank = {}  # since the row `last`: what shows nothing in these columns, as where a cell far below has a space
            for number, cells in rows:
                row = {title: cells.get(column) for column, title in titles.items()}
                check_values(f"{path}, row {number}", row, columns)
                if not any(str(value).strip() for value in row.values() if value is not None):
                    blank[number] = row
                    continue
                for between in range(last + 1, number):
                    yield between, blank.pop(between, None) or dict.fromkeys(titles.values())
                last = number
                yield number, row
    except (zipfile.BadZipFile, ElementTree.ParseError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a workbook that can be read ({error}); save the sheet as CSV in UTF-8") from None


class NoValue(str):
    """What a cell shows in place of a value: an error (#N/A), or a formula that no program has computed yet."""


def check_values(where, row, columns):
    """UserError for a cell of one of `columns` without a value; elsewhere it stays as it is."""
    for column in columns:
        if isinstance(row.get(column), NoValue):
            raise UserError(
                f"{where}: `{column}` is {row[column]!r}, an error or a formula without a value; correct it, or open and "
                "save the workbook in Excel"
            )


def xml_of(archive, part):
    """The root of a part of the archive; KeyError where it has none of that name."""
    if archive.getinfo(part).file_size > LARGEST:
        raise ValueError(f"{part} takes more than {LARGEST} bytes")
    return ElementTree.fromstring(archive.read(part))


def sheets_of(archive):
    """[(name, part of the archive)] of a workbook's sheets, in their order."""
    relations = {
        relation.get("Id"): relation.get("Target") for relation in xml_of(archive, "xl/_rels/workbook.xml.rels")
    }
    targets = [
        (sheet.get("name"), relations[sheet.get(f"{RELATIONS}id")])
        for sheet in xml_of(archive, "xl/workbook.xml").iter(f"{SHEETS}sheet")
    ]
    return [(name, part.lstrip("/") if part.startswith("/") else f"xl/{part}") for name, part in targets]


def shared_strings(archive):
    """The texts that cells refer to by number."""
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    return [string_of(item) for item in xml_of(archive, "xl/sharedStrings.xml").iter(f"{SHEETS}si")]


def date_reader(archive):
    """A function from a cell and its number to what it shows: a date or a time as text, else the number."""
    properties, kinds = xml_of(archive, "xl/workbook.xml").find(f"{SHEETS}workbookPr"), []
    from_1904 = properties is not None and properties.get("date1904") in ("1", "true")
    if "xl/styles.xml" in archive.namelist():
        styles = xml_of(archive, "xl/styles.xml")
        codes = {one.get("numFmtId"): one.get("formatCode", "") for one in styles.iter(f"{SHEETS}numFmt")}
        used = [style.get("numFmtId", "0") for style in styles.findall(f"{SHEETS}cellXfs/{SHEETS}xf")]
        kinds = [kind_of_format(int(number), codes.get(number)) for number in used]

    def dated(cell, number):
        style = int(cell.get("s", "0"))
        kind = kinds[style] if style < len(kinds) else None
        return text_of_date(number, kind, from_1904) if kind else number

    return dated


def string_of(item):
    """The text of a string item: its own or that of its runs, without the phonetic guides of East Asian text."""
    parts = [item, *item.iter(f"{SHEETS}r")]
    text = "".join(part.text or "" for parent in parts for part in parent.findall(f"{SHEETS}t"))
    return re.sub("_x([0-9A-Fa-f]{4})_", lambda code: chr(int(code[1], 16)), text).replace("\r\n", "\n")


def sheet_rows(archive, part, shared, dated):
    """Yield (row number, {letters of the column: value}) of a sheet's rows that hold something."""
    for number, row in enumerate(xml_of(archive, part).iter(f"{SHEETS}row"), 1):
        cells = {}
        for position, cell in enumerate(row.iter(f"{SHEETS}c")):
            letters = re.match("[A-Z]*", cell.get("r", ""))[0]
            value = cell_value(cell, shared, dated)
            if value is not None:
                cells[letters or position] = value
        if cells:
            yield int(row.get("r", number)), cells


def cell_value(cell, shared, dated):
    """A cell's str, int, float, bool or NoValue; None where it is empty."""
    kind, value = cell.get("t", "n"), cell.findtext(f"{SHEETS}v")
    if kind == "inlineStr":
        return string_of(cell.find(f"{SHEETS}is"))
    formula = cell.find(f"{SHEETS}f")
    if value is None and formula is not None:
        return NoValue(f"={formula.text or ''}")
    if value is None:
        return None
    if kind == "e":
        return NoValue(value)
    if kind == "b":
        return value == "1"
    if kind == "s":
        return shared[int(value)]
    if kind == "n":
        return dated(cell, int(value) if re.fullmatch("-?[0-9]+", value) else float(value))
    return value
