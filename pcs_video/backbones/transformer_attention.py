"""Attention processors for video transformers that apply edits and record maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.backbones.attention_processors import Processor


def is_plain(layer: Any, default: type) -> bool:
    """Whether a layer uses diffusers' default processor without any of its optional settings."""
    now = layer.processor
    return (
        type(now) is default
        and now._attention_backend is None
        and now._parallel_config is None
        and not layer.fused_projections
    )


class WanProcessor(Processor):
    """Computes what diffusers' `WanAttnProcessor` computes for a `WanAttention` layer, and carries out a plan."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Maps tokens [B, N, C] to the same shape. Cross-attention layers also take the text [B, L, C]."""
        assert attention_mask is None, "Wan also attends to padding, which consists of zeros"
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in _projected(attn, hidden_states, encoder_hidden_states))
        if rotary_emb is not None:
            cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        return _out(attn, self.plan.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None), q)


class LTXProcessor(Processor):
    """Computes what diffusers' `LTXVideoAttnProcessor` computes for an `LTXAttention` layer, and carries out a plan."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Maps tokens [B, N, C] to the same shape. Cross-attention layers also take the text [B, L, C] and a bias [B, 1, L]."""
        from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

        q, k, v = _projected(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)
        bias = attn.prepare_attention_mask(attention_mask, k.shape[1], len(k))
        if bias is not None:
            bias = bias.view(len(k), attn.heads, -1, bias.shape[-1])
        heads, keys, values = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return _out(attn, self.plan.attend(heads, keys, values, bias), q)


def _projected(attn: Any, x: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values, each [B, L, H * d]. The norms are computed over all heads together."""
    source = x if text is None else text
    return attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(source)), attn.to_v(source)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels of [B, L, H, d] by angles [1, L, 1, d / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def _out(attn: Any, attended: Tensor, like: Tensor) -> Tensor:
    """Joins the heads of `attended` ([B, H, L, d]) and projects them to the layer's output ([B, L, C])."""
    return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2).to(like.dtype)))
