"""LTX-Video (https://arxiv.org/abs/2501.00103), which uses flow matching on highly compressed clips. Frame positions
are given in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcs_video.backbones.transformer_attention import LTXProcessor, is_plain
from pcs_video.backbones.video_transformer import VideoTransformerBackbone, per_token, transformer_roles
from shared.backbones.attention_processors import Processor
from shared.backbones.forward_process import per_row
from shared.types import Conditioning


class LTXBackbone(VideoTransformerBackbone):
    """A diffusers `LTXPipeline` (text to video) behind the protocol. Each latent cell is one token.

    Args:
        pipe: the pipeline; its networks are used in place and frozen
        name: the model's name as the user gave it
        max_sequence_length: T5 tokens per prompt. By default, the tokenizer's limit, but at most 128

    Raises:
        ValueError: when the transformer joins several cells into one token, or its channel count differs from the
            autoencoder's
    """

    family = "ltx"
    role_table = transformer_roles(("transformer",), r"transformer_blocks\.\d+\.", "ff")
    default_guidance = 3.0
    default_steps = 50
    masks_context = True
    time_per_frame = True
    #: Frames per second of generated and learned clips. The network gets each frame's time in seconds, not its index.
    frame_rate: float | None = 25.0
    #: The noise level for decoding, if the autoencoder is conditioned on one.
    decode_time: float = 0.0

    def __init__(self, pipe: Any, name: str = "", max_sequence_length: int | None = None) -> None:
        _check(pipe.transformer.config, pipe.vae.config.latent_channels)
        length = max_sequence_length or min(128, pipe.tokenizer.model_max_length)
        super().__init__(
            name=name,
            components={"transformer": pipe.transformer, "text_encoder": pipe.text_encoder},
            tokenizers={"text_encoder": pipe.tokenizer},
            max_length={"text_encoder": length},
            vae=pipe.vae,
            scheduler=pipe.scheduler,
        )
        self.transformer: Any = pipe.transformer
        self.frame_factor = self.vae.temporal_compression_ratio
        self.resolution, self.frames = 512, 161
        self.num_train_timesteps = 1000
        self._set_sites("transformer_blocks", len(self.transformer.transformer_blocks))

    def pipeline(self) -> Any:
        """Returns an `LTXPipeline` around the same networks, with the base tokenizer and a new scheduler."""
        from diffusers import LTXPipeline  # pyright: ignore[reportPrivateImportUsage]

        networks: dict[str, Any] = dict(self._components)
        return LTXPipeline(
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            vae=self.vae,
            tokenizer=self.tokens.base["text_encoder"],
            **networks,
        )

    # --- the autoencoder -----------------------------------------------------------------------------------

    @property
    def vae_factor(self) -> int:
        return self.vae.spatial_compression_ratio

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.vae.latents_mean.to(like), self.vae.latents_std.to(like)
        return mean, std / self.vae.config.scaling_factor

    def _decode(self, z: Tensor) -> Tensor:
        """Decodes latents. Some versions of the autoencoder add noise, which is the same in every call."""
        timed = self.vae.config.timestep_conditioning
        t = z.new_full([len(z)], self.decode_time) if timed else None
        with torch.random.fork_rng(devices=[z.device] if z.device.type == "cuda" else []):
            torch.manual_seed(0)
            return self.vae.decode(z, t, return_dict=False)[0]

    # --- the network ---------------------------------------------------------------------------------------

    def set_timesteps(self, scheduler: Any, steps: int, latent_shape: Sequence[int]) -> None:
        """Sets evenly spaced sigmas, as `LTXPipeline` does. The scheduler may shift them according to the number of tokens."""
        import numpy as np
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        config = scheduler.config
        mu = calculate_shift(
            int(np.prod(latent_shape[1:])),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device=self.device)

    def _velocity(self, clips: Tensor, t: Tensor, conditioning: Conditioning, context: Tensor) -> Tensor:
        dtype, (frames, height, width) = self.transformer.dtype, clips.shape[2:]
        assert conditioning.context_mask is not None
        with self._predictions.under_way(len(clips), per_row(t)):
            out = self.transformer(
                hidden_states=clips.flatten(2).transpose(1, 2).to(dtype),
                encoder_hidden_states=context.to(dtype),
                timestep=t if t.ndim == 1 else per_token(t, frames, frames * height * width),
                encoder_attention_mask=conditioning.context_mask,
                num_frames=frames,
                height=height,
                width=width,
                rope_interpolation_scale=(
                    self.frame_factor / (self.frame_rate or 25.0),
                    self.vae_factor,
                    self.vae_factor,
                ),
                return_dict=False,
            )[0]
        return out.transpose(1, 2).unflatten(2, (frames, height, width))

    def _run_text(self, component: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._components[component](ids)[0], None  # T5 attends to padding here; the transformer does not

    def _processor_for(self, layer: Any) -> type[Processor] | None:
        from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

        return LTXProcessor if is_plain(layer, LTXVideoAttnProcessor) else super()._processor_for(layer)


def _check(config: Any, channels: int) -> None:
    if (config.patch_size, config.patch_size_t) != (1, 1):
        raise ValueError(
            f"ltx: patches of {config.patch_size_t}x{config.patch_size}x{config.patch_size} are not supported"
        )
    if config.in_channels != channels:
        raise ValueError(f"ltx: the transformer needs {config.in_channels} channels, but gets {channels}")
