"""A page that marks the entities of texts and files, and answers questions.

    pip install gradio==6.31.0
    python web_ner.py                                              # http://127.0.0.1:7860
    python web_ner.py --host=0.0.0.0 --auth=accounts.txt           # for others too; user:password in each line

Offers the adapters found under checkpoint/ that were trained on the same base, and the base alone. A file's result is
what predict.py writes. Programs use gradio's HTTP API: /recognize, /recognize_file, /ask, /loras. Nothing is fetched from
elsewhere: no fonts, no statistics, no version checks.
"""

from alpaca.common.start import start

start()

import importlib
import os
import signal
import tempfile
import threading
from contextlib import closing
from pathlib import Path

from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.models.base import check_generation
from alpaca.page.address import check_address
from alpaca.page.events import make_events
from alpaca.page.guard import SECONDS, TRIES, Guard, make_login, read_accounts
from alpaca.page.marks import HEADS
from alpaca.page.models import Models
from config_utils import run_script

CONFIG = {
    "data_name": "demo",  # name of the data set: its folder under checkpoint/, whose adapter is chosen at first
    "base_model": None,  # folder of the base model; None: the base that the adapter was trained on
    "lora_model": "auto",  # auto: the adapter of checkpoint/<data_name>/ written last | a folder | none: the base alone
    "tokenizer_path": None,  # folder of the tokenizer; None: the base model's
    "template": "auto",  # the prompt around the instruction: auto | alpaca | alpaca2 | chat; auto: as in training, else the base's
    "host": "127.0.0.1",  # address to listen on; one that other machines reach needs auth
    "port": 7860,  # port to listen on
    "auth": None,  # file of who may log in, user:password a line; None: the environment variable WEB_NER_AUTH, else anybody
    "max_upload_mb": 50,  # largest file that is taken, in MB
    "max_text": 200_000,  # most characters of a text or a question
    "batch_size": 16,  # most texts answered at once, those of all users together
    "max_new_tokens": 512,  # most tokens of an answer; a longer one is cut
    "constrained": "auto",  # True: answers name only parts of the text and known types | False: anything | auto: True for NER
    "precision": "auto",  # auto | bf16 | fp16 | fp32: number format to compute in; auto: the best that the device has
    "base_weights": "auto",  # auto | full | nf4 | fp8: how the base is held; auto: as the adapter was trained, where that is possible
}
GRADIO = "gradio==6.31.0"  # not in requirements.txt: no other script needs it
EXAMPLES = [
    "记者陈刚从广州报道，中国银行行长赵志强昨天会见了日本客人。",
    "校长许文舟在杭州参观了临江大学，李华和张伟陪同。",
    "刘芳是湖南省教育局局长，去年从长沙调到北京。",
    "去年冬天，来借书的孩子比往年多了一倍。",
]
QUESTIONS = ["重复下面的文本。文本：天气渐渐凉了。", "把文本里的字一个一个写出来。文本：长江"]
CACHE_SECONDS = (
    600,
    3600,
)  # how often gradio looks for files that it keeps for users, and the age at which it deletes them
MAX_JOBS = 200  # that are answered at the same time; others wait. With gradio's 40 they would hold up its own pages too
STYLE = Path(__file__).parent / "alpaca" / "page" / "page.css"


def build_page(gr, models, max_text):
    """The page as gradio's Blocks; gr: the module gradio."""
    events = make_events(gr, models, max_text)
    with gr.Blocks(title="中文命名实体识别", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        with gr.Row(equal_height=True):
            gr.Markdown("# 中文命名实体识别", min_width=320)
            lora = gr.Dropdown(models.names(), value=models.first, label=f"LoRA，基座 {models.base}", elem_id="lora")
        with gr.Tab("实体识别"):
            text = gr.Textbox(label="文本", placeholder="一句话或一篇文章，长短不限", lines=3, elem_id="text")
            with gr.Row():
                go = gr.Button("识别", variant="primary", elem_id="go")
                stop = gr.Button("停止", elem_id="stop", scale=0, min_width=90)
            examples = gr.Examples(EXAMPLES, text, label="例句")
            marked = gr.HighlightedText(label="实体", elem_id="marked")
            table = gr.Dataframe(headers=HEADS, visible=False, elem_id="entities")
            said = gr.Textbox(label="模型的回答", visible=False, elem_id="said")
        with gr.Tab("文件"):
            with gr.Row():
                upload = gr.File(label="一行一条的文本，JSON lines，CSV 或 Excel", elem_id="upload", height=140)
                stop_file = gr.Button("停止", elem_id="stop_file", scale=0, min_width=90)
            figures = gr.Textbox(label="结果", elem_id="figures")
            preview = gr.Dataframe(headers=["第几条", *HEADS], visible=False, elem_id="preview")
            download = gr.DownloadButton(visible=False, variant="primary", elem_id="download")
        with gr.Tab("闲聊"):
            gr.Markdown("每个问题单独回答，不记得上文。上面选“只用基座”，就能比较微调前后的回答。")
            log = gr.Chatbot(render_markdown=False, show_label=False, height=420, buttons=[], elem_id="log")
            messages = gr.State([])
            with gr.Row():
                question = gr.Textbox(placeholder="问题，回车发送", show_label=False, scale=5, elem_id="question")
                send = gr.Button("发送", variant="primary", elem_id="send", scale=0, min_width=90)
                stop_chat = gr.Button("停止", elem_id="stop_chat", scale=0, min_width=90)
            gr.Examples(QUESTIONS, question, label="例子")

        # The engine answers everybody at once, so gradio need not let them wait.
        own = {"api_visibility": "private", "concurrency_limit": None}
        answer = [events.mark_text, [text, lora], [marked, table, said]]
        for on_event in (go.click, examples.load_input_event.then):
            on_event(*answer, trigger_mode="multiple", **own)
        upload.upload(events.answer_file, [upload, lora], [figures, preview, download], trigger_mode="multiple", **own)
        for on_event in (question.submit, send.click):
            on_event(events.chat, [question, messages, lora], [question, log, messages], **own)
        log.clear(lambda: [], None, messages, queue=False, **own)
        for button, stop_job in (
            (stop, events.stop_text),
            (stop_file, events.stop_file),
            (stop_chat, events.stop_chat),
        ):
            button.click(stop_job, queue=False, **own)
        lora.focus(lambda: gr.Dropdown(models.names()), None, lora, queue=False, show_progress="hidden", **own)
        page.load(lambda: gr.Dropdown(models.names()), None, lora, show_progress="hidden", **own)
        page.unload(events.leave)

        offered = {"concurrency_limit": None}
        file, name, found = gr.File(visible=False), gr.Textbox("", visible=False), gr.File(visible=False)
        file.upload(events.recognize_file, [file, name], found, api_name="recognize_file", **offered)
        gr.api(events.recognize, api_name="recognize", **offered)
        gr.api(events.ask, api_name="ask", **offered)
        gr.api(events.loras, api_name="loras", **offered)
    return page


def main(args):
    accounts = read_accounts(args.auth)
    check_address(args, accounts)
    check_generation(args)
    for name in ("max_upload_mb", "max_text"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: expected 1 or more")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # gradio asks its own server whether it answers. Through a proxy it would get no answer.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost,::1", args.host]))
    try:
        gr, fastapi = importlib.import_module("gradio"), importlib.import_module("fastapi")
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}); install it: pip install {GRADIO}") from None
    models = Models(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the uploaded files are removed
    with tempfile.TemporaryDirectory() as folder, closing(models.engine):
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(gr, models, args.max_text)
        fonts = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
        page.launch(
            server_name=args.host,
            server_port=args.port,
            auth=make_login(accounts, lambda said: fastapi.HTTPException(400, said)) if accounts else None,
            auth_message=f"一个地址在 {SECONDS} 秒里错了 {TRIES} 次，就要等一会儿才能再试。",
            max_threads=MAX_JOBS,
            app_kwargs={"middleware": [fastapi.middleware.Middleware(Guard, max_upload_mb=args.max_upload_mb)]},
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Soft(primary_hue="blue", font=fonts, font_mono=["monospace"]),
            css=STYLE.read_text(encoding="utf-8"),
        )
        say(f"网页: {page.local_url}，按 Ctrl-C 结束")
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
