"""Greedy answers are those of the model, whatever is computed together.     python -m pytest tests/answering/test_generation.py"""

import copy
import random
from collections import Counter
from contextlib import nullcontext
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alpaca.answering import engine, memory, slots
from alpaca.answering import generate as generating
from alpaca.answering.engine import Engine
from alpaca.answering.generate import Request, answer_requests, generate, sampler, stream, without_template
from alpaca.answering.grammar import AnswerGrammar
from alpaca.answering.prefixes import find_prefixes
from alpaca.answering.row import Row
from alpaca.answering.slots import Slots
from alpaca.answering.standby import Standby
from alpaca.answering.step import Part, Stepper
from alpaca.common.errors import UserError
from alpaca.models.base_weights import load_base
from alpaca.models.templates import TEMPLATES, encode_prompts, message_of
from alpaca.models.tokenizer import BOS, EOS, UNK, load_tokenizer
from harness import INSTRUCTION, make_records

LABELS = ["人名", "地名"]


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return load_tokenizer(base_dir)


@pytest.fixture(scope="module")
def model(base_dir, tokenizer, prompts):
    """Random, but its eos is as likely as a token that half of its answers hold, so that these end there."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.model.parameters():  # such that what stands before a token matters
            if weight.dim() == 2:
                weight *= 8
    texts = [greedy(model, prompt) for prompt in prompts[0]]
    counts = Counter(token for text in texts for token in set(text) - {text[0]})
    token = min(counts, key=lambda token: abs(counts[token] - len(texts) // 2))
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight[token] * 1.0001
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer):
    records = make_records(21, 5)
    texts = [record["text"] for record in records]
    prompts = encode_prompts(tokenizer, [message_of(INSTRUCTION, f"文本：{text}") for text in texts])
    return prompts, texts


def greedy(model, prompt):
    """The new tokens of transformers' own loop, which is kept from what has no text; [PAD] is the last piece."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
    options["suppress_tokens"] = [BOS, UNK, model.config.vocab_size - 1]
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def answers(model, tokenizer, prompts, texts=None, max_new_tokens=24, batch_size=8):
    grammar = AnswerGrammar(tokenizer, LABELS) if texts else None
    return list(generate(model, tokenizer, prompts, max_new_tokens, batch_size, grammar, texts))


def rounded(answers):
    """Log-probabilities differ in the last digits."""
    return [
        (*answer[:4], [round(score, 3) for score in answer.scores], round(answer.log_probability, 2))
        for answer in answers
    ]


def test_answers_are_those_of_transformers(model, tokenizer, prompts):
    """One example at a time, the full prompt, model.generate: the same tokens. Some have another instruction."""
    others = [message_of("说出下面文本里的人名，没有就说没有。", text) for text in prompts[1][::4]]
    prompts = [*prompts[0][::2], *encode_prompts(tokenizer, others)]
    assert len(find_prefixes(prompts)[0]) == 2
    found = answers(model, tokenizer, prompts)
    for prompt, answer in zip(prompts, found, strict=True):
        new = greedy(model, prompt)
        assert answer.ended == (EOS in new)
        assert answer.text == tokenizer.decode([token for token in new if token != EOS])
    assert 1 < sum(answer.ended for answer in found) < len(found)  # rows leave at different times


@pytest.mark.slow
@pytest.mark.parametrize("constrained", [False, True])
def test_nothing_depends_on_what_is_computed_together(model, tokenizer, prompts, monkeypatch, constrained):
    """Batches of 1, 3 and 64; any order; a memory for two rows, in which others begin; prompts read in parts."""
    prompts, texts = prompts[0], prompts[1] if constrained else None
    expected = rounded(answers(model, tokenizer, prompts, texts, batch_size=1))
    # from here on, the slots of the two layers are apart, as on two devices
    monkeypatch.setattr(engine, "device_runs", lambda layers: [(torch.device("cpu"), 1)] * 2)
    for batch_size in (3, 64):
        assert rounded(answers(model, tokenizer, prompts, texts, batch_size=batch_size)) == expected
    shuffled = random.Random(1).sample(range(len(prompts)), len(prompts))
    mixed = answers(model, tokenizer, [prompts[i] for i in shuffled], texts and [texts[i] for i in shuffled])
    assert [rounded(mixed)[shuffled.index(i)] for i in range(len(prompts))] == expected
    # a memory for two of the longest rows: others go back to wait, in the middle of their answers
    monkeypatch.setattr(slots, "PLACES", 8)
    monkeypatch.setattr(slots, "USUAL", 0)
    monkeypatch.setattr(slots, "ANSWER_PLACES", 1)
    token_bytes = 2 * 2 * 1 * 16 * 4  # layers, key and value, heads, size, float32
    places = max(map(len, prompts)) - len(find_prefixes(prompts)[0][0].tokens) + 24
    monkeypatch.setattr(slots, "free_memory", lambda device: 2 * places * token_bytes / slots.MEMORY_SHARE)
    put_off, release = [], Slots.release
    monkeypatch.setattr(Slots, "release", lambda self, row: put_off.append(row.over) or release(self, row))
    assert rounded(answers(model, tokenizer, prompts, texts)) == expected
    assert not all(put_off[1:]) or constrained  # the first is what all share; the longest constrained answers are short
    # a prompt is read in parts, some beside others
    monkeypatch.setattr(engine, "STEP_TOKENS", 11)
    assert rounded(answers(model, tokenizer, prompts, texts)) == expected


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="seen with the kernels for AVX2 alone")
def test_log_probabilities_are_equal_to_the_last_digit(tokenizer, prompts):
    """In float32 on a CPU, in sizes that its kernels compute as those of a larger model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=512, **sizes)
    model = LlamaForCausalLM(config).eval()
    found = [answers(model, tokenizer, prompts[0], batch_size=batch_size) for batch_size in (64, 3, 5)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("constrained", [False, True])
def test_without_memory_fewer_rows_go_on_where_they_were(model, tokenizer, prompts, monkeypatch, capsys, constrained):
    """Once in the middle of a step, and once when its logits are there."""
    prompts, texts = prompts[0], prompts[1] if constrained else None
    expected = rounded(answers(model, tokenizer, prompts, texts))
    holder, name = (engine, "forbid") if constrained else (Stepper, "compute")
    original, calls = getattr(holder, name), []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args)

    monkeypatch.setattr(holder, name, fails_once)
    assert rounded(answers(model, tokenizer, prompts, texts)) == expected
    assert "最多同时回答 4 条" in capsys.readouterr().err
    monkeypatch.setattr(Stepper, "compute", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match="no memory left for a single answer"):
        answers(model, tokenizer, prompts)


def test_adapters_apart_answer_as_merged_ones_and_none_as_the_base(model, tokenizer, prompts):
    """Two adapters and none, in turn, with the slots of one standby."""
    prompts = prompts[0][::3]

    def adapted():
        torch.manual_seed(7)
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
        peft_model = PeftModel(copy.deepcopy(model), LoraConfig(**options), "one")
        peft_model.add_adapter("two", LoraConfig(**options))
        return peft_model.eval()

    apart, standby, found = adapted(), Standby(8), {}
    for name in ("one", "two", "none", "one"):
        if name != "none":
            apart.set_adapter(name)
        with apart.disable_adapter() if name == "none" else nullcontext():
            found[name] = list(generate(apart, tokenizer, prompts, 24, 8, standby=standby))
        slots = found.setdefault("slots", standby.slots)
        assert slots is standby.slots and not any(slots.taken)
    merged = {name: adapted() for name in ("one", "two")}
    for name, other in merged.items():
        other.set_adapter(name)
    wholes = {name: other.merge_and_unload() for name, other in merged.items()} | {"none": model}
    for name, whole in wholes.items():
        assert rounded(found[name]) == rounded(answers(whole, tokenizer, prompts))
    assert len({str(rounded(found[name])) for name in wholes}) == 3
    assert standby.rows == {("one",): 2 * len(prompts), ("two",): len(prompts), (): len(prompts)}


def test_a_step_goes_from_device_to_device(model, prompts, monkeypatch):
    """The device `meta` has shapes, but no numbers; torch refuses to compute with tensors of two devices."""
    parts, prompts = copy.deepcopy(model), [prompt[:n] for prompt, n in zip(prompts[0], (1, 5, 5), strict=False)]
    for part in (parts.model.layers[1], parts.model.norm, parts.lm_head):
        part.to("meta")
    rows, free = [Row(i, prompt, 20) for i, prompt in enumerate(prompts)], {"cpu": 2**30, "meta": 2**15}
    monkeypatch.setattr(slots, "free_memory", lambda device: free[device.type])
    made = Slots(parts.config, slots.device_runs(parts.model.layers), torch.float32, rows, 64, True)
    assert [str(kept.device) for kept in made.kept] == ["cpu", "meta"]
    assert made.kept[1].numel() * 4 <= 2**15 < 64 * made.kept[1][:, :, 0].numel() * 4  # the fuller one decides
    for row in rows:
        made.give(row, len(row.ids))
    with torch.inference_mode():
        logits = Stepper(parts, made)([Part(row, len(row.ids)) for row in rows])
    assert logits.is_meta and logits.shape == (3, len(model.lm_head.weight))


def test_bf16_differs_from_float32_as_transformers_does(model, tokenizer, prompts, monkeypatch):
    """The logits behind the prompts and the first tokens of the answers; others are read beside them, and in parts."""
    seen, choose = {}, Engine.choose

    def noted(self, rows, logits):
        seen.update({tuple(row.ids): line.clone() for row, line in zip(rows, logits, strict=True)})
        choose(self, rows, logits)

    monkeypatch.setattr(Engine, "choose", noted)
    monkeypatch.setattr(engine, "STEP_TOKENS", 29)
    half = copy.deepcopy(model).to(torch.bfloat16)
    answers(half, tokenizer, prompts[0][:6], max_new_tokens=3, batch_size=4)
    assert len(seen) > 12
    with torch.no_grad():
        exact, theirs = (
            torch.stack([kind(torch.tensor([ids])).logits[0, -1].float() for ids in seen]) for kind in (model, half)
        )
    ours = torch.stack(list(seen.values()))[:, : exact.shape[1]]
    error, expected = ((logits - exact).norm() / exact.norm() for logits in (ours, theirs))
    assert error < 1.5 * expected < 0.5


CACHED = "active_file 100\ninactive_file 200\ntotal_active_file 10000\ntotal_inactive_file 20000\n"


@pytest.mark.parametrize(
    "line, files, free",
    [  # a container's root under v2; a job that may use what it likes, in one that may not; v1; no limit; no controller
        ("0::/", {"memory.max": "5000", "memory.current": "1000"}, 4300),
        ("0::/job/1", {"job/1/memory.max": "max", "job/memory.max": "3000", "job/memory.current": "1000"}, 2300),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": "50000", "memory/memory.usage_in_bytes": "40000"}, 40000),
        ("0::/", {"memory.max": "1000", "memory.current": "2000"}, 0),
        ("0::/", {"memory.max": "max", "memory.current": "1000"}, 7168000),
        ("8:pids:/", {}, 7168000),
        (None, {}, 7168000),
    ],
)
def test_free_memory_is_what_a_container_leaves(tmp_path, monkeypatch, line, files, free):
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    files = {f"cgroup/{name}": text for name, text in files.items()} | {"proc/meminfo": "MemAvailable: 7000 kB"}
    files |= {f"{Path(name).parent}/memory.stat": CACHED for name in files if "cgroup/" in name}
    files |= {"proc/self/cgroup": f"9:name=systemd:/\n{line}\n"} if line else {}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.free_memory(torch.device("cpu")) == free


def test_short_prompts_leave_a_long_row_its_places(model, tokenizer, prompts, monkeypatch):
    """They come in while it is still being answered, and alone would need a cache of half the size."""
    monkeypatch.setattr(slots, "PLACES", 8)
    prompts = [(prompts[0][0] * 3)[:480], *prompts[0]]
    alone = answers(model, tokenizer, prompts, batch_size=1)
    assert rounded(answers(model, tokenizer, prompts, batch_size=8)) == rounded(alone)


@pytest.mark.parametrize("steps", [32, 2])
def test_few_rows_are_answered_before_the_first_has_its_answer(model, tokenizer, prompts, monkeypatch, steps):
    """In their order, and for no more than so many steps; where all rows are known, all begin at once."""
    together, compute = [], Stepper.__call__

    def noted(stepper, parts):
        if parts[0].row.number >= 0:  # not a prefix
            together.append(sorted(part.row.number for part in parts))
        return compute(stepper, parts)

    monkeypatch.setattr(Stepper, "__call__", noted)
    monkeypatch.setattr(engine, "FIRST_STEPS", steps)
    requests = [Request(i, prompt) for i, prompt in enumerate(prompts[0])]
    for expected in (len(requests), None):
        together.clear()
        ended = [
            key for found in answer_requests(model, tokenizer, requests, 24, 16, None, expected) for key, _ in found
        ]
        assert sorted(ended) == [*range(len(requests))]
        few = [len(found) <= 8 for found in together if 0 in found]  # of each step with the first row
        assert max(map(len, together)) == 16
        if expected:
            assert together[0] == [*range(8)] and len(few) > 2 and few == [n < steps for n in range(len(few))]
        else:
            assert not any(few)


def test_a_prompt_that_does_not_fit_keeps_its_place(model, tokenizer, prompts):
    prompts = [prompts[0][0], prompts[0][1] * 5, prompts[0][2]]
    found = answers(model, tokenizer, prompts, max_new_tokens=500)
    assert [answer.text is None for answer in found] == [False, True, False]
    for prompt, answer in zip(prompts, found, strict=True):  # as far as the 512 positions go
        assert answer.ended or answer.text is None or len(prompt) < 512


@pytest.mark.parametrize("constrained", [False, True])
def test_an_answer_has_no_more_tokens_than_it_may(model, tokenizer, prompts, constrained, monkeypatch):
    """Not with one token either, which the grammar may force."""
    limits = []
    answer = Row.answer
    monkeypatch.setattr(Row, "answer", lambda row, *args: limits.append(len(row.ids) - row.limit) or answer(row, *args))
    for count in (1, 2, 5):
        found = answers(model, tokenizer, prompts[0], prompts[1] if constrained else None, max_new_tokens=count)
        assert len(found) == len(prompts[0])
    assert max(limits) == 0


def test_answers_come_in_order_before_all_are_known(model, tokenizer, prompts, monkeypatch):
    monkeypatch.setattr(generating, "SORTED_BATCHES", 1)
    calls = []
    advance = Engine.advance
    monkeypatch.setattr(Engine, "advance", lambda self, waiting: calls.append(len(waiting)) or advance(self, waiting))
    found = generate(model, tokenizer, prompts[0], 12, 4)
    next(found)
    assert calls[-1] > 0  # others have not even begun


@pytest.mark.parametrize("constrained", [False, True])
def test_a_streamed_answer_grows_to_that_of_generate(model, tokenizer, prompts, constrained):
    grammar = AnswerGrammar(tokenizer, LABELS) if constrained else None
    whole = answers(model, tokenizer, prompts[0], prompts[1] if constrained else None)
    growing = 0
    for prompt, text, answer in zip(*prompts, whole, strict=True):
        said = list(stream(model, tokenizer, prompt, 24, grammar, text))
        assert said[-1] == answer.text
        assert all(later.startswith(earlier) and later != earlier for earlier, later in pairwise(said))
        growing += len(said) > 1
    assert growing > 3  # many constrained answers are one line
    assert list(stream(model, tokenizer, [1] * model.config.max_position_embeddings, 24)) == []


def test_half_a_character_is_not_streamed(model, tokenizer, monkeypatch):
    """A model that says 鑫, which is no piece, and ends: three bytes."""
    ids = [*tokenizer.encode_texts(["鑫"])[0], EOS]
    assert len(ids) == 5
    script = iter(ids)

    def says(self, parts):
        logits = torch.zeros(1, tokenizer.vocab_size)
        logits[0, next(script)] = 9
        return logits

    monkeypatch.setattr(Stepper, "__call__", says)
    assert list(stream(model, tokenizer, [1, 5], 24)) == ["鑫"]


def test_free_answers_say_nothing_without_a_text(model, tokenizer, prompts, monkeypatch):
    """No bos, no unk, no pad, which the model likes best here; neither greedily nor drawn."""
    silent, compute = [BOS, UNK, tokenizer.pad_token_id], Stepper.__call__

    def likes_them(self, parts):
        logits = compute(self, parts)
        logits[:, silent] = 50.0
        return logits

    expected = rounded(answers(model, tokenizer, prompts[0][:6]))
    monkeypatch.setattr(Stepper, "__call__", likes_them)
    assert rounded(answers(model, tokenizer, prompts[0][:6])) == expected
    pick = sampler(0.0, 1.0, 1)
    assert [*stream(model, tokenizer, prompts[0][0], 24, pick=pick)][-1] == expected[0][0]


def test_held_and_free_answers_are_given_together(model, tokenizer, prompts):
    """Each as if it were alone: where a record has an instruction of its own, its answer is free."""
    prompts, texts = prompts
    some = [text if i % 3 else None for i, text in enumerate(texts)]
    expected = [(held, free)[i % 3 == 0] for i, (held, free) in enumerate(zip(
        rounded(answers(model, tokenizer, prompts, texts)), rounded(answers(model, tokenizer, prompts)), strict=True
    ))]  # fmt: skip
    assert rounded(answers(model, tokenizer, prompts, some)) == expected
    said = [*stream(model, tokenizer, prompts[0], 24, AnswerGrammar(tokenizer, LABELS))]
    assert said[-1] == expected[0][0]


def given_log_probability(model, tokenizer, prompt, tokens, grammar=None, text=None):
    requests = iter([Request(0, prompt, text, tokens), Request(1, prompt, text)])
    ended = [pair for pairs in answer_requests(model, tokenizer, requests, 3, 4, grammar) for pair in pairs]
    return dict(ended)[0]


def test_a_given_answer_is_scored_and_not_chosen(model, tokenizer, prompts):
    """By the model's own probabilities of its tokens, the end included, however many; beside a row that chooses."""
    prompt = prompts[0][3]
    tokens = [*tokenizer.encode_texts(["王明_人名\n北京_地名"])[0], EOS]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    logits[:, [BOS, UNK, tokenizer.pad_token_id]] = -float("inf")
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item()
    answer = given_log_probability(model, tokenizer, prompt, tokens)
    assert answer.log_probability == pytest.approx(expected, abs=1e-4)
    assert answer.ended and answer.text == "王明_人名\n北京_地名"


def test_a_given_answer_under_a_grammar(model, tokenizer, prompts):
    """What a model says by itself has the probability that it said it with; what the grammar forbids has none."""
    grammar, (prompts, texts) = AnswerGrammar(tokenizer, LABELS), prompts
    own = answers(model, tokenizer, prompts, texts)
    whole = [i for i, answer in enumerate(own) if answer.ended and not (answer.repeated or answer.abandoned)]
    assert whole
    for i in whole[:3]:
        tokens = [*tokenizer.encode_texts([own[i].text])[0], EOS]
        answer = given_log_probability(model, tokenizer, prompts[i], tokens, grammar, texts[i])
        assert answer.ended and answer.text == own[i].text
        assert answer.log_probability <= own[i].log_probability + 1e-4  # it may spell the same text in other tokens
    tokens = [*tokenizer.encode_texts(["鑫鑫_人名"])[0], EOS]
    answer = given_log_probability(model, tokenizer, prompts[0], tokens, grammar, texts[0])
    assert (answer.ended, answer.log_probability) == (True, -float("inf"))


def test_weights_that_are_no_numbers_are_one_line(base_dir, tokenizer, prompts):
    broken = load_base(base_dir, torch.float32, "cpu").eval()
    broken.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    for texts in (None, prompts[1]):
        with pytest.raises(UserError, match=f"{base_dir}: the model computes NaN.*--precision=fp16$"):
            answers(broken, tokenizer, prompts[0], texts)


def test_sampling_is_repeatable_and_stays_in_the_nucleus(model, tokenizer, prompts):
    def said(*options):
        pick = sampler(*options)
        return ["".join([*stream(model, tokenizer, prompt, 24, pick=pick)][-1:]) for prompt in prompts[0][:4]]

    drawn = said(5.0, 0.9, 1)
    assert drawn == said(5.0, 0.9, 1) != said(5.0, 0.9, 2)
    assert said(0.0, 1.0, 1) == said(5.0, 1e-9, 2) == [a.text for a in answers(model, tokenizer, prompts[0][:4])]
    logits = torch.full((1000, tokenizer.vocab_size), -99.0)
    logits[:, 4:7] = torch.tensor([2.0, 1.0, -9.0])
    tokens = Counter(sampler(1.0, 0.8, 0)(logits).tolist())
    assert tokens.keys() == {4, 5} and tokens[4] / 1000 == pytest.approx(0.731, abs=0.04)  # softmax of 2 and 1


def test_a_prompt_of_the_models_own_is_not_shown():
    whole = "好\n\n### 标题\n\n### Instruction:\n再来"
    grown = [whole[:n] for n in range(1, len(whole) + 1)]
    said = list(without_template(iter(grown), TEMPLATES["alpaca"]))
    assert said[0] == "好" and said[-1] == "好\n\n### 标题\n\n"
    assert all(later.startswith(earlier) and later != earlier for earlier, later in pairwise(said))
    for template in (*TEMPLATES.values(), TEMPLATES["alpaca"]._replace(headings=())):
        assert list(without_template(iter(["一 #", "一 ##"]), template))[-1] == "一 ##"  # it did not go on
        assert list(without_template(iter([]), template)) == [] and list(without_template(iter([""]), template)) == [""]


def test_prompts_share_what_those_of_their_instruction_do():
    def shared(*prompts):
        prefixes, of_prompts = find_prefixes(list(prompts))
        assert [prefix.number for prefix in prefixes] == [*range(len(prefixes))]
        assert [prefix.begin for prefix in prefixes] == [*accumulate([0] + [len(p.tokens) for p in prefixes[:-1]])]
        return [list(prefix.tokens) for prefix in of_prompts]

    assert shared([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3]) == [[1, 2]] * 3
    assert shared([1, 2, 3], [1, 9, 3]) == [[1]] * 2
    assert shared([1, 2, 3], [1, 2, 3]) == [[1, 2]] * 2
    assert shared([5, 6], [7, 8]) == shared([5], [5, 6]) == [[]] * 2
    assert shared([1, 2, 3]) == [[]] and shared() == []
    head, first, second = [1, 2], [3, 4, *range(100, 130)], [3, 5, *range(200, 216)]
    rows = [[*head, *middle, n, 0] for n in range(7) for middle in (first, second, [3, 9])]
    expected = [[*head, *first], [*head, *second], [*head, 3]] * 7
    assert shared(*rows) == expected
    assert shared(*rows[:9]) == [[*head, 3]] * 9  # three rows of each are too few


def test_a_lines_score_is_its_log_probability_under_the_constraint(model, tokenizer, prompts):
    """Without its end. Against a plain loop over the tokens of each answer, with the masks of a matcher of its own."""
    grammar = AnswerGrammar(tokenizer, LABELS)
    found = generate(model, tokenizer, prompts[0], 40, 8, grammar, prompts[1])
    prompt, text, answer = next(case for case in zip(*prompts, found, strict=True) if "\n" in case[2].text)
    (matcher,), ids, total = grammar.matchers([text]), list(prompt), 0.0
    scores, line = {}, []
    with torch.no_grad():
        while len(ids) < len(prompt) + 40:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            bits = grammar.masks([matcher])[0]
            for token in range(len(logits)):
                if not int(bits[token // 32]) >> token % 32 & 1:
                    logits[token] = -float("inf")
            token = logits.argmax().item()
            chosen = logits.log_softmax(-1)[token].item()
            total += chosen
            if token == EOS:
                break
            piece = tokenizer.token_bytes[token][len(ids) == len(prompt) :]
            ids.append(token)
            matcher.consume_token(token)
            if piece == b"\n":
                scores.setdefault(tokenizer.decode([i for i, _ in line]), [s for _, s in line])
                line = []
            elif piece:
                line.append((token, chosen))
    scores.setdefault(tokenizer.decode([i for i, _ in line]), [s for _, s in line])
    assert answer.log_probability == pytest.approx(total, abs=1e-4)
    lines = answer.text.split("\n")
    assert len(lines) > 1 and answer.scores == pytest.approx([sum(scores[line]) for line in lines], abs=1e-5)
