"""Texts made rough on purpose: most of what the embedded model is pretrained on.

Fixed words of the templates are replaced by others of the same kind from a large dictionary, words and clauses are put
in or left out, ordinary words take the place of names, and some sentences are walks through several templates. Few of
these texts are Chinese that anyone would publish. But a small model that reads only clean templates learns them by
heart, and takes every word that it never met for a name.
"""

from embedded_model import dictionary
from embedded_model.sources import slot_kind
from embedded_model.text_maker import TextMaker, distinct

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


class RoughTextMaker(TextMaker):
    """A TextMaker of rough texts; its names include those of the dictionary.

    walk_share: the fraction of the sentences with an entity that are walks through several templates.
    rough_share: the fraction of all sentences whose fixed words are disturbed.
    """

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
        """The segments of a template, or of what a walk or roughness makes of it."""
        if len(parts) > 1 and self.chance(self.walk_share):
            parts = self.walk()
        if self.chance(self.rough_share):
            parts = self.disturbed(parts)
        return super().fill(parts)

    def entity(self, slot, before):
        """As a TextMaker's, with more of the one-character places: 中日韩, 沪宁, 俄总统."""
        if slot == "两国" and self.chance(0.35):
            heading = self.choice(("两国", "省份简称"))
            return [(name, "LOC") for name in distinct(self.choice(self.lexicon[heading]) for _ in range(3))]
        if slot == "国" and self.chance(0.06):
            return [(self.compose("单字国"), "LOC")]
        return super().entity(slot, before)

    def walk(self):
        """A template put together from several: what follows a slot is what follows such a slot in some template."""
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
        """A template with its fixed words replaced, left out and added to, and words in place of some slots."""
        rate, chance = self.choice((0.1, 0.25, 0.5, 0.8, 1.0)), self.random.random
        new = [self.rough_literal(parts[0], rate, False)]
        for i in range(1, len(parts), 2):
            apart = parts[i - 1] and parts[i + 1]  # next to a name, an ordinary word could be read as a part of it
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
        if self.chance(0.3):  # 公司 is left out: 友谊公司 is a name
            return self.word("n") + self.choice(("部门", "单位", "企业", "机构", "行业", "组织"))
        return self.choice(DETERMINERS) + self.choice(GENERIC_ORGANISATIONS)

    def rough_literal(self, literal, rate, after_slot):
        """Fixed words, each replaced with the probability `rate`, and other words put in between.

        The words next to a slot stay, unless they are verbs or adverbs: a noun there might extend the name.
        after_slot: whether a slot stands before the literal.
        """
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
        """The words of a clause without a name, each replaced with the probability `rate`."""
        words, chance = self.choice(self.clauses), self.random.random
        pools = (dictionary.pool_of(word) if chance() < rate else None for word in words)
        return "".join(
            pool[int(chance() * len(pool))] if pool else word for word, pool in zip(words, pools, strict=True)
        )


def walk_kind(slot):
    """What a walk knows of a slot: the type of a name, else the slot itself."""
    return slot_kind(slot) or slot
