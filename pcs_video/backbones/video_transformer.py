"""The base class of video transformers, which attend jointly over space and time, use cross-attention to the text, and
are trained by flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcs_video.backbones.causal_latents import CausalCodec
from shared.backbones.attention_sites import Site
from shared.backbones.base_backbone import BaseBackbone
from shared.backbones.forward_process import FlowMatching
from shared.backbones.module_roles import RoleSpec
from shared.types import Conditioning

_QKVO = r"(to_q|to_k|to_v|to_out\.0)"
_LEAVES = {"": _QKVO, ".kv": "to_[kv]", ".q": "to_q", ".qk": "to_[qk]"}
_T5 = r"encoder\.block\.\d+\.layer\.\d+\."
_NOTE = "the layers of self_attention, which attend jointly over space and time; there are no layers for time alone"


def transformer_roles(networks: Sequence[str], block: str, feed_forward: str) -> dict[str, tuple[RoleSpec, ...]]:
    """Returns the roles of one or more transformers with the same layers, and of their T5 text encoder.

    Args:
        networks: the component names of the transformers
        block: a pattern for the names of blocks, including the trailing dot
        feed_forward: the name of the feed-forward module in a block
    """

    def of(pattern: str, **options: Any) -> tuple[RoleSpec, ...]:
        return tuple(RoleSpec(network, pattern, **options) for network in networks)

    roles = {
        "denoiser": of(".*"),
        "denoiser.all": of(".*", of="parameters"),
        "attention": of(rf"{block}attn[12]\.{_QKVO}"),
        "feed_forward": of(rf"{block}{feed_forward}\.net\.(0\.proj|2)"),
        "text_encoder": (RoleSpec("text_encoder", _T5 + r"SelfAttention\.[qkvo]"),),
        "text_encoder.mlp": (RoleSpec("text_encoder", _T5 + r"DenseReluDense\.w[io](_[01])?"),),
    }
    for suffix, leaf in _LEAVES.items():
        roles[f"self_attention{suffix}"] = of(rf"{block}attn1\.{leaf}")
        roles[f"cross_attention{suffix}"] = of(rf"{block}attn2\.{leaf}")
        roles[f"temporal_attention{suffix}"] = of(rf"{block}attn1\.{leaf}", resolution="port", note=_NOTE)
    return roles


class VideoTransformerBackbone(FlowMatching, CausalCodec, BaseBackbone):
    """Wraps a diffusers pipeline in the backbone protocol. The pipeline has a T5 text encoder, one or more video
    transformers with the same layers, and a causal autoencoder.

    Clips are [B, C, f, h, w], and pictures [B, C, h, w] are handled as clips of one frame. Unlike diffusers' pipelines,
    this backbone uses prompts as they are, without cleaning up HTML entities or repeated spaces.
    """

    why_one_context = "all of its layers share one projection of the text"
    _sites: tuple[Site, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the computation; some parameters may stay in float32."""
        network: Any = self.denoiser
        return network.dtype

    @property
    def latent_dtype(self) -> torch.dtype:
        """The dtype of latents during sampling, which is at least float32 whatever the network's precision, as in
        diffusers."""
        return torch.promote_types(self.dtype, torch.float32)

    def sites(self) -> tuple[Site, ...]:
        return self._sites

    def text_sites(self) -> tuple[str, ...]:
        """Returns no sites, because all layers share one projection of the text."""
        return ()

    def _set_sites(self, block: str, blocks: int) -> None:
        """Sets the list of sites. Each block, in order, adds its self-attention and then its cross-attention."""
        names = [(f"{block}.{i}.attn{n}", n) for i in range(blocks) for n in (1, 2)]
        self._sites = tuple(Site(name, "self" if n == 1 else "cross", self.latent_multiple) for name, n in names)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the velocity `noise - x_0`, in the shape of x_t.

        Args:
            x_t: clips [B, C, f, h, w], or pictures [B, C, h, w]
            t: [B] or a scalar; may also be [B, f] if the network takes one time per frame (`time_per_frame`)

        Raises:
            ValueError: when the conditioning has one context per site, image tokens, regions or size_ids, or when shapes do
                not match
        """
        self._refuse_unread(conditioning, len(x_t))
        if not isinstance(conditioning.context, Tensor):
            raise ValueError(f"{self.family}: {self.why_one_context}, so the context must be one tensor")
        clips = x_t if x_t.ndim == 5 else x_t[:, :, None]
        out = self._velocity(clips, self._told(t, clips), conditioning, conditioning.context)
        return out if x_t.ndim == 5 else out[:, :, 0]

    def _velocity(self, clips: Tensor, t: Tensor, conditioning: Conditioning, context: Tensor) -> Tensor:
        """Returns the velocity of clips [B, C, f, h, w] at times t ([B] or [B, f]), with the context [B, L, D]."""
        raise NotImplementedError


def per_token(t: Tensor, frames: int, tokens: int) -> Tensor:
    """Returns the time of each token's frame, [B, tokens], for times t ([B] or [B, f]). All frames have the same number of
    tokens."""
    each = t if t.ndim == 2 else t[:, None].expand(-1, frames)
    return each.repeat_interleave(tokens // frames, dim=1)
