"""Optical flow of a clip, forward and backward: what point tracks and the dynamic degree are read off.

The flow is DIS (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", arXiv 1603.03590). VBench measures with
RAFT, which needs weights; its thresholds are kept, its values are not the same to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from shared.masks.track import flow_between, grey_levels


@dataclass(frozen=True)
class FlowFields:
    """Flow between consecutive frames, on a grid at least 256 cells wide and high (small clips are enlarged first).

    Values are in cells of that grid: x to the right, y down. A clip of one frame has none (F-1 = 0).
    """

    forward: Tensor  # float32 [F-1, h, w, 2]: from a frame to the next
    backward: Tensor  # float32 [F-1, h, w, 2]: from the next one back
    size: tuple[int, int]  # height and width of the clip in pixels

    @property
    def cells_per_pixel(self) -> float:
        return self.forward.shape[1] / self.size[0]

    def magnitudes(self) -> Tensor:
        """`[F-1, h, w]`: lengths of the forward flow, as a fraction of the frame's shorter side."""
        return self.forward.norm(dim=-1) / min(self.forward.shape[1:3])


def flow_fields(clip: Tensor) -> FlowFields:
    """The flow of a clip `[3, F, H, W]` in [-1, 1]. ValueError for another shape or values that are not finite."""
    check_clip(clip)
    grey = grey_levels(clip.detach().float().cpu())
    height, width = grey.shape[1:]
    none = np.zeros((0, height, width, 2), np.float32)
    ahead = [_between(a, b) for a, b in pairwise(grey)]
    back = [_between(b, a) for a, b in pairwise(grey)]
    forward, backward = (torch.from_numpy(np.stack(each) if each else none) for each in (ahead, back))
    return FlowFields(forward, backward, (clip.shape[2], clip.shape[3]))


def _between(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    if np.array_equal(before, after):  # nothing has moved, and what is estimated of it is not exactly 0 everywhere
        return np.zeros((*before.shape, 2), np.float32)
    return flow_between("dis", before, after)


def check_clip(clip: Tensor) -> None:
    """ValueError unless it is a clip `[3, F, H, W]` of finite values."""
    if clip.ndim != 4 or clip.shape[0] != 3 or 0 in clip.shape:
        raise ValueError(f"a clip has the shape [3, F, H, W], and this one has {list(clip.shape)}")
    if not bool(torch.isfinite(clip).all()):
        raise ValueError("a clip holds values that are not finite (NaN or infinity): the model that made it diverged")
