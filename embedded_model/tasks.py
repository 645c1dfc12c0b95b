"""The instruction tasks that the embedded model is pretrained on, and the demo's rehearsal of them.

    python embedded_model/tasks.py                                                  # prints samples
    python embedded_model/tasks.py --rehearse=data/demo/ori_data/rehearse.txt       # writes the demo's rehearsal

None of them is the demo's task in the demo's format: no answer lists entities with their types 人名, 地名, 机构名. The
texts come from the demo's templates and names, and only from those of train.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from config_utils import run_script
from dataset import NO_ENTITY, QUERY_PREFIX
from embedded_model import dictionary
from embedded_model.rough_text import RoughTextMaker
from embedded_model.sources import ENTITY_TYPES, HANZI, LEXICON
from embedded_model.text_maker import TextMaker, any_text, distinct, plain_text

CONFIG = {
    "rehearse": None,  # the file that the rows of the demo's rehearsal go to; None: print samples
}
REHEARSAL_ROWS, REHEARSAL_SEED = 800, 79
# Words of the project's NER instruction and labels, each a piece of the vocabulary. A LoRA for NER does not change
# lm_head, so the pretraining must have seen each of them as an output: repeat() draws from them.
NER_WORDS = (
    "实体 识别 模型 提取 文本 里面 人名 地名 机构名 机构 存在 结果 返回 类型 不同 分隔 如果 没有 回答 问题 需要 你现在 一个 之间"
).split()
JOBS = {word for heading, words in LEXICON.items() if heading.endswith(("职务", "身份")) for word in words}
# What tell_kinds calls the kinds of a segment.
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
# What fill_gap may write in place of a string of a kind.
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
# What extract_things asks for, found in a text whose names are blanked out: by its form, not by the slot it came from.
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
ANY_SLOT = {"PER": "人", "LOC": "地", "ORG": "机构"}  # the slot that takes every name of a type


# ---------------------------------------------------------------------------------------------------------------------
# tasks: functions (maker, segments) -> (instruction, query, answer), or None where the text does not suit the task


def labelled_positions(segments, kinds):
    """The indices of the segments of these kinds."""
    return [i for i, (_, kind) in enumerate(segments) if kind in kinds]


def find_things(segments):
    """[(string, kind)] of what is no name, in the order of the text."""
    masked = "".join("\0" * len(string) if kind in ENTITY_TYPES else string for string, kind in segments)
    return [(match[match.lastgroup], match.lastgroup) for match in THINGS.finditer(masked)]


def extract_things(maker, segments):
    """List dates, sums, quotations and the like with their kinds."""
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
    return instruct, f"{QUERY_PREFIX}{plain_text(segments)}", "\n".join(found) or NO_ENTITY


def list_proper_names(maker, segments):
    """List the names without their types. Finding names is learnt here, telling their types apart in tell_kinds."""
    found = distinct(string for string, kind in segments if kind in ENTITY_TYPES)
    instruct = maker.random.choice(
        [
            "列出文本里的专有名词，每行一个，没有就回答'没有'。",
            "文本里有哪些专名？每行写一个。",
            "你需要提取文本里面的专有名词，不同名词间用\n分隔。如果没有，回答'没有'。",
        ]
    )
    return instruct, f"{QUERY_PREFIX}{plain_text(segments)}", "\n".join(found) or NO_ENTITY


def fill_gap(maker, segments):
    """Name the string that is missing in a part of the text."""
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
    return instruct, f"{QUERY_PREFIX}{plain_text(segments)}\n问题：{before}{gap}{after}", answer


def tell_kinds(maker, segments):
    """Tell the kind of each given string: 人, 地方, 单位, …, 不对 for one cut at the wrong place, 其他 for a plain word.

    A string that stands in the text in two meanings is not asked for.
    """
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
    return instruct, f"{QUERY_PREFIX}{text}\n问题：{question}", "\n".join(f"{string}：{kind}" for string, kind in rows)


def repeat(maker, segments):
    """Write a text once more.

    Sixty in a hundred are unrelated words, so that every piece of the vocabulary is an output now and then.
    """
    text, form = plain_text(segments)[:60], maker.random.random()
    if form < 0.4:
        pools = [dictionary.frequent_words()] * 6 + [NER_WORDS] + [HANZI] * 3
        words = (maker.choice(maker.choice(pools)) for _ in range(maker.random.randint(2, 14)))
        text = "".join(word + maker.random.choice(["", "", "_", "，", "\n"]) for word in words).strip()
        text = re.sub("_(?=人名|地名|机构名)", "", text)  # nothing that looks like an answer of the demo's task
    elif form < 0.6:
        pools = [dictionary.frequent_words()] * 2 + [NER_WORDS]
        text = "\n".join(maker.choice(maker.choice(pools)) for _ in range(maker.random.randint(1, 4)))
    return maker.random.choice(["重复下面的文本。", "把文本原样写一遍。"]), f"{QUERY_PREFIX}{text}", text


def replace_name(maker, segments):
    """Write a text with another name in place of one of its own."""
    names, text = labelled_positions(segments, ENTITY_TYPES), plain_text(segments)
    if not names or len(text) > 60:
        return None
    old, kind = segments[maker.random.choice(names)]
    new = maker.name(ANY_SLOT[kind])
    return "按要求改写文本。", f"{QUERY_PREFIX}{text}\n要求：把{old}换成{new}", text.replace(old, new)


def spell(maker, segments):
    """Write a string character by character, with spaces between them."""
    labelled = labelled_positions(segments, KIND_NAMES)
    string = segments[maker.random.choice(labelled)][0] if labelled else maker.choice(dictionary.frequent_words())
    return "把文本里的字一个一个写出来。", f"{QUERY_PREFIX}{string}", " ".join(string)


def tell_which_occur(maker, segments):
    """List those of the given names that occur in the text."""
    names = [segments[i][0] for i in labelled_positions(segments, ENTITY_TYPES)]
    if not names:
        return None
    strings = maker.random.sample(names, min(len(names), maker.random.randint(1, 3)))
    for _ in range(maker.random.randint(1, 3)):
        strings.append(maker.name(maker.choice(list(ANY_SLOT.values()))))
    maker.random.shuffle(strings)
    strings, text = distinct(strings), plain_text(segments)
    answer = "\n".join(string for string in strings if string in text) or NO_ENTITY
    return "问题里的哪些词在文本中出现过？", f"{QUERY_PREFIX}{text}\n问题：{'、'.join(strings)}", answer


TASKS = {  # how often each is drawn, by weight
    extract_things: 22,
    list_proper_names: 36,
    tell_kinds: 24,
    fill_gap: 14,
    repeat: 8,
    replace_name: 11,
    tell_which_occur: 4,
    spell: 3,
}


def any_task(maker):
    """(instruction, query, answer) of a random task on a random text."""
    while True:
        task = maker.random.choices(list(TASKS), list(TASKS.values()))[0]
        example = task(maker, any_text(maker))
        if example:
            return example


def rehearsal_rows(count=REHEARSAL_ROWS, seed=REHEARSAL_SEED):
    """`count` different rows {"instruct", "query", "answer"}, the same number of each task.

    The sentences are as natural as the demo's, so repeat()'s unrelated words are left out. None of the persons and
    organisations of the demo's dev occurs.
    """
    lines = (ROOT / "data" / "demo" / "ori_data" / "dev.txt").read_text(encoding="utf-8").splitlines()
    entities = [entity for line in lines for entity in json.loads(line)["entity_list"]]
    held_out = {entity["entity"] for entity in entities if entity["entity_type"] != "LOC"}
    maker, tasks, rows = TextMaker(seed, "train"), list(TASKS), []
    while len(rows) < count:
        segments = any_text(maker)
        instruct, query, answer = tasks[len(rows) % len(tasks)](maker, segments) or ("", "", "")
        text, row = plain_text(segments), {"instruct": instruct, "query": query, "answer": answer}
        of_text = text in query or query.removeprefix(QUERY_PREFIX) in text
        if instruct and of_text and row not in rows and not any(name in query + answer for name in held_out):
            rows.append(row)
    return rows


def print_samples():
    """Print ten texts and an example of each task."""
    sample_maker = RoughTextMaker(0, "train", walk_share=0.25, rough_share=0.7)
    for _ in range(10):
        print("文本", plain_text(any_text(sample_maker)))
    for sample_task in TASKS:
        sample = None
        while sample is None:
            sample = sample_task(sample_maker, any_text(sample_maker))
        print(f"\n{sample_task.__name__}\n" + "\n".join(sample))


def main(args):
    if args.rehearse:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rehearsal_rows()]
        Path(args.rehearse).write_text("".join(lines), encoding="utf-8")
    else:
        print_samples()


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
