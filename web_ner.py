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
import os
import signal
import tempfile
import threading
from pathlib import Path

from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.models.base import check_generation
from alpaca.page.address import check_address
from alpaca.page.events import make_events
from alpaca.page.marks import head_html, note_html
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
    "auth": None,  # user:password that the page asks for; None: nothing is asked for
    "batch_size": 16,  # most texts answered at once; more: files are done sooner, others wait longer for their turn
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
STYLE = Path(__file__).parent / "alpaca" / "page" / "page.css"


def build_page(gr, models):
    """The page as gradio's Blocks; gr: the module gradio."""
    events = make_events(gr, models)
    with gr.Blocks(title="中文命名实体识别", analytics_enabled=False) as page:
        with gr.Row(equal_height=True):
            gr.HTML(head_html(models.base), elem_id="head", min_width=320)
            lora = gr.Dropdown(list(models.choices), value=models.first, label="LoRA", min_width=320, elem_id="lora")
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
            gr.HTML(note_html("每个问题单独回答，不记得上文。上面选“只用基座”，就能比较微调前后的回答。"))
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
            on_event(events.mark_text, [text, lora], result, **quiet)
        upload.upload(events.answer_file, [upload, lora], [result, download], **quiet)
        for on_event in (question.submit, send.click):
            on_event(events.chat, [question, exchanges, lora], [question, log, exchanges], **quiet)
        for button in (stop, stop_chat):
            button.click(events.stop, queue=False, api_visibility="private")
    return page


def main(args):
    auth = check_address(args)
    check_generation(args)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # gradio asks its own server whether it answers. Through a proxy it would get no answer.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost,::1", args.host]))
    try:
        gr = importlib.import_module("gradio")
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}); install it: pip install {GRADIO}") from None
    models = Models(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the uploaded files are removed
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
            css=STYLE.read_text(encoding="utf-8"),
        )
        say(f"网页: {page.local_url}，按 Ctrl-C 结束")
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
