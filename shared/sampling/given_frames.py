"""Keeps existing content (the first frame, the first few frames or a region) while the rest is sampled."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.config import Many, PathText, absent
from shared.io.clips.open_frames import open_frames
from shared.masks.pool import pool_masks
from shared.sampling.given_files import encoded, is_clip, masked_picture, picture_latents, read_given
from shared.sampling.hooks import DenoisingStep, SamplingHookBase
from shared.sampling.sampler import output_size
from shared.sampling.settings import SamplingSettings

_MOST = 0.5  # a latent cell is kept if at least this share of it is masked


class GivenFrames(SamplingHookBase):
    """Keeps a file's frames, or a region of these frames, in the result. Several such hooks may be combined.

    A picture becomes the first frame, and a clip becomes the first frames. With a mask, only the masked region is kept,
    and the file must be a clip at least as long as the result, or a picture if a picture is generated.

    At each step, the kept latents are replaced with the file's latents plus that step's noise. After the last step,
    they are replaced with the file's clean latents (Lugmayr et al., RePaint, arXiv 2201.09865, eq. 8, without
    resampling). If the network takes one time per frame (`time_per_frame`), frames that are kept whole are instead
    passed to it without noise, at t = 0 (HaCohen et al., LTX-Video, arXiv 2501.00103).
    """

    kind: Literal["given_frames"] = "given_frames"
    path: PathText
    mask: PathText | None = None  # white in the region to keep; one mask per frame, or one for all frames
    frames: Many | None = None  # the number of frames to keep from the start of a clip without a mask; null: all

    def check(self) -> None:
        """Raises ValueError, naming the file, for errors that can be found before a model is loaded."""
        clip = is_clip(self.path)
        if self.mask is None and clip and self.frames is not None and self.frames > open_frames(self.path).count:
            there = open_frames(self.path).count
            has = f"only {there} frame{'s' if there > 1 else ''}"
            raise ValueError(f"{self.path} has {has}, but its first {self.frames} are requested")
        if not clip and self.frames is not None:
            raise ValueError(f"{self.path} is a picture; set the number of frames only for clips")
        if self.mask is not None and not self.mask.exists():
            raise ValueError(f"{self.mask} {absent(self.mask)}")

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> KeptLatents:
        """Returns a hook with the encoded latents. Raises ValueError if frames or masks do not match the sampled size,
        or if nothing is left to generate."""
        self.check()
        *frames, height, width = output_size(backbone, settings)
        shape = backbone.latent_shape(height, width, *frames)
        if self.mask is not None:
            known, kept = self._region(backbone, frames, (height, width), shape)
        elif frames:
            known, kept = self._beginning(backbone, frames[0], (height, width), shape)
        else:
            raise ValueError(f"{self.path} would be kept whole; use a mask to choose what to keep")
        if bool(kept.all()):
            raise ValueError(f"{self.path} already fills every frame, so nothing is left to generate")
        return KeptLatents(known=known, kept=kept)

    def _beginning(
        self, backbone: Backbone, frames: int, size: tuple[int, int], shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Returns the latents to keep ([1, C, f, h, w], 0 elsewhere) and a bool mask of their positions
        ([1, 1, f, h, w])."""
        if is_clip(self.path):
            count = self.frames or open_frames(self.path).count
            if count >= frames:
                raise ValueError(
                    f"{self.path} would fill {count} frames, but only {frames} are generated in all; "
                    "generate a longer clip, or keep fewer frames"
                )
            if count > 1:
                backbone.latent_shape(*size, count)  # raises a clear error for an invalid frame count
            pixels = read_given(self.path, count, size).frames
            given = encoded(backbone, pixels) if count > 1 else encoded(backbone, pixels[:, 0])[:, :, None]
        else:
            given = picture_latents(backbone, self.path, size)[:, :, None]
        known = given.new_zeros(1, *shape)
        kept = torch.zeros(1, 1, *shape[1:], dtype=torch.bool, device=given.device)
        known[:, :, : given.shape[2]], kept[:, :, : given.shape[2]] = given, True
        return known, kept

    def _region(
        self, backbone: Backbone, frames: list[int], size: tuple[int, int], shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Returns the file's latents ([1, C, (f), h, w]) and a bool mask ([1, 1, (f), h, w]) of the region to keep."""
        assert self.mask is not None
        if not frames:
            pixels, mask = masked_picture(self.path, self.mask, size)
            return encoded(backbone, pixels), _pooled(backbone, mask[:, None], (1, *shape[1:]))[:, :, 0]
        clip = read_given(self.path, frames[0], size, self.mask)
        assert clip.masks is not None
        masks = clip.masks.expand(-1, frames[0], -1, -1)
        return encoded(backbone, clip.frames), _pooled(backbone, masks, shape[1:])


def _pooled(backbone: Backbone, masks: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Pools masks [1, F, H, W] to a bool mask [1, 1, f, h, w] of the latent cells that are kept."""
    return (pool_masks(masks[None], (grid[0], grid[1], grid[2])) >= _MOST).to(backbone.device)


class KeptLatents(SamplingHookBase):
    """Keeps the clean latents `known` ([1, C, (f), h, w]) where the bool mask `kept` ([1, 1, (f), h, w]) is True."""

    known: Tensor
    kept: Tensor

    def _whole(self, backbone: Backbone) -> Tensor:
        """Returns a bool mask [1, 1, f, 1, 1] of the frames that are kept whole. It is all False if the network does
        not take one time per frame."""
        whole = self.kept.all(-1, keepdim=True).all(-2, keepdim=True)
        return whole if backbone.time_per_frame and self.kept.ndim == 5 else torch.zeros_like(whole)

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        given = torch.where(self._whole(step.backbone), self.known / step.scale, step.noised(self.known))
        return torch.where(self.kept, given.to(latents.dtype), latents)

    def told(self, step: DenoisingStep, t: Tensor) -> Tensor:
        whole = self._whole(step.backbone)
        if not bool(whole.any()):
            return t
        each = t if t.ndim == 2 else t.expand(len(step.noise), self.kept.shape[2])
        return torch.where(whole.view(1, -1), torch.zeros_like(each), each)

    def after(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        return torch.where(self.kept, self.known.to(latents.dtype), latents) if step.last else latents
