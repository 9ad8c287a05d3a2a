"""The common parts of video transformers: joint attention over space and time, cross-attention to the text, flow matching."""

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
_NOTE = "the layers of self_attention, which attends jointly over space and time; no layers are for time alone"


def transformer_roles(networks: Sequence[str], block: str, feed_forward: str) -> dict[str, tuple[RoleSpec, ...]]:
    """Returns the roles of transformers of one kind, and of their T5.

    Args:
        networks: names of the components
        block: pattern of a block's name, including the trailing dot
        feed_forward: name of the feed-forward module in a block
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
    """A diffusers pipeline with one T5, one kind of video transformer and a causal autoencoder behind the protocol.

    Clips are [B, C, f, h, w]; pictures [B, C, h, w] are handled as clips of one frame. Prompts are used as they are: unlike
    the pipelines, this backbone does not clean up HTML entities and repeated spaces.
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
        """The pipelines sample in float32, whatever the network's precision."""
        return torch.promote_types(self.dtype, torch.float32)

    def sites(self) -> tuple[Site, ...]:
        return self._sites

    def text_sites(self) -> tuple[str, ...]:
        """Returns no sites: one projection of the text serves all layers."""
        return ()

    def _set_sites(self, block: str, blocks: int) -> None:
        """Lists the sites: block by block, self-attention, then cross-attention."""
        names = [(f"{block}.{i}.attn{n}", n) for i in range(blocks) for n in (1, 2)]
        self._sites = tuple(Site(name, "self" if n == 1 else "cross", self.latent_multiple) for name, n in names)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicts the velocity noise - x_0, in the shape of x_t.

        Args:
            x_t: [B, C, f, h, w], or pictures [B, C, h, w]
            t: [B] or a scalar; [B, f] if the network takes a time for each token (`time_per_frame`)

        Raises:
            ValueError: given a context per site, image tokens, regions or size_ids, or shapes that do not match
        """
        self._refuse_unread(conditioning, len(x_t))
        if not isinstance(conditioning.context, Tensor):
            raise ValueError(f"{self.family}: {self.why_one_context}, so the context must be one tensor")
        clips = x_t if x_t.ndim == 5 else x_t[:, :, None]
        out = self._velocity(clips, self._told(t, clips), conditioning, conditioning.context)
        return out if x_t.ndim == 5 else out[:, :, 0]

    def _velocity(self, clips: Tensor, t: Tensor, conditioning: Conditioning, context: Tensor) -> Tensor:
        """Clips [B, C, f, h, w], t [B] or [B, f], context [B, L, D] -> [B, C, f, h, w]."""
        raise NotImplementedError


def per_token(t: Tensor, frames: int, tokens: int) -> Tensor:
    """[B] or [B, f] -> [B, tokens]: each token's time is its frame's; all frames have the same number of tokens."""
    each = t if t.ndim == 2 else t[:, None].expand(-1, frames)
    return each.repeat_interleave(tokens // frames, dim=1)
