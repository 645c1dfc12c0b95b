"""Chat with the model, one question at a time.

    python chat_ner.py
    python chat_ner.py --base_model ./model_hub/chinese-alpaca-tiny --with_prompt --interactive     # the base alone
    python chat_ner.py --data_file questions.txt --predictions_file answers.json --interactive=False

An input that begins with the adapter's instruction, a typed `\\n` read as a newline, gets exactly the prompt that
training used, and an answer that its text allows. Anything else is free chat, as typed. `/base` puts the last question
again without the adapter, `/help` says what else there is. An empty line, Ctrl-D or Ctrl-C ends it.
"""

from alpaca.common.start import start

start()

import contextlib
import json
from pathlib import Path

from alpaca.answering.generate import sampler, stream, without_template
from alpaca.answering.predictions import make_grammar
from alpaca.answering.standby import Standby
from alpaca.common.console import progress, say
from alpaca.common.devices import pick_device
from alpaca.common.errors import UserError
from alpaca.common.folders import check_writable
from alpaca.common.text_files import SURROGATE
from alpaca.common.whole_files import written_whole
from alpaca.corpora.inputs import read_inputs
from alpaca.models.adapters import find_adapter, open_output
from alpaca.models.base import check_generation, load_for_inference
from alpaca.models.templates import encode_prompts, message_of
from config_utils import run_script
from dataset import QUERY_PREFIX

with contextlib.suppress(ImportError):  # some builds of Python have none
    import readline  # noqa: F401  arrow keys and history in input()

CONFIG = {
    "base_model": None,  # folder of the base model; None: the base that the adapter was trained on; given alone: no adapter
    "lora_model": "auto",  # auto: the adapter of checkpoint/demo/ written last | a folder | none: the base alone
    "tokenizer_path": None,  # folder of the tokenizer; None: the base model's
    "template": "auto",  # the prompt around the instruction: auto | alpaca | alpaca2 | chat; auto: as in training, else the base's
    "with_prompt": True,  # True: the input is put into the prompt of training | False: the model reads it as typed
    "interactive": True,  # True: ask for inputs in the terminal, unless data_file is given | False: only answer data_file
    "data_file": None,  # file of inputs to answer, one a line; None: no file
    "predictions_file": "predictions.txt",  # file for the answers to data_file, a JSON list of {"Input", "Output"}
    "devices": "0",  # number of the GPU to use | auto: a base that is too large for one is spread over all
    "gpus": None,  # the same, as the original scripts call it
    "only_cpu": False,  # True: compute on the CPU even where there is a GPU
    "base_weights": "auto",  # auto | full | nf4 | fp8: how the base is held; auto: as the adapter was trained, where that is possible
    "max_new_tokens": 512,  # most tokens of an answer; a longer one is cut
    "temperature": 0.0,  # randomness of free chat; 0: always the likeliest token, so the same answer every time
    "top_p": 1.0,  # 0 to 1; at a temperature above 0, draw from the likeliest tokens of this probability together
    "seed": 42,  # random seed of what is drawn at a temperature above 0
    "constrained": "auto",  # as in test.py, for inputs that begin with the adapter's instruction: auto | True | False
}
BANNER = """\
+ 该模式下仅支持单轮问答，无多轮对话能力。
+ 如要进行多轮对话，请使用llama.cpp或llamachat工具。
-------------------------------------------------------------------------------------
+ This mode only supports single-turn QA.
+ If you want to experience multi-turn dialogue, please use llama.cpp or llamachat.
=====================================================================================
+ /help 显示可用的命令 shows the commands"""
HELP = """\
/help       显示这些命令
/base       不用 LoRA，把上一个问题再答一遍
/base 问题  不用 LoRA，回答这个问题
↑ ↓         找回之前的输入
空行、Ctrl-D 或 Ctrl-C 结束；正在回答时，Ctrl-C 只停下这次回答
"""


def chat_message(line, instructs):
    """(the message of one input line, its query): training's own if it begins with an instruction, else the line as
    instruction, and None."""
    text = line.replace("\\n", "\n")
    for instruct in instructs:
        if text.startswith(instruct):
            query = text.removeprefix(instruct).lstrip("\n")
            return message_of(instruct, query), query
    return message_of(line, ""), None


def check_sampling(args):
    if args.temperature < 0:
        raise UserError(f"--temperature={args.temperature}: expected 0 (always the likeliest token) or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p}: expected more than 0, at most 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed}: expected 0 to 4294967295")


def show(texts):
    """Print an answer as it grows."""
    text = ""
    for grown in texts:
        print(grown[len(text) :], end="", flush=True)
        text = grown


def main(args):
    if not args.interactive and not args.data_file:
        raise UserError("--interactive=False needs --data_file, a file with one input a line")
    questions = read_inputs(args.data_file) if args.data_file else []
    check_generation(args)
    check_sampling(args)
    alone = args.base_model and args.lora_model == "auto"
    adapter, train_args, facts = find_adapter("demo", "none" if alone else args.lora_model, args.base_model)
    if args.data_file:
        check_writable(Path(args.predictions_file).resolve().parent, "name another file")  # before the weights load
        open_output(args.predictions_file).close()
    device = "cpu" if args.only_cpu else pick_device(args.gpus or args.devices)
    model, tokenizer = load_for_inference(
        *(adapter, train_args, facts, args.base_model, args.tokenizer_path),
        device=device,
        base_weights=args.base_weights,
        template=args.template,
    )

    grammar = make_grammar(args.constrained, adapter or facts, tokenizer, facts.get("labels"))
    query_prefix = facts.get("query_prefix", QUERY_PREFIX)
    free, standby = sampler(args.temperature, args.top_p, args.seed), Standby(at_once=1)

    def answer(line, without_adapter=False):
        """Yield the answer to an input as it grows, each text beginning with the one before."""
        message, query = chat_message(line, facts.get("instructs", [])) if args.with_prompt else (None, None)
        bare = [[*tokenizer.begin, *ids] for ids in tokenizer.encode_texts([line])]
        (ids,) = encode_prompts(tokenizer, [message]) if message else bare
        rules = {"pick": free}
        if grammar and query is not None and not without_adapter:
            rules = {"grammar": grammar, "text": query.removeprefix(query_prefix)}
        with model.disable_adapter() if adapter and without_adapter else contextlib.nullcontext():
            texts = stream(model, tokenizer, ids, args.max_new_tokens, standby=standby, **rules)
            texts = without_template(texts, tokenizer.template)
            yield next(texts, "（输入超过模型的长度上限）")
            yield from texts

    if args.data_file:
        results = []
        for question in progress(questions, desc="回答", unit="条"):
            *_, text = answer(question)
            results.append({"Input": question, "Output": text})
        with written_whole(args.predictions_file) as new:
            new.write_text(json.dumps(results, ensure_ascii=False, indent=2), encoding="utf-8")
        say(f"{len(results)} 条回答已写到 {args.predictions_file}")
        return

    print(BANNER)
    last = None
    while True:
        try:
            line = input("Input:")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line.strip():
            return
        if SURROGATE.search(line):
            say("输入里有不是 UTF-8 的字节，请再输一次")
            continue
        command, _, rest = line.strip().partition(" ")
        if command == "/base":
            line = rest or last
        if command == "/help" or line is None:
            print(HELP)
            continue
        last = line
        print("Response:  ", end="", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # ends the answer, not the chat
            show(answer(line, without_adapter=command == "/base"))
        print("\n\n")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
