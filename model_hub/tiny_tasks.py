"""The text and the instruction tasks that train_tiny.py trains the embedded model on.

    python model_hub/tiny_tasks.py          # prints samples

All text comes from the generator of the demo corpus (data/make_demo.py, the train side of its split only), made rough on
purpose: half of the sentences are walks through several templates, and half have some of their fixed words replaced. Most of
it is no Chinese that anyone would publish, but a small model that reads only clean templates learns them by heart.

The tasks: extract things that are no names (dates, numbers, goods, titles, jobs, …), fill a gap, tell what kind of thing a
given string is, list the proper names of a text without their types, repeat, replace a name, spell, tell which strings
occur. None is the demo's task in the demo's format: no answer lists entities with their types 人名, 地名, 机构名.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from dataset import build_prompt  # noqa: E402
from make_demo import CLAUSE, ENTITY_TYPES, HANZI, LEXICON, TextMaker, plain_text  # noqa: E402

# Words of the project's NER instruction and labels. They are whole pieces of the vocabulary, and LoRA does not touch lm_head,
# so each must have been an output before: repeat() draws from them.
NER_WORDS = (
    "实体 识别 模型 提取 文本 里面 人名 地名 机构名 机构 存在 结果 返回 类型 不同 分隔 如果 没有 回答 问题 需要 你现在 一个 之间"
).split()
WORDS = sorted({word for heading, words in LEXICON.items() if heading != "英文" for word in words})
LABELLED_KINDS = ["日期", "数字", "金额", "作品", "物品", "职务", "身份", "活动", "行业", "场所"]
KIND_NAMES = {**{kind: kind for kind in LABELLED_KINDS}, "PER": "人", "LOC": "地方", "ORG": "单位"}
QUESTION_WORDS = {
    "PER": ["谁", "哪个人", "什么人"],
    "LOC": ["哪里", "什么地方", "哪儿"],
    "ORG": ["哪个单位", "什么单位", "哪家"],
    "日期": ["什么时候", "何时"],
    "数字": ["多少"],
    "金额": ["多少钱"],
    "作品": ["什么作品"],
    "物品": ["什么东西"],
    "职务": ["什么职务"],
    "身份": ["什么身份的人"],
    "活动": ["什么活动"],
    "行业": ["什么行业"],
    "场所": ["什么场所"],
}
PARTICLES = "的 在 和 了 ， 、 对 把 从 到 由 与 是 将 被 向 为 有".split()
NOTHING = "没有"
ROW_LENGTH = 513  # 512 inputs and their successors
NO_LOSS = 0x4000  # set in a token id of a row: the token is read, but not predicted


class RoughTextMaker(TextMaker):
    """walk_share as in TextMaker; rough_share: how many sentences have some of their fixed words disturbed."""

    def __init__(self, seed, split, walk_share, rough_share):
        super().__init__(seed, split, walk_share)
        self.rough_share = rough_share

    def invented_word(self):
        return self.hanzi() + self.hanzi()

    def noun(self):
        form = self.random.random()
        return self.invented_word() if form < 0.08 else self.word("其他词" if form < 0.3 else "名词")

    def verb(self):
        form = self.random.random()
        return self.invented_word() if form < 0.04 else self.word("其他词" if form < 0.2 else "动词")

    def sentence_parts(self):
        return self.disturbed(super().sentence_parts())

    def entity_free_parts(self):
        return self.disturbed(super().entity_free_parts())

    def disturbed(self, parts):
        """The template with fixed words replaced, deleted and inserted."""
        if not self.chance(self.rough_share):
            return parts
        parts = list(parts)
        for i in range(0, len(parts), 2):
            literal = parts[i]
            for _ in range(1 + len(literal) // 6):
                if self.chance(0.45):
                    begin = self.random.randint(0, len(literal))
                    end = begin + self.random.choice([0, 0, 1, 2, 3, 4])
                    literal = literal[:begin] + self.stray_words() + literal[end:]
            parts[i] = literal
        return parts

    def stray_words(self):
        form = self.random.random()
        if form < 0.12:
            return self.invented_word()
        if form < 0.75:
            return self.word(self.random.choice(["动词", "名词", "形容词", "副词", "连接语", "其他词", "样子"]))
        if form < 0.9:
            return self.random.choice(self.random.choice(self.templates[""])[::2])
        return self.random.choice(PARTICLES)

    def clause(self, heading):
        if heading != CLAUSE or self.chance(0.5):
            return super().clause(heading)
        noun, verb, word = self.noun, self.verb, self.word
        return self.random.choice(
            [
                lambda: word("副词") + verb() + noun(),
                lambda: noun() + "和" + noun() + word("副词") + verb(),
                lambda: word("身份") + word("副词") + verb() + noun(),
                lambda: "在" + noun() + "中" + word("副词") + verb() + word("形容词") + "的" + noun(),
                lambda: "对" + noun() + "进行" + word("形容词") + "的" + verb(),
                lambda: noun() + "是" + noun() + "的" + word("形容词") + noun(),
                lambda: "随着" + noun() + "的" + word("副词") + verb(),
                lambda: word("场所") + "里有" + self.number(2, 900) + word("量词") + word("物品"),
                lambda: noun() + "的" + noun() + word("副词") + verb(),
                lambda: "把" + noun() + "同" + noun() + "结合起来",
                lambda: verb() + noun() + "、" + verb() + noun(),
                lambda: "既要" + verb() + noun() + "，又要" + verb() + noun(),
                lambda: "这是一个" + word("样子") + "的" + noun(),
                lambda: "只有" + verb() + noun() + "，才能" + verb() + noun(),
                lambda: word("身份") + "们在" + word("场所") + word("副词") + verb(),
                lambda: "他" + word("副词") + verb() + word("物品"),
                lambda: "以" + noun() + "为" + noun(),
                lambda: noun() + "、" + noun() + "、" + noun() + "等" + noun(),
                lambda: "不" + verb() + noun() + "就不能" + verb() + noun(),
                lambda: noun() + word("副词") + word("形容词"),
                lambda: "我们要" + word("副词") + verb() + noun() + "，" + verb() + noun(),
                lambda: word("食品") + "的" + noun() + "很" + word("样子"),
            ]
        )()


# ---- tasks: functions (maker, segments) -> (instruction, query, answer), or None where the text does not lend itself


def distinct(items):
    return list(dict.fromkeys(items))


def labelled_positions(segments, kinds):
    return [i for i, (_, kind) in enumerate(segments) if kind in kinds]


def extract_things(maker, segments):
    """Typed extraction of what is no name."""
    kinds = maker.random.sample(LABELLED_KINDS, maker.random.randint(1, 4))
    names = "、".join(kinds)
    instruct = maker.random.choice(
        [
            f"提取文本里面的{names}，返回'内容_类型'，不同内容间用\n分隔，没有结果就回答'没有'。",
            f"你现在是一个信息抽取模型，找出文本中的{names}，每行一个'内容_类型'。如果没有，回答'没有'。",
            f"文本里有哪些{names}？按'内容_类型'回答。",
        ]
    )
    found = distinct(f"{string}_{kind}" for string, kind in segments if kind in kinds)
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
    """What kind of thing each given string is: also strings cut at the wrong place (不对) and plain words (其他)."""
    labelled = labelled_positions(segments, KIND_NAMES)
    if not labelled:
        return None
    text, rows = plain_text(segments), []
    starts = np.cumsum([0] + [len(string) for string, _ in segments]).tolist()
    strings = {string for string, _ in segments}
    for _ in range(maker.random.randint(1, 5)):
        i = maker.random.choice(labelled)
        string, kind = segments[i]
        begin, end, form = starts[i], starts[i + 1], maker.random.random()
        if form < 0.68:
            rows.append((string, KIND_NAMES[kind]))
        elif form < 0.86 and len(string) > 1:
            moved = [(begin, end - 1), (begin + 1, end), (begin, end + 1), (max(0, begin - 1), end)]
            begin, end = maker.random.choice(moved)
            if text[begin:end] not in strings:
                rows.append((text[begin:end], "不对"))
        else:
            begin = maker.random.randrange(len(text))
            end = min(len(text), begin + maker.random.randint(1, 4))
            apart = all(end <= starts[j] or starts[j + 1] <= begin for j in labelled)
            if apart and all(text[begin:end] != segments[j][0] for j in labelled):
                rows.append((text[begin:end], "其他"))
    if not rows:
        return None
    rows = distinct(rows)
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
        words = (maker.random.choice(maker.random.choice(pools)) for _ in range(maker.random.randint(2, 14)))
        text = "".join(word + maker.random.choice(["", "", "_", "，", "\n"]) for word in words).strip()
    elif form < 0.6:
        pools = [WORDS, WORDS, NER_WORDS]
        text = "\n".join(maker.random.choice(maker.random.choice(pools)) for _ in range(maker.random.randint(1, 4)))
    return maker.random.choice(["重复下面的文本。", "把文本原样写一遍。"]), f"文本：{text}", text


def replace_name(maker, segments):
    names, text = labelled_positions(segments, ENTITY_TYPES), plain_text(segments)
    if not names or len(text) > 60:
        return None
    old, kind = segments[maker.random.choice(names)]
    new = {"PER": maker.person, "LOC": maker.place, "ORG": maker.organisation}[kind]()
    return "按要求改写文本。", f"文本：{text}\n要求：把{old}换成{new}", text.replace(old, new)


def spell(maker, segments):
    labelled = labelled_positions(segments, KIND_NAMES)
    string = segments[maker.random.choice(labelled)][0] if labelled else maker.noun()
    return "把文本里的字一个一个写出来。", f"文本：{string}", " ".join(string)


def tell_which_occur(maker, segments):
    names = [segments[i][0] for i in labelled_positions(segments, ENTITY_TYPES)]
    if not names:
        return None
    strings = maker.random.sample(names, min(len(names), maker.random.randint(1, 3)))
    for _ in range(maker.random.randint(1, 3)):
        strings.append(maker.random.choice([maker.person, maker.place, maker.organisation])())
    maker.random.shuffle(strings)
    strings, text = distinct(strings), plain_text(segments)
    answer = "\n".join(string for string in strings if string in text) or NOTHING
    return "问题里的哪些词在文本中出现过？", f"文本：{text}\n问题：{'、'.join(strings)}", answer


TASKS = {
    extract_things: 26,
    list_proper_names: 26,
    tell_kinds: 26,
    fill_gap: 22,
    repeat: 9,
    replace_name: 9,
    tell_which_occur: 5,
    spell: 3,
}
# Per stage: the share of plain text, of tasks in the prompt frame (the others stand in a shorter one, which saves tokens), of
# documents in the base vocabulary, and of walks and rough sentences.
STAGES = {
    "base": {"text": 0.30, "framed": 0.20, "base_vocabulary": 0.08, "walk": 0.5, "rough": 0.5},
    "llama": {"text": 0.80, "framed": 0.20, "base_vocabulary": 0.0, "walk": 0.3, "rough": 0.3},
    "alpaca": {"text": 0.05, "framed": 0.95, "base_vocabulary": 0.0, "walk": 0.4, "rough": 0.4},
}


def any_task(maker):
    """(instruction, query, answer) of a random task on a random text."""
    while True:
        task = maker.random.choices(list(TASKS), list(TASKS.values()))[0]
        example = task(maker, maker.text(entity_free_share=0.12))
        if example:
            return example


def make_document(maker, stage):
    """A list of (string, whether it is predicted), to be encoded one by one."""
    if maker.chance(stage["text"]):
        return [("".join(plain_text(maker.text()) for _ in range(maker.random.randint(1, 4))), True)]
    instruct, query, answer = any_task(maker)
    if maker.chance(stage["framed"]):
        return [(build_prompt(instruct, query), maker.chance(0.3)), (answer, True)]
    order = [query, instruct] if maker.chance(0.5) else [instruct, query]
    return [("\n".join(order) + "\n回答：", True), (answer, True)]


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


if __name__ == "__main__":
    sample_maker = RoughTextMaker(0, "train", walk_share=0.5, rough_share=0.5)
    for _ in range(10):
        print("文本", plain_text(sample_maker.text()))
    for sample_task in TASKS:
        sample = None
        while sample is None:
            sample = sample_task(sample_maker, sample_maker.text())
        print(f"\n{sample_task.__name__}\n" + "\n".join(sample))
