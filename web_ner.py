"""A page that marks the entities of texts and files, and answers questions.

    pip install gradio==6.31.0
    python web_ner.py                                              # http://127.0.0.1:7860
    python web_ner.py --host=0.0.0.0 --auth=user:password          # for others too

Offers the adapters found under checkpoint/ that were trained on the same base, and the base alone. A file's result is
what predict.py writes. Nothing is fetched from elsewhere: no fonts, no statistics, no version checks.
"""

from alpaca.common.start import start

start()

import importlib
import ipaddress
import json
import math
import os
import signal
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from alpaca.answering.generate import stream, without_template
from alpaca.answering.predictions import make_grammar, predict_rows
from alpaca.answering.windows import cut_examples, rows_of_texts
from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.models.adapters import find_adapter
from alpaca.models.base import attach_adapter, check_fit, check_generation, load_for_inference
from config_utils import load_config, run_script
from dataset import SURROGATE, build_prompt, encode_prompts, read_texts, task_of, to_example

CONFIG = {
    "data_name": "demo",  # name of the data set: its folder under checkpoint/, whose adapter is chosen at first
    "base_model": None,  # folder of the base model; None: the base that the adapter was trained on
    "lora_model": "auto",  # auto: the adapter of checkpoint/<data_name>/ written last | a folder | none: the base alone
    "tokenizer_path": None,  # folder of the tokenizer; None: the base model's
    "host": "127.0.0.1",  # address to listen on; one that other machines reach needs auth
    "port": 7860,  # port to listen on
    "auth": None,  # user:password that the page asks for; None: nothing is asked for
    "batch_size": 16,  # most texts answered at once; more: files are done sooner, others wait longer for their turn
    "max_new_tokens": 512,  # most tokens of an answer; a longer one is cut
    "constrained": "auto",  # True: answers name only parts of the text and known types | False: anything | auto: True for NER
    "precision": "auto",  # auto | bf16 | fp16 | fp32: number format to compute in; auto: the best that the device has
}
GRADIO = "gradio==6.31.0"  # not in requirements.txt: no other script needs it
BASE = "不加 LoRA，只用基座"
EXAMPLES = [
    "记者陈刚从广州报道，中国银行行长赵志强昨天会见了日本客人。",
    "校长许文舟在杭州参观了临江大学，李华和张伟陪同。",
    "刘芳是湖南省教育局局长，去年从长沙调到北京。",
    "去年冬天，来借书的孩子比往年多了一倍。",
]
QUESTIONS = ["重复下面的文本。文本：天气渐渐凉了。", "把文本里的字一个一个写出来。文本：长江"]
STOPPED = '<p class="note">已停止。</p>'
PREVIEWED = 5  # texts of a file that the page shows
COLOURS = 8
STYLE = """
.gradio-container { width: 100%; max-width: 1080px !important; margin: auto !important; }
#head h1 { font-size: 1.7rem; margin: 0 0 .2rem; } #head p, .note { opacity: .7; margin: .2rem 0; }
.marked { font-size: 1.15rem; line-height: 2.2; white-space: pre-wrap; overflow-wrap: anywhere; padding: .4rem 0; }
.marked + .marked { border-top: 1px solid var(--border-color-primary); }
.marked mark, .type { color: #16181d; background: var(--c); border-radius: .35rem; padding: .18rem .35rem; }
.marked mark { margin: 0 .12rem; }
.marked mark::after { content: attr(data-type); font-size: .7rem; opacity: .65; margin-left: .35rem; }
#result .entities { width: 100%; border-collapse: collapse; border: 0; margin-top: .4rem; }
#result .entities :is(th, td) { text-align: left; padding: .4rem .7rem .4rem 0; border: 0; }
#result .entities tr { border: 0; border-bottom: 1px solid var(--border-color-primary); }
#result .entities th { font-weight: 600; opacity: .7; }
progress { appearance: none; width: 100%; height: .6rem; border: 0; border-radius: .3rem; overflow: hidden; }
progress::-webkit-progress-bar { background: var(--border-color-primary); }
progress::-webkit-progress-value { background: var(--primary-500); }
progress::-moz-progress-bar { background: var(--primary-500); }
#log { background: var(--block-background-fill); border-radius: .5rem; padding: 1rem; }
#log .asked, #log .answered { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font-size: 1.05rem; }
#log .asked { width: fit-content; max-width: 85%; margin-left: auto; padding: .4rem .8rem; border-radius: .8rem;
  background: var(--primary-100); color: #16181d; }
#log .note { font-size: .8rem; margin-top: .8rem; }
""" + "".join(
    f".c{i} {{ --c: {colour}; }}\n"
    for i, colour in enumerate("#fecaca #bfdbfe #bbf7d0 #fde68a #ddd6fe #fbcfe8 #99f6e4 #e2e8f0".split())
)


# ---------------------------------------------------------------------------------------------------------------------
# the model


class Models:
    """One base in memory and the adapters that fit it, each read when it is first asked for. Requests take turns."""

    def __init__(self, args):
        self.args, self.turn = args, threading.Lock()
        adapter, train_args, facts = find_adapter(args.data_name, args.lora_model)
        self.model, self.tokenizer = load_for_inference(
            adapter, train_args, facts, args.base_model, args.tokenizer_path, args.precision
        )
        self.base = self.model.config.name_or_path
        self.first = _name(adapter) if adapter else BASE
        self.adapters = {self.first: (adapter, train_args, facts)}
        self.adapters |= adapters_on({self.base, train_args.model_dir if adapter else self.base})
        self.adapters |= {BASE: (None, None, {})}
        self.ids = {self.first: "default"} if adapter else {}  # what PEFT calls those that are in memory
        self.current, self.grammars = self.first, {}
        self.grammar(self.first)  # an impossible --constrained is said now

    def grammar(self, name):
        """That of all answers of an adapter, or None."""
        if name not in self.grammars:
            adapter, _, facts = self.adapters[name]
            labels, _, _ = task_of(facts)
            self.grammars[name] = make_grammar(self.args.constrained, adapter, self.tokenizer, labels)
        return self.grammars[name]

    def _use(self, name):
        if name == self.current:
            return
        adapter, train_args, facts = self.adapters[name]
        self.current = None  # where what follows fails
        if not adapter and self.ids:
            self.model.base_model.disable_adapter_layers()
        elif adapter and name not in self.ids:
            check_fit(adapter, train_args, facts, self.base, self.args.tokenizer_path or self.base)
            number = f"adapter{len(self.ids)}"
            self.model = attach_adapter(self.model, adapter, number)
            self.ids[name] = number
        if adapter:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.ids[name], inference_mode=True)
        self.current = name

    def steps(self, name, work):
        """Yield what `work`, a generator that computes with the model, yields; others may have theirs in between."""
        while True:
            with self.turn:
                self._use(name)
                try:
                    step = next(work)
                except StopIteration:
                    return
            yield step

    def answer(self, name, records):
        """Yield (windows answered, of how many, None), at last the rows of the texts (dataset.read_texts) instead."""
        args, (_, train_args, facts) = self.args, self.adapters[name]
        labels, instruct, query_prefix = task_of(facts)
        examples = [to_example(record, instruct, query_prefix) for record in records]
        cuts = cut_examples(examples, self.model, self.tokenizer, train_args, facts)
        parts = [part for window_examples, _, _ in cuts for part in window_examples]
        work = predict_rows(
            self.model, self.tokenizer, parts, labels, args.max_new_tokens, args.batch_size, self.grammar(name)
        )
        rows = []
        yield 0, len(parts), None
        for row in self.steps(name, work):
            rows.append(row)
            yield len(rows), len(parts), None
        yield len(parts), len(parts), list(rows_of_texts(examples, cuts, iter(rows)))

    def chat(self, name, question):
        """Yield the growing answer to free text."""
        (prompt,) = encode_prompts(self.tokenizer, [build_prompt(question, "")])
        said = stream(self.model, self.tokenizer, prompt, self.args.max_new_tokens)
        return self.steps(name, without_template(said))


def _name(adapter):
    """What the page calls an adapter's folder: demo/shipped for checkpoint/demo/shipped/adapter_model."""
    folder, root = Path(adapter).resolve(), Path("checkpoint").resolve()
    return str(folder.parent.relative_to(root)) if folder.is_relative_to(root) else str(adapter)


def adapters_on(bases):
    """{name: (folder, the training's Config, its facts)} of the adapters under checkpoint/ trained on one of `bases`."""
    found, bases = {}, {Path(base).resolve() for base in bases}
    for file in sorted(Path("checkpoint").glob("**/adapter_model/train_args.json")):
        try:
            train_args, facts = load_config(file)
        except UserError as error:
            say(f"略过: {error}")
            continue
        if Path(train_args.model_dir).resolve() in bases:
            found[_name(file.parent)] = file.parent, train_args, facts
        else:
            say(f"略过 {file.parent}: 它的基座是 {train_args.model_dir}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# rows of predictions.jsonl -> HTML


def escape(text):
    """Text as HTML shows it; gradio reads its own signs in HTML, so that they are escaped too."""
    return "".join(f"&#{ord(char)};" if char in "&<>\"'{}$`\\" else char for char in text)


def marked(row, labels):
    """A row's text with its entities marked; of two that overlap, the first."""
    text, parts, end = row["text"], [], 0
    spans = sorted((b, -e, entity["type"]) for entity in row["entities"] for b, e in entity["spans"])
    for begin, last, kind in spans:
        if begin >= end:
            parts += escape(text[end:begin]), f'<mark class="{colour(kind, labels)}" data-type="{escape(kind)}">'
            parts += escape(text[begin:-last]), "</mark>"
            end = -last
    return f'<div class="marked">{"".join(parts)}{escape(text[end:])}</div>'


def colour(kind, labels):
    return f"c{labels.index(kind) % COLOURS if kind in labels else COLOURS - 1}"


def table(row, labels):
    """A row's entities with offsets (end exclusive) and confidence: the mean probability of a token of its line."""
    if not row["entities"]:
        return '<p class="note">没有找到实体。</p>'
    lines = []
    for entity in row["entities"]:
        kind, spans = entity["type"], "，".join(f"{b}–{e}" for b, e in entity["spans"])
        spans = spans or ("在更长的实体里" if entity["entity"] in row["text"] else "不在原文")
        cells = escape(entity["entity"]), f'<span class="type {colour(kind, labels)}">{escape(kind)}</span>', spans
        lines.append(f"<tr><td>{'</td><td>'.join(cells)}</td><td>{math.exp(entity['confidence']):.1%}</td></tr>")
    head = "<tr><th>实体</th><th>类型</th><th>位置（起–止，不含止）</th><th>置信度</th></tr>"
    return f'<table class="entities"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'


def notes(row):
    """What there is to know of an answer that its entities do not tell."""
    if row["prediction"] is None:
        return '<p class="note">文本超过模型的长度上限，没有回答。</p>'
    problems = row.get("problems", {})
    said = '<p class="note">回答达到长度上限，被截断。</p>' if problems.get("cut") else ""
    if problems.keys() & {"malformed", "unknown_type", "not_in_text"}:  # of an answer that no grammar held
        said += f'<p class="note">模型的回答：</p>{plain(row["prediction"])}'
    return said


def plain(text):
    return f'<div class="marked">{escape(text)}</div>'


def shown(row, labels):
    """A row in full; labels=None: of another task than NER."""
    if labels is None:
        return plain(row["prediction"] or "") + notes(row)
    return marked(row, labels) + table(row, labels) + notes(row)


def summary(rows, labels):
    """How much was found in a file, and its first texts."""
    first = f'<p class="note">前 {PREVIEWED} 条：</p>' if len(rows) > PREVIEWED else ""
    if labels is None:
        answers = "".join(plain(row["prediction"] or "") for row in rows[:PREVIEWED])
        return f"<p>{len(rows)} 条回答</p>{first}{answers}"
    counts = {}
    for entity in (entity for row in rows for entity in row["entities"]):
        counts[entity["type"]] = counts.get(entity["type"], 0) + len(entity["spans"])
    kinds = " ".join(
        f'<span class="type {colour(kind, labels)}">{escape(kind)} {counts[kind]}</span>'
        for kind in sorted(counts, key=lambda kind: colour(kind, labels))
    )
    texts = "".join(marked(row, labels) for row in rows[:PREVIEWED])
    return f"<p>{len(rows)} 条文本，{sum(counts.values())} 处实体 {kinds}</p>{first}{texts}"


def talk(exchanges):
    """Questions and answers, (question, adapter's name, answer), the last below."""
    return "".join(
        f'<div class="asked">{escape(question)}</div><p class="note">{escape(name)}</p>'
        f'<div class="answered">{escape(answer)}</div>'
        for question, name, answer in exchanges
    )


def progress(done, total):
    return f'<progress max="{total}" value="{done}"></progress><p class="note">{done} / {total} 段</p>'


def now_and_then(steps, seconds=0.2):
    """The steps that are worth showing: the first of every few hundred milliseconds, and the last."""
    shown = 0
    for step in steps:
        if step[-1] is not None or time.monotonic() - shown >= seconds:
            yield step
            shown = time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# the page


def build_page(gr, models):
    """The page as gradio's Blocks."""

    @contextmanager
    def refusing(path=""):
        """A UserError becomes a message on the page."""
        try:
            yield
        except UserError as error:
            message = escape(str(error).replace(path, Path(path).name) if path else str(error))
            raise gr.Error(message, title="不行", duration=None, print_exception=False) from None

    # Of those that pressed 停止. gradio's own cancelling may come amid a step, and leaves an error on the page.
    stopped = set()

    def until_stopped(steps, user):
        stopped.discard(user)
        return takewhile(lambda _: user not in stopped, steps)

    def checked(text):
        if SURROGATE.search(text):
            raise UserError(f"half a character in {text[:40]!r}; give UTF-8")
        return text

    def recognise(text, name, request: gr.Request):
        if not text.strip():
            raise gr.Error("请先输入文本。", title="没有文本", print_exception=False)
        labels, _, _ = task_of(models.adapters[name][2])
        with refusing():
            steps = until_stopped(models.answer(name, [{"text": checked(text)}]), request.session_hash)
            rows = None
            for done, total, rows in now_and_then(steps):
                if not rows:
                    yield progress(done, total)
        yield shown(rows[0], labels) if rows else STOPPED

    def process(path, name, request: gr.Request):
        labels, _, _ = task_of(models.adapters[name][2])
        hidden = gr.DownloadButton(visible=False)
        yield '<p class="note">正在读文件，切分……</p>', hidden
        with refusing(path):
            steps = until_stopped(models.answer(name, read_texts(path)), request.session_hash)
            rows = None
            for done, total, rows in now_and_then(steps):
                if not rows:
                    yield progress(done, total), hidden
        if not rows:
            yield STOPPED, hidden
            return
        output = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / f"{Path(path).stem}.entities.jsonl"
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        yield summary(rows, labels), gr.DownloadButton(f"下载 {output.name}", value=output, visible=True)

    def chat(question, before, name, request: gr.Request):
        if not question.strip():
            raise gr.Error("请先输入问题。", title="没有问题", print_exception=False)
        now = [*before, (question, name, "…")]
        yield "", talk(now), now
        with refusing():
            for said in until_stopped(models.chat(name, checked(question)), request.session_hash):
                now = [*before, (question, name, said)]
                yield "", talk(now), now
        if now[-1][2] in ("", "…"):
            now = [*before, (question, name, "（没有回答：停止了，或者问题超过模型的长度上限）")]
            yield "", talk(now), now

    def halt(request: gr.Request):
        stopped.add(request.session_hash)

    with gr.Blocks(title="中文命名实体识别", analytics_enabled=False) as page:
        with gr.Row(equal_height=True):
            gr.HTML(
                f"<h1>中文命名实体识别</h1><p>基座 {escape(models.base)}，全部在本机计算</p>",
                elem_id="head",
                min_width=320,
            )
            lora = gr.Dropdown(list(models.adapters), value=models.first, label="LoRA", min_width=320, elem_id="lora")
        with gr.Tab("实体识别"):
            text = gr.Textbox(label="文本", placeholder="一句话或一篇文章，长短不限", lines=3, elem_id="text")
            with gr.Row():
                go = gr.Button("识别", variant="primary", elem_id="go")
                upload = gr.UploadButton("上传文件：一行一条的文本，或 JSON lines", elem_id="upload")
                stop = gr.Button("停止", elem_id="stop", scale=0, min_width=90)
            examples = gr.Examples(EXAMPLES, text, label="例句")
            result = gr.HTML(elem_id="result", min_height=40)
            download = gr.DownloadButton("下载", visible=False, variant="primary", elem_id="download")
        with gr.Tab("闲聊"):
            gr.HTML('<p class="note">每个问题单独回答，不记得上文。上面选“只用基座”，就能比较微调前后的回答。</p>')
            log = gr.HTML(elem_id="log", min_height=300, max_height=480, autoscroll=True)
            exchanges = gr.State([])
            with gr.Row():
                question = gr.Textbox(
                    show_label=False, placeholder="问题，回车发送", scale=5, max_lines=1, elem_id="question"
                )
                send = gr.Button("发送", variant="primary", elem_id="send", scale=0, min_width=90)
                stop_chat = gr.Button("停止", elem_id="stop_chat", scale=0, min_width=90)
            gr.Examples(QUESTIONS, question, label="例子")

        quiet = {"api_visibility": "private", "show_progress": "minimal"}
        for on_event in (go.click, examples.load_input_event.then):
            on_event(recognise, [text, lora], result, **quiet)
        upload.upload(process, [upload, lora], [result, download], **quiet)
        for on_event in (question.submit, send.click):
            on_event(chat, [question, exchanges, lora], [question, log, exchanges], **quiet)
        for button in (stop, stop_chat):
            button.click(halt, queue=False, api_visibility="private")
    return page


def check_address(args):
    """--auth as (user, password) or None; UserError for a page that others could open without, and for no free address."""
    if not 0 < args.port < 65536:
        raise UserError(f"--port={args.port}: expected 1 to 65535")
    user, _, password = (args.auth or "").partition(":")
    if args.auth is not None and not (user and password):
        raise UserError("--auth: expected user:password")
    try:
        own = args.host == "localhost" or ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        raise UserError(f"--host={args.host}: expected an IP address, e.g. 0.0.0.0 for all of this machine's") from None
    if not own and not args.auth:
        raise UserError(f"--host={args.host}: others could use the page; give --auth=user:password as well")
    try:
        socket.create_server(
            (args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET
        ).close()
    except OSError as error:
        remedy = "name another port, e.g. --port=7861"
        raise UserError(f"--host={args.host} --port={args.port}: {os.strerror(error.errno)}; {remedy}") from None
    return (user, password) if args.auth else None


def main(args):
    auth = check_address(args)
    check_generation(args)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # gradio asks its own server whether it is there; a proxy would not know.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost,::1", args.host]))
    try:
        gr = importlib.import_module("gradio")
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}); install it: pip install {GRADIO}") from None
    models = Models(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: what was uploaded is removed
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(gr, models)
        fonts = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
        page.launch(
            server_name=args.host,
            server_port=args.port,
            auth=auth,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Soft(primary_hue="blue", font=fonts, font_mono=["monospace"]),
            css=STYLE,
        )
        say(f"网页: {page.local_url}，按 Ctrl-C 结束")
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
