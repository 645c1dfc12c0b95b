"""What every reader of a corpus yields: one sentence (or document) with the entities that are marked in it."""

from typing import NamedTuple


class Mark(NamedTuple):
    """One marked entity."""

    begin: int  # characters of the sentence's text, from 0
    end: int  # exclusive
    tag: str  # the type as the corpus writes it
    entity: str  # its characters as the corpus states them; they need not be those of the text
    line: int  # where in the file it stands, from 1


class Sentence(NamedTuple):
    """One sentence or document of a corpus."""

    line: int  # where in the file it begins, from 1
    text: str
    marks: list  # of Mark, in the order of the file
    path: object = None  # the file they stand in, where it is not the one that was named
