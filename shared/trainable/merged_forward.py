"""LoRA layers that compute with one weight, W' = W + s B A, in place of a second, narrow layer beside the first.

peft's layers compute W x + s B (A x): two products more, and two passes over the output, in the forward pass and again for
the gradient of x. Where W is frozen, W' is known before x is, and costs less than those wherever x has many rows; the gradients
of A and B come from x and the gradient of the output alone. The numbers are the same but for rounding, and exactly those of W
where B is 0. What this does not cover stays with peft's own forward: see `_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shared.trainable.rank_by_noise import RankByNoise

#: Multiplications that take as long as a backward pass in Python (0.1 to 0.2 ms): where fewer are spared by r columns in place
#: of dW', autograd's own is the faster one.
_OVERHEAD = 2**23

Pair = tuple[Tensor, Tensor, float]  # A [r, in, …], B [out, r, …], s


def merge_in_forward(layer: nn.Module) -> None:
    """Let one of peft's LoRA layers compute with W'; others are left alone. Done again, it changes nothing."""
    if type(layer) in (Linear, Conv2d):
        layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    pairs = None if args or kwargs else _pairs(layer, x)
    if pairs is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    base = layer.base_layer
    if not pairs:
        return base(x)
    product = _Product(base.stride, base.padding) if isinstance(base, nn.Conv2d) else _Product()
    if not torch.is_grad_enabled() or _spared(base, x, pairs) < _OVERHEAD:
        return product.of(x, _merged(base.weight, pairs), base.bias)
    factors = [factor for a, b, _ in pairs for factor in (a, b)]
    return _MergedLora.apply(x, base.weight, base.bias, (product, [s for *_, s in pairs]), *factors)


def _pairs(layer: Any, x: Tensor) -> list[Pair] | None:
    """What acts on a layer now. None where peft's own forward has to be asked: half precision and autocast, in which W' would
    round B A away; weights that are trained or hooked themselves; dropout, and whatever else stands between A, B and x; other
    layers than plain ones; fewer rows of x than make W' pay; and devices other than a CPU, for which nobody has measured it."""
    base, weight = layer.base_layer, getattr(layer.base_layer, "weight", None)
    if layer.disable_adapters or layer.merged or not _plain(base) or _trained(base):
        return None
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return None
    pairs = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if name in layer.lora_variant or b.bias is not None or _hooked(b) or a.weight.dtype != x.dtype:
            return None
        rank = _rank(a)
        if rank is None or (dropout.training and not isinstance(dropout, nn.Identity)):
            return None
        full = rank == len(a.weight)
        factors = (a.weight, b.weight) if full else (a.weight[:rank], b.weight[:, :rank])
        pairs += [(*factors, layer.scaling[name])] if rank else []
    return pairs if not pairs or _pays(base, x) else None


def _rank(a: Any) -> int | None:
    """How many directions of A act. A rank that falls with the noise is one for all rows when pictures are made; where rows
    differ, and in training, where they mostly do, it is None, as with hooks of any other kind."""
    if not _hooked(a):
        return len(a.weight)
    falls = [hook for hook in a._forward_hooks.values() if isinstance(hook, RankByNoise)]
    others = a._forward_pre_hooks or a._backward_hooks or len(falls) != 1 or len(a._forward_hooks) != 1
    return None if others or torch.is_grad_enabled() else falls[0].common(len(a.weight))


def _plain(base: Any) -> bool:
    if _hooked(base):
        return False
    if type(base) is nn.Conv2d:
        usual = base.groups == 1 and base.padding_mode == "zeros" and set(base.dilation) == {1}
        return usual and isinstance(base.padding, tuple)
    return type(base) is nn.Linear


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _trained(base: Any) -> bool:
    return base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)


def _pays(base: Any, x: Tensor) -> bool:
    """Whether r out K multiplications for B A, with K inputs of each output, are fewer than r (out + K) for each row of x."""
    if x.ndim < base.weight.ndim:
        return False
    out, inputs = len(base.weight), base.weight[0].numel()
    return _count(base, x) * (out + inputs) >= out * inputs


def _spared(base: Any, x: Tensor, pairs: Sequence[Pair]) -> int:
    """How many multiplications the gradients of A and B take less through r columns than through dW'."""
    out, inputs = len(base.weight), base.weight[0].numel()
    ranks = sum(len(a) for a, b, _ in pairs if a.requires_grad or b.requires_grad)
    return _count(base, x) * (out * inputs - 2 * ranks * (out + inputs)) if ranks else 0


def _count(base: Any, x: Tensor) -> int:
    """Rows of a linear layer, places of a convolution."""
    if isinstance(base, nn.Conv2d):
        return x.numel() // x.shape[1] // (base.stride[0] * base.stride[1])
    return x.numel() // x.shape[-1]


def _merged(weight: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """W + the sum of s B A, in the shape of W."""
    flat = weight.flatten(1)
    for a, b, s in pairs:
        flat = torch.addmm(flat, b.flatten(1), a.flatten(1), alpha=s)
    return flat.view(weight.shape)


@dataclass(frozen=True)
class _Product:
    """A linear layer's product of x and a weight, or a convolution's; and its two gradients."""

    stride: tuple[int, ...] = ()  # (): linear
    padding: Any = ()

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding) if self.stride else F.linear(x, weight, bias)

    def to_input(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        if self.stride:
            return self._backward(grad, grad.new_empty(x_shape), weight, (True, False, False))[0]
        return (_rows(grad) @ weight).view(x_shape)

    def to_weight(self, grad: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        if self.stride:
            return self._backward(grad, x, grad.new_empty(shape), (False, True, False))[1]
        return _rows(grad).mT @ _rows(x)

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
        """A convolution's gradients; of a tensor whose gradient is wanted, only the shape is read."""
        fixed = ((1, 1), False, (0, 0), 1)  # dilation, not transposed, output padding, groups
        return torch.ops.aten.convolution_backward(grad, x, weight, None, self.stride, self.padding, *fixed, wanted)


How = tuple[_Product, list[float]]  # and s of each pair


class _MergedLora(torch.autograd.Function):
    """W' x, and the gradients of x and of every A and B: dA = s B^T dW', dB = s dW' A^T, where dW' itself is seldom made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: How, *factors: Tensor) -> Tensor:
        ctx.product, ctx.scales = how
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, weight, *factors)
        return ctx.product.of(x, _merged(weight, _paired(factors, ctx.scales)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        pairs, product, to_x = _paired(factors, ctx.scales), ctx.product, None
        if ctx.needs_input_grad[0]:
            to_x = product.to_input(grad, ctx.x_shape, _merged(weight, pairs))
        to_factors: list[Tensor | None] = []
        for i, pair in enumerate(pairs):
            learns = any(ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i])
            to_factors += _to_pair(product, grad, x, pair) if learns else [None, None]
        return to_x, None, None, None, *to_factors


def _to_pair(product: _Product, grad: Tensor, x: Tensor, pair: Pair) -> list[Tensor]:
    """The gradients of A and B, by the way with fewer multiplications: through r columns, or through dW'."""
    a, b, s = pair
    rank, out, inputs = len(a), len(b), a[0].numel()
    if 2 * rank * (out + inputs) >= out * inputs:
        full = product.to_weight(grad, x, torch.Size((out, *a.shape[1:]))).flatten(1)
        return [s * (b.flatten(1).mT @ full).view(a.shape), s * (full @ a.flatten(1).mT).view(b.shape)]
    onto_a = s * (b.flatten(1).mT @ grad.flatten(2) if product.stride else grad @ b)  # [B, r, n] or [..., r]
    below = product.of(x, a)  # A x, of the same kind
    if product.stride:
        to_b = (grad.flatten(2) @ below.flatten(2).mT).sum(0)
        return [product.to_weight(onto_a.view(below.shape), x, a.shape), (s * to_b).view(b.shape)]
    return [_rows(onto_a).mT @ _rows(x), s * (_rows(grad).mT @ _rows(below))]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _paired(factors: Sequence[Tensor], scales: Sequence[float]) -> list[Pair]:
    return list(zip(factors[::2], factors[1::2], scales, strict=True))
