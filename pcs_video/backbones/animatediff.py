"""AnimateDiff (https://arxiv.org/abs/2307.04725), an image U-Net with motion modules between its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pcs_video.backbones.framewise import FramewiseCodec, by_frame, shares
from pcs_video.backbones.recomputed_motion import recompute_motion
from shared.backbones.module_roles import RoleSpec
from shared.backbones.stable_diffusion import ROLES as PICTURE_ROLES
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.io.failures import of_the_machine
from shared.io.model_folders import quiet

DEFAULT_FRAMES = 16
_UNWRAPPED = (
    "all but motion modules' proj_in and proj_out, which diffusers calls with keyword arguments that peft rejects"
)
ROLES: Mapping[str, Sequence[RoleSpec]] = {
    **PICTURE_ROLES,
    "denoiser": (RoleSpec("unet", r"(?!.*motion_modules\.\d+\.proj_).*", "port", _UNWRAPPED),),
    "temporal_feed_forward": (
        RoleSpec("unet", r".*motion_modules\.\d+\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"),
    ),
}
_BLOCK = ("resnets", "attentions", "downsamplers", "upsamplers")
_ENDS = ("conv_in", "time_proj", "time_embedding", "conv_norm_out", "conv_act", "conv_out")


class AnimateDiffBackbone(FramewiseCodec, StableDiffusionBackbone):
    """A diffusers `AnimateDiffPipeline` behind the protocol.

    Clips [B, C, F, h, w] pass through the whole network. Pictures [B, C, h, w] pass only through its image layers: a
    subject should be learned and shown without motion modules, but these would change even a single frame. A concept
    learned on the image U-Net therefore works unchanged with this backbone, and a single concept can train both kinds
    of layers.

    Args:
        pipe: the pipeline; its U-Net is a `UNetMotionModel` or becomes one, and is frozen
        name: the model's name as the user gave it

    Raises:
        ValueError: when this family does not support this kind of U-Net, or the motion module does not fit the U-Net
    """

    family = "animatediff"
    role_table = ROLES

    def __init__(self, pipe: Any, name: str = "") -> None:
        self.motion_adapter = pipe.motion_adapter
        super().__init__(pipe, name)
        self.most_frames: int = self.unet.config.motion_max_seq_length
        self.frames: int | None = min(DEFAULT_FRAMES, self.most_frames)
        recompute_motion(self.unet)
        self._pictures = _without_motion(self.unet)
        self._by_frame = False

    @property
    def reads(self) -> frozenset[str]:
        """The families whose concepts can fit this model: its own family and that of the image U-Net."""
        return frozenset({self.family, StableDiffusionBackbone.family})

    def pipeline(self) -> Any:
        """Returns an `AnimateDiffPipeline` around the same networks, with the base tokenizer and a new scheduler."""
        from diffusers import AnimateDiffPipeline  # pyright: ignore[reportPrivateImportUsage]

        return AnimateDiffPipeline(
            vae=self.vae,
            tokenizer=self.tokens.base["text_encoder"],
            motion_adapter=self.motion_adapter,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            **self._components,  # pyright: ignore[reportArgumentType]
        )

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Returns the network's output in its own parametrisation, [B, C, F, h, w] for clips and [B, C, h, w] for
        pictures. Otherwise behaves like `StableDiffusionBackbone.predict`."""
        return super().predict(x_t, t, conditioning)

    @contextmanager
    def image_layers(self) -> Iterator[None]:
        """Inside the context, clips pass only through the image layers. Each frame is processed as a picture."""
        before, self._by_frame = self._by_frame, True
        try:
            yield
        finally:
            self._by_frame = before

    def _run_denoiser(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if x_t.ndim == 4:
            self._follow()
            return self._pictures(x_t, t, encoder_hidden_states=context, return_dict=False)[0]
        frames = x_t.shape[2]
        each = context.repeat_interleave(frames, dim=0)
        if not self._by_frame:
            return self.unet(x_t, t, encoder_hidden_states=each, return_dict=False)[0]
        times = t.repeat_interleave(frames) if t.ndim else t
        return by_frame(lambda x: self._run_denoiser(x, times, each), x_t)

    def _follow(self) -> None:
        """Makes the image path use the same wrapped layers and gradient checkpointing as the whole network."""
        shares(self.unet, self._pictures, _ENDS)
        for picture, clip in zip(_blocks(self._pictures), _blocks(self.unet), strict=True):
            picture.gradient_checkpointing = clip.gradient_checkpointing
            if clip.gradient_checkpointing:
                picture._gradient_checkpointing_func = clip._gradient_checkpointing_func


def _without_motion(unet: Any) -> Any:
    """Builds a `UNet2DConditionModel` that shares all layers of a `UNetMotionModel` except its motion modules."""
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    config = unet.config
    with torch.device("meta"):
        pictures = UNet2DConditionModel(
            sample_size=config.sample_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            down_block_types=tuple(kind.replace("Motion", "2D") for kind in config.down_block_types),  # pyright: ignore
            up_block_types=tuple(kind.replace("Motion", "2D") for kind in config.up_block_types),  # pyright: ignore
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            downsample_padding=config.downsample_padding,
            mid_block_scale_factor=config.mid_block_scale_factor,
            act_fn=config.act_fn,
            norm_num_groups=config.norm_num_groups,
            norm_eps=config.norm_eps,
            cross_attention_dim=config.cross_attention_dim,
            transformer_layers_per_block=config.transformer_layers_per_block,
            attention_head_dim=config.num_attention_heads,  # diffusers' name for the number of heads
            use_linear_projection=config.use_linear_projection,
        )
    shares(unet, pictures, _ENDS)
    for picture, clip in zip(_blocks(pictures), _blocks(unet), strict=True):
        shares(clip, picture, _BLOCK)
    left = [name for name, parameter in pictures.named_parameters() if parameter.is_meta]
    if left:
        raise ValueError(f"animatediff: the U-Net has no {left[0]}, which its image layers need")
    return pictures.eval()


def _blocks(unet: Any) -> list[Any]:
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


def with_motion(pipe: Any, adapter: Any) -> Any:
    """Builds an `AnimateDiffPipeline` from a `StableDiffusionPipeline` and a `MotionAdapter`.

    Raises ValueError if the motion module was made for a different U-Net.
    """
    from diffusers import AnimateDiffPipeline, UNetMotionModel  # pyright: ignore[reportPrivateImportUsage]

    try:
        with quiet():  # diffusers warns about the precision, which is simply the given U-Net's
            unet: Any = UNetMotionModel.from_unet2d(pipe.unet, adapter)
    except (ValueError, RuntimeError) as error:
        if of_the_machine(error):
            raise
        raise ValueError(f"the motion module does not fit the U-Net: {str(error).splitlines()[0]}") from None
    return AnimateDiffPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, unet, adapter, pipe.scheduler)
