"""The house holds its shape: which way imports run, whose names are whose, what an import may do.

    python -m pytest tests/test_layout.py

A command -> training | weights | page -> answering -> scoring, corpora -> models -> dataset, config_utils -> common: an
arrow may skip floors, none runs up or sideways. Only tests import a command or embedded_model; only web_ner.py has the
page. All tracked files are read with `ast`, imports inside functions included.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from harness import ROOT

FLOORS = {
    "common": 0,
    "dataset": 1,
    "config_utils": 1,
    "models": 2,
    "scoring": 3,
    "corpora": 3,
    "answering": 4,
    "training": 5,
    "weights": 5,
    "page": 5,
    "command": 6,
    "embedded_model": 6,
    "tools": 6,
    "benchmarks": 7,
    "tests": 7,
}
LENGTH = 350  # lines of a code file, tests aside
FOLDERS_ON_THE_PATH = ("", "tests", "tests/weights", "benchmarks", "tools", "embedded_model", "model_hub")

# What is not as it should be yet. Each line is to go: the test fails as well where one of them is no longer true.
KNOWN_ARROWS = {
    ("benchmarks/demo_baselines.py", "embedded_model"): "its surnames are those of the demo's lexicon",
    ("benchmarks/reliability.py", "tests"): "its records and its log reader are those of the tests",
}


def tracked():
    """The project's Python files, relative to its root; new ones that git does not ignore too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(Path(name) for name in listed if (ROOT / name).is_file())


FILES = tracked()


def room_of(file):
    """The room that a file stands in, a key of FLOORS; KeyError for one that nobody has drawn."""
    first, *rest = file.with_suffix("").parts
    if not rest:
        return first if first in ("dataset", "config_utils") else "command"
    if first == "alpaca":
        return {"__init__": "common"}.get(rest[0], rest[0])
    return "command" if first == "model_hub" else first


def module_names():
    """{dotted name: file} of all that can be imported; a script's folder is on its own path."""
    names = {}
    for file in FILES:
        for folder in FOLDERS_ON_THE_PATH:
            if file.is_relative_to(folder):
                parts = file.relative_to(folder).with_suffix("").parts
                names.setdefault(".".join(parts[:-1] if parts[-1] == "__init__" else parts), file)
    return names


MODULES = module_names()
OWN = {name.partition(".")[0] for name in MODULES} | {"alpaca"}


def imports_of(file, tree):
    """(line, module, name or None, as what) of each import; relative ones are made absolute, importlib's are seen too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            package = file.parent.parts[: len(file.parent.parts) - node.level + 1] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, module, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, node.args[0].value, None, None


def target_of(module, name):
    """The file that an import reads (of a folder, one in it), None for a library's; KeyError for one that there is not."""
    if module.partition(".")[0] not in OWN:
        return None
    for wanted in (f"{module}.{name}", module) if module != "alpaca" else (f"{module}.{name}",):
        inside = [file for known, file in MODULES.items() if f"{known}.".startswith(f"{wanted}.")]
        if inside:
            return MODULES.get(wanted, inside[0])
    raise KeyError(module)


def parse(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def wrong_arrows(file, tree):
    """(room imported, line) of the imports of a file that run up or sideways, or into a room that is not there."""
    room = room_of(file)
    for line, module, name, _ in imports_of(file, tree):
        try:
            target = target_of(module, name)
            other = room_of(target) if target else room
            floor = FLOORS[other]
        except KeyError:
            yield f"{module} (no such room or file)", line
            continue
        if other == room and not (room == "command" and target):
            continue
        if room == "tests":
            continue
        inside = other not in ("command", "embedded_model", "benchmarks", "tools")
        of_page = other != "page" or file == Path("web_ner.py")
        if FLOORS[room] <= floor or not inside or not of_page:
            yield other, line


def test_every_file_stands_in_a_room():
    assert {str(file) for file in FILES if room_of(file) not in FLOORS} == set()


def test_imports_run_down():
    found = {(str(file), other): line for file in FILES for other, line in wrong_arrows(file, parse(file))}
    unknown = [
        f"{file}:{line}: imports {other}" for (file, other), line in found.items() if (file, other) not in KNOWN_ARROWS
    ]
    assert unknown == [] and KNOWN_ARROWS.keys() - found.keys() == set()


@pytest.mark.parametrize(
    "file, source",
    [
        ("alpaca/common/console.py", "import dataset"),
        ("alpaca/common/console.py", "def f():\n    from alpaca import models"),
        ("alpaca/common/console.py", "def f():\n    from alpaca.models import base"),
        ("alpaca/common/console.py", "from ..models import base"),
        ("alpaca/common/console.py", "import importlib\nimportlib.import_module('alpaca.models.base')"),
        ("alpaca/scoring/metrics.py", "from alpaca.corpora.labels import read_labels"),
        ("alpaca/training/loss.py", "from alpaca.weights import checksums"),
        ("alpaca/answering/row.py", "from alpaca.attic.old import thing"),
        ("alpaca/answering/row.py", "import alpaca.answering.missing"),
        ("alpaca/answering/row.py", "from alpaca import attic"),
        ("alpaca/weights/checksums.py", "import predict"),
        ("alpaca/weights/checksums.py", "from embedded_model import tasks"),
        ("predict.py", "import chat_ner"),
        ("predict.py", "from alpaca.page.models import Models"),
        ("dataset.py", "from config_utils import Config"),
        ("embedded_model/tasks.py", "import process"),
        ("benchmarks/loss_curves.py", "import train_trainer"),
    ],
)
def test_an_arrow_that_runs_up_is_seen(file, source):
    assert len(list(wrong_arrows(Path(file), ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "file, source",
    [
        ("web_ner.py", "from alpaca.page.models import Models"),
        ("predict.py", "import json, torch\nfrom alpaca.common import start\nimport dataset"),
        ("alpaca/answering/row.py", "from . import grammar\nfrom alpaca.models import base"),
        ("tests/harness.py", "import predict\nfrom embedded_model import tasks"),
    ],
)
def test_an_arrow_that_runs_down_is_allowed(file, source):
    assert list(wrong_arrows(Path(file), ast.parse(source))) == []


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def borrowed_underscores(file, tree):
    """(name, line) of the underscore names that a file takes from another of ours, imported or through what it imported."""
    imported = set()
    for line, module, name, bound in imports_of(file, tree):
        if module.partition(".")[0] in OWN and bound:
            imported.add(bound)
            if is_private(name or ""):
                yield name, line
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            holder = ast.unparse(node.value)
            if any(holder == name or holder.startswith(f"{name}.") for name in imported):
                yield f"{holder}.{node.attr}", node.lineno


def test_no_module_uses_the_underscore_names_of_another():
    found = [(file, line, name) for file in FILES for name, line in borrowed_underscores(file, parse(file))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from dataset import _occurrences",
        "import dataset\ndataset._occurrences",
        "from alpaca.answering import row as rows\nrows.Row._note",
        "def f():\n    import alpaca.answering.row\n    return alpaca.answering.row._x",
    ],
)
def test_a_borrowed_underscore_is_seen(source):
    assert len(list(borrowed_underscores(Path("predict.py"), ast.parse(source)))) == 1


def test_no_code_file_is_long():
    sizes = {str(f): len((ROOT / f).read_text(encoding="utf-8").splitlines()) for f in FILES if room_of(f) != "tests"}
    assert {file for file, size in sizes.items() if size > LENGTH} == set()


# ---------------------------------------------------------------------------------------------------------------------
# what an import may do


# Imports each module named in argv, in one fresh interpreter. Prints whatever one of them changed that is not its own.
# Libraries set warning filters when they are imported: of those, only calls that our files make count.
WATCHED_IMPORTS = """
import importlib, os, sys, warnings
import transformers
root, names = sys.argv[1], sys.argv[2:]
calls = []
def watched(function):
    def call(*arguments, **options):
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(root + os.sep) and "site-packages" not in caller:
            calls.append(caller)
        return function(*arguments, **options)
    return call
warnings.filterwarnings, warnings.simplefilter = watched(warnings.filterwarnings), watched(warnings.simplefilter)
def state():
    return {
        "sys.excepthook": sys.excepthook,
        "warnings.filters": len(calls),
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR"),
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY"),
        "transformers' verbosity": transformers.logging.get_verbosity(),
    }
before = state()
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(f"{name}: {error!r}")
    after = state()
    for key in before:
        if before[key] != after[key]:
            print(f"{name} changes {key}")
    before = after
"""


def changes_of(names, env_path=ROOT):
    env = {"PATH": "", "HOME": "/nowhere", "PYTHONPATH": str(env_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WATCHED_IMPORTS, str(env_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_importing_is_free():
    names = [name for name in MODULES if name.split(".")[0] in ("alpaca", "dataset", "config_utils")]
    assert len(names) > 40 and changes_of(names) == []


def test_an_import_that_is_not_free_is_seen(tmp_path):
    sources = {
        "hooks": "import sys\nsys.excepthook = print",
        "silences": "import warnings\nwarnings.filterwarnings('ignore', message='x')",
        "chooses": "import os\nos.environ['DS_ACCELERATOR'] = 'cpu'",
        "quiets": "import transformers\ntransformers.logging.set_verbosity_error()",
        "exits": "raise SystemExit(2)",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    assert changes_of([*sources], tmp_path) == [
        "hooks changes sys.excepthook",
        "silences changes warnings.filters",
        "chooses changes DS_ACCELERATOR",
        "quiets changes transformers' verbosity",
        "exits: SystemExit(2)",
    ]


# Somebody else's program: it has modules with the names of two of ours, and no transformers.
STRANGER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "peft", "sentencepiece", "deepspeed"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
before = set(sys.modules)
from alpaca.training.prefix_tree import prefix_collator
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"alpaca"}, new
import config_utils, dataset
assert dataset.MINE and config_utils.MINE
from types import SimpleNamespace
examples = [SimpleNamespace(prompt_ids=[1, 5, 6, 7, 8, last], answer_ids=[9, 2]) for last in (3, 4)]
batch = prefix_collator(examples)
assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 8, 3, 9, 4, 9]], batch["input_ids"]
assert batch["labels"].tolist() == [[9, 2, 9, 2]] and batch["attention_mask"].shape == (1, 1, 9, 9)
assert prefix_collator([], bos_id=42)["input_ids"].tolist() == [[42]]
"""


@pytest.mark.slow
def test_prefix_collator_works_in_another_program(tmp_path):
    for name in ("dataset", "config_utils"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n", encoding="utf-8")
    (tmp_path / "program.py").write_text(STRANGER, encoding="utf-8")
    command = [sys.executable, "program.py"]
    env = {"PATH": "", "HOME": "/nowhere", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
