"""Every command of README.md, as typed, on the embedded model.     python -m pytest tests/test_readme.py

All ```bash blocks run in order, in one copy of the repository, each from its root, with standard input closed; those
that are the same on the embedded model run once. Changed are only the size (7B, 7b and 13B become tiny), how much is
trained and answered (SHORTER), and the port of the deepspeed launcher, so that nothing else on the machine is in the
way. The real corpora that README.md names are played by a part of the demo's own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import config_tables
from alpaca.common.option_help import _source
from harness import free_port

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README_EN.md")
TIMEOUT = 600  # seconds for one block, on a machine that has other things to do
SHORTER = {  # how a line begins -> what is added to it; an adapter of 20 steps may not know yet how an answer ends
    r"(deepspeed|python) train_": " --max_steps=20",
    r"python test\.py": " --max_examples=20 --max_new_tokens=64",
    r"python predict\.py": " --max_new_tokens=64",
}

# Every line of the ```console blocks: a clone, make (which runs this test), installation, long training, several GPUs,
# a server.
CONSOLE = """\
git clone <repository> Chinese-LLaMA-Alpaca-LoRA-Tuning
cd Chinese-LLaMA-Alpaca-LoRA-Tuning
make demo
make test
source .venv/bin/activate
python3 -m venv .venv
source .venv/bin/activate
pip install -r requirements.txt
deepspeed train_trainer.py --data_name=mine --model_dir=./model_hub/chinese-alpaca-7b
python test.py --data_name=mine
python predict.py --data_name=mine --text=周五上午，程立群到了苏州。
deepspeed train_trainer.py --data_name=qa --model_dir=./model_hub/chinese-alpaca-7b --eval_steps=100 --best=loss
python test.py --data_name=qa --metric=exact
python predict.py --data_name=qa --text=一周有几天？
deepspeed --num_gpus=4 train_trainer.py --data_name=msra --model_dir=./model_hub/chinese-alpaca-7b
deepspeed --include=localhost:1,3 train_deepspeed.py --data_name=msra --model_dir=./model_hub/chinese-alpaca-7b
python benchmarks/train_speed.py --gpus=2,4 --batch=64,192 --zero=1 --how=prefix,trainer --steps=25 --shape=7b --corpus=<msra_train.txt> --tokenizer=<tokenizer.model>
deepspeed --hostfile=hostfile train_trainer.py --data_name=msra --model_dir=./model_hub/chinese-alpaca-7b
python benchmarks/train_speed.py --shape=7b --batch=12 --how=peft,liger,original,prefix,trainer --steps=25 --seconds=8 --corpus=<msra_train.txt> --tokenizer=<tokenizer.model>
pip install gradio==6.31.0
python web_ner.py
"""


def blocks(readme, language):
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def on_tiny(text):
    return re.sub("7B|7b|13B", "tiny", text)


COMMANDS = list(dict.fromkeys(map(on_tiny, blocks("README.md", "bash"))))


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
    """The repository as a clone would have it, plus a small corpus under the names of MSRA's files."""
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
    return folder


def names_of(readme):
    """The paths in the annotated trees of a README, from the repository's root."""
    paths = []
    for tree in blocks(readme, "text"):
        root, *lines = tree.splitlines()
        above = [] if root == "." else [root]
        if not lines or not lines[0].startswith("├── "):
            continue
        for line in lines:
            head, name = re.fullmatch(r"((?:│   |    )*)[├└]── (\S+).*", line).groups()
            depth = len(head) // 4
            above = above[: depth + (root != ".")] + [name]
            paths.append("/".join(above))
    return paths


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_block(copy, number):
    block = shortened(COMMANDS[number], free_port())
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=copy,
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
    assert process.returncode == 0 and "Traceback" not in output, f"{block}\n{output[-6000:]}"


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_names_what_is_there(copy, readme):
    """After all blocks have run: also what convert, merge, process, training and testing are said to write."""
    paths = names_of(readme)
    assert len(paths) > 40
    assert [path for path in paths if not (copy / on_tiny(path)).exists()] == []


def test_no_broken_command_hides_in_a_console_block():
    assert "".join(blocks("README.md", "console")) == CONSOLE


def test_both_languages_have_the_same_commands():
    assert blocks("README_EN.md", "bash") == blocks("README.md", "bash")
    assert blocks("README_EN.md", "console") == blocks("README.md", "console")


@pytest.mark.parametrize("readme", READMES)
def test_settings_shown_are_those_of_the_code(readme):
    assert config_tables.shown(readme) == config_tables.tables(readme), "python tests/config_tables.py writes it anew"
    (deepspeed,) = (block for block in blocks(readme, "json") if "optimizer" in block)
    assert json.loads(deepspeed) == json.loads((ROOT / "deepspeed.json").read_text(encoding="utf-8"))


def test_every_script_has_its_table():
    found = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("model_hub/*.py")) if "\nCONFIG = {" in path.read_text()]
    names = {str(path.relative_to(ROOT)) for path in found}
    assert names == {*config_tables.SCRIPTS, "train_deepspeed.py"}
    (_, one), (_, other) = (_source(ROOT / script) for script in ("train_trainer.py", "train_deepspeed.py"))
    assert other == {key: comment.replace("train_trainer", "train_deepspeed") for key, comment in one.items()}


@pytest.mark.parametrize("readme", READMES)
def test_no_figure_is_left_to_be_filled_in(readme):
    assert not re.search(r"TODO|@@|XX", (ROOT / readme).read_text(encoding="utf-8"))
