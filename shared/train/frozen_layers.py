"""Stores fewer activations for the backward pass through a frozen network.

PyTorch stores what the gradients of a convolution's weights would need, even if these weights are frozen. It also
stores results that are cheap to recompute. Inside `lean`, gradients stay the same bit for bit, but three kinds of
layers store less:

- a convolution with frozen weights stores only these weights, not its input;
- a SiLU that follows a group norm stores the norm's input, which the norm stores anyway, and recomputes the norm;
- a GEGLU stores its projection and recomputes the GELU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_NORM = "_norm_that_made_it"  # an attribute of a group norm's output


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.layer = x.shape, layer
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), layer = ctx.saved_tensors, ctx.layer
        x = grad.new_empty(1).expand(ctx.shape)  # only the shape of x matters for its own gradient
        wanted, where = (True, False, False), (layer.stride, layer.padding, layer.dilation)
        found = torch.ops.aten.convolution_backward(
            grad, x, weight.to(grad.dtype), None, *where, False, (0, 0), layer.groups, wanted
        )
        return found[0], None, None, None


class _FrozenConv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        learned = weight.requires_grad or (bias is not None and bias.requires_grad)
        plain = self.padding_mode == "zeros" and isinstance(self.padding, tuple)
        if learned or not plain or not input.requires_grad or not torch.is_grad_enabled():
            return super()._conv_forward(input, weight, bias)
        return _FrozenConvolution.apply(input, weight, bias, self)  # pyright: ignore[reportReturnType]


class _SiLUOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.GroupNorm) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.dtype, ctx.norm = y.dtype, norm
        return F.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = (t.to(ctx.dtype) for t in ctx.saved_tensors)
        y = F.group_norm(x, ctx.norm.num_groups, weight, bias, ctx.norm.eps)
        return torch.ops.aten.silu_backward(grad, y), None, None, None, None


class _GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if self.affine and y.requires_grad:
            setattr(y, _NORM, (input, self))
        return y


class _SiLU(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        made: tuple[Tensor, nn.GroupNorm] | None = getattr(input, _NORM, None)
        if made is None or not torch.is_grad_enabled():
            return super().forward(input)
        x, norm = made
        return _SiLUOfNorm.apply(input, x, norm.weight, norm.bias, norm)  # pyright: ignore[reportReturnType]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        value, gate = projected.chunk(2, -1)
        return value * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        value, gate = projected.chunk(2, -1)
        return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], -1)


@cache
def _lean_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Maps each layer class to the class that replaces it."""
    from diffusers.models.activations import GEGLU  # slow to import

    class Lean(GEGLU):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return super().forward(hidden_states, *args, **kwargs)
            return _Gated.apply(self.proj(hidden_states))  # pyright: ignore[reportReturnType]

    return {nn.Conv2d: _FrozenConv2d, nn.GroupNorm: _GroupNorm, nn.SiLU: _SiLU, GEGLU: Lean}


@contextmanager
def lean(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context, the layers of these networks store less for the backward pass; see the module docstring."""
    # Changing the class keeps hooks, parameters and names, and a copy of the network stays independent of the original.
    classes = _lean_classes()
    layers = [m for network in networks for m in network.modules() if type(m) in classes]
    for layer in layers:
        layer.__class__ = classes[type(layer)]
    try:
        yield
    finally:
        before = {new: old for old, new in classes.items()}
        for layer in layers:
            layer.__class__ = before.get(type(layer), type(layer))
