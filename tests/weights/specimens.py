"""What all specimens share: vocabularies, random weights, and the weights that a merge must give.

A specimen is a miniature of a folder that people really have, made on the fly: the true names of files and tensors,
number formats, and keys and values of the config files; only sizes are scaled. specimens_meta.py makes Meta's folders,
specimens_hf.py Hugging Face's, specimens_lora.py LoRAs. What stands here and there is never computed by the project's
own reader or writer, so that a test compares two independent ways.

Sizes are 1/64 of the real ones: 7B has 64 dimensions for 4096 and 172 feed-forward units for 11008. A head has 16
numbers or more, for FlexAttention takes no smaller ones, so heads are fewer than 1/64 times the dimensions would give.
Vocabularies: 512 pieces for LLaMA's 32,000, 797 for Chinese-LLaMA's 49,953 (odd, too), 798 for Chinese-Alpaca's 49,954
(which divides by 2, but not by 4), 888 for generation 2's 55,296 (which divides by 8).
"""

import collections
import functools
import io
import json
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2

ROOT = Path(__file__).resolve().parents[2]
BASE, LLAMA, ALPACA, SECOND = 512, 797, 798, 888  # pieces, see above
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT_TEXT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.
### Instruction:
### Response:
 0 1 2 3 4 5 6 7 8 9 ! " # $ % & ' ( ) * + , - . / : ; < = > ? @ [ ] ^ _ ` { | } ~
""".splitlines()


class Shape(NamedTuple):
    """dim: size of a hidden state; ffn: feed-forward units; heads and key_heads: of attention; layers."""

    dim: int = 64
    ffn: int = 172
    heads: int = 4
    key_heads: int = 4
    layers: int = 2


class Model(NamedTuple):
    """A folder of full weights, and what it holds: Hugging Face's name -> tensor, in the folder's number format."""

    folder: Path
    weights: dict


class Lora(NamedTuple):
    """A LoRA's folder, and what it holds, by the names of the base's tensors."""

    folder: Path
    factors: dict  # name -> (lora_A [rank, in], lora_B [out, rank], scaling)
    saved: dict  # name -> the tensor that takes the base's place


SEVEN_B = Shape()


# ---------------------------------------------------------------------------------------------------------------------
# vocabularies


def demo_texts():
    """Sentences of the project's own demo corpus."""
    lines = (ROOT / "data/demo/ori_data/train.txt").read_text(encoding="utf-8").splitlines()[:600]
    return [json.loads(line)["text"] for line in lines]


@functools.cache
def vocabularies():
    """{"base", "llama", "alpaca", "second"}: tokenizer.model as bytes, trained once a process (in 0.2 s).

    base is trained as LLaMA's: BPE, byte_fallback, unk 0, bos 1, eos 2, no pad. llama adds Chinese pieces, all of score
    0, alpaca one more, [PAD]. second adds <pad> first, as generation 2 does, whose id is LLaMA's number of pieces.
    """
    texts, model = demo_texts(), io.BytesIO()
    # LLaMA's vocabulary has few Chinese characters, so few are left in the text; all others become bytes
    frequent = {c for c, _ in collections.Counter("".join(texts)).most_common(80)} | set("".join(PROMPT_TEXT))
    known_texts = ["".join(c if c in frequent else " " for c in text) for text in texts]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPT_TEXT * 50 + known_texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=BASE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    base = model.getvalue()
    known = {piece.piece for piece in sentencepiece_model_pb2.ModelProto.FromString(base).pieces}
    assert len(known) == BASE
    hanzi = "".join(c if "\u4e00" <= c <= "\u9fff" else " " for text in texts for c in text + " ")
    words = [w for part in hanzi.split() for n in (1, 2) for w in (part[i : i + n] for i in range(len(part) - n + 1))]
    chinese = [word for word, _ in collections.Counter(words).most_common() if word not in known]
    llama = chinese[: LLAMA - BASE]
    second = ["<pad>", *chinese[: SECOND - BASE - 1]]
    added = {"base": [], "llama": llama, "alpaca": [*llama, "[PAD]"], "second": second}
    return {name: add_pieces(base, pieces) for name, pieces in added.items()}


def add_pieces(model, pieces):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


# ---------------------------------------------------------------------------------------------------------------------
# weights


def shapes(shape, rows):
    """Hugging Face's name -> shape of each tensor of a LLaMA with `rows` embeddings."""
    dim, keys = shape.dim, shape.dim // shape.heads * shape.key_heads
    layer = {
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (keys, dim),
        "self_attn.v_proj": (keys, dim),
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (shape.ffn, dim),
        "mlp.down_proj": (dim, shape.ffn),
        "mlp.up_proj": (shape.ffn, dim),
        "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,),
    }
    found = {EMBEDDING: (rows, dim)}
    for i in range(shape.layers):
        found |= {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
    return found | {"model.norm.weight": (dim,), HEAD: (rows, dim)}


def random_tensor(size, random, dtype):
    """Norms are about 1, matrices of the size at which answers depend on every layer."""
    numbers = torch.randn(size, generator=random)
    return (1 + 0.1 * numbers if len(size) == 1 else numbers * size[1] ** -0.5).to(dtype)


def random_weights(shape, rows, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {name: random_tensor(size, random, dtype) for name, size in shapes(shape, rows).items()}


def rotary_table(shape, dtype=torch.float32):
    """The rotary angles a step: 10000^(-2i/d) for each pair i of the d numbers of a head."""
    size = shape.dim // shape.heads
    return torch.tensor([10000.0 ** (-2 * i / size) for i in range(size // 2)]).to(dtype)


def merged(weights, *loras):
    """What a merge must give: W + scaling B A in float32 for one LoRA after the other, rounded after each."""
    weights = dict(weights)
    for lora in loras:
        for name, tensor in lora.saved.items():
            weights[name] = tensor.to(weights[name].dtype)
        for name, (a, b, scaling) in lora.factors.items():
            total = weights[name].float() + scaling * (b.float() @ a.float())
            weights[name] = total.to(weights[name].dtype)
    return weights


def write_json(path, value, end="", **options):
    Path(path).write_text(json.dumps(value, **options) + end, encoding="utf-8")


def write_as_transformers(path, value):
    """Indented and ended with a line feed, as transformers writes its JSON; PEFT's adapter_config.json ends without."""
    write_json(path, value, end="\n", indent=2)
