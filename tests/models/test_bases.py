"""Bases of other kinds than LLaMA-1: what they train, answer and merge to.     python -m pytest tests/models/test_bases.py"""

import json
import re
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_deepspeed
from alpaca.answering.generate import generate
from alpaca.answering.grammar import AnswerGrammar
from alpaca.common.errors import UserError
from alpaca.models.adapters import find_adapter
from alpaca.models.base import load_for_inference
from alpaca.models.base_weights import load_base
from alpaca.models.quantized import QuantizedLinear
from alpaca.models.templates import TEMPLATES, encode_examples, encode_prompts, message_of
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.lora import add_lora, check_options, lora_weights
from alpaca.training.loss import answer_loss
from alpaca.training.prefix_tree import make_collate
from alpaca.weights import safetensors_writer
from config_utils import parse_config
from dataset import parse_answer
from harness import ROOT, assert_same_adapter, lora_settings, make_records, read_log, run_script
from stand_ins import KINDS, SHAPE, TEMPLATE, make_stand_in

sys.path.insert(0, str(ROOT / "model_hub"))
import merge_llama_with_chinese_lora as merge

LABELS = ["人名", "地名"]


@pytest.fixture(scope="session", params=KINDS)
def stand_in(request, tmp_path_factory, tokenizer_models):
    """(kind, its folder, its tokenizer)."""
    kind = request.param
    folder = make_stand_in(tmp_path_factory.mktemp("stand_ins") / kind, kind, tokenizer_models)
    return kind, folder, load_tokenizer(folder, TEMPLATE.get(kind, "auto"))


def trainable(folder, rank=4):
    settings = lora_settings()
    settings.lora_r = rank
    settings.lora_target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return add_lora(load_base(folder, torch.float32, "cpu"), settings)


def test_a_prefix_row_is_one_example_at_a_time(stand_in):
    """Loss and gradients in float32, and of a padded batch too."""
    kind, folder, tokenizer = stand_in
    model = trainable(folder)
    assert model.config.model_type == KINDS[kind]["model_type"]  # it is not loaded as another
    torch.manual_seed(1)
    for name, weight in lora_weights(model, model.lora.data).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    examples = encode_examples(tokenizer, make_records(6, 5))
    tokens, found = sum(len(example.answer_ids) for example in examples), []
    for packing, groups in (("none", [[e] for e in examples]), ("none", [examples]), ("prefix", [examples])):
        collate = make_collate(packing, tokenizer.pad_token_id)
        loss = sum(answer_loss(model, collate(group), tokens) for group in groups)
        found.append((loss.item(), torch.autograd.grad(loss, model.lora)[0]))
    (alone, gradient), *others = found
    assert gradient.norm() > 0
    for loss, other in others:
        assert loss == pytest.approx(alone, rel=1e-5) and (other - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.slow
def test_eight_examples_are_learnt_by_heart(stand_in):
    _, folder, tokenizer = stand_in
    model, examples = trainable(folder, rank=16), encode_examples(tokenizer, make_records(8, 7))
    rows = make_collate("prefix", tokenizer.pad_token_id)(examples)
    optimizer, tokens = torch.optim.Adam([model.lora], lr=1e-2), sum(len(e.answer_ids) for e in examples)
    losses = []
    while len(losses) < 150 and (not losses or losses[-1] > 0.05 * losses[0]):
        loss = answer_loss(model, rows, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], losses[-1]


@pytest.mark.slow
def test_answers_are_transformers_own_in_any_batch(stand_in):
    """Greedy, without a grammar; some end, since an eos is made likely."""
    kind, folder, tokenizer = stand_in
    model = load_base(folder, torch.float32, "cpu").eval()
    prompts = encode_prompts(tokenizer, [message_of(r["instruct"], r["query"]) for r in make_records(7, 9)])
    ends = sorted(tokenizer.ends)
    assert len(ends) == (1 if kind == "alpaca2" else 2)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
        # no row beyond the tokenizer is ever said, nor what has no text
        silent = {*tokenizer.controls.values()} - {*ends}
        options["suppress_tokens"] = [*silent, *range(len(tokenizer), model.config.vocab_size)]
        said = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        expected.append(tokenizer.decode([token for token in said if token not in tokenizer.ends]))
    # tied and untrained, it repeats the last token of the prompt
    assert len(set(expected)) > 1 or kind == "qwen2"
    for batch in (1, 3, 7):
        assert [a.text for a in generate(model, tokenizer, prompts, 20, batch)] == expected, batch


def test_a_grammar_holds_the_answers(stand_in):
    kind, folder, tokenizer = stand_in
    model = load_base(folder, torch.float32, "cpu").eval()
    records = [*make_records(5, 11), {"instruct": "i", "query": "q", "text": "<think>王<|im_end|></s>明\n"}]
    texts = [record["text"] for record in records]
    prompts = encode_prompts(tokenizer, [message_of(r["instruct"], r["query"]) for r in records])
    grammar = AnswerGrammar(tokenizer, LABELS)
    answers = [a.text for a in generate(model, tokenizer, prompts, 30, 3, grammar, texts)]
    assert answers == [a.text for a in generate(model, tokenizer, prompts, 30, 1, grammar, texts)]
    for text, answer in zip(texts, answers, strict=True):
        parsed = parse_answer(answer, text, LABELS)
        assert parsed == (parsed.entities, [], [], [], []), answer
    for text in texts:  # and every right answer can be said
        (matcher,) = grammar.matchers([text])
        entity = text.strip()[:3]
        for token in [*tokenizer.encode_texts([f"{entity}_人名\n{entity}_地名"])[0], tokenizer.frame.end]:
            bits = grammar.masks([matcher])[0]
            assert bits[token // 32].item() >> token % 32 & 1, (text, token)
            matcher.consume_token(token)


def test_a_quantized_base_keeps_its_biases_and_norms(stand_in):
    _, folder, _ = stand_in
    model, full = (load_base(folder, torch.float32, "cpu", kind) for kind in ("nf4", "full"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                full.get_submodule(name).weight.copy_(module.dequantized(torch.float32))
        assert (model(ids).logits - full(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name, shape, said",
    [
        ("model.layers.0.self_attn.q_proj.bias", 64, "1 tensors are not of the model in config.json, {name} among"),
        ("lm_head.weight", 0, "{name} is not the embeddings, though config.json says"),
        ("v_head.summary.weight", 1, None),
    ],
)
def test_tensors_that_config_json_knows_nothing_of(name, shape, said, tmp_path, tokenizer_models, capsys):
    """transformers would leave out the biases of a Qwen2 that calls itself a Qwen3, and say it to nobody."""
    base = make_stand_in(tmp_path, "qwen2" if shape == 0 else "qwen3", tokenizer_models)
    tensors = load_file(base / "model.safetensors")
    tensors[name] = torch.ones(shape) if shape else tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for base_weights in ("full", "nf4"):  # however the base is held, the words are the same
        if said:
            with pytest.raises(UserError, match=re.escape(said.format(name=name))):
                load_base(base, torch.float32, "cpu", base_weights)
        else:
            load_base(base, torch.float32, "cpu", base_weights)
            assert f"不用 1 个张量，如 {name}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["qwen3", "alpaca2"])
def test_both_trainers_train_it_and_go_on(kind, tmp_path, tokenizer_models, instruct_data):
    """The same losses, the same adapter; a run resumed in its middle ends as the one that was not; test.py answers."""
    base = make_stand_in(tmp_path / "base", kind, tokenizer_models)
    options = [f"--model_dir={base}", "--precision=fp32", "--max_steps=6", "--train_batch_size=6", "--log_steps=1"]
    options += ["--lora_dropout=0.1", "--save_steps=3", "--eval_steps=6", f"--template={TEMPLATE.get(kind, 'auto')}"]
    options += [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    run_script("train_deepspeed.py", *options, "--save_dir=one", cwd=tmp_path)
    run_script("train_trainer.py", *options, "--save_dir=two", cwd=tmp_path)
    assert read_log(tmp_path / "two") == read_log(tmp_path / "one")
    assert_same_adapter(tmp_path / "two", tmp_path / "one")
    expected = read_log(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    run_script("train_deepspeed.py", *options, "--save_dir=again", "--resume=3", cwd=tmp_path)
    assert read_log(tmp_path / "again")[len(expected) :] == [row for row in expected if row["step"] > 3]
    assert_same_adapter(tmp_path / "again", tmp_path / "one")

    lora = ["--lora_model=one/adapter_model", "--precision=fp32", "--max_new_tokens=9"]
    run_script("test.py", *lora, f"--dev_path={instruct_data}/dev.txt", "--max_examples=3", cwd=tmp_path)
    facts = json.loads((tmp_path / "one" / "adapter_model" / "train_args.json").read_text(encoding="utf-8"))
    assert facts["template"] == {"qwen3": "chat", "alpaca2": "alpaca2"}[kind]
    result = run_script("predict.py", *lora, "--text=王明。", "--template=alpaca", cwd=tmp_path, check=False)
    assert result.returncode == 2 and f"the adapter was trained with {facts['template']}" in result.stderr
    path = base / "chat_template.jinja"
    if path.is_file():  # another system turn: another template
        path.write_text(path.read_text(encoding="utf-8").replace("helpful", "kind"), encoding="utf-8")
        result = run_script("predict.py", *lora, "--text=王明。", cwd=tmp_path, check=False)
        assert result.returncode == 2 and "was trained with another prompt template" in result.stderr


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_merged_model_is_base_and_adapter(kind, tmp_path, tokenizer_models, instruct_data, monkeypatch, capsys):
    """From sharded files to sharded files; a head that was tied is written apart; it is asked as the adapter was."""
    base = make_stand_in(tmp_path / "base", kind, tokenizer_models)
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="60KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    trained = [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    options = [f"--model_dir={base}", "--precision=fp32", "--max_steps=3", "--deepspeed_optimizer_params_lr=0.01"]
    run_script("train_deepspeed.py", *options, *trained, "--save_dir=run", cwd=tmp_path)
    adapter = tmp_path / "run" / "adapter_model"
    monkeypatch.setattr(safetensors_writer, "FILE_BYTES", 100_000)
    monkeypatch.chdir(tmp_path)
    merge.main(parse_config(merge.CONFIG, merge.__file__, [
        f"--base_model={base}", f"--lora_model={adapter}", "--output_dir=merged", "--verify"]))  # fmt: skip
    assert "3/3 个贪心答案相同" in capsys.readouterr().out
    merged = tmp_path / "merged"
    assert len(list(merged.glob("model-*.safetensors"))) > 2
    assert not AutoModelForCausalLM.from_pretrained(merged).config.tie_word_embeddings
    own = AutoTokenizer.from_pretrained(base)
    assert AutoTokenizer.from_pretrained(merged).chat_template == own.chat_template
    found = [find_adapter("demo", str(adapter)), find_adapter("demo", None, str(merged))]
    answers = []
    for (folder, train_args, facts), name in zip(found, (None, str(merged)), strict=True):
        model, tokenizer = load_for_inference(folder, train_args, facts, name, None, "fp32", "cpu")
        assert tokenizer.template.name == "chat"
        prompts = encode_prompts(tokenizer, ["王明去年在北京说", "你好"])
        answers.append([answer.text for answer in generate(model, tokenizer, prompts, 20, 2)])
    assert answers[0] == answers[1]
    with pytest.raises(UserError, match="--output_type=pth: no place there for the tensor model.layers.0.self_attn"):
        merge.main(parse_config(merge.CONFIG, merge.__file__, [
            f"--base_model={base}", f"--lora_model={adapter}", "--output_dir=pth", "--output_type=pth"]))  # fmt: skip


def test_a_lora_on_a_tied_head_leaves_the_embeddings(tmp_path, tokenizer_models, capsys):
    """In the model that answers with it merged, and in what a merge is compared with, where another LoRA follows."""
    base = make_stand_in(tmp_path / "base", "qwen2", tokenizer_models)
    for seed, name in enumerate(("lm_head", "q_proj")):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=[name], r=4, lora_alpha=16, task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
    ids, found = torch.arange(3, 40)[None], []
    for merged in (False, True):
        lora = find_adapter("demo", str(tmp_path / "lm_head"))
        model, _ = load_for_inference(*lora, str(base), None, "fp32", "cpu", merge=merged)
        with torch.no_grad():
            found.append(model(ids).logits)
    assert (found[1] - found[0]).abs().max() < 1e-4 * found[0].std()
    merge.main(parse_config(merge.CONFIG, merge.__file__, [
        f"--base_model={base}", f"--lora_model={tmp_path}/lm_head,{tmp_path}/q_proj", f"--output_dir={tmp_path}/merged",
        "--verify"]))  # fmt: skip
    assert "3/3 个贪心答案相同，logits 最大相差 0.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {"model_type": "gemma2", "sliding_window": 4096},
            "\"model_type\" is 'gemma2'; only llama, mistral",
        ),
        ({"model_type": "mixtral", "num_local_experts": 8}, "is 'mixtral'; only"),
        ({"model_type": "gpt2"}, "is 'gpt2'; only"),
        ({"model_type": "qwen", "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}, "auto_map names code"),
        (
            {**SHAPE, "vocab_size": 9, "model_type": "mistral", "sliding_window": 256},
            "sliding_window of 256 .*max_seq_length=256, or --packing=none",
        ),
    ],
)
def test_layers_that_are_refused_before_any_weight(config, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    args = parse_config(train_deepspeed.CONFIG, train_deepspeed.__file__, [f"--model_dir={tmp_path}"])
    with pytest.raises(UserError, match=said) as error:
        check_options(args)
    assert "\n" not in str(error.value)


def test_a_window_may_be_short_in_a_padded_batch_and_targets_are_linear_layers(tmp_path, tokenizer_models):
    base = make_stand_in(tmp_path / "base", "mistral", tokenizer_models)  # a window of 300
    options = [f"--model_dir={base}", "--max_seq_length=512", "--packing=none"]
    check_options(parse_config(train_deepspeed.CONFIG, train_deepspeed.__file__, options))
    options += ["--lora_target_modules=c_attn"]
    with pytest.raises(
        UserError, match="no linear layer 'c_attn'; there are down_proj, gate_proj, k_proj, lm_head, o_proj"
    ):
        check_options(parse_config(train_deepspeed.CONFIG, train_deepspeed.__file__, options))


def test_facts_of_the_published_alpaca2():
    """github.com/ymcui/Chinese-LLaMA-Alpaca-2, scripts/inference: its prompt, and the sum of this one."""
    assert TEMPLATES["alpaca2"].prompt("你好") == (
        "[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n你好 [/INST]"
    )
    assert TEMPLATES["alpaca2"].pieces == (55296,)
