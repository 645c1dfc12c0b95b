"""Write the demo corpus: Chinese sentences from templates, with persons, places and organisations marked.

    python data/make_demo.py

Reads data/demo_text/{templates,lexicon}.txt, writes data/demo/ori_data/train.txt (4,000 sentences) and dev.txt (500), one
JSON object a line: {"text": "…", "entity_list": [{"entity_index": {"begin": 3, "end": 4}, "entity_type": "LOC",
"entity": "日"}]} (characters, end exclusive; types PER, LOC, ORG). The same seed gives the same files.

dev measures reading, not memory: its templates and its person and organisation names occur nowhere in train. A hash
decides the side of each, so that model_hub/train_tiny.py, which draws text from here too, never shows them either.

Rules that keep the labels free of contradictions:
- A place inside a place is always two entities (湖南省 + 明溪县). A generic word belongs to the name before it (长沙 + 市,
  长沙 + 火车站), so it is one entity with it.
- A place at the head of an organisation is part of the organisation (长沙市公安局, 法国外交部).
- What stands inside 《》 is a title and holds no entity.
"""

import argparse
import json
import random
import re
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TEXT_DIR = ROOT / "demo_text"
TRAIN_SENTENCES, DEV_SENTENCES = 4000, 500
TRAIN_SEED, DEV_SEED = 77, 78
TRAIN_WALK_SHARE = 0.15  # see TextMaker.walk; dev has none

ENTITY_TYPES = ("PER", "LOC", "ORG")
# Headings of templates.txt that are no domains: sentences without an entity; clauses that stand anywhere, lead in, follow.
ENTITY_FREE, CLAUSE, LEAD_IN, FOLLOW_UP = "无实体", "小句", "状语", "后续"
HELD_OUT_ONE_IN = 7
# The 3,755 characters of GB2312 level 1: rows 16 to 55 of the table, whose last row is five short.
HANZI = [
    bytes([row, cell]).decode("gb2312")
    for row in range(0xB0, 0xD8)
    for cell in range(0xA1, 0xFF)
    if (row, cell) < (0xD7, 0xFA)
]
CHINESE_DIGITS = "零一二三四五六七八九"
FULL_WIDTH = str.maketrans("0123456789.", "０１２３４５６７８９．")

# How a name is composed, with the weight of each form (the methods of NameMaker).
PERSON_FORMS = {
    "chinese_person": 60,
    "foreign_person": 14,
    "japanese_person": 8,
    "known_person": 6,
    "nickname": 5,
    "korean_person": 4,
    "shortened_person": 1.5,
    "given_name": 1.5,
}
PLACE_FORMS = {
    "small_place": 28,
    "city_or_landmark": 24,
    "province": 18,
    "known_country": 10,
    "foreign_place": 10,
    "city_facility": 6,
    "invented_foreign_place": 4,
}
ORGANISATION_FORMS = {
    "known_organisation": 22,
    "agency": 18,
    "school_or_hospital": 18,
    "branded_company": 18,
    "company_of_a_place": 8,
    "team": 6,
    "national_body": 3.5,
    "latin_letters": 2,
    "numbered_unit": 2,
    "foreign_company": 2,
}

# Slots that take a word of the list of the same name, with what kind of thing it is.
WORD_SLOTS = {
    "职务": "职务",
    "物品": "物品",
    "食品": "物品",
    "文物": "物品",
    "牲畜": "物品",
    "行业": "行业",
    "场所": "场所",
    "史事": "活动",
    "形容词": None,
    "样子": None,
}
# {数} takes its size from what is counted: (start of the words that follow, smallest, largest).
NUMBER_RANGES = [
    (("岁高龄",), 80, 99),
    (("岁的小将",), 13, 19),
    (("岁", "环"), 20, 95),
    (("的成绩",), 9, 99),
    (("比", "球"), 0, 9),
    (("月", "点"), 1, 12),
    (("级",), 3, 8),
    (("度",), 1, 39),
    (("席", "名研究生", "名失学", "名矿工", "名第", "例病例"), 3, 300),
    (("年", "天", "个月", "小时", "分钟", "分", "届", "会议", "次", "章", "个", "起", "家", "头", "名", "，"), 2, 60),
    (("亩", "米", "棵", "吨", "公里", "公斤", "平方米", "人"), 2, 3000),
]


def read_lexicon(path):
    """The word lists of lexicon.txt: {heading: [words]}."""
    blocks = re.split(r"^\[(.+)\]$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {heading: words.split() for heading, words in zip(blocks[::2], blocks[1::2], strict=True)}


def read_templates(path):
    """The lines of templates.txt: {heading: [templates]}, all domains together under the heading ""."""
    templates, heading = {"": []}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line[1:].strip()
            heading = heading if heading in (ENTITY_FREE, CLAUSE, LEAD_IN, FOLLOW_UP) else ""
        elif line:
            templates.setdefault(heading, []).append(line)
    return templates


LEXICON = read_lexicon(TEXT_DIR / "lexicon.txt")
TEMPLATES = read_templates(TEXT_DIR / "templates.txt")


def is_held_out(key):
    """Whether a template or a name belongs to dev. crc32, since Python's own hash differs from run to run."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


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
    return CHINESE_DIGITS[n // 100] + "百" + ("零" if 0 < rest < 10 else "") + (chinese_number(rest) if rest else "")


class NameMaker:
    """Composes the names of one split ("train" or "dev") of persons, places and organisations."""

    def __init__(self, seed, split):
        self.random = random.Random(seed)
        self.is_dev = split == "dev"

    def chance(self, probability):
        return self.random.random() < probability

    def word(self, heading):
        return self.random.choice(LEXICON[heading])

    def frequent_word(self, heading):
        """Favours the front of a list that is sorted by frequency."""
        words = LEXICON[heading]
        return words[int(len(words) * self.random.random() ** 1.7)]

    def hanzi(self):
        return self.random.choice(HANZI)

    def any_form(self, forms):
        return getattr(self, self.random.choices(list(forms), list(forms.values()))[0])()

    def name_of_this_split(self, make):
        while True:
            name = make()
            if is_held_out("name:" + name) == self.is_dev:
                return name

    # ---- persons

    def person(self):
        return self.name_of_this_split(lambda: self.any_form(PERSON_FORMS))

    def given_character(self):
        return self.hanzi() if self.chance(0.2) else self.word("名字用字")

    def chinese_person(self):
        surname = self.word("复姓") if self.chance(0.03) else self.frequent_word("姓")
        return surname + self.given_character() + (self.given_character() if self.chance(0.72) else "")

    def foreign_syllables(self, shortest, longest):
        return "".join(self.word("音译用字") for _ in range(self.random.randint(shortest, longest)))

    def foreign_person(self):
        name = self.foreign_syllables(2, 4)
        return name + "·" + self.foreign_syllables(2, 4) if self.chance(0.3) else name

    def japanese_person(self):
        return self.word("日本姓") + (self.word("日本名") if self.chance(0.7) else "")

    def korean_person(self):
        return self.word("韩国姓") + self.word("韩国名")

    def known_person(self):
        return self.word("知名人物")

    def nickname(self):
        return self.random.choice("老小阿大") + self.frequent_word("姓")

    def shortened_person(self):
        return self.frequent_word("姓") + self.random.choice(["某", "某某", "老", "氏"])

    def given_name(self):
        return "阿" + self.given_character() if self.chance(0.4) else self.given_character() + self.given_character()

    # ---- places

    def place(self):
        return self.any_form(PLACE_FORMS)

    def province(self):
        if self.chance(0.3):
            return self.word("直辖市和自治区")
        return self.word("省") + ("省" if self.chance(0.3) else "")

    def city(self):
        return self.word("城市") + ("市" if self.chance(0.25) else "")

    def city_or_landmark(self):
        return self.city() if self.chance(0.75) else self.word("地标")

    def city_facility(self):
        return self.word("城市") + self.word("城市设施")

    def known_country(self):
        return self.word("国家")

    def foreign_place(self):
        return self.word("外国地名")

    def invented_foreign_place(self):
        suffixes = ["", "", "州", "市", "岛", "河", "山", "省", "湾", "半岛"]
        return self.foreign_syllables(2, 4) + self.random.choice(suffixes)

    def country(self):
        if self.chance(0.93):
            return self.known_country()
        return self.foreign_syllables(2, 4) + self.random.choice(["", "", "共和国", "王国"])

    def place_stem(self):
        if self.chance(0.2):
            return self.frequent_word("姓") + "家"
        first = self.hanzi() if self.chance(0.5) else self.word("名字用字")
        return first + (self.hanzi() if self.chance(0.6) else "")

    def small_place(self):
        return self.place_stem() + self.word("小地名后缀")

    # ---- organisations

    def organisation(self):
        return self.name_of_this_split(lambda: self.any_form(ORGANISATION_FORMS))

    def known_organisation(self):
        return self.word("知名机构")

    def agency(self):
        level = self.random.random()
        if level < 0.4:
            return self.word("城市") + ("市" if self.chance(0.6) else "") + self.word("市级机关")
        if level < 0.6:
            return self.province() + self.word("省级机关")
        if level < 0.72:
            return self.place_stem() + self.random.choice("县县区镇") + self.word("县乡机关")
        if level < 0.86:
            return self.random.choice("市市县区") + self.random.choice(
                ["公安局", "法院", "教育局", "卫生局", "检察院", "气象台"]
            )
        return self.country() + self.word("国家机关")

    def school_or_hospital(self):
        level = self.random.random()
        if level < 0.55:
            head = self.city()
        elif level < 0.75:
            head = self.province()
        elif level < 0.88:
            head = self.random.choice([self.country, self.foreign_place])()
        else:
            head = self.place_stem() + self.random.choice("县镇市")
        return head + self.word("学校医院等")

    def team(self):
        return (self.word("城市") if self.chance(0.6) else self.brand()) + self.word("球队")

    def brand(self):
        if self.chance(0.5):
            return self.word("字号")
        return self.hanzi() + self.hanzi()

    def business(self):
        """An industry and a fitting kind of organisation: 化工有限公司, 地质研究所, 饭店."""
        kind = self.random.random()
        if kind < 0.55:
            return (self.word("行业") if self.chance(0.75) else "") + self.word("公司后缀")
        if kind < 0.75:
            return self.word("学科") + self.word("研究机构后缀")
        return self.word("场馆后缀")

    def branded_company(self):
        head = self.random.choice([self.city, self.province, self.country])() if self.chance(0.6) else ""
        return head + self.brand() + self.business()

    def company_of_a_place(self):
        head = self.random.choice([self.city, self.city, self.province, self.country, self.small_place])()
        return head + self.business()

    def national_body(self):
        head = self.random.choice(["中国", "国家", "全国", "国际", "世界", "亚洲", self.known_country()])
        bodies = ["协会", "学会", "总局", "联合会", "委员会", "总公司", "集团", "组织", "研究院", "基金会"]
        return head + self.word("行业") + self.random.choice(bodies)

    def latin_letters(self):
        return "".join(self.random.choice("ABCDEFGHIKLMNOPRSTUW") for _ in range(self.random.randint(2, 4)))

    def numbered_unit(self):
        units = ["中学", "医院", "集团军", "研究所", "师", "军", "炼油厂", "工程局"]
        return f"第{chinese_number(self.random.randint(1, 99))}" + self.random.choice(units)

    def foreign_company(self):
        return self.foreign_syllables(2, 3) + self.random.choice(["公司", "集团", "银行", "大学", "队", "报"])


class TextMaker(NameMaker):
    """Fills templates. A text is a list of segments (string, kind): kind is None for plain words, PER, LOC or ORG for an
    entity, else the Chinese name of what the string is (日期, 物品, …), which the pretraining tasks ask for.

    walk_share: how many sentences are walks through several templates instead of one template.
    """

    def __init__(self, seed, split, walk_share=0.0):
        super().__init__(seed, split)
        self.walk_share = walk_share
        self.templates = {
            heading: [split_template(line) for line in lines if is_held_out("sentence:" + line) == self.is_dev]
            for heading, lines in TEMPLATES.items()
        }
        self.after_slot, self.endings = {}, {}
        for parts in self.templates[""]:
            parts = [part.rstrip("12") if i % 2 else part for i, part in enumerate(parts)]
            for i in range(1, len(parts), 2):
                self.after_slot.setdefault(parts[i], []).append(parts[i + 1 : i + 3])
            if len(parts) > 1:
                self.endings.setdefault(parts[-2], []).append(parts[-1:])
        self.slots = {
            "人": self.fill_person,
            "地": self.fill_place,
            "国": lambda before, after: [(self.country(), "LOC")],
            "两国": self.fill_two_places,
            "机构": lambda before, after: [(self.organisation(), "ORG")],
            "国家队": self.fill_national_team,
            "身份": self.fill_role,
            "数": self.fill_number,
            "日期": lambda before, after: [(self.day() if before.endswith("年") else self.date(), "日期")],
            "年": lambda before, after: [(self.year(), "日期")],
            "金额": lambda before, after: [
                (self.number(2, 9000) + self.random.choice(["元", "万元", "亿元", "万美元"]), "金额")
            ],
            "比例": lambda before, after: [(self.share(), "数字")],
            "作品": lambda before, after: [("《", None), (self.word("作品"), "作品"), ("》", None)],
            "赛事": lambda before, after: self.fill_event(before, ["赛事"]),
            "活动": lambda before, after: self.fill_event(before, ["赛事", "会议"]),
            "小句": lambda before, after: [(self.clause(CLAUSE), None)],
            "引语": lambda before, after: [(self.word("引语") if self.chance(0.6) else self.clause(CLAUSE), None)],
            "名词": lambda before, after: [(self.noun_phrase(), None)],
            "动词": lambda before, after: [(self.verb(), None)],
        }
        for heading, kind in WORD_SLOTS.items():
            self.slots[heading] = lambda before, after, heading=heading, kind=kind: [(self.word(heading), kind)]

    # ---- sentences

    def walk(self):
        """Literal, slot, literal, slot, …: each neighbouring pair is taken from some template. Such a sentence makes little
        sense, but keeps a small model from learning the few hundred templates by heart."""
        while True:
            parts = [part.rstrip("12") for part in self.random.choice(self.templates[""])[:2]]
            while len(parts) % 2 == 0:
                ready_to_end = len(parts) > 12 and parts[-1] in self.endings
                parts += self.random.choice((self.endings if ready_to_end else self.after_slot)[parts[-1]])
            literals = "".join(parts[::2])
            if all(literals.count(opening) == literals.count(closing) for opening, closing in ("（）", "“”")):
                return parts

    def sentence_parts(self):
        return self.walk() if self.chance(self.walk_share) else self.random.choice(self.templates[""])

    def entity_free_parts(self):
        return self.random.choice(self.templates[ENTITY_FREE])

    def fill(self, parts):
        segments, repeated = [], {}
        for i, part in enumerate(parts):
            if i % 2 == 0:
                segments.append((part, None))
            elif part[-1].isdigit():
                if part not in repeated:
                    repeated[part] = self.slots[part[:-1]](parts[i - 1], parts[i + 1])
                segments += repeated[part]
            else:
                segments += self.slots[part](parts[i - 1], parts[i + 1])
        return [segment for segment in segments if segment[0]]

    def text(self, entity_free_share=0.18):
        """One to three sentences, with or without clauses around them; either all of them hold entities or none."""
        segments, entity_free = [], self.chance(entity_free_share)
        for _ in range(self.random.choices([1, 2, 3], [0.74, 0.21, 0.05])[0]):
            if self.chance(0.14):
                segments.append((self.clause(CLAUSE) + self.random.choice("，。；"), None))
            if self.chance(0.14):
                segments.append((self.clause(LEAD_IN) + "，", None))
            sentence = self.fill(self.entity_free_parts() if entity_free else self.sentence_parts())
            if self.chance(0.22):
                if sentence[-1][0].endswith("。"):
                    sentence[-1] = (sentence[-1][0][:-1], sentence[-1][1])
                sentence.append(("，" + self.clause(self.random.choice([CLAUSE, FOLLOW_UP])) + "。", None))
            segments += sentence
        return [segment for segment in segments if segment[0]]

    # ---- slots: methods (literal before, literal after) -> segments

    def fill_person(self, before, after):
        segments = [(self.person(), "PER")]
        if self.chance(0.12) and not before.endswith(("、", "：", "叫", "@")):
            heading = self.random.choice(["身份", "职务"])
            segments.insert(0, (self.word(heading), heading))
        elif self.chance(0.06) and after.startswith(("说", "在", "表示", "，", "的")):
            segments.append((self.random.choice(["先生", "女士", "同志", "教授", "博士", "夫妇", "等人"]), None))
        return segments

    def fill_place(self, before, after):
        if self.chance(0.12):
            outer = self.random.choice([self.province, self.city])()
            inner = self.random.choice([self.small_place, self.city if outer in LEXICON["省"] else self.small_place])()
            segments = [(outer, "LOC"), (inner, "LOC")]
        else:
            segments = [(self.place(), "LOC")]
        if self.chance(0.25) and before.endswith(("在", "到", "从", "抵达", "往")):
            segments.append((self.random.choice(["附近", "境内", "一带", "北部", "城区", "郊区"]), None))
        return segments

    def fill_two_places(self, before, after):
        if self.chance(0.25):
            return [(self.country(), "LOC"), (self.country(), "LOC")]
        heading = "省份简称" if self.chance(0.2) else "国家简称"
        return [(name, "LOC") for name in self.random.sample(LEXICON[heading], self.random.choice([2, 2, 2, 2, 2, 3]))]

    def fill_national_team(self, before, after):
        sides = ["队", "队", "队", "女排", "男篮", "女足", "国奥队", "青年队"]
        return [(self.name_of_this_split(lambda: self.country() + self.random.choice(sides)), "ORG")]

    def fill_role(self, before, after):
        return [(self.word("身份"), "身份")]

    def fill_event(self, before, headings):
        segments = [(self.word(self.random.choice(headings)), "活动")]
        if self.chance(0.3) and not before.endswith("届"):
            segments.insert(0, (f"第{self.number(2, 40)}届", None))
        return segments

    def fill_number(self, before, after):
        if before.endswith("比"):  # a score, 三比一
            return [(self.number(0, 9), "数字")]
        for starts, smallest, largest in NUMBER_RANGES:
            if after.startswith(starts):
                return [(self.number(smallest, largest), "数字")]
        return [(self.number(2, 20000), "数字")]

    # ---- numbers and dates

    def number(self, smallest, largest):
        """Written in Chinese, full-width or plain digits; small numbers are the more frequent ones."""
        n = smallest + int((largest - smallest + 1) * self.random.random() ** 3)
        style = self.random.random()
        if style < 0.35 and n < 1000:
            return chinese_number(n)
        return str(n).translate(FULL_WIDTH) if style < 0.6 else str(n)

    def share(self):
        percent = self.number(2, 90)
        return self.random.choice([f"百分之{percent}", f"{percent}%", f"{self.number(2, 9)}成"])

    def year(self):
        year, style = str(self.random.randint(1840, 2024)), self.random.random()
        if style < 0.25:
            return "".join("〇一二三四五六七八九"[int(digit)] for digit in year)
        return year.translate(FULL_WIDTH) if style < 0.6 else year

    def day(self):
        return f"{self.number(1, 12)}月{self.number(1, 30)}日"

    def date(self):
        loose = [
            "昨天",
            "今天上午",
            "去年",
            "前天",
            "上周",
            "本月初",
            "近日",
            "昨晚",
            "星期" + self.random.choice("一二三四五六日"),
        ]
        month = f"{self.number(1, 12)}月"
        exact = [self.day(), f"{self.number(1, 30)}日", month, f"今年{month}", f"{self.year()}年{month}"]
        return self.random.choice([*loose, *exact, *exact, f"{self.year()}年{self.day()}"])

    # ---- words without a label

    def noun(self):
        return self.word("名词")

    def verb(self):
        return self.word("动词")

    def noun_phrase(self):
        form = self.random.random()
        if form < 0.7:
            return self.noun()
        if form < 0.85:
            return self.word("形容词") + "的" + self.noun()
        return self.noun() + "和" + self.noun()

    def clause(self, heading):
        """Words without an entity, around or between sentences."""
        clause = plain_text(self.fill(self.random.choice(self.templates[heading])))
        if heading == CLAUSE and self.chance(0.15):
            return self.word("连接语") + "，" + clause
        return clause


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
        record = to_record(maker.text())
        names = [e["entity"] for e in record["entity_list"] if e["entity_type"] in ("PER", "ORG")]
        if record["text"] in seen_texts or any(name in forbidden_in for name in names):
            continue
        seen_texts.add(record["text"])
        records.append(record)
    return records


def main(args):
    seen_texts = set()
    train = make_records(TextMaker(TRAIN_SEED, "train", TRAIN_WALK_SHARE), TRAIN_SENTENCES, seen_texts)
    train_text = "\n".join(record["text"] for record in train)
    dev = make_records(TextMaker(DEV_SEED, "dev"), DEV_SENTENCES, seen_texts, forbidden_in=train_text)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("dev", dev)):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (output_dir / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        counts = {t: sum(e["entity_type"] == t for r in records for e in r["entity_list"]) for t in ENTITY_TYPES}
        empty = sum(not record["entity_list"] for record in records)
        print(f"{output_dir / name}.txt: {len(records)} sentences, {empty} without an entity, {counts}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=str(ROOT / "demo" / "ori_data"), help="where train.txt and dev.txt go")
    main(parser.parse_args())
