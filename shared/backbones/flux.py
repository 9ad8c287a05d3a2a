"""FLUX.1, a flow-matching MMDiT (Esser et al., arXiv 2403.03206) conditioned on CLIP's pooled output and T5's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.backbones.attention_sites import Site
from shared.backbones.base_backbone import BaseBackbone
from shared.backbones.forward_process import FlowMatching, times
from shared.backbones.module_roles import RoleSpec, denoiser_roles
from shared.types import Conditioning

_DOUBLE = r"transformer_blocks\.\d+\."
_ANY = r"(single_)?transformer_blocks\.\d+\."
_PICTURE = r"attn\.(to_q|to_k|to_v|to_out\.0)"
_TEXT = r"attn\.(add_[qkv]_proj|to_add_out)"
_CLIP = r"(text_model\.)?encoder\.layers\.\d+\."
_T5 = r"encoder\.block\.\d+\.layer\.\d+\."
_NET = "transformer"


def _port(pattern: str, note: str) -> tuple[RoleSpec, ...]:
    return (RoleSpec(_NET, pattern, "port", note),)


ROLES = {
    **denoiser_roles(_NET),
    "attention": (RoleSpec(_NET, f"{_ANY}({_PICTURE}|{_TEXT})"),),
    "self_attention": _port(
        _ANY + _PICTURE, "the picture stream of joint attention, and the single blocks' shared stream"
    ),
    "self_attention.kv": _port(_ANY + r"attn\.to_[kv]", "keys and values of the picture stream of joint attention"),
    "self_attention.q": _port(_ANY + r"attn\.to_q", "queries of the picture stream of joint attention"),
    "cross_attention": _port(_DOUBLE + _TEXT, "the text stream of joint attention in the double blocks"),
    "cross_attention.kv": _port(_DOUBLE + r"attn\.add_[kv]_proj", "keys and values of joint attention's text stream"),
    "cross_attention.q": _port(_DOUBLE + r"attn\.add_q_proj", "queries of joint attention's text stream"),
    "feed_forward": (RoleSpec(_NET, rf"{_DOUBLE}ff(_context)?\.net\.(0\.proj|2)|single_{_DOUBLE}proj_mlp"),),
    "proj": _port(rf"single_{_DOUBLE}proj_out", "the single blocks' joint projection of attention and feed-forward"),
    "text_encoder": (RoleSpec("text_encoder", _CLIP + r"self_attn\.(q|k|v|out)_proj"),),
    "text_encoder.mlp": (RoleSpec("text_encoder", _CLIP + r"mlp\.fc[12]"),),
    "text_encoder_2": (RoleSpec("text_encoder_2", _T5 + r"SelfAttention\.[qkvo]"),),
    "text_encoder_2.mlp": (RoleSpec("text_encoder_2", _T5 + r"DenseReluDense\.w[io](_[01])?"),),
}


class FluxBackbone(FlowMatching, BaseBackbone):
    """A diffusers `FluxPipeline` behind the protocol.

    At the interface, latents are unpacked ([B, C, h, w]). Internally, each block of 2x2 cells becomes one token. The time is
    t = 1000 * sigma.

    Args:
        pipe: the pipeline; its networks are used in place and frozen
        name: the model's name as the user gave it
        max_sequence_length: the maximum number of T5 tokens per prompt. By default, the tokenizer's limit or 512, whichever
            is smaller
    """

    family = "flux"
    context_component = "text_encoder_2"
    pooled_component = "text_encoder"
    role_table = ROLES
    latent_multiple = 2
    default_guidance = 3.5
    default_steps = 28
    undistilled_defaults = (1.0, 4)  # guidance and steps for FLUX.1-schnell, which takes no guidance scale
    #: The scale that `predict` passes to a guidance-distilled transformer by default. At 1, the output is closest to the
    #: unguided velocity, which is the training target.
    training_guidance = 1.0

    def __init__(self, pipe: Any, name: str = "", max_sequence_length: int | None = None) -> None:
        length = max_sequence_length or min(512, pipe.tokenizer_2.model_max_length)
        super().__init__(
            name=name,
            components={
                "transformer": pipe.transformer,
                "text_encoder": pipe.text_encoder,
                "text_encoder_2": pipe.text_encoder_2,
            },
            tokenizers={"text_encoder": pipe.tokenizer, "text_encoder_2": pipe.tokenizer_2},
            max_length={"text_encoder": pipe.tokenizer.model_max_length, "text_encoder_2": length},
            vae=pipe.vae,
            scheduler=pipe.scheduler,
        )
        self.transformer: Any = pipe.transformer
        if not self.distilled:
            self.default_guidance, self.default_steps = self.undistilled_defaults
        channels = self.transformer.config.in_channels
        if channels != 4 * self.vae.config.latent_channels:
            packed = 4 * self.vae.config.latent_channels
            raise ValueError(
                f"flux: the transformer expects {channels} channels but gets {packed} (a control or fill model?)"
            )
        self.resolution = 128 * self.vae_factor
        self.num_train_timesteps = 1000
        doubles, singles = len(self.transformer.transformer_blocks), len(self.transformer.single_transformer_blocks)
        names = [f"transformer_blocks.{i}.attn" for i in range(doubles)]
        names += [f"single_transformer_blocks.{i}.attn" for i in range(singles)]
        self._sites = tuple(Site(n, "joint", 2) for n in names)

    def pipeline(self) -> Any:
        """Returns a diffusers pipeline around the same networks, with the base tokenizers and a new scheduler."""
        from diffusers import FluxPipeline  # pyright: ignore[reportPrivateImportUsage]

        networks: dict[str, Any] = dict(self._components)
        return FluxPipeline(
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            vae=self.vae,
            tokenizer=self.tokens.base["text_encoder"],
            tokenizer_2=self.tokens.base["text_encoder_2"],
            **networks,
        )

    def sites(self) -> tuple[Site, ...]:
        return self._sites

    @property
    def distilled(self) -> bool:
        """Whether the transformer is guidance-distilled (FLUX.1-dev). Such a transformer takes the guidance scale as an input,
        so no prediction for a negative prompt is needed."""
        return bool(self.transformer.config.guidance_embeds)

    def set_timesteps(self, scheduler: Any, steps: int, latent_shape: Sequence[int]) -> None:
        """Spaces sigmas evenly, as `FluxPipeline` does. The scheduler may shift them according to the picture's size."""
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = scheduler.config
        mu = calculate_shift(
            (latent_shape[-2] // 2) * (latent_shape[-1] // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device=self.device)
        scheduler.set_begin_index(0)

    # --- the network ---------------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance: float | None = None) -> Tensor:
        """Returns the velocity `noise - x_0`, [B, C, h, w].

        Args:
            x_t: [B, C, h, w], unpacked
            t: [B] or a scalar
            guidance: the scale for a guidance-distilled transformer; `training_guidance` by default

        Raises:
            ValueError: when the conditioning has one context per site, image tokens, regions or size_ids, or when shapes do
                not match
        """
        self._refuse_unread(conditioning, len(x_t))
        if not isinstance(conditioning.context, Tensor):
            raise ValueError("flux: text and picture attend jointly, so the context must be one tensor")
        batch, _, h, w = x_t.shape
        dtype, device = self.transformer.dtype, x_t.device
        t = times(t, batch, device)
        embedded_guidance = self.training_guidance if guidance is None else guidance
        with self._predictions.under_way(batch, t):
            out = self.transformer(
                hidden_states=pack(x_t).to(dtype),
                timestep=t.to(dtype) / 1000,
                guidance=torch.full([batch], embedded_guidance, device=device, dtype=torch.float32)
                if self.distilled
                else None,
                pooled_projections=conditioning.pooled.to(dtype) if conditioning.pooled is not None else None,
                encoder_hidden_states=conditioning.context.to(dtype),
                txt_ids=torch.zeros(conditioning.context.shape[1], 3, device=device, dtype=dtype),
                img_ids=picture_ids(h // 2, w // 2).to(device, dtype),
                return_dict=False,
            )[0]
        return unpack(out, h, w)

    def needs_negative(self, guidance: float) -> bool:
        """Whether sampling uses the negative prompt. A guidance-distilled transformer takes the scale as an input instead."""
        return not self.distilled and guidance > 1

    def predict_guided(
        self, x_t: Tensor, t: Tensor, positive: Conditioning, negative: Conditioning | None, guidance: float
    ) -> Tensor:
        """Uses classifier-free guidance (diffusers' `true_cfg_scale`), or distilled guidance if the model has it and `negative`
        is None."""
        if self.distilled and negative is None:
            return self.predict(x_t, t, positive, guidance)
        return super().predict_guided(x_t, t, positive, negative, guidance)

    def _run_text(self, component: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self._components[component](ids)  # no mask: FLUX also attends to padding
        return out[0], out.pooler_output if component == self.pooled_component else None


def pack(latents: Tensor) -> Tensor:
    """Packs each 2x2 block of latent cells into one token ([B, C, h, w] -> [B, h/2 * w/2, 4C])."""
    b, c, h, w = latents.shape
    cells = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Inverts `pack` ([B, h/2 * w/2, 4C] -> [B, C, h, w])."""
    b, _, channels = tokens.shape
    cells = tokens.reshape(b, h // 2, w // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(b, channels // 4, h, w)


def picture_ids(rows: int, columns: int) -> Tensor:
    """Returns the rotary position (0, row, column) of each picture token, [rows * columns, 3]."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3)
