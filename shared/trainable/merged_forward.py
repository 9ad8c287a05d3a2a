"""Lets LoRA layers compute with one merged weight, W' = W + s B A, instead of a second, narrow layer in parallel.

peft's layers compute W x + s B (A x), which takes two extra products and two passes over the output. When x has many
rows, computing W' x is cheaper. The results are equal up to rounding. If B is 0, they are exactly those of W.

Layers are merged only inside `merged_layers()`, which is used for sampling and for teachers. Training does not use it,
because the predictions that a training step compares must all be rounded in the same way. Besides, peft's own forward
is just as fast when there is a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.trainable.rank_by_noise import RankByNoise

Pair = tuple[Tensor, Tensor, float]  # A [r, in, …], B [out, r, …], s
_merges: ContextVar[bool] = ContextVar("merges", default=False)


@contextmanager
def merged_layers() -> Iterator[None]:
    """Inside the context, LoRA layers compute with merged weights wherever this is possible and cheaper.

    Weights are never merged while gradients are enabled.
    """
    token = _merges.set(True)
    try:
        yield
    finally:
        _merges.reset(token)


def merge_in_forward(layer: nn.Module) -> None:
    """Prepares one of peft's LoRA layers for `merged_layers`. Leaves other layers unchanged."""
    from peft.tuners.lora.layer import Conv2d, Linear

    if type(layer) in (Linear, Conv2d):
        layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    pairs = _pairs(layer, x) if _merges.get() and not (args or kwargs) else None
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
    """Returns the factors that currently apply to a layer, or None if peft's own forward must be used.

    peft's own forward must be used when

    - gradients are enabled,
    - the layer runs in half precision or under autocast, where rounding W' could lose B A,
    - the layer has hooks, or anything (such as dropout) comes between x and A or between A and B,
    - the layer is a variant of LoRA,
    - x has too few rows for W' to be cheaper, or
    - the device is not a CPU, because the gain has been measured only on CPUs.
    """
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
    """Returns how many directions of A are active, or None if that number differs between the rows of x.

    Also returns None if A has an unknown hook. During sampling, a noise-dependent rank is the same for all rows.
    """
    if not _hooked(a):
        return len(a.weight)
    falls = [hook for hook in a._forward_hooks.values() if isinstance(hook, RankByNoise)]
    others = a._forward_pre_hooks or a._backward_hooks or len(falls) != 1 or len(a._forward_hooks) != 1
    return None if others else falls[0].common(len(a.weight))


def _plain(base: Any) -> bool:
    if _hooked(base):
        return False
    if isinstance(base, nn.Conv2d):
        usual = base.groups == 1 and base.padding_mode == "zeros" and set(base.dilation) == {1}
        return usual and isinstance(base.padding, tuple)
    return type(base) is nn.Linear


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _pays(base: Any, x: Tensor) -> bool:
    """Whether merging is cheaper.

    Computing B A takes r * out * K multiplications, where K is the number of inputs per output. Without merging, each
    row of x takes r * (out + K) extra multiplications.
    """
    if x.ndim < base.weight.ndim:
        return False
    out, inputs = len(base.weight), base.weight[0].numel()
    return _count(base, x) * (out + inputs) >= out * inputs


def _count(base: Any, x: Tensor) -> int:
    """Counts the rows of a linear layer's input, or the output positions of a convolution."""
    if isinstance(base, nn.Conv2d):
        return x.numel() // x.shape[1] // (base.stride[0] * base.stride[1])
    return x.numel() // x.shape[-1]


def _merged(weight: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Returns W + the sum of s B A, in the shape of W."""
    flat = weight.flatten(1)
    for a, b, s in pairs:
        flat = torch.addmm(flat, b.flatten(1), a.flatten(1), alpha=s)
    return flat.view(weight.shape)
