"""Write the demo corpus: Chinese sentences from templates, with persons, places and organisations marked.

    python embedded_model/make_demo.py

Reads embedded_model/{templates,lexicon}.txt, writes data/demo/ori_data/train.txt (4,000 texts) and dev.txt (500), one
JSON object a line: {"text": "…", "entity_list": [{"entity_index": {"begin": 3, "end": 4}, "entity_type": "LOC",
"entity": "日"}]} (characters, end exclusive; types PER, LOC, ORG). The same seed gives the same files.

A text is one template, sometimes two or three of one domain. A name is composed by the grammar in lexicon.txt, whose head
says what counts as one entity. What stands inside 《》 is a title and holds none.

dev measures reading, not memory: its templates and its person and organisation names occur nowhere in train. A hash
decides the side of each, so that embedded_model/train_tiny.py, which draws text from here too, never shows them either.
"""

import argparse
import json
import random
import re
import zlib
from pathlib import Path

TEXT_DIR = Path(__file__).resolve().parent
TRAIN_TEXTS, DEV_TEXTS = 4000, 500
TRAIN_SEED, DEV_SEED = 77, 78
ENTITY_FREE_SHARE = 0.32  # of the texts
# How many sentences a text may have, with entities (False) and without.
SENTENCES_OF_A_TEXT = {False: [1] * 15 + [2] * 4 + [3], True: [1] * 8 + [2] * 5 + [3] * 2}
PLACE_IN_PLACE_SHARE = 0.12  # of the counties, villages and streets: 湖南省 + 明溪县, two entities

ENTITY_TYPES = ("PER", "LOC", "ORG")
# The slots that take a name, which is an entry of the list of the same name in lexicon.txt.
ENTITY_SLOTS = {
    **dict.fromkeys("人 中国人 外国人 日本人 韩国人 昵称".split(), "PER"),
    **dict.fromkeys("地 省 市 县 村 街 景 国 外市 两国".split(), "LOC"),
    **dict.fromkeys("机构 机关 学校 医院 公司 银行 研究所 媒体 球队 国家队 协会 部队 简称".split(), "ORG"),
}
BEFORE_SHORT_COUNTRY = tuple("访驻赴抵离对援")  # 访华, 驻日大使
HELD_OUT_ONE_IN = 7
# Chosen so that the names every newspaper is full of (新华社, 国务院, 联合国, …) are on the side of train.
HASH_SALT = "327:"
# The 3,755 characters of GB2312 level 1: rows 16 to 55 of the table, whose last row is five short.
HANZI = [
    bytes([row, cell]).decode("gb2312")
    for row in range(0xB0, 0xD8)
    for cell in range(0xA1, 0xFF)
    if (row, cell) < (0xD7, 0xFA)
]
CHINESE_DIGITS = "零一二三四五六七八九"
FULL_WIDTH = str.maketrans("0123456789.", "０１２３４５６７８９．")
# {数} takes its size from what is counted: (start of the words that follow, smallest, largest).
NUMBER_RANGES = [
    (("名矿工", "人死亡", "人受伤", "人跳楼"), 2, 60),
    (("岁高龄",), 80, 99),
    (("岁的小将",), 13, 19),
    (("岁",), 20, 95),
    (("比", "球", "：", ":"), 0, 9),
    (("月", "点", "个月", "时"), 1, 12),
    (("日", "号"), 1, 30),
    (("级",), 3, 8),
    (("度", "摄氏度", "℃"), 1, 39),
    (("秒", "分钟", "分"), 2, 59),
    (("成",), 1, 9),
    (("席", "票"), 3, 300),
    (tuple("年 天 小时 届 次 章 起 家 头 层 楼 岁 周 轮 期 条 桌 部 座 局 号 节 页 倍 辈 代 里".split()), 2, 60),
    (tuple("亩 米 棵 吨 公里 公斤 平方米 人 名 件 户 册 斤".split()), 2, 3000),
]
# {日期} takes a loose form (昨天, 去年) only where it opens a clause that is not about the future.
CLAUSE_START = ("", "，", "。", "；", "“", "：", "、")
DAYTIME = (*"上午 下午 凌晨 晚 早 中午 傍晚 深夜 夜 电 消息".split(), "　")
FUTURE = ("将", "前", "起", "之前", "以前", "开始", "截止", "交", "到", "报")


# Words before a sum that no single person pays.
LARGE_SUMS = "额 利润 收入 投资 亏损 资金 赔款 贷款余额 以 捐资 索赔 费用 财政".split()


def read_entries(path):
    """The lists of lexicon.txt: {heading: [word, or literal, heading, literal, … of a pattern]}, each as often as its *n says."""
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


def split_template(template):
    """Literal, slot, literal, slot, …, literal."""
    return re.split(r"\{(.+?)\}", template)


def chinese_number(n):
    """0 to 999 in Chinese: 15 -> 十五, 203 -> 二百零三."""
    if n < 10:
        return CHINESE_DIGITS[n]
    if n < 100:
        tens = "" if n < 20 else CHINESE_DIGITS[n // 10]
        return tens + "十" + (CHINESE_DIGITS[n % 10] if n % 10 else "")
    rest = n % 100
    tail = ("零" if rest < 10 else "一" if rest < 20 else "") + chinese_number(rest) if rest else ""
    return CHINESE_DIGITS[n // 100] + "百" + tail


LEXICON = read_entries(TEXT_DIR / "lexicon.txt")
TEMPLATES = read_templates(TEXT_DIR / "templates.txt")


def is_held_out(key):
    """Whether a template or a name belongs to dev. crc32, since Python's own hash differs from run to run."""
    return zlib.crc32((HASH_SALT + key).encode()) % HELD_OUT_ONE_IN == 0


def slot_kind(slot):
    """人1 -> PER, 数 -> None."""
    return ENTITY_SLOTS.get(slot.rstrip("123"))


def has_entity(parts):
    return any(slot_kind(slot) for slot in parts[1::2])


class TextMaker:
    """Makes the texts of one split ("train" or "dev"). A text is a list of segments (string, kind): kind is None for plain
    words, PER, LOC or ORG for an entity, else the Chinese name of what the string is (日期, 数字, …), which the pretraining
    tasks ask for."""

    lexicon = LEXICON

    def __init__(self, seed, split):
        self.random = random.Random(seed)
        self.is_dev = split == "dev"
        self.starts = {False: [], True: []}  # {without an entity: [(domain, template)]}
        self.sentences = {}  # (domain, without an entity): [templates that others may stand next to]
        for domain, line in TEMPLATES:
            if is_held_out("sentence:" + line) == self.is_dev:
                parts = split_template(line)
                entity_free = not has_entity(parts)
                self.starts[entity_free].append((domain, parts))
                if is_sentence(parts):
                    self.sentences.setdefault((domain, entity_free), []).append(parts)

    def chance(self, probability):
        return self.random.random() < probability

    def choice(self, items):
        return items[int(self.random.random() * len(items))]  # twice as fast as random.choice

    # ---- names

    def compose(self, heading):
        """An entry of a list, its braces filled in."""
        entry = self.choice(self.lexicon[heading])
        if type(entry) is str:
            return entry
        return "".join([self.compose(part) if i % 2 else part for i, part in enumerate(entry)])

    def name(self, heading):
        """A name of this split, as a string."""
        if ENTITY_SLOTS[heading] == "LOC":  # places are shared: one cannot make do without 北京
            return self.compose(heading)
        while True:
            name = self.compose(heading)
            if is_held_out("name:" + name) == self.is_dev:
                return name

    def entity(self, slot, before):
        """The segments of an entity slot: one name, or several places next to each other."""
        kind = ENTITY_SLOTS[slot]
        if slot == "两国":
            first = second = self.compose(slot)
            while first == second:
                second = self.compose(slot)
            return [(first, kind), (second, kind)]
        if slot == "国" and before.endswith(BEFORE_SHORT_COUNTRY) and self.chance(0.4):
            return [(self.compose("单字国"), kind)]
        name = (self.name(slot), kind)
        if slot in ("县", "村", "街") and not before.endswith("}") and self.chance(PLACE_IN_PLACE_SHARE):
            return [(self.name("省" if slot == "县" or self.chance(0.5) else "市"), kind), name]
        return [name]

    # ---- texts

    def text(self, entity_free):
        """One to three sentences of a domain: none of them with an entity, or the first of them with one."""
        domain, parts = self.choice(self.starts[entity_free])
        sentences = [parts]
        if is_sentence(parts):
            for _ in range(self.choice(SENTENCES_OF_A_TEXT[entity_free]) - 1):
                more = self.choice(self.sentences[domain, entity_free or self.chance(0.4)])
                if more not in sentences:
                    sentences.append(more)
        return [segment for sentence in sentences for segment in self.fill(sentence)]

    def fill(self, parts):
        """The segments of a template. Slots with a digit are filled once; all names of a sentence differ."""
        segments, filled = [], {}
        for i, part in enumerate(parts):
            if i % 2 == 0:
                segments.append((part, None))
                continue
            slot = part.rstrip("123")
            if part == slot or part not in filled:
                while True:
                    before = parts[i - 1] if i == 1 else parts[i - 1] or "{" + parts[i - 2].rstrip("123") + "}"
                    new = self.fill_slot(slot, before, parts[i + 1])
                    if slot not in ENTITY_SLOTS or not any(segment in segments for segment in new):
                        break
                filled[part] = new
            segments += filled[part]
        return [segment for segment in segments if segment[0]]

    def fill_slot(self, slot, before, after):
        """The segments of a slot between the words `before` and `after`; before is "{学校}" where that slot stands there."""
        if slot in ENTITY_SLOTS:
            return self.entity(slot, before)
        if slot == "数":
            return [(self.counted(before, after), "数字")]
        if slot == "日期":
            return [(self.date(before, after), "日期")]
        if slot == "年":
            return [(self.year(), "日期")]
        if slot == "金额":
            return [(self.money(before), "金额")]
        if slot == "比例":
            return [(self.share(), "数字")]
        if slot == "作品":
            return [("《", None), (self.compose("作品"), "作品"), ("》", None)]
        office = before[1:-1] + slot  # the offices of what stands before, {学校}{职务}
        return [(self.compose(office if office in self.lexicon else slot), slot)]  # 职务, 身份

    # ---- numbers and dates

    def number(self, smallest, largest):
        """Written in Chinese, full-width or plain digits; small numbers are the more frequent ones."""
        n = smallest + int((largest - smallest + 1) * self.random.random() ** 3)
        style = self.random.random()
        if style < 0.35 and n < 1000:
            return chinese_number(n)
        return str(n).translate(FULL_WIDTH) if style < 0.5 else str(n)

    def counted(self, before, after):
        if before.endswith(("比", "：", ":")) and not after.startswith(("岁", "人", "年")):  # a score, 三比一
            return self.number(0, 9)
        if before.endswith("第"):
            return self.number(1, 30)
        ranges = ((low, high) for starts, low, high in NUMBER_RANGES if after.startswith(starts))
        number = self.number(*next(ranges, (2, 3000)))
        if number == "二" and not before.endswith("第") and not after.startswith(("月", "比", "号", "日", "楼", "层")):
            return "两"
        return number

    def share(self):
        number = self.number(2, 90)
        if number.isascii():
            return number + self.random.choice(["%", "%", "．5%", ".5%"][: 4 if len(number) < 3 else 2])
        return f"百分之{number}" if self.chance(0.7) else f"{chinese_number(self.random.randint(2, 9))}成"

    def money(self, before):
        number = self.number(2, 900)
        number = "两" if number == "二" else number
        large = any(word in before for word in LARGE_SUMS)
        return number + self.choice(
            ["万元", "亿元", "万美元", "亿美元"] if large else ["元", "元", "万元", "多元", "万元"]
        )

    def year(self):
        year = str(self.random.randint(1949, 2023) if self.chance(0.85) else self.random.randint(1900, 1948))
        style = self.random.random()
        if style < 0.2:
            return "".join("〇一二三四五六七八九"[int(digit)] for digit in year)
        return year.translate(FULL_WIDTH) if style < 0.4 else year

    def day(self):
        """Month and day in one way of writing."""
        month, day = self.random.randint(1, 12), self.random.randint(1, 28)
        if self.chance(0.3):
            return f"{chinese_number(month)}月{chinese_number(day)}日"
        date = f"{month}月{day}日"
        return date.translate(FULL_WIDTH) if self.chance(0.3) else date

    def date(self, before, after):
        if before.endswith("年"):
            return self.day()
        if before[-1:] in CLAUSE_START and not after.startswith(FUTURE) and self.chance(0.5):
            return self.random.choice(
                "昨天 今天上午 今天下午 去年 前天 上周 本月初 日前 近日 昨晚 上个月 去年冬天 今年春天 上周五 今年夏天".split()
            )
        if after.startswith(DAYTIME):
            return self.day()
        style, month = self.random.random(), self.random.randint(1, 12)
        if style < 0.5:
            return self.day()
        if style < 0.7:
            return f"今年{month}月" if self.chance(0.5) else f"{chinese_number(month)}月"
        if style < 0.8:
            return f"星期{self.choice('一二三四五六日')}"
        return f"{self.random.randint(1985, 2023)}年{month}月" + (
            f"{self.random.randint(1, 28)}日" if style < 0.9 else ""
        )


def is_sentence(parts):
    """Whether others may follow it: no heading, no list item."""
    return parts[-1].endswith(("。", "！", "？", "。”", "！”", "？”", "……"))


def plain_text(segments):
    return "".join(string for string, _ in segments)


def to_record(segments):
    """Segments -> one line of the corpus."""
    entities, begin = [], 0
    for string, kind in segments:
        end = begin + len(string)
        if kind in ENTITY_TYPES:
            entities.append({"entity_index": {"begin": begin, "end": end}, "entity_type": kind, "entity": string})
        begin = end
    return {"text": plain_text(segments), "entity_list": entities}


def make_records(maker, count, seen_texts, forbidden_in=""):
    """`count` records with different texts. No person and no organisation occurs in the string `forbidden_in`."""
    records = []
    while len(records) < count:
        record = to_record(maker.text(entity_free=len(records) >= count * (1 - ENTITY_FREE_SHARE)))
        names = [e["entity"] for e in record["entity_list"] if e["entity_type"] in ("PER", "ORG")]
        if record["text"] in seen_texts or any(name in forbidden_in for name in names):
            continue
        seen_texts.add(record["text"])
        records.append(record)
    maker.random.shuffle(records)
    return records


def main(args):
    seen_texts = set()
    train = make_records(TextMaker(TRAIN_SEED, "train"), TRAIN_TEXTS, seen_texts)
    train_text = "\n".join(record["text"] for record in train)
    dev = make_records(TextMaker(DEV_SEED, "dev"), DEV_TEXTS, seen_texts, forbidden_in=train_text)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("dev", dev)):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (output_dir / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        counts = {t: sum(e["entity_type"] == t for r in records for e in r["entity_list"]) for t in ENTITY_TYPES}
        empty = sum(not record["entity_list"] for record in records)
        print(f"{output_dir / name}.txt: {len(records)} texts, {empty} without an entity, {counts}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        default=str(TEXT_DIR.parent / "data" / "demo" / "ori_data"),
        help="where train.txt and dev.txt go",
    )
    main(parser.parse_args())
