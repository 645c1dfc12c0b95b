"""The page in a real browser.     python -m pytest tests/page/test_web.py

Needs gradio, playwright and the system's chromium, else what needs them is skipped. The picture of README.md, with the
demo's adapter as it is now, after `make tiny`:

    python tests/page/test_web.py benchmarks/results/web_ner.png
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]  # run without pytest

import web_ner
from alpaca.answering.generate import generate
from alpaca.answering.predictions import make_grammar, predict_rows
from alpaca.answering.windows import cut_examples, rows_of_texts
from alpaca.common.errors import UserError
from alpaca.corpora.inputs import read_texts
from alpaca.models.base import load_for_inference
from alpaca.models.templates import encode_prompts, message_of
from alpaca.page.address import check_address
from alpaca.page.marks import HTML, PREVIEWED, file_html, pieces_of, row_html
from alpaca.page.models import BASE
from config_utils import load_config, parse_config
from dataset import example_of_input, task_of
from harness import free_port

TOKENS = 24
TEXT = '王明说：<b>${1+1}</b> {{value}} `北京`\\n & "上海"。\n李华去年在长沙。'
LONG = "王明去年在北京说新闻。李华在上海说新闻新闻新闻。" * 12
QUESTION = "北京在中国？"
# What the server may do: talk to this machine. Python runs this file at its start.
WATCH = """
import ipaddress, os, sys
def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0] or "localhost"
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
        with open(os.environ["WATCHED"], "a", encoding="utf-8") as file:
            print(event, arguments, file=file)
sys.addaudithook(watch)
"""


# ---------------------------------------------------------------------------------------------------------------------
# a server and a browser


@contextmanager
def serving(folder, *options, env=None):
    """The address of web_ner.py, run in a folder."""
    port = free_port()
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")  # where nobody is
    command = [sys.executable, str(ROOT / "web_ner.py"), f"--port={port}", *options]
    address, said = f"http://127.0.0.1:{port}", []
    with subprocess.Popen(
        command, cwd=folder, env={**os.environ, **proxies, **(env or {})}, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            said.append(line)
            if address in line:
                break
        else:
            pytest.fail("".join(said))
        reader = threading.Thread(target=lambda: said.extend(process.stderr))  # a full pipe would stop the server
        reader.start()
        try:
            yield address
        finally:
            process.terminate()
            reader.join(timeout=30)
    assert process.returncode == 130 and "Traceback" not in "".join(said), "".join(said)


@contextmanager
def browsing():
    """A headless chromium that can reach nothing but this machine; skips the test where there is none."""
    pytest.importorskip("gradio")
    driver = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("chromium is not installed")
    offline = ["--no-sandbox", "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=offline)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(workspace, tmp_path_factory, browser):
    """A checkpoint/ with two adapters; random, the first says something of every text, whatever training came to."""
    folder = tmp_path_factory.mktemp("web")
    for trainer in ("train_trainer", "train_deepspeed"):
        adapter = folder / "checkpoint" / "mine" / trainer / "adapter_model"
        shutil.copytree(workspace / "checkpoint" / "mine" / trainer / "adapter_model", adapter)
    torch.manual_seed(0)
    path = folder / "checkpoint" / "mine" / "train_trainer" / "adapter_model" / "adapter_model.safetensors"
    weights = {name: torch.randn_like(t) if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def address(folder):
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    env = {"PYTHONPATH": str(folder / "watch"), "WATCHED": str(folder / "watched.txt")}
    options = ["--data_name=mine", "--lora_model=checkpoint/mine/train_trainer/adapter_model", "--precision=fp32"]
    with serving(folder, *options, f"--max_new_tokens={TOKENS}", env=env) as address:
        yield address
    assert not (folder / "watched.txt").exists(), (folder / "watched.txt").read_text(encoding="utf-8")


@pytest.fixture
def page(browser, address):
    """The page, opened anew. Afterwards: nothing in the console, no request to another host."""
    complaints, hosts = [], set()
    page = browser.new_page(locale="zh-CN")
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(re.sub(r"^(blob|ws):", "", request.url).split("/")[2]))
    page.goto(address)
    page.wait_for_selector("#result", state="attached")
    yield page
    page.close()
    assert complaints == [] and hosts == {address.removeprefix("http://")}


@pytest.fixture(scope="module")
def loaded(folder):
    """The same adapter, in this process."""
    adapter = folder / "checkpoint" / "mine" / "train_trainer" / "adapter_model"
    args, facts = load_config(adapter / "train_args.json")
    model, tokenizer = load_for_inference(adapter, args, facts, None, None, "fp32", "cpu")
    return SimpleNamespace(adapter=adapter, args=args, facts=facts, model=model, tokenizer=tokenizer)


def predicted(loaded, records):
    """What predict.py would write."""
    labels, *asked = task_of(loaded.facts)
    examples = [example_of_input(record, *asked) for record in records]
    cuts = cut_examples(examples, loaded.model, loaded.tokenizer, loaded.args, loaded.facts)
    parts = [part for cut in cuts for part in cut.parts]
    grammar = make_grammar("auto", loaded.adapter, loaded.tokenizer, labels)
    rows = predict_rows(loaded.model, loaded.tokenizer, parts, labels, TOKENS, 64, grammar)
    return list(rows_of_texts(examples, cuts, rows)), cuts


# ---------------------------------------------------------------------------------------------------------------------
# what a user does


def test_a_typed_text_is_marked(page, loaded):
    ((row,), _) = predicted(loaded, [{"text": TEXT}])
    assert row["entities"]
    page.fill("#text textarea", TEXT)
    page.click("#go")
    page.wait_for_selector("#result .entities")
    assert page.locator("#result .marked").text_content() == TEXT  # nothing of it has become HTML
    marks = page.locator("#result .marked mark")
    shown = {(m.text_content(), m.get_attribute("data-type")) for m in marks.all()}
    assert shown and shown <= {(e["entity"], e["type"]) for e in row["entities"]}
    cells = [line.locator("td").all_text_contents() for line in page.locator("#result tbody tr").all()]
    spans = ["，".join(f"{b}–{e}" for b, e in entity["spans"]) or "在更长的实体里" for entity in row["entities"]]
    assert [c[:3] for c in cells] == [[e["entity"], e["type"], s] for e, s in zip(row["entities"], spans, strict=True)]
    assert all(0 <= float(cell[3].rstrip("%")) <= 100 for cell in cells)


def test_an_example_is_answered_at_a_click(page):
    page.click(f"text={web_ner.EXAMPLES[1]}")
    page.wait_for_selector("#result .marked")
    assert page.locator("#result .marked").text_content() == web_ner.EXAMPLES[1]


def test_a_file_comes_back_as_predict_would_write_it(page, loaded, tmp_path):
    """Plain lines, one of them longer than a window."""
    upload = tmp_path / "我的 文本.txt"
    upload.write_text("王明在北京。\n\n" + LONG + "\n李华去年在上海。\n" + "新闻。\n" * 5, encoding="utf-8")
    rows, cuts = predicted(loaded, list(read_texts(upload)))
    assert [len(cut.windows) > 1 for cut in cuts] == [False, False, True] + 6 * [False]
    page.evaluate("""() => {
        window.bars = new Set();
        new MutationObserver(() => { const bar = document.querySelector("#result progress");
            if (bar) window.bars.add(bar.value + "/" + bar.max); })
            .observe(document.querySelector("#result"), {childList: true, subtree: true});
    }""")
    page.locator("input[type=file]").first.set_input_files(upload)
    page.wait_for_selector("#download", state="visible")
    assert page.evaluate("window.bars.size") > 0
    assert page.locator("#result .marked").count() == PREVIEWED
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename.endswith(".entities.jsonl")
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert unrounded(map(json.loads, lines)) == unrounded(rows)


def unrounded(rows):
    """Rows with log-probabilities as exact as they must be, in the order of their keys."""
    return json.loads(json.dumps(list(rows)), parse_float=lambda digits: pytest.approx(float(digits), abs=1e-2))


def test_a_long_file_can_be_stopped(page, tmp_path):
    """And another text is answered after that."""
    upload = tmp_path / "long.txt"
    upload.write_text((LONG + "\n") * 60, encoding="utf-8")
    page.locator("input[type=file]").first.set_input_files(upload)
    page.wait_for_selector("#result progress")
    page.click("#stop")
    page.wait_for_selector("#result >> text=已停止。")
    page.fill("#text textarea", "王明在北京。")
    page.click("#go")
    page.wait_for_selector("#result .marked")
    assert page.locator("#result").inner_text().startswith("王明在北京。")  # no sign of an error


def test_a_file_with_a_mistake_is_named(page, tmp_path):
    upload = tmp_path / "texts.jsonl"
    upload.write_text('{"text": "王明在北京。"}\n{"text": 王明}\n', encoding="utf-8")
    page.locator("input[type=file]").first.set_input_files(upload)
    page.wait_for_selector("text=texts.jsonl:2: not valid JSON")


def test_chat_streams_and_the_base_is_itself(page, loaded, folder):
    """The answer grows; it is that of whatever is chosen: of one adapter, the base, another, and the first again."""
    (prompt,) = encode_prompts(loaded.tokenizer, [message_of(QUESTION, "")])
    answer = lambda: next(generate(loaded.model, loaded.tokenizer, [prompt], TOKENS, 1)).text  # noqa: E731
    own = answer()
    with loaded.model.disable_adapter():
        base = answer()
    loaded.model.load_adapter(folder / "checkpoint" / "mine" / "train_deepspeed" / "adapter_model", "other")
    loaded.model.set_adapter("other")
    other = answer()
    loaded.model.set_adapter("default")
    loaded.model.delete_adapter("other")
    assert len({own, base, other}) == 3
    page.get_by_role("tab", name="闲聊").click()
    page.evaluate("""() => new MutationObserver(() => {
        const all = [...document.querySelectorAll("#log .answered")], last = all.pop()?.textContent;
        if (all.length + 1 == window.turn && last != window.said[window.said.length - 1]) window.said.push(last);
    }).observe(document.querySelector("#log"), {childList: true, subtree: true, characterData: true})""")
    turns = (None, own), (BASE, base), ("mine/train_deepspeed", other), ("mine/train_trainer", own)
    for number, (name, expected) in enumerate(turns, 1):
        if name:
            page.click("#lora input")
            page.get_by_role("option", name=name).click()
        page.evaluate("number => { window.said = []; window.turn = number; }", number)
        page.fill("#question :is(textarea, input)", QUESTION)
        page.press("#question :is(textarea, input)", "Enter")
        page.wait_for_function("expected => window.said[window.said.length - 1] === expected", arg=expected)
        said = [text for text in page.evaluate("window.said") if text != "…"]
        assert len(said) > 1 and all(later.startswith(earlier) for earlier, later in pairwise(said))
    assert page.locator("#log .asked").all_text_contents() == [QUESTION] * len(turns)


# ---------------------------------------------------------------------------------------------------------------------
# without a browser


def test_of_two_entities_that_overlap_the_first_is_marked():
    entities = [
        {"entity": "京大", "type": "地名", "spans": [[1, 3]]},
        {"entity": "北京", "type": "人名", "spans": [[0, 2]]},
        {"entity": "<学>", "type": "别的", "spans": [[3, 6]]},
    ]
    row = {"text": "北京大<学>$", "entities": entities}
    assert HTML.marked_text(pieces_of(row, ["人名", "地名"])) == (
        '<div class="marked"><mark class="c0" data-type="人名">北京</mark>大'
        '<mark class="c7" data-type="别的">&#60;学&#62;</mark>&#36;</div>'
    )


def test_a_confidence_that_is_not_calibrated_is_called_so():
    entity = {"entity": "北京", "type": "地名", "spans": [[0, 2]], "confidence": 0.9046, "log_probability": -2.5}
    row = {"text": "北京", "prediction": "北京_地名", "entities": [entity], "calibrated": True}
    shown = row_html(row, ["地名"])
    assert "<th>置信度</th>" in shown and "<td>90.5%</td>" in shown
    assert "<th>置信度（未校准）</th>" in row_html({**row, "calibrated": False}, ["地名"])


def test_answers_of_another_task_stand_as_they_are():
    row = {"text": "一周有几天？", "prediction": "七天<br>", "entities": []}
    assert row_html(row, None) == '<div class="marked">七天&#60;br&#62;</div>'
    assert file_html([row] * 2, None) == "<p>2 条回答</p>" + 2 * '<div class="marked">七天&#60;br&#62;</div>'


@pytest.mark.parametrize(
    "options, message",
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0: others could use the page; give --auth=user:password as well"),
        (["--host=::"], "give --auth"),
        (["--host=elsewhere"], "--host=elsewhere: expected an IP address"),
        (["--auth=nobody"], "--auth: expected user:password"),
        (["--auth=:secret"], "--auth: expected user:password"),
        (["--port=0"], "--port=0: expected 1 to 65535"),
    ],
)
def test_who_may_open_the_page(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        web_ner.main(parse_config(web_ner.CONFIG, web_ner.__file__, options))


def test_an_address_that_is_allowed():
    check = lambda *options: check_address(parse_config(web_ner.CONFIG, web_ner.__file__, options))  # noqa: E731
    port = f"--port={free_port()}"
    assert check(port) is None and check(port, "--host=localhost") is None
    assert check(port, "--host=0.0.0.0", "--auth=me:a:b") == ("me", "a:b")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use; name another port"):
        check(f"--port={taken.getsockname()[1]}")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=f"pip install {re.escape(web_ner.GRADIO)}$"):
        web_ner.main(parse_config(web_ner.CONFIG, web_ner.__file__, []))


# ---------------------------------------------------------------------------------------------------------------------
# the picture of README.md


def take_picture(path):
    with serving(ROOT) as address, browsing() as browser:
        page = browser.new_page(locale="zh-CN", viewport={"width": 1100, "height": 860})
        page.goto(address)
        page.click(f"text={web_ner.EXAMPLES[2]}")
        page.wait_for_selector("#result .entities")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # for what fades in
        page.screenshot(path=path)


if __name__ == "__main__":
    take_picture(sys.argv[1])
