"""Write the demo corpus: Chinese sentences from templates, with persons, places and organisations marked.

    python embedded_model/make_demo.py

Reads embedded_model/{templates,lexicon}.txt, writes data/demo/ori_data/train.txt (4,000 texts) and dev.txt (500), one
JSON object a line: {"text": "…", "entity_list": [{"entity_index": {"begin": 3, "end": 4}, "entity_type": "LOC",
"entity": "日"}]} (characters, end exclusive; types PER, LOC, ORG). The same seed gives the same files.

The head of lexicon.txt says what counts as one entity. What stands inside 《》 is a title and holds none.

dev measures reading, not memory: its templates, persons and organisations occur nowhere in train. A hash of each
decides its side (sources.py), so train_tiny.py, which uses the same templates and names, leaves out those of dev too.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from alpaca.common.whole_files import written_whole
from config_utils import run_script
from embedded_model.sources import ENTITY_TYPES
from embedded_model.text_maker import ENTITY_FREE_SHARE, TextMaker, plain_text

CONFIG = {
    "output_dir": None,  # where train.txt and dev.txt go; None: data/demo/ori_data
}
TRAIN_TEXTS, DEV_TEXTS = 4000, 500
TRAIN_SEED, DEV_SEED = 77, 78


def to_record(segments):
    """Segments -> the object of one line of the corpus."""
    entities, begin = [], 0
    for string, kind in segments:
        end = begin + len(string)
        if kind in ENTITY_TYPES:
            entities.append({"entity_index": {"begin": begin, "end": end}, "entity_type": kind, "entity": string})
        begin = end
    return {"text": plain_text(segments), "entity_list": entities}


def make_records(maker, count, seen_texts, forbidden_in=""):
    """`count` records whose texts differ from each other and from `seen_texts`, a set to which they are added.

    None of their persons and organisations occurs in the string `forbidden_in`.
    """
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
    output_dir = Path(args.output_dir or ROOT / "data" / "demo" / "ori_data")
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("dev", dev)):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        with written_whole(output_dir / f"{name}.txt") as new:
            new.write_text("".join(lines), encoding="utf-8")
        counts = {t: sum(e["entity_type"] == t for r in records for e in r["entity_list"]) for t in ENTITY_TYPES}
        empty = sum(not record["entity_list"] for record in records)
        print(f"{output_dir / name}.txt: {len(records)} texts, {empty} without an entity, {counts}")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
