"""Which examples a step has, and that a packed row computes exactly what single examples do.

python -m pytest tests/training/test_packing.py
"""

import itertools
import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from alpaca.common.errors import UserError
from alpaca.models.templates import TokenizedExample
from alpaca.models.tokenizer import EOS
from alpaca.training.batches import TrainLoader, added_tokens, eval_batches, optimizer_steps
from alpaca.training.cuda_graphs import (
    CompiledLayers,
    choose_lengths,
    compile_layers,
    mask_buffers,
    next_length,
    row_lengths,
)
from alpaca.training.lora import lora_weights
from alpaca.training.loss import answer_loss, evaluate_loss, model_inputs
from alpaca.training.prefix_tree import (
    IGNORE_INDEX,
    MIN_SHARED,
    make_collate,
    pad_batch,
    prefix_collator,
    to_tensors,
    tree_mask,
    tree_row,
)
from alpaca.training.tree_attention import plan_attention, tree_attention


def example(prompt, answer):
    return TokenizedExample(list(range(10, 10 + prompt)), [*range(30, 30 + answer - 1), EOS])


def test_pad_batch():
    batch = pad_batch([example(3, 2), example(2, 1)], pad_id=9)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 30, 2], [10, 11, 2, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    no = IGNORE_INDEX
    assert batch["labels"].tolist() == [[no, no, no, 30, 2], [no, no, 2, no, no]]


def test_a_pad_token_in_the_users_text_still_carries_loss():
    batch = pad_batch([TokenizedExample([1, 9], [9, EOS]), example(4, 4)], pad_id=9)
    assert batch["labels"][0].tolist()[:4] == [IGNORE_INDEX, IGNORE_INDEX, 9, EOS]
    assert batch["attention_mask"][0].tolist()[:4] == [1, 1, 1, 1]


def sizes_of(n):
    draw = random.Random(n)
    return [draw.choice([9, 20, 21, 300]) for _ in range(n)]


@pytest.mark.parametrize(
    "n, batch, accumulation, ranks", [(205, 12, 1, 1), (205, 3, 4, 2), (7, 4, 2, 4), (24, 4, 2, 3), (211, 5, 3, 8)]
)
def test_every_example_once_an_epoch(n, batch, accumulation, ranks):
    for epoch in range(3):
        steps = list(optimizer_steps(sizes_of(n), batch, accumulation, ranks, 42, epoch))
        assert len(steps) == -(-n // (batch * accumulation * ranks))
        assert all(len(step) == ranks and {len(parts) for parts in step} == {accumulation} for step in steps)
        assert sorted(i for step in steps for parts in step for part in parts for i in part) == list(range(n))
        assert all(len(part) <= batch for step in steps for parts in step for part in parts)
        for step in steps:  # nobody has two more than another
            assert max(sum(map(len, parts)) for parts in step) - min(sum(map(len, parts)) for parts in step) <= 1
            counts = [len(part) for parts in step for part in parts]
            assert max(counts) - min(counts) <= 1


def test_layout_does_not_change_which_examples_a_step_has():
    def sets(sizes, *shape):
        steps = optimizer_steps(sizes, *shape, 42, 1)
        return [sorted(i for parts in step for part in parts for i in part) for step in steps]

    sizes = sizes_of(205)
    expected = sets(sizes, 12, 1, 1)
    assert expected == sets(sizes, 3, 4, 1) == sets(sizes, 3, 2, 2) == sets(sizes, 1, 1, 12) == sets([0] * 205, 3, 1, 4)
    orders = [next(iter(optimizer_steps(sizes, 12, 1, 1, seed, epoch))) for seed, epoch in ((42, 0), (42, 1), (43, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_one_rank_has_the_shuffled_order_whatever_the_sizes():
    order = list(range(205))
    random.Random("42-1").shuffle(order)
    steps = optimizer_steps(sizes_of(205), 3, 4, 1, 42, 1)
    assert [i for ((*parts,),) in steps for part in parts for i in part] == order


def test_ranks_get_equal_numbers_of_tokens():
    """Of two instructions, one of them long, and texts of 5 to 300 tokens: the row of no rank is much above the mean.

    Of drawn examples it would be; so it is if the instruction counts, which a row holds once.
    """
    draw = random.Random(0)
    instructions = [[1, *range(1000, 1080)], [1, *range(2000, 2300)]]
    examples = []
    for _ in range(960):
        text = [draw.randrange(3, 900) for _ in range(min(300, int(draw.lognormvariate(3.5, 0.8)) + 5))]
        examples.append(TokenizedExample(draw.choice(instructions) + text, [7] * draw.randint(1, 30) + [EOS]))

    def excess(sizes, batch, accumulation, ranks):
        """The mean over steps of the longest row of a micro-batch and rank over their mean."""
        ratios = []
        for step in optimizer_steps(sizes, batch, accumulation, ranks, 42, 0):
            rows = [len(tree_row([examples[i] for i in part])["input_ids"]) for parts in step for part in parts]
            ratios.append(max(rows) * len(rows) / sum(rows))
        return sum(ratios) / len(ratios) - 1

    sizes = added_tokens(examples, 12)
    assert all(len(e.answer_ids) < n <= len(e.answer_ids) + 300 for n, e in zip(sizes, examples, strict=True))
    whole = [len(e.prompt_ids) + len(e.answer_ids) for e in examples]
    for shape in ((12, 1, 8), (12, 2, 4)):
        assert excess(sizes, *shape) < 0.03
        assert excess([0] * 960, *shape) > 0.2 and excess(whole, *shape) > 0.06


def test_all_ranks_pad_to_the_same_lengths(lora_model):
    """Else each would wait for the others to compile lengths of their own. No row is longer than the last: all are counted.
    An evaluation, which compiles nothing, finds the same loss in the padded rows."""
    examples = [example(draw, 3) for draw in range(50, 600, 10)]
    lengths = []
    for rank in range(2):
        loader = TrainLoader(examples, 1, 1, make_collate("prefix", 0), 42, rank, 2)
        expected = [batch["rows"][0]["input_ids"] for batch in loader]
        loss = evaluate_loss(lora_model, [loader.collate(examples[:1])], "cpu")
        lengths.append(
            compile_layers(lora_model, loader, "prefix", 0, False, False, None, 2 * loader.steps_per_epoch)[0]
        )
        assert evaluate_loss(lora_model, [loader.collate(examples[:1])], "cpu") == pytest.approx(loss, rel=1e-5)
        rows = [batch["rows"][0]["input_ids"] for batch in loader]
        assert all(torch.equal(a[0, : b.shape[1]], b[0]) for a, b in zip(rows, expected, strict=True))
        assert {row.shape[1] for row in rows} <= set(lengths[0])
    assert lengths[0] == lengths[1] and lengths[0][-1] - 128 < max(len(e.prompt_ids) for e in examples) < lengths[0][-1]


def test_a_compiled_row_has_its_own_mask(lora_model):
    """Each of two of one length: an example that fills it, and two that see nothing of each other."""
    layers, order = CompiledLayers(lora_model, [256], False, False, None), torch.arange(256)
    for examples in ([example(254, 3)], [example(126, 3)] * 2):
        row = to_tensors(tree_row(examples, share=False))
        assert layers.load_mask(row["enter"], row["exit"])
        mask = layers.masks[256][1]
        assert torch.equal(mask.mask_mod(0, 0, order[:, None], order), tree_mask(row["enter"][0], row["exit"][0]))
        for name, buffer in mask_buffers(row["enter"][0], row["exit"][0]).items():
            assert torch.equal(getattr(mask, name), buffer), name


def test_all_rows_of_a_run_are_counted_if_there_is_time(lora_model, capsys):
    """Those of two epochs, accumulation and ranks included. Of a sample, a longer row brings a length of its own, and a line."""
    examples = [example(draw, 3) for draw in range(50, 600, 10)]
    loaders = [TrainLoader(examples, 2, 3, make_collate("prefix", 0), 42, rank, 2) for rank in range(2)]
    met = [row["input_ids"].shape[1] for loader in loaders for batch in loader for row in batch["rows"]]
    for loader in loaders:
        loader.set_epoch(1)
    met += [row["input_ids"].shape[1] for loader in loaders for batch in loader for row in batch["rows"]]
    lengths, complete = row_lengths(loaders[0], "prefix", 2 * loaders[0].steps_per_epoch)
    assert complete and sorted(lengths) == sorted(met) and max(loader.longest for loader in loaders) == max(met)
    first, complete = row_lengths(loaders[0], "prefix", 2 * loaders[0].steps_per_epoch, seconds=-1)
    assert not complete and len(first) == 6 and set(first) <= set(met)

    lengths = [128]
    collate = make_collate("plain", 0, lengths, longer=next_length)
    for draw in (60, 300, 200, 384 - 2, 512 - 2):  # the last two are as long as a length is
        (row,) = collate([example(draw, 3)])
        assert row["input_ids"].shape[1] in lengths
    assert lengths == [128, 384, 512]
    assert capsys.readouterr().err.count("为行长 384 再编译一次") == 1


@pytest.mark.parametrize("ranks", [1, 4])
def test_dev_examples_once_and_as_many_batches_on_each_rank(ranks):
    """500 of 12 on 4 ranks would be 11, 11, 10 and 10 batches, and ZeRO-3 would wait for ever."""
    shares = [list(eval_batches(list(range(500)), 12, list, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(500))


def test_loader_goes_on_where_a_run_stopped():
    loader = TrainLoader([example(3, k % 4 + 1) for k in range(23)], 2, 2, make_collate("none", 0), 42)
    loader.set_epoch(1)
    whole = [batch["rows"][0]["input_ids"] for batch in loader]
    loader.seek(loader.steps_per_epoch + 4)
    loader.set_epoch(1)  # as Trainer does
    rest = [batch["rows"][0]["input_ids"] for batch in loader]
    assert len(whole) == 12 and all(map(torch.equal, rest, whole[8:])) and len(rest) == 4
    loader.set_epoch(2)
    assert len(list(loader)) == 12


def test_what_is_laid_out_ahead_is_what_comes():
    """Asked for behind every micro-batch, as the trainers do, and forgotten where an iteration is left for another."""
    examples = [example(3 + k, 2) for k in range(23)]
    loader = TrainLoader(examples, 2, 2, lambda part: [len(e.prompt_ids) for e in part], 42)
    expected = [batch["rows"] for batch in loader]

    def epoch():
        for batch in loader:
            loader.lay_out_next()
            assert loader.ahead is not None
            yield batch["rows"]

    assert len(expected) == 12 and list(epoch()) == list(epoch()) == expected
    next(epoch())
    assert list(epoch()) == expected


def test_loader_counts_the_answer_tokens_of_the_whole_step():
    draw = random.Random(0)
    examples = [example(draw.randint(2, 6), draw.randint(1, 5)) for _ in range(23)]
    loaders = [TrainLoader(examples, 2, 2, make_collate("none", 0), 42, rank, 2) for rank in range(2)]
    batches = [[{**batch, **batch["rows"][0]} for batch in loader] for loader in loaders]
    assert [len(b) for b in batches] == [len(loader) for loader in loaders] == [6, 6]
    for step in range(3):
        micro = [batch for rank in batches for batch in rank[2 * step : 2 * step + 2]]
        tokens = sum((batch["labels"] != IGNORE_INDEX).sum().item() for batch in micro)
        assert {batch["step_tokens"] for batch in micro} == {tokens}
    assert [loaders[0].examples_until(k) for k in range(5)] == [0, 8, 16, 23, 31]
    loaders[0].set_epoch(1)
    again = [batch["rows"][0]["input_ids"] for batch in loaders[0]]
    assert not all(torch.equal(a, b["input_ids"]) for a, b in zip(again, batches[0], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# rows


@pytest.fixture
def mixed():
    """Two instructions that share 10 tokens, equal prompts with different answers, prompts that are prefixes of others,
    answers of one token, a prompt that shares nothing but bos."""
    draw = random.Random(1)

    def ids(count):
        return [draw.randrange(3, 500) for _ in range(count)]

    first, second = [1, *ids(30)], [1, *ids(25)]
    second[:10] = first[:10]
    examples = [
        TokenizedExample(draw.choice([first, second]) + ids(draw.randint(1, 12)), [*ids(draw.randint(0, 5)), EOS])
        for _ in range(20)
    ]
    examples += [
        TokenizedExample(list(examples[0].prompt_ids), [*ids(3), EOS]),
        TokenizedExample(list(examples[0].prompt_ids), [EOS]),
        TokenizedExample([*first, 7], [EOS]),
        TokenizedExample([*first, 7, 8, 9], [5, EOS]),
        TokenizedExample([*first, *range(7, 20)], [5, 6, EOS]),
        TokenizedExample([1, *ids(9)], [EOS]),
    ]
    draw.shuffle(examples)
    return examples


def loss_and_gradients(model, micro_batches, tokens):
    """Summed loss, and each LoRA gradient by name."""
    model.zero_grad()
    total = 0.0
    for rows in micro_batches:
        loss = answer_loss(model, rows, tokens)
        loss.backward()
        total += loss.item()
    return total, {name: gradient.clone() for name, gradient in lora_weights(model, model.lora.grad).items()}


@pytest.mark.parametrize("packing", ["prefix", "plain", "none"])
@pytest.mark.parametrize("count", [26, 1])
def test_loss_and_every_gradient_are_those_of_single_examples(lora_model, mixed, packing, count):
    examples = mixed[:count]
    tokens = sum(len(e.answer_ids) for e in examples)
    single = [[pad_batch([e], 0)] for e in examples]
    expected_loss, expected = loss_and_gradients(lora_model, single, tokens)
    rows = make_collate(packing, 0)(examples)
    loss, gradients = loss_and_gradients(lora_model, [rows], tokens)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_rows_are_as_short_as_they_can_be(mixed):
    """Against a trie built by brute force: each distinct prompt prefix once, each answer but its eos once."""
    row = tree_row(mixed)
    prefixes = {tuple(e.prompt_ids[:i]) for e in mixed for i in range(1, len(e.prompt_ids) + 1)}
    fewest = len(prefixes) + sum(len(e.answer_ids) - 1 for e in mixed)
    repeated = (MIN_SHARED - 1) * len(mixed)  # shared nodes too short to be worth it
    assert fewest <= len(row["input_ids"]) <= fewest + repeated < sum(len(e.prompt_ids) for e in mixed) / 2
    assert len(row["shift_labels"]) == len(row["logits_to_keep"]) == sum(len(e.answer_ids) for e in mixed)
    plain = tree_row(mixed, share=False)
    assert len(plain["input_ids"]) == sum(len(e.prompt_ids) + len(e.answer_ids) - 1 for e in mixed)


@pytest.mark.parametrize("share", [True, False])
def test_each_token_sees_its_own_example_and_nothing_else(mixed, share):
    """What an answer's positions see, read along the mask, is the example's prompt and answer."""
    row = tree_row(mixed, share)
    mask = tree_mask(torch.tensor(row["enter"]), torch.tensor(row["exit"]))
    seen = []
    for position, label in zip(row["logits_to_keep"], row["shift_labels"], strict=True):
        visible = mask[position].nonzero()[:, 0].tolist()
        assert [row["position_ids"][i] for i in visible] == list(range(len(visible)))
        seen.append(([row["input_ids"][i] for i in visible], label))
    wanted = [(e.prompt_ids + e.answer_ids[:k], target) for e in mixed for k, target in enumerate(e.answer_ids)]
    assert sorted(seen) == sorted(wanted)


def test_changing_an_example_leaves_the_others_logits(lora_model, mixed):
    def logits(examples):
        row = tree_row(examples, share=True)
        inputs = model_inputs(to_tensors(row), "cpu")
        with torch.no_grad():
            values = lora_model(**inputs).logits[0]
        return {(tuple(prompt), k): values[j] for j, (prompt, k) in enumerate(answer_positions(examples, row))}

    unique = list({tuple(e.prompt_ids): e for e in mixed}.values())
    changed = [*unique]
    victim = unique[3]
    changed[3] = TokenizedExample([*victim.prompt_ids[:-1], 77], [88, 99, EOS])
    before, after = logits(unique), logits(changed)
    kept = [key for key in before if key in after and key[0] != tuple(victim.prompt_ids)]
    assert len({key[0] for key in kept}) == len(unique) - 1
    assert all((before[key] - after[key]).abs().max() < 1e-6 for key in kept)


def answer_positions(examples, row):
    """(prompt, index in its answer) of each kept position, found by walking the row's mask."""
    mask = tree_mask(torch.tensor(row["enter"]), torch.tensor(row["exit"]))
    lengths = {tuple(e.prompt_ids): len(e.prompt_ids) for e in examples}
    for position in row["logits_to_keep"]:
        visible = [row["input_ids"][i] for i in mask[position].nonzero()[:, 0].tolist()]
        prompt = max((p for p in lengths if list(p) == visible[: len(p)]), key=len)
        yield prompt, len(visible) - len(prompt)


def test_padding_of_a_row_reaches_no_loss(lora_model, mixed):
    tokens = sum(len(e.answer_ids) for e in mixed)
    row = tree_row(mixed)
    loss, gradients = loss_and_gradients(lora_model, [[to_tensors(row)]], tokens)
    padded = to_tensors(row, length=len(row["input_ids"]) + 37)
    mask = tree_mask(padded["enter"][0], padded["exit"][0])
    assert torch.equal(mask[-37:], torch.eye(len(mask), dtype=torch.bool)[-37:])  # each sees itself alone
    padded_loss, padded_gradients = loss_and_gradients(lora_model, [[padded]], tokens)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    assert all((g - padded_gradients[n]).norm() <= 1e-5 * g.norm() for n, g in gradients.items())


def test_attention_in_bf16_is_that_of_float32(mixed):
    """On a CPU it is written out. Four heads share two of keys and values."""
    row = to_tensors(tree_row(mixed))
    torch.manual_seed(0)
    heads = [torch.randn(1, count, row["enter"].shape[1], 16) for count in (4, 2, 2)]
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        tree = plan_attention(row["enter"], row["exit"], dtype)
        given = (tensor.to(dtype) for tensor in heads)
        outputs.append(tree_attention(None, *given, None, scaling=0.5, tree=tree)[0].float())
    assert (outputs[1] - outputs[0]).norm() < 0.01 * outputs[0].norm()


def test_stock_inputs_give_the_same_loss(lora_model, mixed):
    """prefix_collator's dense mask, through plain model(**batch) with another attention, against answer_loss."""
    tokens = sum(len(e.answer_ids) for e in mixed)
    loss, _ = loss_and_gradients(lora_model, [make_collate("prefix", 0)(mixed)], tokens)
    lora_model.set_attn_implementation("sdpa")
    assert lora_model(**prefix_collator(mixed), use_cache=False).loss.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("packing", ["prefix", "plain", "none"])
def test_an_empty_micro_batch_costs_nothing(lora_model, packing):
    loss, gradients = loss_and_gradients(lora_model, [make_collate(packing, 0)([])], 5)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())


def test_row_lengths_are_chosen_with_the_least_padding():
    assert choose_lengths([100, 120, 500, 510, 1000]) == [128, 512, 1024, 1152]
    assert choose_lengths([700] * 5) == [768, 896]
    assert choose_lengths([100, 120, 500, 510, 1000], count=3, spare=False) == [128, 512, 1024]
    draw = random.Random(3)
    lengths = [draw.randint(300, 1400) for _ in range(200)]
    chosen = choose_lengths(lengths, 4)

    def padded(chosen):
        return sum(min(n for n in chosen if n >= length) for length in lengths)

    sizes = range(384, max(chosen[:3]) + 1, 128)
    assert padded(chosen) == min(padded([*pair, chosen[2]]) for pair in itertools.combinations(sizes, 2))
    assert len(chosen) == 4 and chosen[3] >= 1.1 * max(lengths)


def test_unknown_packing():
    with pytest.raises(UserError, match="--packing=dense: expected prefix, plain, none"):
        make_collate("dense", 0)


def test_block_mask_is_that_of_create_block_mask(mixed):
    long = [TokenizedExample(e.prompt_ids + [7] * 30, e.answer_ids) for e in mixed]
    row = to_tensors(tree_row(mixed + long), 1280)
    enter, exit = row["enter"][0], row["exit"][0]
    assert sum(enter == exit - 1) > 0 and (exit == 1280).any()  # padding, and a last node

    def sees(batch, head, q, k):
        return (k <= q) & (enter[k] <= enter[q]) & (enter[q] < exit[k])

    expected = create_block_mask(sees, None, None, len(enter), len(enter), "cpu")
    for name, buffer in mask_buffers(enter, exit).items():
        assert torch.equal(buffer, getattr(expected, name)), name
