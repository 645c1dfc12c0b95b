"""Dates and times of Excel's sheets: numbers that only their format tells from others.

ECMA-376, part 1: 18.8.30 (numFmt), 18.17.4 (dates and times). A number counts the days since the end of 1899, its fraction
is the time.
"""

import re
from datetime import datetime, timedelta

# Formats that a workbook does not spell out: those of all languages, and those that differ between East Asian ones.
DATES = {14, 15, 16, 17, 22, 27, 28, 29, 30, 31, 36, 50, 51, 52, 53, 54, 57, 58}
TIMES = {18, 19, 20, 21, 32, 33, 34, 35, 45, 47, 55, 56}
SPANS = {46}
LEAP_DAY = 60  # the 29th of February 1900, which Excel counts and which never was
LAST = 2958466  # the day after the last of the year 9999
SECONDS = 24 * 60 * 60


def kind_of_format(number, code):
    """date, time, span (of more than 24 hours, perhaps), or None where a format shows a number. code: None: built in."""
    if code is None:
        kinds = {"date": DATES, "time": TIMES, "span": SPANS}
        return next((kind for kind, numbers in kinds.items() if number in numbers), None)
    # without texts, single characters, fill, colours, conditions and languages
    code = re.sub(r'"[^"]*"|\\.|_.|\*.|\[(?!(?:h+|m+|s+)\])[^\]]*\]', "", code.partition(";")[0].lower())
    if "[" in code:
        return "span"
    if re.search("[hs]", code):
        return "date" if re.search("[yd]", code) else "time"  # m are minutes there
    return "date" if re.search("[ymd]", code) else None


def text_of_date(number, kind, from_1904=False):
    """As ISO 8601 writes it, to the second: a day, with its time where it has one; or hours, minutes and seconds."""
    if not 0 <= number < LAST:
        return number
    seconds = round(number * SECONDS)
    if kind == "span" or kind == "time" and number < 1:
        return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    begin = datetime(1904, 1, 1) if from_1904 else datetime(1899, 12, 31 if number < LEAP_DAY else 30)
    moment = begin + timedelta(seconds=seconds)
    return moment.isoformat(" ") if seconds % SECONDS else moment.date().isoformat()
