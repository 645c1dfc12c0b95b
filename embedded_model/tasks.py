"""The text and the instruction tasks that train_tiny.py trains the embedded model on.

    python embedded_model/tasks.py                                                  # prints samples
    python embedded_model/tasks.py --rehearse=data/demo/ori_data/rehearse.txt       # writes the demo's rehearsal

All text comes from the generator of the demo corpus (embedded_model/make_demo.py, the train side of its split only), and most of it is
made rough on purpose: fixed words are replaced by others of the same kind from a large dictionary, words and clauses are
put in or left out, names give way to ordinary words, and a share of the sentences are walks through several templates. Few of
those are Chinese that anyone would publish, but a small model that reads only clean templates learns them by heart and takes
every word that it never met for a name.

The tasks: extract things that are no names (dates, numbers, sums, titles, quotations), fill a gap, tell what kind of thing a
given string is, list the proper names of a text without their types, repeat, replace a name, spell, tell which strings
occur. None is the demo's task in the demo's format: no answer lists entities with their types 人名, 地名, 机构名.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from dataset import build_prompt
from embedded_model import dictionary
from embedded_model.sources import ENTITY_TYPES, HANZI, LEXICON, slot_kind
from embedded_model.text_maker import ENTITY_FREE_SHARE, TextMaker, plain_text

# Words of the project's NER instruction and labels. They are whole pieces of the vocabulary, and LoRA does not touch lm_head,
# so each must have been an output before: repeat() draws from them.
NER_WORDS = (
    "实体 识别 模型 提取 文本 里面 人名 地名 机构名 机构 存在 结果 返回 类型 不同 分隔 如果 没有 回答 问题 需要 你现在 一个 之间"
).split()
WORDS = dictionary.frequent_words(12000)
JOBS = {word for heading, words in LEXICON.items() if heading.endswith(("职务", "身份")) for word in words}
KIND_NAMES = {
    "PER": "人",
    "LOC": "地方",
    "ORG": "单位",
    "日期": "日期",
    "金额": "金额",
    "作品": "作品",
    "职务": "职业",
    "身份": "职业",
}
QUESTION_WORDS = {
    "PER": ["谁", "哪个人", "什么人"],
    "LOC": ["哪里", "什么地方", "哪儿"],
    "ORG": ["哪个单位", "什么单位", "哪家"],
    "日期": ["什么时候", "何时"],
    "金额": ["多少钱"],
    "作品": ["什么作品"],
    "职务": ["什么人"],
    "身份": ["什么人"],
}
# What extract_things asks for, as it stands in a text whose names are blanked out: the string decides, never the template.
DIGITS = "[0-9０-９]"
NUMERAL = "[0-9０-９〇零一二三四五六七八九十]"
THINGS = re.compile(
    f"(?P<日期>(?:{NUMERAL}{{4}}年|[今去明前]年)?{NUMERAL}{{1,3}}月(?:{NUMERAL}{{1,3}}[日号])?|{NUMERAL}{{4}}年|星期[一二三四五六日]"
    "|[昨今明前][天晚]|[今去明]年|[上下本]周|上个月|本月|近日|日前)"
    "|(?P<金额>[0-9０-９.．一二两三四五六七八九十百千零]+[多余]?[万亿千百]*(?:元|美元|英镑|欧元|日元))"
    "|(?P<比例>[0-9０-９.．]+[%％]|百分之[0-9０-９.．一二三四五六七八九十百零]+)"
    f"|(?P<数字>{DIGITS}+(?:[.．]{DIGITS}+)?)"
    "|《(?P<作品>[^《》]+)》|“(?P<引语>[^“”\0]+)”"
)
ASKED_THINGS = ["日期", "金额", "比例", "数字", "作品", "引语"]
CONNECTIVES = (
    "因此 所以 但是 不过 同时 此外 另外 目前 近年来 据悉 据了解 然而 其实 当然 总之 长期以来 从此 为此 首先 其次 最后 最近 如今 "
    "当时 后来 过去 现在 一方面 另一方面 事实上 例如 特别是 尤其是 可见 显然 据介绍 据统计 会上 为了"
).split()
GENERIC_ORGANISATIONS = (
    "单位 公司 学校 医院 部门 厂 机关 法院 报社 银行 研究所 队 委员会 集团 政府 企业 协会 组织 机构 当局 军队 部队 大学 电视台 出版社"
).split()
DETERMINERS = ["", "这家", "该", "一家", "有关", "各", "某", "几家", "当地", "上级", "我们"]
GENERIC_PLACES = (
    "村里 城里 山里 山区 首都 省城 县城 海边 河边 当地 这里 那里 外地 农村 城市 国外 边境 镇上 街上 市区 郊区 灾区 现场 家里 南方 北方"
).split()
GENERIC_PERSONS = (
    "他 她 我 你 他们 我们 大家 有人 对方 父亲 母亲 妻子 儿子 女儿 爷爷 奶奶 孩子 丈夫 老人 朋友 谁 自己"
).split()
ANY_SLOT = {"PER": "人", "LOC": "地", "ORG": "机构"}
NOTHING = "没有"
ROW_LENGTH = 513  # 512 inputs and their successors
NO_LOSS = 0x4000  # set in a token id of a row: the token is read, but not predicted
# How many of the tasks' texts and questions are predicted too. The network is small, and the answers are what it is for.
PREDICTED_QUESTIONS = 0.3


class RoughTextMaker(TextMaker):
    """walk_share: how many sentences with an entity are walks through several templates instead of one template;
    rough_share: how many sentences have their fixed words disturbed. Its names include the dictionary's."""

    def __init__(self, seed, split, walk_share, rough_share):
        super().__init__(seed, split)
        self.lexicon = dictionary.lexicon()
        self.walk_share, self.rough_share = walk_share, rough_share
        pools = dictionary.pools()
        noun_pools = [pools["n", 2]] * 6 + [pools["n", 3]] * 2 + [pools["vn", 2]] * 2 + [pools["n", 4]]
        self.pools = {"n": noun_pools, "d": [pools["d", 2]]}
        self.clauses = list(dictionary.clauses().values())
        # What may follow a slot of a kind: (literal, next slot), or (literal,) where the template ends there.
        self.after, self.endings = {}, {}
        for _, parts in self.starts[0]:
            for i in range(1, len(parts), 2):
                following = self.after if i + 2 < len(parts) else self.endings
                continuation = [parts[i + 1], *(slot.rstrip("123") for slot in parts[i + 2 : i + 3])]
                following.setdefault(walk_kind(parts[i]), []).append(continuation)

    def fill(self, parts):
        if len(parts) > 1 and self.chance(self.walk_share):
            parts = self.walk()
        if self.chance(self.rough_share):
            parts = self.disturbed(parts)
        return super().fill(parts)

    def entity(self, slot, before):
        """More of the one-character places: 中日韩, 沪宁, 俄总统."""
        if slot == "两国" and self.chance(0.35):
            heading = self.choice(("两国", "省份简称"))
            return [(name, "LOC") for name in distinct(self.choice(self.lexicon[heading]) for _ in range(3))]
        if slot == "国" and self.chance(0.06):
            return [(self.compose("单字国"), "LOC")]
        return super().entity(slot, before)

    def walk(self):
        """Literal, slot, literal, slot, …: each neighbouring pair is taken from some template."""
        while True:
            _, start = self.choice(self.starts[0])
            parts = [start[0], start[1].rstrip("123")]
            while len(parts) % 2 == 0:
                ready_to_end = len(parts) > 8 and walk_kind(parts[-1]) in self.endings
                parts += self.choice((self.endings if ready_to_end else self.after)[walk_kind(parts[-1])])
            literals = "".join(parts[::2])
            if all(literals.count(opening) == literals.count(closing) for opening, closing in ("（）", "“”")):
                return parts

    def word(self, part_of_speech):
        """An ordinary noun or adverb, mostly of two characters."""
        return self.choice(self.choice(self.pools[part_of_speech]))

    def disturbed(self, parts):
        """The template with its fixed words replaced, left out and added to, and some of its names replaced by words."""
        rate, chance = self.choice((0.1, 0.25, 0.5, 0.8, 1.0)), self.random.random
        new = [self.rough_literal(parts[0], rate, False)]
        for i in range(1, len(parts), 2):
            apart = parts[i - 1] and parts[i + 1]  # a generic word next to a name could be read as a part of it
            kind = slot_kind(parts[i]) if apart and chance() < 0.12 else None
            literal = self.rough_literal(parts[i + 1], rate, True)
            if kind:
                new[-1] += self.ordinary(kind) + literal
            else:
                new += [parts[i], literal]
        return new

    def ordinary(self, kind):
        """Words that may stand where a name stood."""
        if self.chance(0.35):
            return self.word("n")
        if kind == "PER":
            return self.choice(GENERIC_PERSONS) if self.chance(0.5) else self.compose("身份")
        if kind == "LOC":
            in_noun = self.word("n") + self.choice(("里", "上", "旁边", "附近"))
            return self.choice(GENERIC_PLACES) if self.chance(0.6) else in_noun
        if self.chance(0.3):  # not 公司: 友谊公司 is a name
            return self.word("n") + self.choice(("部门", "单位", "企业", "机构", "行业", "组织"))
        return self.choice(DETERMINERS) + self.choice(GENERIC_ORGANISATIONS)

    def rough_literal(self, literal, rate, after_slot):
        """The first word after a slot and the last before one stay, unless a verb or an adverb: they might extend the name."""
        words, chance, new = dictionary.segment(literal), self.random.random, []
        for i, word in enumerate(words):
            edge = (i == 0 and after_slot) or i == len(words) - 1
            if not edge and chance() < 0.03:
                continue
            pool = dictionary.pool_of(word)
            if pool and chance() < rate and not (edge and (len(word) == 1 or dictionary.is_noun(word))):
                word = pool[int(chance() * len(pool))]
            new.append(word)
            form = chance()
            if word == "，" and form < 0.12:
                new.append(self.clause(rate) + "，")
            elif not edge and form < 0.10 and pool:
                if dictionary.is_noun(word):
                    new.append(self.choice(("和", "、", "的", "", "")) + self.word("n"))
                elif form < 0.05:
                    new.append(self.word("n"))
                else:
                    new.insert(-1, self.word("d"))
        if not after_slot and chance() < 0.06:
            new.insert(0, self.choice(CONNECTIVES) + "，")
        return "".join(new)

    def clause(self, rate):
        words, chance = self.choice(self.clauses), self.random.random
        pools = (dictionary.pool_of(word) if chance() < rate else None for word in words)
        return "".join(
            pool[int(chance() * len(pool))] if pool else word for word, pool in zip(words, pools, strict=True)
        )


def walk_kind(slot):
    return slot_kind(slot) or slot


# ---- tasks: functions (maker, segments) -> (instruction, query, answer), or None where the text does not lend itself


def distinct(items):
    return list(dict.fromkeys(items))


def labelled_positions(segments, kinds):
    return [i for i, (_, kind) in enumerate(segments) if kind in kinds]


def find_things(segments):
    """[(string, kind)] of what is no name, in the order of the text."""
    masked = "".join("\0" * len(string) if kind in ENTITY_TYPES else string for string, kind in segments)
    return [(match[match.lastgroup], match.lastgroup) for match in THINGS.finditer(masked)]


def extract_things(maker, segments):
    """Typed extraction of what is no name."""
    things = find_things(segments)
    if not things and maker.chance(0.7):
        return None
    kinds = maker.random.sample(ASKED_THINGS, maker.random.randint(1, 3))
    if things and maker.chance(0.7):
        kinds[0] = maker.choice(things)[1]
        kinds = distinct(kinds)
    names = "、".join(kinds)
    instruct = maker.random.choice(
        [
            f"提取文本里面的{names}，返回'内容_类型'，不同内容间用\n分隔，没有结果就回答'没有'。",
            f"你现在是一个信息抽取模型，找出文本中的{names}，每行一个'内容_类型'。如果没有，回答'没有'。",
            f"文本里有哪些{names}？按'内容_类型'回答。",
        ]
    )
    found = distinct(f"{string}_{kind}" for string, kind in things if kind in kinds)
    return instruct, f"文本：{plain_text(segments)}", "\n".join(found) or NOTHING


def list_proper_names(maker, segments):
    """Untyped: finding names is learnt here, telling them apart in tell_kinds."""
    found = distinct(string for string, kind in segments if kind in ENTITY_TYPES)
    instruct = maker.random.choice(
        [
            "列出文本里的专有名词，每行一个，没有就回答'没有'。",
            "文本里有哪些专名？每行写一个。",
            "你需要提取文本里面的专有名词，不同名词间用\n分隔。如果没有，回答'没有'。",
        ]
    )
    return instruct, f"文本：{plain_text(segments)}", "\n".join(found) or NOTHING


def fill_gap(maker, segments):
    names, labelled = labelled_positions(segments, ENTITY_TYPES), labelled_positions(segments, KIND_NAMES)
    if not labelled:
        return None
    i = maker.random.choice(names if names and maker.chance(0.8) else labelled)
    answer, kind = segments[i]
    gap = maker.random.choice(["____", "（ ）"] if maker.chance(0.5) else QUESTION_WORDS[kind])
    before = plain_text(segments[max(0, i - maker.random.randint(1, 5)) : i])[-14:]
    after = plain_text(segments[i + 1 : i + 1 + maker.random.randint(1, 5)])[:14]
    instruct = maker.random.choice(
        ["根据文本回答问题。", "阅读文本，把问题里缺少的内容补上。", "问题的答案在文本里，请找出来。"]
    )
    return instruct, f"文本：{plain_text(segments)}\n问题：{before}{gap}{after}", answer


def tell_kinds(maker, segments):
    """What kind of thing each given string is: also strings cut at the wrong place (不对) and plain words (其他). A string
    that stands in the text in two meanings is not asked for."""
    text, rows = plain_text(segments), []
    starts = np.cumsum([0] + [len(string) for string, _ in segments]).tolist()
    labelled = labelled_positions(segments, KIND_NAMES)
    for _ in range(maker.random.randint(1, 5)):
        form = maker.random.random()
        if labelled and form < 0.8:
            i = maker.random.choice(labelled)
            string, kind = segments[i][0], KIND_NAMES[segments[i][1]]
            if form > 0.6 and segments[i][1] in ENTITY_TYPES and len(string) > 1:
                begin, end = starts[i], starts[i + 1]
                moved = [(begin, end - 1), (begin + 1, end), (begin, end + 1), (max(0, begin - 1), end)]
                begin, end = maker.random.choice(moved)
                string, kind = text[begin:end], "不对"
            if text.count(string) == sum(other == string for other, _ in segments) or text.count(string) == 1:
                rows.append((string, kind))
        else:
            i = maker.random.randrange(len(segments))
            words = [w for w in dictionary.segment(segments[i][0]) if dictionary.pool_of(w)]
            if segments[i][1] is None and words:
                string = maker.random.choice(words)
                if text.count(string) == 1 and string not in JOBS and not find_things([(string, None)]):
                    rows.append((string, "其他"))
    by_string = dict(rows)
    names = {string for string, _ in segments if _ in KIND_NAMES}
    rows = [(s, k) for s, k in by_string.items() if k not in ("不对", "其他") or s not in names]
    if not rows:
        return None
    instruct = maker.random.choice(
        ["文本里的这些词各指什么？切错的词回答'不对'。", "说明问题中每个词的种类，边界不对的回答'不对'。"]
    )
    question = "；".join(string for string, _ in rows)
    return instruct, f"文本：{text}\n问题：{question}", "\n".join(f"{string}：{kind}" for string, kind in rows)


def repeat(maker, segments):
    """Half of the time words without sense, so that every piece of the vocabulary is an output now and then."""
    text, form = plain_text(segments)[:60], maker.random.random()
    if form < 0.4:
        pools = [WORDS] * 6 + [NER_WORDS] + [HANZI] * 3
        words = (maker.choice(maker.choice(pools)) for _ in range(maker.random.randint(2, 14)))
        text = "".join(word + maker.random.choice(["", "", "_", "，", "\n"]) for word in words).strip()
        text = re.sub("_(?=人名|地名|机构名)", "", text)  # nothing that looks like an answer of the demo's task
    elif form < 0.6:
        pools = [WORDS, WORDS, NER_WORDS]
        text = "\n".join(maker.choice(maker.choice(pools)) for _ in range(maker.random.randint(1, 4)))
    return maker.random.choice(["重复下面的文本。", "把文本原样写一遍。"]), f"文本：{text}", text


def replace_name(maker, segments):
    names, text = labelled_positions(segments, ENTITY_TYPES), plain_text(segments)
    if not names or len(text) > 60:
        return None
    old, kind = segments[maker.random.choice(names)]
    new = maker.name(ANY_SLOT[kind])
    return "按要求改写文本。", f"文本：{text}\n要求：把{old}换成{new}", text.replace(old, new)


def spell(maker, segments):
    labelled = labelled_positions(segments, KIND_NAMES)
    string = segments[maker.random.choice(labelled)][0] if labelled else maker.choice(WORDS)
    return "把文本里的字一个一个写出来。", f"文本：{string}", " ".join(string)


def tell_which_occur(maker, segments):
    names = [segments[i][0] for i in labelled_positions(segments, ENTITY_TYPES)]
    if not names:
        return None
    strings = maker.random.sample(names, min(len(names), maker.random.randint(1, 3)))
    for _ in range(maker.random.randint(1, 3)):
        strings.append(maker.name(maker.choice(list(ANY_SLOT.values()))))
    maker.random.shuffle(strings)
    strings, text = distinct(strings), plain_text(segments)
    answer = "\n".join(string for string in strings if string in text) or NOTHING
    return "问题里的哪些词在文本中出现过？", f"文本：{text}\n问题：{'、'.join(strings)}", answer


TASKS = {
    extract_things: 22,
    list_proper_names: 36,
    tell_kinds: 24,
    fill_gap: 14,
    repeat: 8,
    replace_name: 11,
    tell_which_occur: 4,
    spell: 3,
}
# Per stage: the share of plain text, of tasks in the prompt frame (the others stand in a shorter one, which saves tokens), of
# documents in the base vocabulary, and of walks and rough sentences.
STAGES = {
    "base": {"text": 0.20, "framed": 0.20, "base_vocabulary": 0.08, "walk": 0.25, "rough": 0.8},
    "llama": {"text": 0.80, "framed": 0.20, "base_vocabulary": 0.0, "walk": 0.15, "rough": 0.5},
    "alpaca": {"text": 0.05, "framed": 0.95, "base_vocabulary": 0.0, "walk": 0.2, "rough": 0.7},
}


def any_text(maker):
    return maker.text(maker.chance(ENTITY_FREE_SHARE))


def any_task(maker):
    """(instruction, query, answer) of a random task on a random text."""
    while True:
        task = maker.random.choices(list(TASKS), list(TASKS.values()))[0]
        example = task(maker, any_text(maker))
        if example:
            return example


def make_document(maker, stage):
    """A list of (string, whether it is predicted), to be encoded one by one."""
    if maker.chance(stage["text"]):
        return [("".join(plain_text(any_text(maker)) for _ in range(maker.random.randint(1, 4))), True)]
    instruct, query, answer = any_task(maker)
    prompt = build_prompt(instruct, query)
    if not maker.chance(stage["framed"]):
        prompt = "\n".join([query, instruct] if maker.chance(0.5) else [instruct, query]) + "\n回答："
    return [(prompt, maker.chance(PREDICTED_QUESTIONS)), (answer, True)]


def make_batch(stage_name, seed, rows, base_vocabulary, vocabulary):
    """int16 [rows, ROW_LENGTH] of token ids; the two vocabularies are sentencepiece processors. The base vocabulary's ids are
    the first ids of the larger one, so both kinds of documents train one network."""
    stage = STAGES[stage_name]
    maker = RoughTextMaker(seed, "train", stage["walk"], stage["rough"])
    batch = np.zeros((rows, ROW_LENGTH), np.int16)
    for i in range(rows):
        row = []
        while len(row) < ROW_LENGTH:
            encoder = base_vocabulary if maker.chance(stage["base_vocabulary"]) else vocabulary
            row.append(encoder.bos_id())
            for string, predicted in make_document(maker, stage):
                ids = encoder.encode(string)
                row += ids if predicted else [token | NO_LOSS for token in ids]
            row.append(encoder.eos_id())
        batch[i] = row[:ROW_LENGTH]
    return batch


def rehearsal_rows(count=800, seed=79):
    """Different rows {"instruct", "query", "answer"}, of each task as many, on sentences as natural as the demo's (words
    without sense are left out) and without the persons and organisations of its dev."""
    lines = (ROOT / "data" / "demo" / "ori_data" / "dev.txt").read_text(encoding="utf-8").splitlines()
    entities = [entity for line in lines for entity in json.loads(line)["entity_list"]]
    held_out = {entity["entity"] for entity in entities if entity["entity_type"] != "LOC"}
    maker, tasks, rows = TextMaker(seed, "train"), list(TASKS), []
    while len(rows) < count:
        segments = any_text(maker)
        instruct, query, answer = tasks[len(rows) % len(tasks)](maker, segments) or ("", "", "")
        text, row = plain_text(segments), {"instruct": instruct, "query": query, "answer": answer}
        of_text = text in query or query.removeprefix("文本：") in text
        if instruct and of_text and row not in rows and not any(name in query + answer for name in held_out):
            rows.append(row)
    return rows


def print_samples():
    sample_maker = RoughTextMaker(0, "train", walk_share=0.25, rough_share=0.7)
    for _ in range(10):
        print("文本", plain_text(any_text(sample_maker)))
    for sample_task in TASKS:
        sample = None
        while sample is None:
            sample = sample_task(sample_maker, any_text(sample_maker))
        print(f"\n{sample_task.__name__}\n" + "\n".join(sample))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", help="where the rows that the demo rehearses go; without it samples are printed")
    path = parser.parse_args().rehearse
    if path:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rehearsal_rows()]
        Path(path).write_text("".join(lines), encoding="utf-8")
    else:
        print_samples()
