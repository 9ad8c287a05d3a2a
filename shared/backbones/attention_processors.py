"""Attention processors that apply edits and record maps, and otherwise match diffusers' default processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.backbones.attention_edits import Edit
from shared.backbones.attention_maps import Record, Watch
from shared.backbones.attention_rows import Rows
from shared.backbones.attention_sites import Site


class Predictions(Protocol):
    """The current prediction and its batch rows."""

    number: int | None  # None while a forward pass is recomputed

    def rows(self, site: Site, entries: int) -> Rows: ...


@dataclass(frozen=True)
class Plan:
    """The edits to apply and the maps to record at one site."""

    site: Site
    predictions: Predictions
    edits: Sequence[Edit] = ()
    records: Sequence[tuple[Watch, Record]] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Applies the edits, records the maps, and returns softmax(q k^T / sqrt(d) + bias) v, [B, H, Lq, d]."""
        size = q.shape
        if self.edits:
            rows = self.predictions.rows(self.site, q.shape[0])
            for edit in self.edits:
                q, k, v, bias = edit(self.site, q, k, v, bias, rows)
            same = q.shape == size and k.shape == v.shape and k.shape[:2] == size[:2] and k.shape[3] == size[3]
            assert same, f"{self.site.name}: edits turned q {size} into {q.shape}, with k {k.shape} and v {v.shape}"
        if self.records:
            maps = probabilities(q, k, bias)
            for watch, record in self.records:
                self._keep(watch, record, maps)
            return maps.to(v.dtype) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))

    def _keep(self, watch: Watch, record: Record, maps: Tensor) -> None:
        number, name = self.predictions.number, self.site.name
        if watch.keep == "first" and number is not None and record.passes.get(name, number) != number:
            return
        record.maps[name] = maps.mean(1) if watch.heads == "mean" else maps
        if number is not None:
            record.passes[name] = number


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Returns softmax(q k^T / sqrt(d) + bias), [B, H, Lq, Lk].

    The result has at least float32 precision, even if the network runs in half precision or under autocast.

    Args:
        q: [B, H, Lq, d]
        k: [B, H, Lk, d]
        bias: [B or 1, H or 1, Lq or 1, Lk], or None
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        size = (*q.shape[:3], k.shape[2])
        if bias is None:
            added, beta = q.new_empty(size), 0
        else:
            added, beta = bias.to(q.dtype).expand(size), 1
        flat = [x.flatten(0, 1) for x in (added, q, k.mT)]
        return torch.baddbmm(*flat, beta=beta, alpha=q.shape[-1] ** -0.5).softmax(-1).view(size)


class Processor:
    """An attention processor that carries out a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class UNetProcessor(Processor):
    """Computes what diffusers' `AttnProcessor2_0` computes for an `Attention` layer, and carries out a plan."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Maps hidden states [B, L, C] or [B, C, h, w] to the same shape."""
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        grid = x.shape[2:] if x.ndim == 4 else None
        if grid is not None:
            x = x.flatten(2).mT
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        source = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        q, k, v = (
            layer(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, y in ((attn.to_q, x), (attn.to_k, source), (attn.to_v, source))
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        bias = attn.prepare_attention_mask(attention_mask, source.shape[1], len(source))
        if bias is not None:
            bias = bias.view(len(source), attn.heads, -1, bias.shape[-1])
        x = self.plan.attend(q, k, v, bias).transpose(1, 2).flatten(2).to(q.dtype)
        x = attn.to_out[1](attn.to_out[0](x))
        if grid is not None:
            x = x.mT.unflatten(2, grid)
        if attn.residual_connection:
            x = x + hidden_states
        return x / attn.rescale_output_factor


class FluxProcessor(Processor):
    """Computes what diffusers' `FluxAttnProcessor` computes for a `FluxAttention` layer, and carries out a plan. Text tokens
    precede picture tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Maps picture tokens [B, N, C] and text tokens [B, L, C] to the same shapes. In single-stream blocks,
        `hidden_states` contains both kinds of tokens."""
        from diffusers.models.embeddings import apply_rotary_emb

        assert attention_mask is None, "FLUX also attends to padding"
        norms = (attn.norm_q, attn.norm_k, None)
        parts = [_heads(hidden_states, (attn.to_q, attn.to_k, attn.to_v), norms, attn.head_dim)]
        if attn.added_kv_proj_dim is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k, None)
            parts.insert(0, _heads(encoder_hidden_states, layers, norms, attn.head_dim))
        q, k, v = (torch.cat(streams, dim=1) for streams in zip(*parts, strict=True))
        if image_rotary_emb is not None:
            turned: Any = [apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k)]
            q, k = turned
        x = self.plan.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
        x = x.transpose(1, 2).flatten(2).to(q.dtype)
        if encoder_hidden_states is None:
            return x
        length = encoder_hidden_states.shape[1]
        text, picture = x[:, :length].contiguous(), x[:, length:].contiguous()
        return attn.to_out[1](attn.to_out[0](picture)), attn.to_add_out(text)


def _heads(x: Any, layers: Sequence[Any], norms: Sequence[Any], width: int) -> list[Tensor]:
    """Returns the queries, keys and values of one stream, each [B, L, H, d]."""
    apart = [layer(x).unflatten(-1, (-1, width)) for layer in layers]
    return [y if norm is None else norm(y) for y, norm in zip(apart, norms, strict=True)]
