"""LoRA layers that compute with one weight, W' = W + s B A, in place of a second, narrow layer beside the first.

peft's layers compute W x + s B (A x): two products more, and two passes over the output. Where nothing is learned (pictures are
made, a teacher is asked), W' costs less than those wherever x has many rows. The numbers are the same but for rounding, and
exactly those of W where B is 0. In training peft's own forward is as fast, because its backward pass needs no W' anew; it
computes whatever this does not cover: see `_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional as F

from shared.trainable.rank_by_noise import RankByNoise

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
    weight = _merged(base.weight, pairs)
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, weight, base.bias, base.stride, base.padding)
    return F.linear(x, weight, base.bias)


def _pairs(layer: Any, x: Tensor) -> list[Pair] | None:
    """What acts on a layer now. None where peft's own forward has to be asked: in training; in half precision and autocast, in
    which W' would round B A away; hooks on the layer itself; dropout, and whatever else stands between A, B and x; other layers
    than plain ones; fewer rows of x than make W' pay; and devices other than a CPU, for which nobody has measured it."""
    base = layer.base_layer
    if torch.is_grad_enabled() or layer.disable_adapters or layer.merged or not _plain(base):
        return None
    if x.device.type != "cpu" or x.dtype != base.weight.dtype or torch.is_autocast_enabled("cpu"):
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
    differ it is None, as with hooks of any other kind."""
    if not _hooked(a):
        return len(a.weight)
    falls = [hook for hook in a._forward_hooks.values() if isinstance(hook, RankByNoise)]
    others = a._forward_pre_hooks or a._backward_hooks or len(falls) != 1 or len(a._forward_hooks) != 1
    return None if others else falls[0].common(len(a.weight))


def _plain(base: Any) -> bool:
    if _hooked(base):
        return False
    if type(base) is nn.Conv2d:
        usual = base.groups == 1 and base.padding_mode == "zeros" and set(base.dilation) == {1}
        return usual and isinstance(base.padding, tuple)
    return type(base) is nn.Linear


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _pays(base: Any, x: Tensor) -> bool:
    """Whether r out K multiplications for B A, with K inputs of each output, are fewer than r (out + K) for each row of x."""
    if x.ndim < base.weight.ndim:
        return False
    out, inputs = len(base.weight), base.weight[0].numel()
    return _count(base, x) * (out + inputs) >= out * inputs


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
