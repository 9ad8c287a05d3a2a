"""Builds the toybox's networks, which are stock classes from diffusers and transformers, and defines their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from shared.toybox.tokenizer import MAX_LENGTH

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from shared.pretrain.task import Compute

S = TypeVar("S")

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class VaeSize:
    """The size of an ``AutoencoderKL``, which encodes pictures [B, 3, S, S] in [-1, 1] as latents
    [B, latent_channels, s, s], where s = S / 2^(levels - 1)."""

    channels: tuple[int, ...] = (24, 48, 96)
    layers_per_block: int = 1
    groups: int = 12
    sample_size: int = 64
    latent_channels: int = 8


@dataclass(frozen=True)
class TextSize:
    """The size of a ``CLIPTextModel``, which maps 32 tokens to [B, 32, hidden]."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4


@dataclass(frozen=True)
class UnetSize:
    """The size of a ``UNet2DConditionModel`` on latents [B, latent_channels, 16, 16]. All levels except the first have
    attention.

    layers_per_block: the number of residual blocks per level on the way down; on the way up, each level has one more
    """

    channels: tuple[int, ...] = (64, 128, 192)
    layers_per_block: int = 2
    heads: int = 4
    groups: int = 16
    sample_size: int = 16
    latent_channels: int = 8


def build_vae(size: VaeSize = VaeSize()) -> AutoencoderKL:
    """Builds a freshly initialised autoencoder. Its ``scaling_factor`` is 1 until it is measured after training."""
    from diffusers import AutoencoderKL

    levels = len(size.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=size.channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=size.layers_per_block,
        latent_channels=size.latent_channels,
        norm_num_groups=size.groups,
        sample_size=size.sample_size,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_text(tokenizer: CLIPTokenizer, size: TextSize = TextSize()) -> CLIPTextModel:
    """Builds a freshly initialised text model for ``tokenizer``.

    Its end-of-text id is the tokenizer's. With transformers' legacy value of 2, the pooled output would be taken at the
    position of the highest id, which is wrong once a token has been added.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        projection_dim=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,  # pyright: ignore[reportArgumentType]
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    return CLIPTextModel(config)


def build_unet(context: int, size: UnetSize = UnetSize()) -> UNet2DConditionModel:
    """Builds a freshly initialised U-Net that attends to text embeddings with ``context`` channels."""
    from diffusers import UNet2DConditionModel

    deeper = len(size.channels) - 1
    return UNet2DConditionModel(
        sample_size=size.sample_size,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * deeper),
        up_block_types=(*("CrossAttnUpBlock2D",) * deeper, "UpBlock2D"),
        block_out_channels=size.channels,
        layers_per_block=size.layers_per_block,
        cross_attention_dim=context,
        attention_head_dim=size.heads,  # diffusers' name for the number of heads in SD 1.x-style configurations
        norm_num_groups=size.groups,
    )


def lay_out(unet: Any, compute: Compute) -> None:
    """Prepares a picture or clip U-Net for fast training on its current device.

    If `compute.compiled` is set, each block is compiled separately, so that hooks on the blocks still see the same
    inputs and outputs.
    """
    if compute.device.type == "cpu":
        unet.set_attn_processor(PlainAttention())
    if compute.device.type == "cpu" or compute.compiled:  # on a GPU, uncompiled group norms would undo this
        unet.to(memory_format=torch.channels_last)
    if compute.compiled:
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            block.forward = torch.compile(block.forward, dynamic=False)


def alphas_bar() -> Tensor:
    """Returns the cumulative products of the noise schedule's alphas, float32 [1000]."""
    return build_scheduler().alphas_cumprod


def build_scheduler() -> DDIMScheduler:
    """Builds a scheduler with a cosine schedule, v-prediction, and "trailing" timesteps, which start at pure noise.

    The cosine schedule (Nichol and Dhariwal, arXiv 2102.09672) suits small latents. It leaves practically no signal at
    the last timestep, so a picture's overall tone does not leak through. For v-prediction, see Salimans and Ho, arXiv
    2202.00512.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # not used for "trailing" timesteps, but diffusers expects it
        set_alpha_to_one=True,
    )


class PlainAttention:
    """An attention processor for diffusers' ``set_attn_processor``, with two batched matrix products and a softmax.

    It is equivalent to the fused kernel, whose backward pass would take up a fifth of a toybox training step on a CPU.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        """Returns the result ([B, L, D]) of attention from ``hidden_states`` ([B, L, D]) to ``encoder_hidden_states``
        ([B, M, C]). If the latter is None, ``hidden_states`` attend to themselves."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (self._split(x, attn.heads) for x in projected)
        with torch.autocast(q.device.type, enabled=False):
            mixed = ((q @ k.transpose(-1, -2)) * attn.scale).softmax(-1) @ v
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Denoiser(nn.Module):
    """The text model and the U-Net as one module, so that they are trained, averaged and saved together."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predicts v.

        Args:
            noisy: scaled latents [B, C, H, W]
            t: timesteps [B] in [0, 1000)
            ids: token ids [B, L]

        Returns:
            the prediction, [B, C, H, W]
        """
        context: Any = self.text_encoder(input_ids=ids)
        return self.unet(noisy, t, encoder_hidden_states=context.last_hidden_state).sample


def build_denoiser(tokenizer: CLIPTokenizer, sizes: Mapping[str, Any] | None = None) -> Denoiser:
    """Builds a freshly initialised text model and U-Net.

    Args:
        tokenizer: determines the number of token embeddings
        sizes: ``{"text": …, "unet": …}`` with the fields of ``TextSize`` and ``UnetSize``. The shipped sizes are used
            by default.
    """
    text, unet = size_from(TextSize, (sizes or {}).get("text")), size_from(UnetSize, (sizes or {}).get("unet"))
    return Denoiser(build_text(tokenizer, text), build_unet(text.hidden, unet))


def size_from(kind: type[S], fields: Mapping[str, Any] | None) -> S:
    """Builds a size from JSON data, in which tuples are lists. If ``fields`` is None, returns the default size."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in (fields or {}).items()})
