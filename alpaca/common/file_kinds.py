"""What a file is that is no UTF-8 text, by its bytes, and what its owner can do about it."""

import os
import re
import zipfile

from alpaca.common.errors import UserError

HEAD = 4096  # bytes that are looked at
UNPACK = "unpack it and name what is in it"
EXPORT = "export it as UTF-8 text"
# Bytes that a kind of file begins with (the list of file signatures of the `file` command) -> what it is, the remedy.
SIGNATURES = {
    b"PK\x03\x04": ("a zip archive", UNPACK),
    b"PK\x05\x06": ("an empty zip archive", "name another file"),
    b"\x1f\x8b": ("a gzip file", "unpack it: gunzip -k {path}"),
    b"BZh": ("a bzip2 file", "unpack it: bunzip2 -k {path}"),
    b"\xfd7zXZ\x00": ("an xz file", "unpack it: unxz -k {path}"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it: unzstd {path}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": ("a rar archive", UNPACK),
    b"%PDF-": ("a PDF", "extract its text first"),
    b"{\\rtf": ("an RTF document", "save it as UTF-8 text"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": (
        "an old Excel or Word file (.xls, .doc) or one with a password",
        "save it as .xlsx or as UTF-8 text",
    ),
    b"PAR1": ("a parquet file", "write its rows as JSON lines: pandas.read_parquet(…).to_json(…, lines=True)"),
    b"ARROW1": ("an arrow file", "write its rows as JSON lines: datasets.Dataset.to_json(…)"),
    b"\xff\xff\xff\xff": ("an arrow file", "write its rows as JSON lines: datasets.Dataset.to_json(…)"),
    b"Obj\x01": ("an avro file", EXPORT),
    b"\x89HDF": ("an HDF5 file", EXPORT),
    b"\x93NUMPY": ("a numpy array", EXPORT),
    b"SQLite format 3\x00": ("an SQLite database", EXPORT),
    b"\x89PNG": ("a picture", "name a file of text"),
    b"\xff\xd8\xff": ("a picture", "name a file of text"),
    (LFS := b"version https://git-lfs."): ("a Git LFS pointer, not the data", "fetch them: git lfs pull"),
}
ZIP_MEMBERS = {
    "xl/": ("an Excel workbook", "save the sheet as CSV or text, in UTF-8"),
    "word/": ("a Word document", "save it as UTF-8 text"),
    "content.xml": ("an OpenDocument file", "save it as CSV or text, in UTF-8"),
}
UTF_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
PICKLE = re.compile(rb"\x80[\x02-\x05][^\x00-\x08]")
COMMON = "的一是在不了有和人中大为我上国年，。、"  # the most frequent characters of simplified text,
TRADITIONAL = "的一是在不了有和人中大為我上國年，。、"  # and of traditional


def zip_kind(path):
    """(what a zip archive is, the remedy), by the names of what it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "a broken zip archive", "download or copy it again"
    found = (kind for start, kind in ZIP_MEMBERS.items() if any(name.startswith(start) for name in names))
    return next(found, SIGNATURES[b"PK\x03\x04"])


def refuse_other_kinds(path):
    """UserError, with what it is and what to do, for a file whose first bytes are not those of UTF-8 text."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    for start, (kind, remedy) in SIGNATURES.items():
        if head.startswith(start):
            kind, remedy = zip_kind(path) if start == b"PK\x03\x04" else (kind, remedy)
            raise UserError(f"{path}: is {kind}; {remedy.format(path=path)}")
    for bom, name in UTF_BOMS.items():
        if head.startswith(bom):
            raise UserError(f"{path}: is {name} text (Windows calls it Unicode); {_recode(path, name)}")
    if re.match(rb"(\xef\xbb\xbf)?\s*<\?xml\b", head):
        raise UserError(f"{path}: is an XML file; write its texts as lines or as JSON lines")
    if HTML.match(head):
        raise UserError(f"{path}: is an HTML page, perhaps of a download that failed; download the file itself")
    if PICKLE.match(head):
        raise UserError(f"{path}: is a pickle; write its contents as JSON lines (a pickle can run anything: trust it?)")
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: is a tar archive; unpack it: tar xf {path}")
    if b"\x00" in head:
        name = _utf16_without_mark(head)
        if name:
            raise UserError(f"{path}: is {name} text; {_recode(path, name)}")
        raise UserError(f"{path}: is no text (its first {len(head)} bytes hold NUL); {EXPORT}")


def refuse_failed_download(path):
    """UserError for what often stands in place of a large file: a Git LFS pointer, the page that a browser was shown, or
    what aria2 has not finished: it gives a file its full size at once, and what has not come yet is zeros (its manual,
    --file-allocation). Until all has come, <file>.aria2 stands beside it.
    """
    control = f"{path}.aria2"
    if os.path.exists(control):
        raise UserError(
            f"{path}: aria2 has not finished it, for {control} is there; run aria2c -c again, or delete {control} if the "
            "file is whole"
        )
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(LFS):
        raise UserError(f"{path}: is a Git LFS pointer, not the file; fetch the file: git lfs pull, or download it")
    if HTML.match(head):
        raise UserError(f"{path}: is an HTML page, perhaps of a download that failed; download the file itself")


def other_encoding(path):
    """What a file that is not UTF-8 seems to be encoded in, with the command that turns it into UTF-8; None if unknown."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    likely = {}
    for name, common in (("GB18030", COMMON), ("BIG5-HKSCS", TRADITIONAL)):
        text = _decoded(head, name)
        if text is not None:
            likely[name] = sum(text.count(char) for char in common)
    name = max(likely, key=likely.get, default=None)
    if not likely.get(name):  # other bytes make characters too, but seldom these
        return None
    return f"it looks like {name}{' (GBK)' if name == 'GB18030' else ''} text; {_recode(path, name)}"


def _recode(path, name):
    return f"turn it into UTF-8: iconv -f {name} -t UTF-8 {path} > new.txt"


def _decoded(head, encoding):
    """Text of the first bytes of a file; the last few may be half a character. None if they are not so encoded."""
    for cut in range(4):
        try:
            return head[: len(head) - cut].decode(encoding)
        except UnicodeDecodeError:
            if len(head) < HEAD:
                return None
    return None


def _utf16_without_mark(head):
    """The UTF-16 that most of the text is Chinese, ASCII or its punctuation in; None for neither."""
    shares = {}
    for name in ("UTF-16LE", "UTF-16BE"):
        text = _decoded(head[: len(head) // 2 * 2], name) or ""
        usual = sum("\u4e00" <= c <= "\u9fff" or " " <= c <= "~" or c in "\r\n\t，。、：；？！“”" for c in text)
        shares[name] = usual / len(text) if text else 0
    name = max(shares, key=shares.get)
    return name if shares[name] > 0.9 else None
