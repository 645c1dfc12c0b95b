"""Answers of one process or of several, in the order of their texts."""

import time
from itertools import islice

SHARE = 256  # texts that a process takes at a time
AHEAD = 10_000  # so many texts are answered at most before one that takes long; their rows wait in memory
SEND_SECONDS, WAIT_SECONDS = 0.2, 0.02


def in_order(processes, numbered, total, answer):
    """Yield what `answer` makes of each item, in order, on rank 0; on the others nothing, until all is done.

    numbered: an iterator of (number, item) from 0 on, the same on every process. answer: an Answering of
    alpaca/answering/texts.py; its results are what JSON holds.
    """
    number = processes.wait_for_first()
    ended = answer(_own(processes, numbered, total), (total - number) // processes.count)
    with processes.minding_sigterm():
        if processes.rank:
            _send(processes, ended)
            processes.leave()
        else:
            yield from _gather(processes, ended, number, total)
            processes.wait_for_others()


def _gather(processes, ended, number, total):
    early = {}
    while number < total:
        processes.end_if_told()
        found = next(ended, None)
        if found is None:  # nothing is left to do here; others may be at work
            time.sleep(WAIT_SECONDS)
        early.update(found or ())
        early.update(processes.received())
        begin = number
        while number in early:
            yield early.pop(number)
            number += 1
        if number > begin:
            processes.finished(number)


def _own(processes, numbered, total):
    """The items of this process, and None between its shares and while the rows of others are waited for."""
    at = 0
    for share in processes.shares(total, SHARE, AHEAD):
        if share is not None:
            next(islice(numbered, share.start - at, share.start - at), None)  # what is others'
            yield from islice(numbered, len(share))
            at = share.stop
        yield None


def _send(processes, ended):
    waiting, last = [], time.monotonic()
    for found in ended:
        processes.end_if_told()
        waiting += found
        if waiting and time.monotonic() - last > SEND_SECONDS:
            processes.send(waiting)
            waiting, last = [], time.monotonic()
    if waiting:
        processes.send(waiting)
