"""Tracks the mask of a clip's first frame through the clip."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from shared.config import Part

_SIDE = 256  # pixels; frames whose shorter side is below this are enlarged before flow is estimated


class Track(Part):
    """Tracks the mask of a clip's first frame with optical flow. Clips with a mask for every frame keep those masks.

    `flow` is "dis" (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", arXiv 1603.03590) or "farneback"
    (Farnebäck, "Two-Frame Motion Estimation Based on Polynomial Expansion", 2003). Parts of the subject that are hidden in the
    first frame and appear later are not found. Provide a mask for every frame if there are such parts, or if the subject moves
    by more than about a tenth of the picture between frames.
    """

    flow: Literal["dis", "farneback"] = "dis"
    # mask values above the threshold become 1, all others 0; null keeps soft edges
    threshold: float | None = Field(default=0.5, gt=0, lt=1)

    def __call__(self, frames: Tensor, masks: Tensor) -> Tensor:
        """Returns masks [1, F, H, W] for the frames [3, F, H, W].

        Args:
            masks: [1, F, H, W], which are returned unchanged, or [1, 1, H, W] for the first frame
        """
        return self.follow(frames, masks[:, 0]) if masks.shape[1] == 1 < frames.shape[1] else masks

    def follow(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Follows the first frame's mask [1, H, W] through frames [3, F, H, W] in [-1, 1], and returns masks [1, F, H, W].

        Every mask is sampled directly from the first one through the accumulated flow, so that masks do not get blurrier from
        frame to frame. Only flow well inside the mask is used, and it is extrapolated across the mask's edge, because flow at
        edges mixes subject and background. Raises ValueError if frames and mask differ in size.
        """
        if frames.ndim != 4 or frames.shape[0] != 3 or mask.shape != (1, *frames.shape[2:]):
            raise ValueError(
                f"a mask of shape {list(mask.shape)} cannot be tracked in frames of shape {list(frames.shape)}"
            )
        grey = grey_levels(frames)
        height, width = grey.shape[1:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        here = torch.stack([columns, rows]).float()[None]  # (x, y) of each pixel, [1, 2, H, W]
        first = F.interpolate(mask[None].float(), (height, width), mode="bilinear", align_corners=False)
        origin, out, now = here, [mask.float()], first
        for before, after in pairwise(grey):
            forward = _of_the_thing(flow_between(self.flow, before, after), now[0, 0].numpy() > 0.5)
            origin = _sampled(origin, here + _inverse(forward, here))
            now = _sampled(first, origin)
            out.append(F.interpolate(now, mask.shape[1:], mode="area")[0])
        masks = torch.stack(out, 1)
        return (
            masks if self.threshold is None else torch.cat([masks[:, :1], (masks[:, 1:] > self.threshold).float()], 1)
        )


def grey_levels(frames: Tensor) -> np.ndarray:
    """Converts frames to grey levels, uint8 [F, h, w]. Small clips are enlarged, because the patches
    that are matched to estimate flow are too large for frames of, say, 64 by 64 pixels."""
    factor = max(1, -(-_SIDE // min(frames.shape[2:])))
    luma = (frames * torch.tensor([0.299, 0.587, 0.114])[:, None, None, None]).sum(0)
    if factor > 1:
        luma = F.interpolate(luma[:, None], scale_factor=factor, mode="bicubic", align_corners=False)[:, 0]
    return luma.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).numpy()


def flow_between(kind: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Estimates how far each pixel of `before` moves (x and y in pixels). Returns [h, w, 2]."""
    import cv2

    if kind == "dis":
        return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(before, after, None)  # type: ignore[arg-type]
    return cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 5, 25, 5, 7, 1.5, 0)  # type: ignore[call-overload]


def _of_the_thing(flow: np.ndarray, mask: np.ndarray) -> Tensor:
    """Smoothly extrapolates the flow ([h, w, 2]) inside the mask ([h, w]) to the whole frame ([1, 2, h, w]). Returns 0 if the
    mask is empty."""
    import cv2

    reach = max(mask.shape) // 40
    inner = cv2.erode(mask.astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8), borderValue=1)
    inside = (inner if inner.any() else mask).astype(np.float32)[..., None]
    mean = (flow * inside).sum((0, 1)) / max(float(inside.sum()), 1.0)
    weighted = np.concatenate([(flow - mean) * inside, inside], -1)
    smooth = cv2.GaussianBlur(weighted, (0, 0), 1.5 * reach)
    continued = mean + smooth[..., :2] / (smooth[..., 2:] + 1e-3)
    return torch.from_numpy(np.where(inside > 0, flow, continued).astype(np.float32)).permute(2, 0, 1)[None]


def _inverse(forward: Tensor, here: Tensor) -> Tensor:
    """Returns the offset u(x) from each pixel of the later frame to its position in the earlier frame, by iterating
    u(x) = -forward(x + u(x))."""
    back = -forward
    for _ in range(5):
        back = -_sampled(forward, here + back)
    return back


def _sampled(planes: Tensor, at: Tensor) -> Tensor:
    """Samples `planes` ([1, C, h, w]) bilinearly at the positions `at` ([1, 2, h, w], x and y in pixels). Edge values are
    replicated outside the planes."""
    height, width = planes.shape[2:]
    scale = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])
    grid = at.permute(0, 2, 3, 1) * scale - 1
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=True)
