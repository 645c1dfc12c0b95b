"""The figures of README.md, measured on the files that train_tiny.py wrote."""

from pathlib import Path

import torch
import torch.nn.functional as F

from alpaca.answering.generate import generate
from alpaca.corpora.convert import Task, convert
from alpaca.corpora.labels import DEFAULT_LABELS, read_labels
from alpaca.corpora.problems import Problems
from alpaca.models.templates import TEMPLATES, message_of
from alpaca.models.tokenizer import BOS, EOS, load_sentencepiece
from dataset import INSTRUCT, QUERY_PREFIX
from embedded_model.published_files import FOLDERS, load_adapter, load_base, with_adapter
from embedded_model.tasks import TASKS
from embedded_model.text_maker import TextMaker, any_text, plain_text

DEMO_DEV = Path(__file__).resolve().parent.parent / "data" / "demo" / "ori_data" / "dev.txt"
IGNORE = -100  # cross_entropy's mark for a token that carries no loss
BATCH_SIZE = 100  # examples
NEW_TOKENS = 120  # of an answer at most


def new_texts(seed, split, count):
    """[("", text)] as natural as the demo's: on known templates ("train") or on held-out ones ("dev")."""
    maker = TextMaker(f"{seed}-text", split)
    return [("", plain_text(any_text(maker))) for _ in range(count)]


def held_out_tasks(seed, count):
    """{task: [(prompt, answer)]} on templates and names that are in no training text."""
    maker = TextMaker(f"{seed}-tasks", "dev")
    examples = {}
    for task in TASKS:
        found = []
        while len(found) < count:
            example = task(maker, any_text(maker))
            if example:
                instruct, query, answer = example
                found.append((prompt_of(instruct, query), answer))
        examples[task.__name__] = found
    return examples


def demo_examples(count):
    """[(prompt, answer)] of the demo's dev set, the task that no stage trains."""
    labels = read_labels(DEFAULT_LABELS)
    instruct = INSTRUCT.replace("{labels}", "、".join(labels.values()))
    examples = convert(DEMO_DEV, "jsonl", Task(labels, instruct, QUERY_PREFIX), Problems())[:count]
    return [(prompt_of(e["instruct"], e["query"]), e["answer"]) for e in examples]


def prompt_of(instruct, query):
    return TEMPLATES["alpaca"].prompt(message_of(instruct, query))


def with_bos(tokenizer, examples):
    """The ids of the prompts of [(prompt or "", answer)]."""
    return [[BOS, *ids] for ids in tokenizer.encode_texts([prompt for prompt, _ in examples])]


@torch.no_grad()
def nats_per_character(model, tokenizer, examples):
    """Loss of the answers of [(prompt or "", answer)] in nats a character, which two vocabularies have in common."""
    prompts = with_bos(tokenizer, examples)
    answers = [[*ids, EOS] for ids in tokenizer.encode_texts([answer for _, answer in examples])]
    total = 0.0
    for begin in range(0, len(examples), BATCH_SIZE):
        part = list(zip(prompts, answers, strict=True))[begin : begin + BATCH_SIZE]
        rows = [torch.tensor(prompt + answer) for prompt, answer in part]
        labels = [torch.tensor([IGNORE] * len(prompt) + answer) for prompt, answer in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE).to(model.device)
        logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
        total += F.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum").item()
    return total / sum(len(answer) + 1 for _, answer in examples)  # the end of an answer counts as a character


def report(output_dir, device, seed, count):
    """Print the losses and the share of exact answers of the base, alone and with the adapters in both orders.

    count: held-out examples of each task; twice as many texts.
    """
    base = load_base(output_dir / FOLDERS["base"])
    llama, alpaca = (load_adapter(output_dir / FOLDERS[stage]) for stage in ("llama", "alpaca"))
    with_llama = with_adapter(base, llama)
    candidates = {
        "base": (base, "base"),
        "base + llama": (with_llama, "llama"),
        "base + llama + alpaca": (with_adapter(with_llama, alpaca), "alpaca"),
        "base + alpaca + llama, the wrong order": (with_adapter(with_adapter(base, alpaca), llama), "llama"),
    }
    known, held_out = new_texts(seed, "train", 2 * count), new_texts(seed, "dev", 2 * count)
    demo, tasks = demo_examples(2 * count), held_out_tasks(seed, count)
    examples = [example for found in tasks.values() for example in found]
    print(f"nats a character; tasks on held-out templates and names, {count} of each")
    for name, (model, stage) in candidates.items():
        model = model.to(device).eval()
        tokenizer = load_sentencepiece(output_dir / FOLDERS[stage])
        losses = [nats_per_character(model, tokenizer, found) for found in (known, held_out, demo, examples)]
        prompts = with_bos(tokenizer, examples)
        answers = generate(model, tokenizer, prompts, NEW_TOKENS, BATCH_SIZE)
        right = [answer.text == gold for answer, (_, gold) in zip(answers, examples, strict=True)]
        exact = {task: sum(right[i * count : (i + 1) * count]) / count for i, task in enumerate(tasks)}
        text = "new text {:.3f}, with held-out templates {:.3f}, the demo's answers {:.3f}, the tasks' {:.3f}"
        print(f"{name}: " + text.format(*losses))
        print("  exact answers: " + ", ".join(f"{task} {rate:.2f}" for task, rate in exact.items()), flush=True)
