"""A quantized base: its numbers, its gradients, what refuses it.     python -m pytest tests/models/test_quantized.py"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca.common.errors import UserError
from alpaca.models import quantized
from alpaca.models.base_weights import check_base_weights, load_base, pick_base_weights
from alpaca.models.quantized import BLOCK, NF4, Fp8Linear, Nf4Linear, QuantizedLinear, to_nf4
from alpaca.training import tree_attention  # noqa: F401  registers add_lora's attention
from alpaca.training.lora import add_lora, for_answers
from harness import lora_settings

CUDA = torch.cuda.is_available()
FP8 = CUDA and torch.cuda.get_device_capability() >= (8, 9)


def products(layer, weight, x, gradient):
    """((output, gradient to x) of the layer, the same of this weight), all in float32."""
    x = x.detach().requires_grad_()
    output = layer(x)
    output.backward(gradient)
    got = output.detach().float(), x.grad.float()
    return got, (x.detach().float() @ weight.T, gradient.float() @ weight)


def by_hand(packed, scales, rows, columns):
    """nf4's definition: the upper four bits first, one scale for 64 numbers counted through all rows."""
    code, numbers = torch.tensor(NF4).tolist(), []
    for byte in packed.flatten().tolist():
        numbers += [code[byte >> 4], code[byte & 15]]
    scaled = [number * scales[i // BLOCK].item() for i, number in enumerate(numbers[: rows * columns])]
    return torch.tensor(scaled).view(rows, columns)


@pytest.mark.parametrize(
    "rows, columns", [(8, 128), (5, 688), (3, 43)]
)  # whole blocks; rows, and all, that end within one
def test_nf4_is_what_its_format_says(rows, columns):
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns)
    weight[1] = 0
    layer = Nf4Linear(weight, torch.float32)
    dequantized = layer.dequantized(torch.float32)
    assert torch.equal(dequantized, by_hand(layer.packed, layer.scales, rows, columns))
    assert torch.equal(dequantized[1], torch.zeros(columns))
    assert (dequantized - weight).norm() < 0.1 * weight.norm()
    assert layer.packed.nbytes + layer.scales.nbytes < 0.6 * rows * columns


def test_nf4_is_bitsandbytes_own():
    """Numbers half-way between two of the code are left out: bitsandbytes decides with rounded bounds there."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(1)
    weight = torch.randn(40, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    ours, scales = to_nf4(weight)
    assert torch.equal(ours, packed) and torch.equal(scales, state.absmax)
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), torch.tensor(NF4))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs CUDA"))]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_nf4_multiplies_both_ways(device, compiled):
    """Against the dequantized weight in float32; a row of zeros, as padding is, stays one."""
    if compiled and device == "cpu":
        pytest.skip("compiling for a CPU needs a compiler and half a minute")
    torch.manual_seed(0)
    layer = Nf4Linear(torch.randn(24, 688, device=device), torch.float32)
    x, gradient = torch.randn(2, 7, 688, device=device), torch.randn(2, 7, 24, device=device)
    x[0, 3], gradient[1, 2] = 0, 0
    weight = layer.dequantized(torch.float32)
    got, expected = products(torch.compile(layer) if compiled else layer, weight, x, gradient)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert not got[0][0, 3].any() and not got[1][1, 2].any()
    torch.library.opcheck(
        quantized.nf4_product, (x.requires_grad_(), layer.packed, layer.scales, 24, 688, False), raise_exception=True
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_multiplies_both_ways(compiled):
    """Against the dequantized weight in float32: what is left is the rounding of inputs and gradients, 4 bits each."""
    if compiled and not FP8:
        pytest.skip("needs a GPU with fp8 products; a CPU has them too, but compiling takes half a minute")
    torch.manual_seed(0)
    device = "cuda" if FP8 else "cpu"
    weight = torch.randn(96, 688, device=device)
    weight[5] = 0
    layer = Fp8Linear(weight, torch.bfloat16)
    x = torch.randn(2, 70, 688, device=device, dtype=torch.bfloat16)
    gradient = torch.randn(2, 70, 96, device=device, dtype=torch.bfloat16)
    x[0, 3], gradient[1, 2] = 0, 0
    got, expected = products(torch.compile(layer) if compiled else layer, layer.dequantized(torch.float32), x, gradient)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
    assert not got[0][0, 3].any() and not got[0][:, :, 5].any() and not got[1][1, 2].any()


def test_a_quantized_model_computes_as_the_full_one_with_its_numbers(base_dir):
    """Tied or not; nothing of its layers is among its parameters, its buffers or its state."""
    model, full = (load_base(base_dir, torch.float32, "cpu", kind) for kind in ("nf4", "full"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 14
    assert not [name for name in model.state_dict() if "_proj" in name]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        for name, module in layers.items():
            full.get_submodule(name).weight.copy_(module.dequantized(torch.float32))
        assert (model(ids).logits - full(ids).logits).abs().max() < 1e-5
    assert model.config.name_or_path == str(base_dir) and not model.training


def test_fp8_takes_a_byte_a_weight_in_training_too(base_dir, monkeypatch):
    monkeypatch.setattr("alpaca.models.base_weights.FP8_MULTIPLE", 1)  # nothing is multiplied
    model = load_base(base_dir, torch.bfloat16, "cpu", "fp8")
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    add_lora(model, lora_settings())
    assert len(layers) == 14
    for layer in layers:
        held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        assert sum(tensor.nbytes for tensor in held) == layer.in_features * layer.out_features + 4 * layer.out_features


def test_a_tied_base_is_quantized(base_dir, tmp_path):
    shutil.copytree(base_dir, tmp_path / "tied")
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    tensors = load_file(base_dir / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    model = load_base(tmp_path / "tied", torch.float32, "cpu", "nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.norm() > 0


def test_training_after_an_evaluation_has_every_gradient(base_dir):
    """The LoRA stays apart meanwhile, and nothing of the model is changed by it."""
    model = add_lora(load_base(base_dir, torch.float32, "cpu", "nf4"), lora_settings())
    torch.nn.init.normal_(model.lora.data, std=0.05)
    ids = torch.arange(3, 40)[None]

    def gradient():
        model.lora.grad = None
        model(input_ids=ids, labels=ids).loss.backward()
        return model.lora.grad

    before = gradient()
    with torch.inference_mode(), for_answers(model):
        answering = model(input_ids=ids).logits.clone()
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    assert torch.equal(gradient(), before) and (before != 0).all() and model.training
    assert (answering - base).abs().max() > 1e-3


def test_what_a_device_cannot_hold_is_refused_or_replaced(monkeypatch, capsys):
    trained = SimpleNamespace(base_weights="fp8")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))
    for device in ("cpu", "cuda"):
        with pytest.raises(UserError, match="--base_weights=fp8: needs a GPU that multiplies in fp8 .*=full"):
            check_base_weights("fp8", device, "bf16")
        assert pick_base_weights("auto", trained, device, "bf16") == "full"
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    assert pick_base_weights("auto", trained, "cuda", "bf16") == "fp8"
    with pytest.raises(UserError, match="computes in bf16, not fp32; give --precision=bf16"):
        pick_base_weights("fp8", None, "cuda", "fp32")
    monkeypatch.setattr("alpaca.models.base_weights.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes; pip install -r requirements-nf4.txt"):
        pick_base_weights("nf4", trained, "cuda", "fp32")
    with pytest.raises(UserError, match="expected auto, full, nf4, fp8"):
        pick_base_weights("int8", trained, "cpu", "fp32")
    assert pick_base_weights("auto", SimpleNamespace(), "cpu", "fp32") == "full"  # an adapter of an earlier version
    assert pick_base_weights("auto", None, "cpu", "fp32") == "full"
