"""Wan 2.1 and 2.2 (https://arxiv.org/abs/2503.20314), which use flow matching on clips. Wan 2.2 has one expert for high
noise and one for low noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcs_video.backbones.transformer_attention import WanProcessor, is_plain
from pcs_video.backbones.video_transformer import VideoTransformerBackbone, per_token, transformer_roles
from shared.backbones.attention_processors import Processor
from shared.backbones.forward_process import per_row
from shared.types import Conditioning


class WanBackbone(VideoTransformerBackbone):
    """A diffusers `WanPipeline` (text to video) behind the protocol.

    With two experts, `transformer` predicts at times from `boundary` upwards, and `transformer_2` predicts at times
    below it. Both have the same layers. A role refers to the layers of both experts, and a site refers to a layer of
    whichever expert is predicting.

    Args:
        pipe: the pipeline; its networks are used in place and frozen
        name: the model's name as the user gave it
        max_sequence_length: tokens per prompt. By default, the tokenizer's limit, but at most 512

    Raises:
        ValueError: when the transformer takes more than noisy latents (image to video), or an expert is missing
    """

    family = "wan"
    default_guidance = 5.0
    default_steps = 50
    #: Guidance for the second expert (the pipeline's `guidance_scale_2`). If None, the same as for the first.
    low_noise_guidance: float | None = None

    def __init__(self, pipe: Any, name: str = "", max_sequence_length: int | None = None) -> None:
        boundary = pipe.config.boundary_ratio
        experts = {"transformer": pipe.transformer}
        if boundary is not None:
            experts["transformer_2"] = pipe.transformer_2
        _check(experts, pipe.vae.config.z_dim)
        length = max_sequence_length or min(512, pipe.tokenizer.model_max_length)
        super().__init__(
            name=name,
            components={**experts, "text_encoder": pipe.text_encoder},
            tokenizers={"text_encoder": pipe.tokenizer},
            max_length={"text_encoder": length},
            vae=pipe.vae,
            scheduler=pipe.scheduler,
        )
        self.experts: dict[str, Any] = experts
        self.boundary_ratio: float | None = boundary
        self.time_per_token = self.time_per_frame = bool(pipe.config.expand_timesteps)  # Wan 2.2 5B
        self.role_table = transformer_roles(tuple(experts), r"blocks\.\d+\.", "ffn")
        self.frame_factor = self.vae.config.scale_factor_temporal
        self.latent_multiple = pipe.transformer.config.patch_size[1]
        self.resolution, self.frames = 480, 81
        self.num_train_timesteps = 1000
        self._set_sites("blocks", len(pipe.transformer.blocks))

    def pipeline(self) -> Any:
        """Returns a `WanPipeline` around the same networks, with the base tokenizer and a new scheduler."""
        from diffusers import WanPipeline  # pyright: ignore[reportPrivateImportUsage]

        networks: dict[str, Any] = dict(self._components)
        return WanPipeline(
            tokenizer=self.tokens.base["text_encoder"],
            vae=self.vae,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            boundary_ratio=self.boundary_ratio,
            expand_timesteps=self.time_per_token,
            **networks,
        )

    @property
    def boundary(self) -> float:
        """The lowest time at which the first expert predicts."""
        return 1000.0 * (self.boundary_ratio or 0.0)

    # --- the autoencoder -----------------------------------------------------------------------------------

    @property
    def vae_factor(self) -> int:
        return self.vae.config.scale_factor_spatial

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        return like.new_tensor(config.latents_mean), like.new_tensor(config.latents_std)

    # --- the network ---------------------------------------------------------------------------------------

    @property
    def noise_ranges(self) -> Mapping[str, tuple[float, float]]:
        """The time range of each expert. With two experts, `transformer` predicts from the boundary upwards, and
        `transformer_2` predicts below it. Otherwise, `transformer` always predicts."""
        low = {"transformer_2": (0.0, self.boundary)} if len(self.experts) > 1 else {}
        return {"transformer": (self.boundary, 1000.0), **low}

    def set_timesteps(self, scheduler: Any, steps: int, latent_shape: Sequence[int]) -> None:
        """Sets the times as `WanPipeline` does. The scheduler applies the shift that it is configured with."""
        scheduler.set_timesteps(steps, device=self.device)
        scheduler.set_begin_index(0)

    def _velocity(self, clips: Tensor, t: Tensor, conditioning: Conditioning, context: Tensor) -> Tensor:
        if len(self.experts) == 1:
            return self._ask("transformer", clips, t, context)
        high = t >= self.boundary
        rows = {"transformer": high.nonzero().flatten(), "transformer_2": (~high).nonzero().flatten()}
        asked = {name: index for name, index in rows.items() if len(index)}
        if len(asked) == 1:
            return self._ask(next(iter(asked)), clips, t, context)
        if self._is_attended:
            raise ValueError(
                f"{self.family}: these times are on both sides of {self.boundary:g}, where the experts change, but attention "
                "is edited or watched, which is possible for only one expert at a time. Keep the times of each "
                "prediction on one side (train.batch_size=1, or a range of times on one side)."
            )
        parts = [self._ask(name, clips[index], t[index], context[index]) for name, index in asked.items()]
        return torch.cat(parts)[torch.cat(list(asked.values())).argsort()]

    def _ask(self, expert: str, clips: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Runs one expert once."""
        network = self.experts[expert]
        with self._predictions.under_way(len(clips), per_row(t)):
            return network(
                hidden_states=clips.to(network.dtype),
                timestep=self._per_token(t, clips) if self.time_per_token else t,
                encoder_hidden_states=context.to(network.dtype),
                return_dict=False,
            )[0]

    def _per_token(self, t: Tensor, clips: Tensor) -> Tensor:
        """Returns one time per token, [B, tokens], for times t ([B] or [B, f])."""
        return per_token(t, clips.shape[2], clips[0, 0].numel() // self.latent_multiple**2)

    def predict_guided(
        self, x_t: Tensor, t: Tensor, positive: Conditioning, negative: Conditioning | None, guidance: float
    ) -> Tensor:
        """Predicts with classifier-free guidance. The second expert uses `low_noise_guidance` if it is set."""
        if self.low_noise_guidance is None or len(self.experts) == 1:
            return super().predict_guided(x_t, t, positive, negative, guidance)
        high = per_row(self._told(t, x_t)) >= self.boundary
        strength: Any = torch.where(high, guidance, self.low_noise_guidance).view(-1, *[1] * (x_t.ndim - 1))
        return super().predict_guided(x_t, t, positive, negative, strength)

    def _run_text(self, component: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Runs the text encoder. UMT5 does not attend to padding, and the hidden states of padding are set to zero."""
        hidden = self._components[component](ids, attention_mask=mask)[0]
        return hidden * mask[..., None].to(hidden.dtype), None

    def _processor_for(self, layer: Any) -> type[Processor] | None:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        return WanProcessor if is_plain(layer, WanAttnProcessor) else super()._processor_for(layer)


def _check(experts: Mapping[str, Any], channels: int) -> None:
    for name, network in experts.items():
        if network is None:
            raise ValueError(f"wan: the pipeline has no {name}, which its boundary_ratio requires")
        config = network.config
        if config.in_channels != channels or config.image_dim or config.added_kv_proj_dim:
            raise ValueError(
                f"wan: the {name} takes {config.in_channels} channels instead of {channels}, or takes both images and text; "
                "only text-to-video models are supported, not image-to-video models"
            )
        if config.patch_size[0] != 1 or config.patch_size[1] != config.patch_size[2]:
            raise ValueError(f"wan: the {name} has patches of {list(config.patch_size)}; only 1 x n x n is supported")
    if len({len(network.blocks) for network in experts.values()}) > 1:
        raise ValueError("wan: the two experts must have the same number of blocks")
