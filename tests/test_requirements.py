"""A version has one home, a requirements file.     python -m pytest tests/test_requirements.py"""

import ast
import re
import subprocess
import sys
from pathlib import Path

from harness import ROOT

OPTIONAL = {"trl", "datasets", "liger_kernel", "vllm"}  # what benchmarks compare with; each says which version
LISTING = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
NAMES = [name for name in LISTING.splitlines() if (ROOT / name).is_file()]


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


RUN = pins("requirements.txt") | pins("requirements-nf4.txt")
TOOLS = pins("requirements-dev.txt")


def imported(path):
    """Top-level names of the absolute imports of a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_what_is_imported_is_pinned():
    scripts = [Path(name) for name in NAMES if name.endswith(".py")]
    ours = {part.removesuffix(".py") for script in scripts for part in script.parts}
    missing = set()
    for script in scripts:
        known = {*RUN, *sys.stdlib_module_names} | ours
        if script.parts[0] in ("tests", "benchmarks"):
            known |= {name.removeprefix("pytest-") for name in TOOLS} | OPTIONAL
        missing |= {(str(script), name) for name in imported(ROOT / script) if name not in known}
    assert len(scripts) > 40 and missing == set()


def test_a_version_named_elsewhere_is_the_pinned_one():
    """`name==version` wherever it stands, and `name version` on the front pages, where ranges (2.11–2.13) are left alone."""
    pinned, seen, wrong = {**RUN, **TOOLS}, set(), []
    for name in NAMES:
        if not name.endswith((".py", ".md", ".toml", "Makefile")):
            continue
        pattern = (
            r"\b([a-z][a-z0-9-]*)(?:==| )(\d+(?:\.\d+)+)(?![\d.–])"
            if name.startswith("README")
            else r"([\w-]+)==([\d.]*\d)"
        )
        for package, version in re.findall(pattern, (ROOT / name).read_text(encoding="utf-8")):
            if package in pinned:
                seen.add((name, package))
                wrong += [(name, package, version)] if version != pinned[package] else []
    assert wrong == []
    assert {("README.md", "torch"), ("README_EN.md", "torch"), ("web_ner.py", "gradio")} <= seen
