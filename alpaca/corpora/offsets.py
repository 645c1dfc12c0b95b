"""Whether entities stand where a corpus says, and if not, how it may have counted."""

from alpaca.common.errors import UserError

FEWEST, SHARE = 5, 0.5  # of so many entities, such a share in the wrong place is a fault of the whole file
# How else offsets are counted -> (what to say, the part of the text that they mean then); of two ways that fit equally
# often the first: those that differ in few texts only before the one that differs in all.
OTHER_COUNTS = {
    "end + 1": (
        "end is the last character; read an entity_list with --ends=inclusive, elsewhere add 1 to each end",
        lambda t, b, e: t[b : e + 1],
    ),
    "begin - 1": (
        "they count from 1, end is the last character; subtract 1 from each begin",
        lambda t, b, e: t[b - 1 : e],
    ),
    "UTF-8 bytes": ("they count bytes; count characters", lambda t, b, e: t.encode()[b:e].decode(errors="replace")),
    "CRLF": ("they count a line end as two; count characters", lambda t, b, e: t.replace("\n", "\r\n")[b:e]),
    "both - 1": ("they count from 1; subtract 1 from both", lambda t, b, e: t[b - 1 : e - 1]),
    "end - 1": (
        "end is the character behind already; leave out --ends=inclusive, or subtract 1 from each end",
        lambda t, b, e: t[b : e - 1],
    ),
}


def stands_at(text, begin, end, entity):
    """Whether the entity is the characters [begin, end) of the text."""
    return 0 <= begin < end <= len(text) and text[begin:end] == entity


def in_characters(text, mark):
    """A Mark whose offsets count UTF-16 units, as JavaScript does (an emoji is two) -> the same in characters.

    None for a mark that is nowhere then.
    """
    units, entity = text.encode("utf-16-le"), mark.entity.encode("utf-16-le", "surrogatepass")
    if not 0 <= mark.begin < mark.end <= len(units) // 2 or units[2 * mark.begin : 2 * mark.end] != entity:
        return None
    begin = len(units[: 2 * mark.begin].decode("utf-16-le", "ignore"))
    end = begin + len(mark.entity)
    return mark._replace(begin=begin, end=end) if stands_at(text, begin, end, mark.entity) else None


def other_counts(text, begin, end, entity):
    """The keys of OTHER_COUNTS with which the entity is where the corpus says, as a list."""
    if begin < 0 or not entity:
        return []
    return [name for name, (_, part) in OTHER_COUNTS.items() if part(text, begin, end) == entity]


def refuse_misfits(path, marks, misfits):
    """UserError, with the likely cause, where most entities of a file are not at their place.

    marks: how many entities the file has; misfits: (text of the sentence, Mark) of each that is not at its place.
    """
    if marks < FEWEST or len(misfits) < SHARE * marks:
        return
    ways = [name for text, mark in misfits for name in other_counts(text, mark.begin, mark.end, mark.entity)]
    name = max(OTHER_COUNTS, key=ways.count)
    cause = "are the offsets those of another version of the text?"
    if 2 * ways.count(name) > len(misfits):
        cause = f"{ways.count(name)} of them fit with {name}: {OTHER_COUNTS[name][0]}"
    _, mark = misfits[0]
    raise UserError(
        f"{path}:{mark.line}: {mark.entity!r} is not at [{mark.begin}, {mark.end}) of the text, and so it is with "
        f"{len(misfits)} of the {marks} entities of this file; {cause}"
    )
