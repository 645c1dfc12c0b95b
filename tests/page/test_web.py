"""The page in a real browser.     python -m pytest tests/page/test_web.py

Needs gradio, playwright and the system's chromium, else what needs them is skipped. The picture of README.md, with the
demo's adapter as it is now, after `make tiny`:

    python tests/page/test_web.py benchmarks/results/web_ner.png
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
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
from alpaca.answering.predictions import held_instructs, make_grammar
from alpaca.answering.texts import Answering
from alpaca.answering.windows import cutter
from alpaca.corpora.inputs import read_texts
from alpaca.models.base import load_for_inference
from alpaca.models.templates import encode_prompts
from alpaca.page.guard import VARIABLE
from alpaca.page.marks import entity_lines, heads_of, odd_answer, pieces_of
from alpaca.page.models import BASE
from config_utils import load_config
from dataset import example_of_input, task_of
from harness import free_port

USER, PASSWORD = "user", "pass:word"
MAX_TEXT = 5000
TOKENS = 24
TEXT = '王明说：<b>${1+1}</b> {{value}} `北京`\\n & "上海"。\n李华去年在长沙。'
LONG = "".join(f"王明去年{i}在北京说新闻。李华{i}在上海说新闻新闻新闻。" for i in range(12))
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
def folder(workspace, tmp_path_factory):
    """A checkpoint/ with two adapters; random, the first says something of every text, whatever training came to."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("web")
    for trainer in ("train_trainer", "train_deepspeed"):
        adapter = folder / "checkpoint" / "mine" / trainer / "adapter_model"
        shutil.copytree(workspace / "checkpoint" / "mine" / trainer / "adapter_model", adapter)
    spoil(folder / "checkpoint" / "mine" / "train_trainer" / "adapter_model", 0)
    return folder


def spoil(adapter, seed):
    """Random weights."""
    torch.manual_seed(seed)
    path = adapter / "adapter_model.safetensors"
    weights = {name: torch.randn_like(t) if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def address(folder):
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    env = {"PYTHONPATH": str(folder / "watch"), "WATCHED": str(folder / "watched.txt")}
    env |= {VARIABLE: f"{USER}:{PASSWORD}", "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    options = ["--data_name=mine", "--lora_model=checkpoint/mine/train_trainer/adapter_model", "--precision=fp32"]
    options += [f"--max_new_tokens={TOKENS}", "--max_upload_mb=1", f"--max_text={MAX_TEXT}"]
    with serving(folder, *options, env=env) as address:
        yield address
    assert not (folder / "watched.txt").exists(), (folder / "watched.txt").read_text(encoding="utf-8")
    assert [*(folder / "tmp").rglob("*.entities.jsonl")] == []  # neither ours nor gradio's copies


@pytest.fixture
def page(browser, address):
    """The page, opened anew. Afterwards: nothing in the console, no request to another host."""
    complaints, hosts = [], set()
    own = "Method not implemented.", "413"  # gradio's of each upload; the browser's of one that is refused

    def note(message):
        if message.type in ("error", "warning") and not any(known in message.text for known in own):
            complaints.append(message.text)

    page = browser.new_page(locale="zh-CN")
    page.on("console", note)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(re.sub(r"^(blob|ws):", "", request.url).split("/")[2]))
    open_page(page, address)
    yield page
    page.close()
    assert complaints == [] and hosts == {address.removeprefix("http://")}


def open_page(page, address):
    page.request.post(f"{address}/login", form={"username": USER, "password": PASSWORD})
    page.goto(address)
    page.wait_for_selector("#marked")


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
    cut = cutter(loaded.model, loaded.tokenizer, loaded.args, loaded.facts)
    grammar = make_grammar("auto", loaded.adapter, loaded.tokenizer, labels)
    rules = {"instructs": held_instructs("auto", loaded.facts)}
    answer = Answering(loaded.model, loaded.tokenizer, cut, labels, TOKENS, 64, grammar, **rules)
    return [row for rows in answer.in_turn(example_of_input(record, *asked) for record in records) for row in rows]


def unrounded(rows):
    """Rows with log-probabilities as exact as they must be, in the order of their keys."""
    return json.loads(json.dumps(list(rows)), parse_float=lambda digits: pytest.approx(float(digits), abs=1e-2))


def upload(page, path):
    page.get_by_role("tab", name="文件").click()
    page.locator("#upload input[type=file]").set_input_files(path)


def recognize(page, text):
    page.get_by_role("tab", name="实体识别").click()
    page.fill("#text textarea", text)
    page.click("#go")


def shown_marks(page):
    """[(part, type or None)] of the marked text, without its line ends."""
    tokens = page.locator("#marked .token").all()
    return [(t.locator(".text").text_content(), *(t.locator(".label").all_text_contents() or [None])) for t in tokens]


def shown_lines(page, table):
    rows = page.locator(f"{table} [role=row][data-index]").all()
    return [[cell.inner_text() for cell in row.locator("[role=gridcell]").all()] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# what a user does


def test_a_typed_text_is_marked(page, loaded):
    (row,) = predicted(loaded, [{"text": TEXT}])
    assert row["entities"]
    recognize(page, TEXT)
    page.wait_for_selector("#entities [role=gridcell]")
    lines = [(line, kind) for part, kind in pieces_of(row) for line in part.split("\n") if line]
    assert shown_marks(page) == lines and "".join(line for line, _ in lines) == TEXT.replace("\n", "")
    spans = ["，".join(f"{b}–{e}" for b, e in entity["spans"]) or "在更长的实体里" for entity in row["entities"]]
    cells = shown_lines(page, "#entities")
    assert [c[:3] for c in cells] == [[e["entity"], e["type"], s] for e, s in zip(row["entities"], spans, strict=True)]
    assert all(0 <= float(cell[3].rstrip("%")) <= 100 for cell in cells)


def test_an_example_is_answered_at_a_click(page):
    page.click(f"text={web_ner.EXAMPLES[1]}")
    page.wait_for_selector("#marked .token")
    assert "".join(part for part, _ in shown_marks(page)) == web_ner.EXAMPLES[1]


def test_a_file_comes_back_as_predict_would_write_it(page, loaded, folder, tmp_path):
    """Plain lines, one of them longer than a window."""
    file = tmp_path / "我的 文本.txt"
    file.write_text("王明在北京。\n\n" + LONG + "\n李华去年在上海。\n" + "新闻。\n" * 5, encoding="utf-8")
    rows = predicted(loaded, read_texts(file))
    upload(page, file)
    page.wait_for_selector("#download", state="visible")
    assert page.locator("#figures :is(textarea, input)").input_value().startswith("9 条文本，")
    assert shown_lines(page, "#preview")[0][:3] == [
        "1",
        rows[0]["entities"][0]["entity"],
        rows[0]["entities"][0]["type"],
    ]
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename.endswith(".entities.jsonl")
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert unrounded(map(json.loads, lines)) == unrounded(rows)
    assert len([*(folder / "tmp").rglob("*.entities.jsonl")]) == 1  # gradio's copy; ours is gone


def test_two_users_at_once_and_a_stop(page, browser, address, tmp_path):
    """One sentence does not wait for another user's file; the file can be stopped, and the next text is answered."""
    file = tmp_path / "long.txt"
    file.write_text("".join(f"{i}{LONG}\n" for i in range(400)), encoding="utf-8")
    upload(page, file)
    page.wait_for_selector("#figures >> text=/400\\s*条/")  # the progress
    other = browser.new_page(locale="zh-CN")
    open_page(other, address)
    recognize(other, "李华去年在上海。")
    other.wait_for_selector("#marked .token")
    other.close()
    assert not page.locator("#download").is_visible()  # still at it
    page.click("#stop_file")
    recognize(page, "王明在北京。")
    page.wait_for_selector("#marked .token")
    page.wait_for_selector("text=已停止")
    assert "".join(part for part, _ in shown_marks(page)) == "王明在北京。"
    assert not page.locator("#download").is_visible()


def test_what_is_refused_is_said(page, tmp_path):
    """A mistake in a file; a file and a text that are too large, in Chinese. Where it stands, another can be given."""
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "王明在北京。"}\n{"text": 王明}\n', encoding="utf-8")
    upload(page, file)
    page.wait_for_selector("text=texts.jsonl:2: not valid JSON")
    page.dispatch_event("#upload [aria-label=清除]", "click")
    file.write_text("新" * (MAX_TEXT + 1), encoding="utf-8")
    upload(page, file)
    page.wait_for_selector(f"text=第 1 条：文本有 {MAX_TEXT + 1} 个字，最多 {MAX_TEXT} 个")
    page.dispatch_event("#upload [aria-label=清除]", "click")
    file.write_text("新\n" * 300_000, encoding="utf-8")
    upload(page, file)
    page.wait_for_selector("text=文件超过 1 MB")
    recognize(page, "新" * (MAX_TEXT + 1))
    page.wait_for_selector(f"text=/^文本有 {MAX_TEXT + 1} 个字/")


def test_adapters_trained_meanwhile(page, loaded, folder):
    """A new one is in the list; one that is trained anew answers as it is now."""
    text = "王明在北京。"
    adapter = folder / "checkpoint" / "mine" / "again" / "adapter_model"
    shutil.copytree(folder / "checkpoint" / "mine" / "train_trainer" / "adapter_model", adapter)
    page.click("#lora input")
    page.get_by_role("option", name="mine/again").click()
    for seed in (0, 1):
        spoil(adapter, seed)
        os.utime(adapter / "train_args.json")
        recognize(page, text)
        model, tokenizer = load_for_inference(adapter, loaded.args, loaded.facts, None, None, "fp32", "cpu")
        (row,) = predicted(
            SimpleNamespace(**{**vars(loaded), "model": model, "tokenizer": tokenizer}), [{"text": text}]
        )
        kinds = [kind for _, kind in pieces_of(row)]
        page.wait_for_function(
            """expected => JSON.stringify([...document.querySelectorAll("#marked .token")].map(
                token => token.querySelector(".label")?.textContent ?? null)) == JSON.stringify(expected)""",
            arg=kinds,
        )


def test_chat_streams_and_the_base_is_itself(page, loaded, folder):
    """The answer grows; it is that of whatever is chosen: of one adapter, the base, another, and the first again."""
    (prompt,) = encode_prompts(loaded.tokenizer, [QUESTION])
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
        const all = [...document.querySelectorAll("#log [data-testid=bot]")], last = all.pop()?.textContent;
        if (all.length + 1 == window.turn && last != window.said[window.said.length - 1]) window.said.push(last);
    }).observe(document.querySelector("#log"), {childList: true, subtree: true, characterData: true})""")
    turns = ("mine/train_trainer", own), (BASE, base), ("mine/train_deepspeed", other), ("mine/train_trainer", own)
    for number, (name, expected) in enumerate(turns, 1):
        if number > 1:
            page.click("#lora input")
            page.get_by_role("option", name=name).click()
        page.evaluate("number => { window.said = []; window.turn = number; }", number)
        page.fill("#question :is(textarea, input)", QUESTION)
        page.press("#question :is(textarea, input)", "Enter")
        head = f"【{name}】\n"
        page.wait_for_function("expected => window.said[window.said.length - 1] === expected", arg=head + expected)
        said = [text.removeprefix(head) for text in page.evaluate("window.said") if not text.endswith("…")]
        assert len(said) > 1 and all(later.startswith(earlier) for earlier, later in pairwise(said))
    assert page.locator("#log [data-testid=user]").all_text_contents() == [QUESTION] * len(turns)


# ---------------------------------------------------------------------------------------------------------------------
# the HTTP API, without a browser


def test_the_service_as_documented(address, loaded, tmp_path):
    """The lines of docs/zh/answering.md, with curl and with Python; then what they do not show."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs/zh/answering.md").read_text(encoding="utf-8"), re.S)
    commands = blocks[-1].replace(
        "Client('http://127.0.0.1:7860'", f"Client('{address}', auth=('{USER}', '{PASSWORD}')"
    )
    (tmp_path / "login.txt").write_text(f"username={USER}&password={PASSWORD}\n", encoding="utf-8")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = ["bash", "-ec", commands.replace("http://127.0.0.1:7860", address)]
    said = subprocess.run(commands, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    (row,) = json.loads(said.stdout.split("event: complete\ndata: ")[1].splitlines()[0])
    assert unrounded([row]) == unrounded(predicted(loaded, [{"text": "程立群到了苏州。"}]))
    assert ast.literal_eval(said.stdout.splitlines()[-1]) == row, said.stderr

    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(address, auth=(USER, PASSWORD), verbose=False)
    (tmp_path / "texts.txt").write_text(f"{LONG}\n\n王明在北京。\n", encoding="utf-8")
    file = client.predict(gradio_client.handle_file(tmp_path / "texts.txt"), api_name="/recognize_file")
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    assert unrounded(rows) == unrounded(predicted(loaded, [{"text": text} for text in (LONG, "", "王明在北京。")]))
    loras = client.predict(api_name="/loras")
    assert loras[0] == "mine/train_trainer" and loras[-1] == BASE
    (prompt,) = encode_prompts(loaded.tokenizer, [QUESTION])
    expected = next(generate(loaded.model, loaded.tokenizer, [prompt], TOKENS, 1)).text
    assert client.predict(QUESTION, api_name="/ask") == expected
    with pytest.raises(Exception, match="no adapter 'nobody'; there are mine/train_trainer"):
        client.predict("王明", "nobody", api_name="/recognize")


def test_who_is_not_logged_in_gets_nothing(address):
    for path in ("gradio_api/call/v2/recognize", "gradio_api/upload", "gradio_api/queue/join"):
        request = urllib.request.Request(f"{address}/{path}", b"{}", {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 401


# ---------------------------------------------------------------------------------------------------------------------
# without a server


def test_of_two_entities_that_overlap_the_first_is_marked():
    entities = [
        {"entity": "京大", "type": "地名", "spans": [[1, 3]]},
        {"entity": "北京", "type": "人名", "spans": [[0, 2]]},
        {"entity": "<学>", "type": "别的", "spans": [[3, 6]]},
    ]
    row = {"text": "北京大<学>$", "entities": entities}
    assert pieces_of(row) == [("北京", "人名"), ("大", None), ("<学>", "别的"), ("$", None)]


def test_a_confidence_that_is_not_calibrated_is_called_so():
    entity = {"entity": "北京", "type": "地名", "spans": [[0, 2]], "confidence": 0.9046}
    row = {"text": "北京", "entities": [entity], "calibrated": True}
    assert entity_lines(row) == [["北京", "地名", "0–2", "90.5%"]] and heads_of(row)[-1] == "置信度"
    assert heads_of({**row, "calibrated": False})[-1] == "置信度（未校准）"


def test_what_the_model_said_is_shown_where_it_is_no_entities():
    assert odd_answer({"prediction": "七天"}, None) == "七天"
    assert odd_answer({"prediction": "没有"}, ["人名"]) is None
    assert odd_answer({"prediction": "天", "problems": {"malformed": 1}}, ["人名"]) == "天"


# ---------------------------------------------------------------------------------------------------------------------
# the picture of README.md


def take_picture(path):
    with serving(ROOT) as address, browsing() as browser:
        page = browser.new_page(locale="zh-CN", viewport={"width": 1100, "height": 860})
        page.goto(address)
        page.click(f"text={web_ner.EXAMPLES[2]}")
        page.wait_for_selector("#entities [role=gridcell]")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # for what fades in
        page.screenshot(path=path)


if __name__ == "__main__":
    take_picture(sys.argv[1])
