"""python -m pytest tests/embedded_model/test_demo.py: the demo corpus, its generator, its split, and what memory and rules reach on it."""

import collections
import json
import re
import sys
from types import SimpleNamespace

import pytest

from harness import ROOT

sys.path[:0] = [str(ROOT / "benchmarks")]
import demo_baselines

from embedded_model import make_demo, quantities
from embedded_model.quantities import chinese_number
from embedded_model.sources import ENTITY_SLOTS, LEXICON, TEMPLATES, split_template
from embedded_model.text_maker import TextMaker

ORI_DATA = ROOT / "data" / "demo" / "ori_data"
OTHER_SLOTS = set("数 日期 年 金额 比例 作品 职务 身份".split())
# Words of templates in which a name happens to stand: wanted, since only a reader can tell.
TRAPS = "阳春面 民主党派 天台 东北风 共同署名的论文登上 荒漠河岸 林业部门 联想到 枣园 发展中国家 监察部门".split()


@pytest.fixture(scope="module")
def corpus():
    return {part: read(part) for part in ("train", "dev")}


def read(part):
    return [json.loads(line) for line in (ORI_DATA / f"{part}.txt").read_text(encoding="utf-8").splitlines()]


def names(records, *types):
    return {e["entity"] for r in records for e in r["entity_list"] if e["entity_type"] in types}


def outside(record):
    """The text with every entity blanked out."""
    text = record["text"]
    for e in record["entity_list"]:
        begin, end = e["entity_index"]["begin"], e["entity_index"]["end"]
        text = text[:begin] + "\0" * (end - begin) + text[end:]
    return text


def fixed_words(template):
    return split_template(template)[::2]


def test_files_are_what_the_script_writes(tmp_path):
    make_demo.main(SimpleNamespace(output_dir=tmp_path))
    for part in ("train.txt", "dev.txt"):
        assert (tmp_path / part).read_bytes() == (ORI_DATA / part).read_bytes()


def test_offsets_and_sizes(corpus):
    assert [len(records) for records in corpus.values()] == [4000, 500]
    for record in corpus["train"] + corpus["dev"]:
        for e in record["entity_list"]:
            begin, end = e["entity_index"]["begin"], e["entity_index"]["end"]
            assert record["text"][begin:end] == e["entity"]


def test_dev_shares_no_template_and_no_name_with_train(corpus):
    train, dev = TextMaker(0, "train"), TextMaker(0, "dev")
    templates = [{"{}".join(parts) for pair in maker.starts.values() for _, parts in pair} for maker in (train, dev)]
    assert not templates[0] & templates[1]
    assert 1 / 9 < len(templates[1]) / len(TEMPLATES) < 1 / 5
    train_text = "\n".join(record["text"] for record in corpus["train"])
    assert not [name for name in names(corpus["dev"], "PER", "ORG") if name in train_text]


def test_rehearsal_is_of_other_tasks_and_shows_no_name_of_dev(corpus):
    rows = read("rehearse")
    assert len(rows) == 800 and all(row.keys() == {"instruct", "query", "answer"} for row in rows)
    assert len({(row["instruct"], row["query"]) for row in rows}) == 800
    assert not [row for row in rows if re.search("_(人名|地名|机构名)", row["answer"])]
    text = "\n".join(row["query"] + row["answer"] for row in rows)
    assert not [name for name in names(corpus["dev"], "PER", "ORG") if name in text]


def test_entity_free_and_ambiguous_texts(corpus):
    """Ambiguous: outside its entities a text holds a word that looks like a name (高兴, 马上), or a string that is an entity
    somewhere in the corpus."""
    labelled = {name for name in names(corpus["train"] + corpus["dev"], "PER", "LOC", "ORG") if len(name) > 1}
    pattern = re.compile("|".join(map(re.escape, sorted({*LEXICON["易混词"], *labelled}, key=len, reverse=True))))
    for records in corpus.values():
        assert sum(not record["entity_list"] for record in records) / len(records) >= 0.30
        assert sum(bool(pattern.search(outside(record))) for record in records) / len(records) >= 0.15


def test_templates():
    domains = {domain for domain, _ in TEMPLATES}
    lines = [line for _, line in TEMPLATES]
    assert len(lines) == len(set(lines)) >= 1500 and len(domains) >= 20
    for line in lines:
        for slot in split_template(line)[1::2]:
            assert slot.rstrip("123") in {*ENTITY_SLOTS, *OTHER_SLOTS}, line


def test_templates_name_nobody():
    """A name in a template's fixed words would carry no label."""
    headings = "省名 直辖市 自治区 城市 真县 国家 洲 外国地名 名景 真设施 国家机构 国际组织 真校 真公司 真媒体 真简称 知名中国人 知名外国人"
    known = {
        entry for heading in headings.split() for entry in LEXICON[heading] if type(entry) is str and len(entry) > 1
    }
    pattern = re.compile("|".join(map(re.escape, known)))
    for _, line in TEMPLATES:
        for literal in fixed_words(line):
            found = pattern.search(literal)
            assert not found or any(trap in literal for trap in TRAPS), (found[0], line)


def test_no_two_templates_are_alike():
    """No two share 60 % of their groups of three characters."""
    groups, where = [], collections.defaultdict(list)
    for i, (_, line) in enumerate(TEMPLATES):
        text = "□".join(fixed_words(line))
        groups.append({text[j : j + 3] for j in range(len(text) - 2)})
        for group in groups[-1]:
            where[group].append(i)
    for i, mine in enumerate(groups):
        shared = collections.Counter(j for group in mine for j in where[group] if j > i)
        assert not [(TEMPLATES[i], TEMPLATES[j]) for j, n in shared.items() if n > 0.6 * len(mine | groups[j])]


def test_every_list_of_the_lexicon_can_be_filled():
    maker = TextMaker(0, "train")
    for heading in LEXICON:
        for entry in LEXICON[heading]:
            for part in entry[1::2] if type(entry) is list else ():
                assert part in LEXICON, (heading, entry)
    for slot in ENTITY_SLOTS:
        for string, kind in maker.entity(slot, "在"):
            assert string and kind == ENTITY_SLOTS[slot]


def test_a_repeated_slot_and_different_names():
    maker = TextMaker(0, "train")
    for _ in range(50):
        first, again, other = [s for s, kind in maker.fill(split_template("{人1}，{人1}和{人}。")) if kind]
        assert first == again != other


def test_place_in_place_is_two_entities():
    maker = TextMaker(0, "train")
    fillings = [maker.entity("县", "在") for _ in range(200)]
    assert {len(filling) for filling in fillings} == {1, 2}
    assert all(kind == "LOC" for filling in fillings for _, kind in filling)


def test_numbers():
    numbers = {2: "二", 10: "十", 15: "十五", 20: "二十", 203: "二百零三", 310: "三百一十", 999: "九百九十九"}
    assert {n: chinese_number(n) for n in numbers} == numbers
    maker = TextMaker(0, "train")
    assert not re.search(
        "(?<![十百零])二名", " ".join(quantities.counted(maker, "有", "名工人") + "名" for _ in range(300))
    )
    assert all(re.fullmatch(r"[0-9.．]+%|百分之.+|.成", quantities.share(maker)) for _ in range(300))


def test_baselines_stay_below(corpus):
    train, dev = (demo_baselines.read_records(ORI_DATA / f"{part}.txt") for part in ("train", "dev"))
    for find in (demo_baselines.longest_match(train), demo_baselines.by_rules):
        assert 0.1 < demo_baselines.evaluate(find, dev)["micro"]["f1"] < 0.60
