"""Frozen linear layers whose weights are kept in 4 or 8 bits, and what LoRA needs of them: a product and its gradient.

The quantized numbers are plain attributes, neither parameters nor buffers: what casts, saves or sends a model to other
ranks (DeepSpeed, PEFT, a checkpoint) does not see them.
"""

import functools

import torch
from torch import nn

BLOCK = 64  # weights that share a scale in nf4
FP8, FP8_MOST = torch.float8_e4m3fn, 448.0
FP8_MULTIPLE = 16  # the products take no other sizes


class QuantizedLinear(nn.Linear):
    """An nn.Linear whose weight is quantized. weight: [out, in]; dtype: what it computes in. A bias is given to it later,
    and stays as it is."""

    def __init__(self, weight, dtype):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None)
        self.weight = torch.empty(0, dtype=dtype, device=weight.device)  # PEFT asks it for type and device
        self.quantize(weight.detach())

    def forward(self, x):
        product = self.product(x)
        return product if self.bias is None else product + self.bias


# ---------------------------------------------------------------------------------------------------------------------
# nf4: bitsandbytes' format, one scale for 64 weights, two weights a byte. Its code is that of QLoRA (Dettmers et al. 2023,
# arXiv:2305.14314, appendix E). On a CPU all of it is done here: bitsandbytes 0.50.2 dequantizes wrongly there where a row
# is no multiple of 64, and where it is installed PEFT imports it in every command, which takes seconds.

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


class Nf4Linear(QuantizedLinear):
    def quantize(self, weight):
        if not weight.is_cuda:
            self.packed, self.scales = to_nf4(weight)
            return
        from bitsandbytes.functional import quantize_4bit  # takes seconds, and nothing else needs it

        packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        self.packed, self.scales = packed, state.absmax

    def dequantized(self, dtype):
        return dequantize(self.packed, self.scales, self.out_features, self.in_features, dtype)

    def product(self, x):
        return nf4_product(x, self.packed, self.scales, self.out_features, self.in_features, False)


def to_nf4(weight):
    """(packed uint8 [bytes, 1], float32 scales [blocks]) of a weight, in blocks of 64 counted through all its rows: the
    scale is the block's largest size, each number becomes the nearest of NF4."""
    numbers = weight.flatten().float()
    blocks = nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    code = torch.tensor(NF4)
    scaled = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()[: len(numbers)]
    nearest = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    pairs = nn.functional.pad(nearest, (0, len(nearest) % 2), value=NF4.index(0.0)).view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:], scales


def dequantize(packed, scales, rows, columns, dtype):
    """The weight [rows, columns]."""
    if packed.is_cuda:
        return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, BLOCK, "nf4", (rows, columns), dtype)
    count = rows * columns
    values = nn.functional.embedding(packed.flatten().int(), _pairs()).flatten()[:count]
    return (values * scales.repeat_interleave(BLOCK)[:count]).view(rows, columns).to(dtype)


@functools.cache
def _pairs():
    """float32 [256, 2]: the two numbers in each byte, the upper four bits first."""
    code = torch.tensor(NF4)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)


# One opaque operation each way. Were torch.compile to look inside, forward and backward would share the dequantized weight,
# and keep that of every layer: 13 GB of a 7B.
@torch.library.custom_op("alpaca::nf4_product", mutates_args=())
def nf4_product(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, backward: bool
) -> torch.Tensor:
    """x [..., columns] @ weight.T; backward: x [..., rows] @ weight. In the type of x."""
    weight = dequantize(packed, scales, rows, columns, x.dtype)
    product = x.reshape(-1, x.shape[-1]) @ (weight if backward else weight.T)
    return product.view(*x.shape[:-1], product.shape[-1])


@nf4_product.register_fake
def _(x, packed, scales, rows, columns, backward):
    return x.new_empty(*x.shape[:-1], columns if backward else rows)


def _keep_inputs(ctx, inputs, output):
    _, packed, scales, *ctx.others = inputs
    ctx.save_for_backward(packed, scales)


def _nf4_gradient(ctx, gradient):
    rows, columns, backward = ctx.others
    return nf4_product(gradient, *ctx.saved_tensors, rows, columns, not backward), None, None, None, None, None


nf4_product.register_autograd(_nf4_gradient, setup_context=_keep_inputs)


# ---------------------------------------------------------------------------------------------------------------------
# fp8: e4m3, one scale for each row of the weight and each token. The gradient's product wants the weight transposed; that is
# done anew each time: a second copy would make a step of a 7B 4 % faster, and fp8 as large as bf16 (SPEED.md).


class Fp8Linear(QuantizedLinear):
    def quantize(self, weight):
        self.eights, scales = to_fp8(weight)
        self.scales = scales.flatten()

    def dequantized(self, dtype):
        return (self.eights.float() * self.scales[:, None]).to(dtype)

    def product(self, x):
        return _Fp8Product.apply(x, self.eights, self.scales)


def to_fp8(x):
    """(x / scales in e4m3, float32 scales [rows, 1]) of x [rows, columns]. A row of zeros has a scale too."""
    scales = (x.abs().amax(dim=-1, keepdim=True).float() / FP8_MOST).clamp(min=1e-12)
    return (x.float() / scales).clamp(-FP8_MOST, FP8_MOST).to(FP8), scales


class _Fp8Product(torch.autograd.Function):
    """x [..., in] -> [..., out] in bf16. torch.compile looks inside, to make the scaling one with what is before it."""

    @staticmethod
    def forward(ctx, x, eights, scales):
        ctx.save_for_backward(eights, scales)
        x8, x_scales = to_fp8(x.reshape(-1, x.shape[-1]))
        product = torch._scaled_mm(
            x8, eights.t(), x_scales, scales[None], out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        eights, scales = ctx.saved_tensors
        # A scale of the weight belongs to an output, over which this product sums: it goes into the gradient first.
        g8, g_scales = to_fp8(gradient.reshape(-1, gradient.shape[-1]) * scales)
        product = fp8_backward(g8, g_scales, eights)
        return product.view(*gradient.shape[:-1], -1), None, None


# Opaque, so that no transposed copy is made in the forward and kept.
@torch.library.custom_op("alpaca::fp8_backward", mutates_args=())
def fp8_backward(g8: torch.Tensor, g_scales: torch.Tensor, eights: torch.Tensor) -> torch.Tensor:
    """g8 [rows, out] @ eights [out, in] in bf16. The cards want the second factor column by column."""
    transposed = _transpose()(eights).view(FP8) if eights.is_cuda else eights.t().contiguous()
    ones = torch.ones(1, len(transposed), device=g8.device)
    return torch._scaled_mm(g8, transposed.t(), g_scales, ones, out_dtype=torch.bfloat16, use_fast_accum=True)


@functools.cache
def _transpose():
    """As bytes and compiled: torch's own copy of all weights of a 7B takes 39 ms, this one 8 (H200)."""
    return torch.compile(lambda eights: eights.view(torch.uint8).t().contiguous(), dynamic=False)


@fp8_backward.register_fake
def _(g8, g_scales, eights):
    return g8.new_empty(len(g8), eights.shape[1], dtype=torch.bfloat16)
