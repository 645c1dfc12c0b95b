"""Paths as people type and paste them."""

from pathlib import Path

QUOTES = {"“": "”", "‘": "’", "「": "」", "『": "』"}


def user_path(text):
    """The Path of an option: `~` is one's home, also behind `=`, and quotes of a Chinese input method around it go."""
    text = text.strip()
    if not Path(text).exists() and len(text) > 1 and QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1]
    return Path(text).expanduser()
