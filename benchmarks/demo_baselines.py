"""How far memory and simple rules get on the demo's dev set: what a trained model must beat.

    python benchmarks/demo_baselines.py

longest match: the entity strings of train that have two characters or more (with 中 and 日 the score is lower) are looked
up in dev, the longest first; the type is the one that the string most often has in train.
rules: a place or an organisation ends with a known suffix (市, 公司, 大学, …) and begins after the last function word or
punctuation mark before it. A surname and one or two more characters are a person if a function word or a mark stands on
both sides. A string with · in it is a person.
"""

import collections
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from alpaca.scoring.metrics import score
from embedded_model.sources import LEXICON

FOLDER = ROOT / "data" / "demo" / "ori_data"
LABELS = ["PER", "LOC", "ORG"]
# Punctuation marks, function words and the commonest verbs: no name contains one of them.
STOP = "，。、；：？！“”《》（）…— 的了在和与是到对把被向从由为将就也都还又给让叫等及或因但这那他她我你们不没有说去来上下里"
ORGANISATION_SUFFIXES = (
    "公司|集团|大学|学院|中学|小学|医院|法院|检察院|委员会|协会|学会|研究所|研究院|银行|出版社|报社|通讯社|电视台|电台|日报|晚报|政府|"
    "公安局|教育局|局|厅|军区|省委|市委|县委|博物馆|图书馆|队|剧院|剧团|乐团|基金会|联合会|饭店|宾馆|厂|派出所|外交部|议会|信用社|分行|支行"
)
PLACE_SUFFIXES = "省|市|县|区|镇|乡|村|庄|屯|街|路|大道|胡同|山|河|江|湖|海|岛|峡|机场|火车站|大桥|公园|广场|州|国"
SURNAMES = "".join(dict.fromkeys(entry for entry in LEXICON["姓"] if LEXICON["姓"].count(entry) > 4))
RULES = [
    ("PER", re.compile(f"[^{STOP}·A-Za-z0-9]{{2,6}}·[^{STOP}·A-Za-z0-9]{{2,6}}")),
    ("ORG", re.compile(f"[^{STOP}]{{2,14}}?(?:{ORGANISATION_SUFFIXES})(?![{PLACE_SUFFIXES.replace('|', '')}])")),
    ("LOC", re.compile(f"[^{STOP}]{{1,4}}?(?:{PLACE_SUFFIXES})")),
    ("PER", re.compile(f"(?<![^{STOP}])[{SURNAMES}][^{STOP}]{{1,2}}(?![^{STOP}])")),
]


def read_records(path):
    """A raw JSON-lines corpus as [(text, [(entity, type)])]."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(r["text"], [(e["entity"], e["entity_type"]) for e in r["entity_list"]]) for r in records]


def longest_match(train):
    """A function that maps a text to [(entity, type)]; train: as read_records returns it."""
    counts = collections.defaultdict(collections.Counter)
    for _, entities in train:
        for entity, kind in entities:
            if len(entity) > 1:
                counts[entity][kind] += 1
    longest = max(map(len, counts))

    def find(text):
        found, i = [], 0
        while i < len(text):
            sizes = (n for n in range(longest, 0, -1) if text[i : i + n] in counts and i + n <= len(text))
            size = next(sizes, 0)
            if size:
                entity = text[i : i + size]
                found.append((entity, counts[entity].most_common(1)[0][0]))
            i += size or 1
        return found

    return find


def by_rules(text):
    """[(entity, type)] of a text. What one rule has found, the later rules do not see."""
    found = []
    for kind, pattern in RULES:
        found += [(match[0], kind) for match in pattern.finditer(text)]
        text = pattern.sub("，", text)
    return found


def evaluate(find, dev):
    """Scores of the string view, computed as test.py does."""

    def entities(pairs):
        return [{"entity": entity, "type": kind, "spans": []} for entity, kind in pairs]

    rows = [{"text": text, "entities": entities(find(text)), "gold": entities(gold)} for text, gold in dev]
    return score(rows, LABELS)["string"]


def main():
    train, dev = read_records(FOLDER / "train.txt"), read_records(FOLDER / "dev.txt")
    for name, find in {"train 实体串最长匹配": longest_match(train), "后缀与姓氏规则": by_rules}.items():
        scores = evaluate(find, dev)
        rates = "，".join("{} {:.3f}".format(kind, scores[kind]["f1"]) for kind in LABELS)
        print(
            "{}：精确率 {precision:.3f}，召回率 {recall:.3f}，F1 {f1:.3f}".format(name, **scores["micro"])
            + f"（{rates}）"
        )


if __name__ == "__main__":
    main()
