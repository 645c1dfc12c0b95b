"""The two files written by hand, lexicon.txt and templates.txt, and what of them is held out for dev."""

import re
import zlib
from pathlib import Path

from embedded_model.quantities import chinese_number

TEXT_DIR = Path(__file__).resolve().parent
ENTITY_TYPES = ("PER", "LOC", "ORG")
# The slots of a template that take a name, each an entry of the list of that heading in lexicon.txt.
ENTITY_SLOTS = {
    **dict.fromkeys("人 中国人 外国人 日本人 韩国人 昵称".split(), "PER"),
    **dict.fromkeys("地 省 市 县 村 街 景 国 外市 两国".split(), "LOC"),
    **dict.fromkeys("机构 机关 学校 医院 公司 银行 研究所 媒体 球队 国家队 协会 部队 简称".split(), "ORG"),
}
# The 3,755 characters of GB2312 level 1: rows 16 to 55 of the table, whose last row is five short.
HANZI = [
    bytes([row, cell]).decode("gb2312")
    for row in range(0xB0, 0xD8)
    for cell in range(0xA1, 0xFF)
    if (row, cell) < (0xD7, 0xFA)
]
HELD_OUT_ONE_IN = 7
# With this salt the names that every newspaper is full of (新华社, 国务院, 联合国, …) are on the side of train.
HASH_SALT = "327:"


def is_held_out(key):
    """Whether a template ("sentence:" + its line) or a name ("name:" + it) belongs to dev, one of seven.

    By crc32, since Python's own hash differs from run to run.
    """
    return zlib.crc32((HASH_SALT + key).encode()) % HELD_OUT_ONE_IN == 0


# ---------------------------------------------------------------------------------------------------------------------
# templates: literal words and slots in braces


def split_template(template):
    """Literal, slot, literal, slot, …, literal: the literals have even indices."""
    return re.split(r"\{(.+?)\}", template)


def slot_kind(slot):
    """The entity type of a slot, or None: 人1 -> PER, 数 -> None."""
    return ENTITY_SLOTS.get(slot.rstrip("123"))


def has_entity(parts):
    """Whether a template (split_template) has a slot that takes a name."""
    return any(slot_kind(slot) for slot in parts[1::2])


def is_sentence(parts):
    """Whether other sentences may follow this template: it is no heading and no item of a list."""
    return parts[-1].endswith(("。", "！", "？", "。”", "！”", "？”", "……"))


# ---------------------------------------------------------------------------------------------------------------------
# the files


def read_entries(path):
    """The lists of lexicon.txt, {heading: [entry]}. An entry stands there as often as its *n says.

    An entry is a word (str) or a pattern (list): literal, heading, literal, heading, …, literal.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    blocks = re.split(r"^\[(.+)\]$", "\n".join(lines), flags=re.MULTILINE)[1:]
    lexicon = {"汉字": HANZI, "序数": [chinese_number(n) for n in range(1, 40)]}
    for heading, entries in zip(blocks[::2], blocks[1::2], strict=True):
        lexicon[heading] = []
        for entry in entries.split():
            entry, _, times = entry.partition("*")
            parts = split_template(entry)
            lexicon[heading] += [entry if len(parts) == 1 else parts] * int(times or 1)
    return lexicon


def read_templates(path):
    """The lines of templates.txt: [(domain, template)]."""
    templates, domain = [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            domain = line[1:].strip()
        elif line:
            templates.append((domain, line))
    return templates


LEXICON = read_entries(TEXT_DIR / "lexicon.txt")
TEMPLATES = read_templates(TEXT_DIR / "templates.txt")
