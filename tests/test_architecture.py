"""python -m pytest tests/test_architecture.py: docs/ARCHITECTURE.md names files and functions that exist."""

import re

from harness import ROOT

PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
PATH = r"[\w./-]+(?:\.py|/)"


def test_the_files_that_it_names_exist():
    named = set(re.findall(f"`({PATH})`", PAGE)) | set(re.findall(r"[\w/]+\.py|alpaca/\w+", PAGE))
    made_by_training = {"adapter_model/"}
    missing = {name for name in named - made_by_training if not (ROOT / name).exists()}
    assert len(named) > 40 and not missing


def test_the_functions_stand_in_the_files_that_it_names():
    places = re.findall(r"(\w+_\w+)\s+(?:\(|in\s+)`([\w/]+\.py)`", PAGE)
    assert len(places) >= 6
    for name, path in places:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (name, path)


def test_every_room_is_in_the_picture():
    picture = PAGE.split("```")[1]
    rooms = {f"alpaca/{folder.name}" for folder in (ROOT / "alpaca").iterdir() if list(folder.glob("*.py"))}
    assert len(rooms) >= 7 and rooms == set(re.findall(r"alpaca/\w+", picture))


def test_it_is_one_page():
    assert len(PAGE.splitlines()) <= 120
