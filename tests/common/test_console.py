"""What is said while a command works.     python -m pytest tests/common/test_console.py"""

import time

from alpaca.common import console


def test_whole_lines_now_and_then_where_the_output_goes_to_a_file(monkeypatch, capsys):
    """Items of 7 s: after 10 s, then every minute; each line after what it counts, and without carriage returns."""
    clock = iter(range(100, 10000, 7))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    seen = []
    for item in console.progress_or_lines(range(20), 20, "回答", "条"):
        seen.append((item, capsys.readouterr().err))
    said = {item: line for item, line in seen if line}
    assert list(said) == [2, 11] and not "".join(said.values()).count("\r")
    assert said[2] == "回答 2/20 条，每秒 0.1 条，还要 0:04:12\n"
    assert capsys.readouterr().err == "回答 20/20 条，每秒 0.1 条，还要 0:00:00\n"
