"""Every command of README.md and docs/zh/, as typed, on the embedded model.     python -m pytest tests/test_readme.py

All ```bash blocks run in order, in one copy of the repository, each from its root, with no standard input; those that
are the same on the embedded model run once. Changed are only the size (7B, 7b and 13B become tiny), how much is
trained, evaluated (60 rows) and answered (SHORTER), and the port of the launcher, so that nothing else on the machine is in the
way. The real corpora that the pages name are played by a part of the demo's own.
"""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config_utils import parse_config
from harness import ROOT, free_port, run_script
from tools import config_tables

SUBJECTS = ("seven_b", "data", "options", "training", "answering", "errors", "changes")  # in the order of the work
PAGES = ("README.md", *(f"docs/zh/{subject}.md" for subject in SUBJECTS))
TWINS = ("README_EN.md", *(f"docs/en/{subject}.md" for subject in SUBJECTS))
TIMEOUT = 600  # seconds for one block, on a machine that has other things to do
SHORTER = {  # how a line begins -> what is added to it; an adapter of 10 steps does not know yet how an answer ends
    r"(deepspeed|python) train_": " --max_steps=10",
    r"python test\.py": " --max_examples=20 --max_new_tokens=64",
    r"python predict\.py": " --max_new_tokens=64",
}

# A ```console block is not run: a clone, installation, long training, several GPUs, a server. Of what is ours there, the
# targets of make, the pins and the options are checked; these are the lines that are not.
OTHERS = """\
git clone <repository> Chinese-LLaMA-Alpaca-LoRA-Tuning
cd Chinese-LLaMA-Alpaca-LoRA-Tuning
python3 -m venv .venv
source .venv/bin/activate
pip install -r requirements.txt
git clone https://github.com/ggml-org/llama.cpp
pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt
python llama.cpp/convert_hf_to_gguf.py model_hub/chinese-alpaca-7b --outfile chinese-alpaca-7b.gguf
PYTHONPATH=llama.cpp/gguf-py python llama.cpp/examples/convert_legacy_llama.py model_hub/chinese-alpaca-7b-pth --outfile chinese-alpaca-7b.gguf
""".splitlines()


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    text = text_of(page)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def on_tiny(text):
    return re.sub("7B|7b|13B", "tiny", text)


COMMANDS = list(dict.fromkeys(on_tiny(block) for page in PAGES for block in blocks(page, "bash")))


def shortened(block, port):
    """A block as it is run here: with what SHORTER adds, and on a free port."""
    lines = block.splitlines()
    for i, line in enumerate(lines):
        shorter = next((added for start, added in SHORTER.items() if re.match(start, line)), None)
        if shorter and "--help" not in line:
            assert not re.search(r"\\$|[#|;&>]", line), f"nothing can be added to {line!r}"
            lines[i] = line.replace("deepspeed train_", f"deepspeed --master_port={port} train_") + shorter
    return "\n".join(lines)


def as_bio(line):
    """A JSON line of the demo corpus in two columns."""
    record = json.loads(line)
    tags = ["O"] * len(record["text"])
    for entity in record["entity_list"]:
        begin, end = entity["entity_index"]["begin"], entity["entity_index"]["end"]
        tags[begin:end] = [f"{'I' if i else 'B'}-{entity['entity_type']}" for i in range(end - begin)]
    return "".join(f"{char}\t{tag}\n" for char, tag in zip(record["text"], tags, strict=True)) + "\n"


def as_cluener(line):
    """A JSON line of the demo corpus in CLUENER's format."""
    record, labels = json.loads(line), {}
    for entity in record["entity_list"]:
        kind = {"PER": "name", "LOC": "address", "ORG": "organization"}[entity["entity_type"]]
        spans = labels.setdefault(kind, {}).setdefault(entity["entity"], [])
        spans.append([entity["entity_index"]["begin"], entity["entity_index"]["end"] - 1])
    return json.dumps({"text": record["text"], "label": labels}, ensure_ascii=False) + "\n"


def as_weibo(line):
    """A JSON line of the demo corpus as the Weibo corpus has it: a digit behind each character, tags like PER.NAM."""
    return re.sub(r"^(.)\t([BI]-...)?", lambda m: f"{m[1]}0\t{m[2] + '.NAM' if m[2] else ''}", as_bio(line), flags=re.M)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository as a clone would have it, with less to evaluate on, plus a small corpus under the names of MSRA's files."""
    folder = tmp_path_factory.mktemp("readme") / "repository"
    listing = subprocess.check_output(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT)
    for name in filter(None, listing.decode().split("\0")):
        if (ROOT / name).is_file():  # a file deleted, but not yet committed, is still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    msra = folder / "data" / "msra" / "ori_data"
    msra.mkdir(parents=True)
    for part, other_name, count in (("train", "train", 300), ("dev", "test", 60)):
        with (folder / "data" / "demo" / "ori_data" / f"{part}.txt").open(encoding="utf-8") as file:
            lines = file.readlines()[:count]
        for name in (f"{part}.txt", f"msra_{other_name}.txt"):
            (msra / name).write_text("".join(lines), encoding="utf-8")
        (msra / f"msra_{other_name}_bio.txt").write_text("".join(map(as_bio, lines)), encoding="utf-8")
        for name, file_name, convert in (
            ("cluener", f"{part}.json", as_cluener),
            ("weibo", f"weiboNER_2nd_conll.{part}", as_weibo),
        ):
            path = folder / "data" / name / "ori_data" / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(map(convert, lines)), encoding="utf-8")
    shutil.copyfile(msra / "dev.txt", folder / "data" / "demo" / "ori_data" / "dev.txt")
    return folder


def names_of(page):
    """The paths in the annotated trees of a page, from the repository's root; a line may name several files."""
    paths = []
    for tree in blocks(page, "text"):
        root, *lines = tree.splitlines()
        above = [] if root == "." else [root]
        if not lines or not lines[0].startswith("├── "):
            continue
        for line in lines:
            head, names = re.fullmatch(r"((?:│   |    )*)[├└]── (\S+(?: \S+)*)(?:  .*)?", line).groups()
            depth = len(head) // 4
            for name in names.split():
                above = above[: depth + (root != ".")] + [name]
                paths.append("/".join(above))
    return paths


def run_shell(lines, cwd):
    """What lines of a block print in bash."""
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", lines],
        cwd=cwd,
        env={**os.environ, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # so that what a block has started can be ended with it
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, f"{lines}\n{output[-6000:]}"
    return output


@pytest.fixture(scope="module")
def run_block(copy):
    """Runs a block in the copy, once; run_script does what is `python <script> …`, which `make demo` runs as it stands. In the
    first, README's own, `deepspeed` is the launcher itself; in the others run_script runs what it would start."""

    @functools.cache
    def run(number):
        block = shortened(COMMANDS[number], free_port())
        launcher = "python|deepspeed --master_port=[0-9]+" if number else "python"
        parts = re.split(rf"^((?:{launcher}) \S+\.py\b.*)$", block, flags=re.M)
        folder = copy
        for i, part in enumerate(parts):
            if i % 2:
                assert not re.search(r"[\\$`~*?#|;&<>]", part), f"only a shell knows what is meant by {part!r}"
                words = shlex.split(part)
                script, *options = words[1 + part.startswith("deepspeed") :]
                result = run_script(folder / script, *options, cwd=folder, check=False)
                output = result.stdout + result.stderr
                assert result.returncode == 0, f"{part}\n{output[-6000:]}"
            else:
                *output, last = run_shell(f"{part}\necho\npwd", folder).splitlines()
                output, folder = "\n".join(output), Path(last)
            assert "Traceback" not in output, f"{block}\n{output[-6000:]}"

    return run


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_block(run_block, number):
    run_block(number)


@pytest.mark.parametrize("page", [*PAGES, *TWINS])
def test_the_tree_names_what_is_there(copy, run_block, page):
    """Also what convert, merge, process, training and testing are said to write."""
    for number in range(len(COMMANDS)):
        run_block(number)
    paths = names_of(page)
    assert len(paths) > 30 or not page.startswith("README")
    assert [path for path in paths if not (copy / on_tiny(path)).exists()] == []


def test_no_broken_command_hides_in_a_console_block():
    """Nothing is left to be run differently from what is said: scripts are there, and their options are accepted."""
    targets = re.findall(r"^(\w+):", text_of("Makefile"), re.M)
    pins = text_of("requirements.txt") + text_of("requirements-dev.txt")
    lines = [line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]
    assert len(lines) > 10
    for line in set(lines) - set(OTHERS):
        if "127.0.0.1" in line:  # of the service: tests/page/test_web.py runs them
            continue
        if match := re.fullmatch(r"make (\w+)", line):
            assert match[1] in targets, line
        elif match := re.fullmatch(r"pip install (\S+)", line):
            assert f"\n{match[1]}\n" in pins, line
        else:
            command = r"(?:python|deepspeed(?: --(?:num_gpus|include|hostfile)=\S+)?) (\S+\.py)(.*)"
            script, options = re.fullmatch(command, line).groups()
            parse_config(config_tables.config_of(script), str(ROOT / script), shlex.split(options.replace("<", "")))


@pytest.mark.parametrize("page, twin", [*zip(PAGES, TWINS, strict=True)])
def test_both_languages_have_the_same_commands(page, twin):
    for language in ("bash", "console"):
        assert blocks(twin, language) == blocks(page, language)


@pytest.mark.parametrize("language", config_tables.LANGUAGES)
def test_options_shown_are_those_of_the_code(language):
    path = config_tables.path_of(language)
    assert text_of(path) == config_tables.page(language), "python tools/config_tables.py writes it anew"


def test_every_command_has_its_table():
    found = [*ROOT.glob("*.py"), *ROOT.glob("model_hub/*.py")]
    found = {str(path.relative_to(ROOT)) for path in found if "\nCONFIG = {" in path.read_text(encoding="utf-8")}
    assert found == {script for scripts in config_tables.TABLES for script in scripts}
    for language in config_tables.LANGUAGES:  # both trainers have the same options, defaults and comments
        assert {len(row) for row in config_tables.table(config_tables.TRAINERS, language)} == {3}


def test_pages_are_short():
    lines = {page: len(text_of(page).splitlines()) for page in (*PAGES, *TWINS)}
    assert all(170 <= lines.pop(readme) <= 200 for readme in ("README.md", "README_EN.md"))
    assert max(lines.values()) <= 200
    assert sum(count for page, count in lines.items() if page in PAGES) <= 700


@pytest.mark.parametrize("page", [*PAGES, *TWINS])
def test_links_lead_somewhere(page):
    """Files, and headings as GitHub names them."""
    links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text_of(page))
    for link in map("".join, links):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert link.startswith("http") or target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings], link


@pytest.mark.parametrize("page", [*PAGES, *TWINS])
def test_no_figure_is_left_to_be_filled_in(page):
    assert not re.search(r"TODO|@@|XX", text_of(page))
