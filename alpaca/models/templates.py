"""How a base is asked: the one table of templates, and the ids of prompts and of examples.

A message is what a user says: the instruction and, on a line of its own, the query. A template stands around it. Training,
testing, predicting and chatting build their prompts here and nowhere else, so they cannot disagree about a byte of them.
`chat` is not in the table: it is what the base's own chat template writes (chat_template).
"""

import datetime
import hashlib
import re
from typing import NamedTuple

from jinja2 import TemplateError

from alpaca.common.errors import UserError

CHAT = "chat"
# Some chat templates write today's date. A prompt of tomorrow must be that of training.
DATE = datetime.date(2024, 7, 26)
_PARTS = "".join(f"|replace('%{part}','{DATE.strftime('%' + part)}')" for part in "YymdBbAaHMSj")
CLOCK = (
    f"{{% macro strftime_now(form) %}}{{{{ form{_PARTS} }}}}{{% endmacro %}}\n"  # in place of transformers' function
)
MESSAGE, ANSWER = "\ue000message\ue001", "\ue000answer\ue001"  # places in what a chat template writes


class Template(NamedTuple):
    """What stands around a message. The tokenizer adds bos, where it has one, unless the template writes it itself."""

    name: str
    before: str
    after: str
    end: str = ""  # the token that ends an answer; "": the tokenizer's eos
    pieces: tuple = ()  # the sizes of the published vocabularies that were tuned with it
    headings: tuple = ()  # how the model begins another prompt, if it does not know when to end

    @property
    def sha256(self):
        """Hex digest of all its text: an adapter only fits the prompts it was trained with."""
        return hashlib.sha256(f"{self.before}{{instruction}}{self.after}{self.end}".encode()).hexdigest()

    def prompt(self, message):
        """The prompt of one message, without bos."""
        return self.before + message + self.after


TEMPLATES = {
    template.name: template
    for template in (
        # Stanford Alpaca's, for an instruction without a separate input. The one space at its end is a token of its own
        # ("▁"): the answer is encoded separately behind it.
        Template(
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\n",
            "\n\n### Response: ",
            pieces=(49953, 49954),
            headings=("### Instruction:", "### Response:"),
        ),
        # That of Chinese-Alpaca-2 (github.com/ymcui/Chinese-LLaMA-Alpaca-2)
        Template(
            "alpaca2",
            "[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n",
            " [/INST]",
            pieces=(55296,),
            headings=("[INST]",),
        ),
    )
}
NAMES = (*TEMPLATES, CHAT)


def check_name(asked):
    """UserError for a --template that there is not."""
    if asked not in ("auto", *NAMES):
        raise UserError(f"--template={asked}: expected auto, {', '.join(NAMES)}")


def choose_name(asked, folder, pieces, has_chat):
    """`--template` -> the name of the template of a base.

    pieces: the size of its SentencePiece vocabulary, None where it has another tokenizer. has_chat: whether it holds a chat
    template. UserError where auto would be a guess.
    """
    check_name(asked)
    if asked != "auto":
        return asked
    fitting = [name for name, template in TEMPLATES.items() if pieces in template.pieces] + [CHAT] * has_chat
    if len(fitting) > 1:
        raise UserError(f"{folder}: both {' and '.join(fitting)} would fit; say which one with --template=…")
    if not fitting and pieces is None:
        raise UserError(f"{folder}: has no chat template; say how to ask it with --template={' or '.join(TEMPLATES)}")
    return fitting[0] if fitting else "alpaca"


def chat_template(tokenizer, source, folder):
    """The Template of what a base's own chat template (jinja) writes around one message of the user.

    tokenizer: transformers'. Thinking is switched off, where there is a switch; what the template writes then, Qwen3's
    empty block, is part of the prompt.
    """

    def render(*contents):
        messages = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)
        ]
        return tokenizer.apply_chat_template(
            messages,
            chat_template=CLOCK + source,
            tokenize=False,
            add_generation_prompt=len(contents) == 1,
            enable_thinking=False,
            date_string=DATE.strftime("%d %b %Y"),
        )

    try:
        parts, (_, _, behind) = render(MESSAGE).split(MESSAGE), render(MESSAGE, ANSWER).partition(ANSWER)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: its chat template cannot be used ({error}); see --template") from None
    if len(parts) != 2:
        raise UserError(f"{folder}: its chat template does not write a message as it is, and once; see --template")
    end = re.match(rf"\s*({'|'.join(map(re.escape, tokenizer.all_special_tokens))})", behind)
    return Template(CHAT, *parts, end[1] if end else "")


# ---------------------------------------------------------------------------------------------------------------------
# token ids


class TokenizedExample(NamedTuple):
    """An example as token ids."""

    prompt_ids: list  # of int, begins with bos where the tokenizer has one
    answer_ids: list  # of int, ends with eos
    line: int | None = None  # where in the file it stands, for messages


class Frame(NamedTuple):
    """A template in a tokenizer's ids.

    Only what stands between two control tokens is encoded together: `lead`, a message, `trail`.
    """

    head: list  # ids of what stands before that
    lead: str
    trail: str
    tail: list  # ids of what stands behind it
    end: int  # the id that ends an answer


def message_of(instruct, query):
    """What a user says: an empty query adds no newline."""
    return f"{instruct}\n{query}" if query else instruct


def make_frame(tokenizer, template):
    """The Frame of a Template. tokenizer: ExactTokenizer or FastTokenizer."""
    controls = tokenizer.controls  # {text: id}
    pattern = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))

    def ids_of(text):
        """What stands between controls is encoded as it comes; [] for ""."""
        parts = re.split(f"({pattern})", text)
        texts = iter(tokenizer.encode_texts([part for part in parts[::2] if part]))
        return [i for n, part in enumerate(parts) if part for i in ([controls[part]] if n % 2 else next(texts))]

    *head, lead = re.split(f"({pattern})", template.before)
    trail, *tail = re.split(f"({pattern})", template.after)
    begin = [] if template.name == CHAT else tokenizer.begin
    end = controls[template.end] if template.end else tokenizer.eos_token_id
    return Frame([*begin, *ids_of("".join(head))], lead, trail, ids_of("".join(tail)), end)


def encode_prompts(tokenizer, messages):
    """Ids of prompts as the model is to read them: list of str (message_of) -> list of list of int.

    A control token that stands in a message is text like any other.
    """
    head, lead, trail, tail, _ = tokenizer.frame
    return [[*head, *ids, *tail] for ids in tokenizer.encode_texts([lead + message + trail for message in messages])]


def encode_examples(tokenizer, examples):
    """Examples -> list of TokenizedExample. Prompt and answer are encoded separately; only the answer carries loss."""
    prompts = encode_prompts(tokenizer, [message_of(e["instruct"], e["query"]) for e in examples])
    answers, end = tokenizer.encode_texts([e["answer"] for e in examples]), tokenizer.frame.end
    lines = [e.get("line") for e in examples]
    return [TokenizedExample(p, [*a, end], line) for p, a, line in zip(prompts, answers, lines, strict=True)]
