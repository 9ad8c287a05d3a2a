"""Computes a clip's forward and backward optical flow, on which point tracks and the dynamic degree are based.

The method is DIS (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", arXiv 1603.03590). VBench uses RAFT,
which needs pretrained weights. This module uses VBench's thresholds, but its values differ slightly from VBench's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.masks.track import flow_between, grey_levels


@dataclass(frozen=True)
class FlowFields:
    """Flow between consecutive frames, on a grid at least 256 cells wide and high (small clips are enlarged first).

    Values are in cells of that grid: x to the right, y down. A clip of one frame has no flow (F-1 = 0).
    """

    forward: Tensor  # float32 [F-1, h, w, 2]: from each frame to the next
    backward: Tensor  # float32 [F-1, h, w, 2]: from the next frame back
    changes: Tensor  # float32 [F-1, h, w] in [0, 1]: absolute change in each cell's brightness between frames
    size: tuple[int, int]  # height and width of the clip in pixels

    @property
    def cells_per_pixel(self) -> float:
        return self.forward.shape[1] / self.size[0]

    @cached_property
    def magnitudes(self) -> Tensor:
        """The lengths of the forward flow vectors, `[F-1, h, w]`, as fractions of the frame's shorter side. A length is
        set to 0 where the backward flow does not confirm the vector, because flicker also produces vectors, which are
        long in areas without detail."""
        height, width = self.forward.shape[1:3]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        here = torch.stack([columns, rows], -1).reshape(-1, 2).double()
        lengths = self.forward.norm(dim=-1) / min(height, width)
        for i, (forward, backward) in enumerate(zip(self.forward, self.backward, strict=True)):
            lengths[i] *= confirmed(forward.reshape(-1, 2).double(), backward, here).view(height, width)
        return lengths


def flow_fields(clip: Tensor) -> FlowFields:
    """Computes the flow of a clip `[3, F, H, W]` in [-1, 1].

    Raises ValueError for any other shape and for non-finite values.
    """
    check_clip(clip)
    grey = grey_levels(clip.detach().float().cpu())
    height, width = grey.shape[1:]
    none = np.zeros((0, height, width, 2), np.float32)
    ahead = [_between(a, b) for a, b in pairwise(grey)]
    back = [_between(b, a) for a, b in pairwise(grey)]
    forward, backward = (torch.from_numpy(np.stack(each) if each else none) for each in (ahead, back))
    changes = torch.from_numpy(grey.astype(np.float32)).diff(dim=0).abs() / 255
    return FlowFields(forward, backward, changes, (clip.shape[2], clip.shape[3]))


def _between(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    if np.array_equal(before, after):  # nothing has moved, but the estimate would not be exactly 0 everywhere
        return np.zeros((*before.shape, 2), np.float32)
    return flow_between("dis", before, after)


def confirmed(ahead: Tensor, backward: Tensor, at: Tensor) -> Tensor:
    """Returns, as bool `[N]`, whether the backward flow leads back to each starting point.

    The condition is |f + b|² < 0.01 (|f|² + |b|²) + 0.5, in cells (Sundaram, Brox and Keutzer, "Dense point
    trajectories by GPU-accelerated large displacement optical flow", ECCV 2010, eq. 5).

    Args:
        ahead: the forward flow f at the points `at`, `[N, 2]`
        backward: the backward flow `[h, w, 2]`, whose value at the points `at + ahead` is b
        at: the points (x, y) in cells, `[N, 2]`
    """
    back = sampled(backward, at + ahead)
    return (ahead + back).square().sum(1) < 0.01 * (ahead.square().sum(1) + back.square().sum(1)) + 0.5


def sampled(field: Tensor, at: Tensor) -> Tensor:
    """Samples `field` (`[h, w, 2]`) bilinearly at the points `at` (`[N, 2]`: x, y in cells). Returns float64 `[N, 2]`."""
    height, width = field.shape[:2]
    scale = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)], dtype=torch.float64)
    where = (at * scale - 1)[None, None]
    planes = field.permute(2, 0, 1)[None].double()
    return F.grid_sample(planes, where, mode="bilinear", padding_mode="border", align_corners=True)[0, :, 0].T


def check_clip(clip: Tensor) -> None:
    """Raises ValueError unless `clip` has shape `[3, F, H, W]` and only finite values."""
    if clip.ndim != 4 or clip.shape[0] != 3 or 0 in clip.shape:
        raise ValueError(f"a clip must have shape [3, F, H, W], not {list(clip.shape)}")
    if not bool(torch.isfinite(clip).all()):
        raise ValueError(
            "a clip has values that are not finite (NaN or infinity): the model that generated it diverged"
        )
