"""CoNLL columns, as Label Studio exports them: the token first, its tag last, others between.

-DOCSTART- -X- O
梁 -X- _ B-PER
"""

import re

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_lines
from alpaca.corpora.tagged_columns import read_tagged_sentences, split_columns

MARKS = set("，。；？！")
CHINESE = re.compile("[\u3400-\u9fff]")


def is_conll(head):
    columns = split_columns(head.line)
    return columns is not None and columns.count > 2


def read_conll(path, problems):
    """Yield each Sentence; UserError for whole clauses as tokens, which no tag can say the entities of."""
    for number, line in read_lines(path):
        token = line.split(None, 1)[0] if line.strip() else ""
        if MARKS & set(token) and CHINESE.search(token):
            raise UserError(
                f"{path}:{number}: {token[:40]!r} is a clause, not a token: Label Studio cuts its CoNLL export at "
                "blanks, so where entities begin and end in Chinese is lost; export JSON instead"
            )
    yield from read_tagged_sentences(path, problems)
