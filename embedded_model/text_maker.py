"""Texts from templates: names composed by the grammar of lexicon.txt, slots filled, sentences joined."""

import random

from embedded_model import quantities
from embedded_model.sources import (
    ENTITY_SLOTS,
    LEXICON,
    TEMPLATES,
    has_entity,
    is_held_out,
    is_sentence,
    split_template,
)

ENTITY_FREE_SHARE = 0.32  # of the texts, as a fraction
# How many sentences a text may have, with entities (False) and without.
SENTENCES_OF_A_TEXT = {False: [1] * 15 + [2] * 4 + [3], True: [1] * 8 + [2] * 5 + [3] * 2}
PLACE_IN_PLACE_SHARE = 0.12  # of the counties, villages and streets, as a fraction: 湖南省 + 明溪县, two entities
BEFORE_SHORT_COUNTRY = tuple("访驻赴抵离对援")  # 访华, 驻日大使


class TextMaker:
    """Makes the texts of one side of the split, "train" or "dev".

    A text is a list of segments (string, kind). kind: None for plain words; PER, LOC or ORG for an entity; else the
    Chinese name of what the string is (日期, 数字, …), for which the pretraining tasks ask.
    """

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
        """A name of this side of the split, as a string."""
        if ENTITY_SLOTS[heading] == "LOC":  # both sides share the places: no side can do without 北京
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
        """The segments of one to three sentences of one domain.

        entity_free: whether no sentence has an entity; otherwise the first one has one, and others may have.
        """
        domain, parts = self.choice(self.starts[entity_free])
        sentences = [parts]
        if is_sentence(parts):
            for _ in range(self.choice(SENTENCES_OF_A_TEXT[entity_free]) - 1):
                more = self.choice(self.sentences[domain, entity_free or self.chance(0.4)])
                if more not in sentences:
                    sentences.append(more)
        return [segment for sentence in sentences for segment in self.fill(sentence)]

    def fill(self, parts):
        """The segments of a template. All names of it differ; slots with the same digit get the same name."""
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
        """The segments of a slot. before, after: the words on both sides of it; before is "{学校}" after such a slot."""
        if slot in ENTITY_SLOTS:
            return self.entity(slot, before)
        if slot == "数":
            return [(quantities.counted(self, before, after), "数字")]
        if slot == "日期":
            return [(quantities.date(self, before, after), "日期")]
        if slot == "年":
            return [(quantities.year(self), "日期")]
        if slot == "金额":
            return [(quantities.money(self, before), "金额")]
        if slot == "比例":
            return [(quantities.share(self), "数字")]
        if slot == "作品":
            return [("《", None), (self.compose("作品"), "作品"), ("》", None)]
        office = before[1:-1] + slot  # the offices of what stands before, {学校}{职务}
        return [(self.compose(office if office in self.lexicon else slot), slot)]  # 职务, 身份


def any_text(maker):
    """The segments of a text of `maker`, with or without an entity as often as in the demo corpus."""
    return maker.text(maker.chance(ENTITY_FREE_SHARE))


def plain_text(segments):
    """The text that segments make up."""
    return "".join(string for string, _ in segments)


def distinct(items):
    """The items without repeats, in their order."""
    return list(dict.fromkeys(items))
