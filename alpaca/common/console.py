"""What a person sees while a command runs, from rank 0 alone: status lines and progress bars on stderr."""

import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from tqdm import tqdm

FIRST_LINE_SECONDS, LINE_SECONDS = 10, 60  # between the lines that stand for a bar in a file


def forgive_encoding():
    """Let stdout escape what its encoding lacks, as stderr does: no result is lost because a character cannot be shown."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":  # None: closed, or a stand-in of a test
            stream.reconfigure(errors="backslashreplace")


def is_main():
    """True on the one process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message):
    """A status line on stderr, from rank 0 alone, that does not break a progress bar."""
    if is_main():
        with quiet_if_gone():
            tqdm.write(message, file=sys.stderr)


@contextmanager
def quiet_if_gone():
    """A terminal or a pipe that is gone ends nothing: what is written to stderr goes nowhere from then on."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def progress(iterable=None, **options):
    """A bar on rank 0's terminal, once a step has taken more than a second; none where the output goes to a file."""
    shown = {"disable": None if is_main() else True, "delay": 1, "dynamic_ncols": True, "leave": None}
    return tqdm(iterable, **shown, **options)


@contextmanager
def waiting(what, every=30):
    """Meanwhile, say every so many seconds that `what` is still under way."""
    start, ended = time.time(), Event()

    def tell():
        while not ended.wait(every):
            say(f"{what}，已经 {time.time() - start:.0f} 秒")

    Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def progress_or_lines(iterable, total, desc, unit):
    """As `progress`; where the output goes to a file, a whole line now and then: how much is done, how fast, how long yet."""
    if sys.stderr.isatty():
        yield from progress(iterable, total=total, desc=desc, unit=unit)
        return
    begin, next_line = None, FIRST_LINE_SECONDS
    for done, item in enumerate(iterable):
        begin = begin or time.monotonic()  # the first took longer than its share
        yield item
        passed = time.monotonic() - begin
        if done and passed > next_line:
            next_line = passed + LINE_SECONDS
            left = timedelta(seconds=round((total - done - 1) * passed / done))
            say(f"{desc} {done + 1}/{total} {unit}，每秒 {done / passed:.1f} {unit}，还要 {left}")


def end_bars():
    """Leave the progress bar's line, so that an error stands on its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        with quiet_if_gone():
            bar.close()
