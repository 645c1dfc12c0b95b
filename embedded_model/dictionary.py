"""Ordinary words and more names for the pretraining, from the dictionary of the package jieba.

Its 349,000 entries have a frequency and a part of speech. They are needed because a model that has seen only the words
of a few thousand templates takes every other word for a name. Only the file dict.txt is read; no code of jieba runs.
"""

import functools
import importlib.util
import math
import random
import re
from pathlib import Path

from alpaca.common.errors import UserError
from embedded_model.sources import LEXICON, TEMPLATES, is_held_out, split_template

# jieba's parts of speech -> classes whose words may stand for each other: noun, verb, verbal noun, adjective, adverb,
# attribute, state, place word, idiom, time. Names (nr, ns, nt, nz, nrt, j), numbers, pronouns and function words have
# no class.
CLASSES = {"n": "n", "v": "v", "vn": "vn", "a": "a", "an": "a", "d": "d", "ad": "d", "b": "b", "z": "z", "s": "s"}
CLASSES |= {"i": "i", "l": "i", "t": "t"}
DRAWN = 60000  # words in a pool, drawn with a weight of frequency ** 0.6
RARE = 3  # half of the entries have this frequency, the lowest; many of them are no words
COMMON_WORDS = 12000  # how many of the most frequent words frequent_words gives
# Right behind a name, each of these would belong to it (长沙 + 县), so none of them is put into a text as a word.
NAME_PARTS = set(
    "省市县区州镇乡村旗庄寨屯路街巷里桥山峰岭河江湖海岛湾港洋洲国族人氏家某队厂校局院部所处科室站场店社行会团军师营党老小阿大新东西南北中上下前后"
)
# Headings of lexicon.txt. The words of NAMES are no ordinary words, nor are those that begin with a word of PLACES.
NAMES = "知名中国人 知名外国人 外国姓 外国名单 县级市 真县 名景 区域 真设施 真村 真街 国家机构 国际组织 党派 真校 真公司 真简称 真媒体".split()
PLACES = "省名 直辖市 自治区 城市 国家 洲 外国地名 特区".split()
PLACE_ENDINGS = tuple("省市县区州镇乡村旗山河江湖岛湾峡港")
ORGANISATION_ENDINGS = tuple(
    "大学 学院 中学 小学 医院 法院 检察院 委员会 协会 学会 研究所 研究院 公司 集团 银行 出版社 报社 通讯社 电视台 电台 日报 晚报 "
    "政府 公安局 公安厅 教育局 教育厅 军区 舰队 省委 市委 县委 党委 总局 海关 博物馆 图书馆 队 剧院 剧团 乐团 歌舞团 基金会 "
    "联合会 总工会 议会 国会 外交部 国防部 财政部 卫生部 法庭 理事会".split()
)


def plain_words(headings):
    """The words of these lists of lexicon.txt, from two characters on; patterns are left out."""
    return {entry for heading in headings for entry in LEXICON[heading] if type(entry) is str and len(entry) > 1}


def find_dictionary():
    """The path of jieba's dict.txt; UserError where jieba is not installed."""
    spec = importlib.util.find_spec("jieba")
    if spec is None:
        raise UserError("the dictionary of the package jieba is missing; `pip install jieba==0.42.1` installs it")
    return Path(spec.origin).with_name("dict.txt")


@functools.cache
def entries():
    """The dictionary: {word: (frequency, part of speech)}."""
    lines = find_dictionary().read_text(encoding="utf-8").splitlines()
    return {word: (int(count), tag) for word, count, tag in map(str.split, lines)}


def is_simplified(word):
    """Whether a word consists of Chinese characters of GB2312 alone."""
    try:
        return len(word.encode("gb2312")) == 2 * len(word) and word.isalpha()
    except UnicodeEncodeError:
        return False


def is_ordinary(word, names, places):
    """Whether a word is neither a name, nor begins with a place, nor is a place without its ending (石首 of 石首市)."""
    if word in names or not is_simplified(word):
        return False
    if any(word[:n] in places for n in range(2, min(len(word), 6) + 1)):
        return False
    return not any(entries().get(word + ending, (0, ""))[1] == "ns" for ending in "省市县区镇")


@functools.cache
def pools():
    """{(class, characters, 4 standing for more): DRAWN ordinary words, the frequent ones several times}."""
    names, places = plain_words(NAMES), plain_words(PLACES)
    found = {}
    for word, (count, tag) in entries().items():
        if (
            tag in CLASSES
            and count > RARE
            and (len(word) > 1 or word not in NAME_PARTS)
            and is_ordinary(word, names, places)
        ):
            found.setdefault((CLASSES[tag], min(len(word), 4)), {})[word] = count**0.6
    rng = random.Random(1)
    return {
        key: rng.choices(list(words), list(words.values()), k=DRAWN) for key, words in found.items() if len(words) > 20
    }


@functools.cache
def pool_of(word):
    """The words that may stand for this one, or None where it must stay."""
    tag = entries().get(word, (0, ""))[1]
    return pools().get((CLASSES[tag], min(len(word), 4))) if tag in CLASSES and word not in NAME_PARTS else None


def is_noun(word):
    """Whether a name could go on with this word: a noun, or what may be one."""
    return entries().get(word, (0, ""))[1] not in ("v", "vn", "a", "d", "ad", "p", "c", "z")


@functools.cache
def frequent_words():
    """The COMMON_WORDS most frequent ordinary words from two characters on, and the names listed in lexicon.txt."""
    ordinary = {word for (_, length), words in pools().items() if length > 1 for word in words}
    ordinary = sorted(ordinary, key=lambda word: (-entries()[word][0], word))
    return ordinary[:COMMON_WORDS] + sorted(plain_words(NAMES + PLACES))


@functools.cache
def segment(text):
    """The words of a text (list of str): the most probable sequence, by the frequencies of the single words."""
    dictionary, total = entries(), math.log(60_000_000)
    best = [(0.0, 0)] * (len(text) + 1)
    for i in range(len(text) - 1, -1, -1):
        best[i] = max(
            (math.log(dictionary[text[i:j]][0] or 1 if text[i:j] in dictionary else 1) - total + best[j][0], j)
            for j in range(i + 1, min(len(text), i + 8) + 1)
            if j == i + 1 or text[i:j] in dictionary
        )
    words, i = [], 0
    while i < len(text):
        words.append(text[i : best[i][1]])
        i = best[i][1]
    return words


@functools.cache
def clauses():
    """The clauses of those of train's templates that have no slot: {clause: its words}."""
    found = {}
    for _, line in TEMPLATES:
        if len(split_template(line)) == 1 and not is_held_out("sentence:" + line):
            for clause in re.split(r"[，。；：！？“”（）《》、—…]", line):
                if len(clause) > 3:
                    found[clause] = segment(clause)
    return found


@functools.cache
def lexicon():
    """lexicon.txt's lists (sources.LEXICON) with the dictionary's names in them, but for those of doubtful form."""
    surnames, places = set(LEXICON["姓"]), plain_words(PLACES)
    syllables = set("".join(LEXICON["音译"]) + "".join(LEXICON["音译尾"]))
    ordinary = {word for word, (_, tag) in entries().items() if tag in CLASSES}
    given, foreign_persons, chinese_places, foreign_places, organisations = [], [], [], [], []
    for word, (_, tag) in entries().items():
        if not is_simplified(word):
            continue
        starts = [n for n in range(2, min(len(word), 6) + 1) if word[:n] in places]
        if (
            tag == "nr"
            and len(word) == 3
            and word[0] in surnames
            and word[1:] not in ordinary
            and word[:2] not in ordinary
        ):
            given.append(word[1:])
        elif tag in ("nrt", "nr") and 3 <= len(word) <= 6 and set(word) <= syllables and not starts:
            foreign_persons.append(word)
        elif tag == "ns" and 3 <= len(word) <= 4 and word.endswith(PLACE_ENDINGS) and not starts:
            chinese_places.append(word)
            if word[:-1] in entries() and entries()[word[:-1]][1] == "ns" and len(word) == 3 and word[-1] in "县市区":
                chinese_places.append(word[:-1])
        elif tag == "ns" and 3 <= len(word) <= 6 and set(word) <= syllables and not starts:
            foreign_places.append(word)
        elif tag == "nt" and len(word) > 3 and word.endswith(ORGANISATION_ENDINGS):
            if starts or word.startswith(("中国", "国家", "全国", "中央", "中共", "国际", "世界", "联合国")):
                organisations.append(word)
    more = {"词典名": given, "词典译名": foreign_persons, "词典地": chinese_places, "词典外地": foreign_places}
    more["词典机构"] = organisations

    def grown(heading, part, share):
        """A list of which the fraction `share` comes from the dictionary's names under the heading `part`."""
        entries_, times = LEXICON[heading], share / (1 - share) * len(LEXICON[heading])
        return entries_ + [["", part, ""]] * max(1, round(times))

    return {
        **LEXICON,
        **more,
        "中国人": grown("中国人", "知名中国人", 0.06),
        "外国人": grown("外国人", "知名外国人", 0.12),
        "日本人": grown("日本人", "知名日本人", 0.05),
        "韩国人": grown("韩国人", "知名韩国人", 0.05),
        "双名": grown("双名", "词典名", 0.4) + [["", "汉字", "", "汉字", ""]] * 3,
        "音译名": grown("音译名", "词典译名", 0.3),
        "县": grown("县", "词典地", 0.35),
        "外市": grown("外市", "词典外地", 0.2),
        "机构": grown("机构", "词典机构", 0.1),
    }


def prepare():
    """Fill the caches, so that processes forked after this share them."""
    pools(), lexicon(), clauses(), frequent_words()
    for _, line in TEMPLATES:
        for literal in split_template(line)[::2]:
            for word in segment(literal):
                pool_of(word)
