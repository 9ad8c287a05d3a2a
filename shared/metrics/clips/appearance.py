"""Measures how closely a clip's frames match the prompt, the subject, and the clips that a motion was learned from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics.crops import crop_embeddings
from shared.metrics.encoders import CropSettings, ImageEncoder, InstrumentInfo
from shared.metrics.scores import clip_i, clip_t, cosine

GRID = 16  # cells along each side of the grid to which `PixelEncoder` reduces a picture
_FLAT = 1e-3  # makes two flat pictures count as equal; their cosine would otherwise be undefined


class PixelEncoder:
    """Encodes each frame's colours on a 16×16 grid, minus the mean, as a unit vector.

    This is the fallback if no network is given. It captures which colours are where, but not what is depicted.
    """

    info = InstrumentInfo("pixels (16×16, no network)", "likeness of frames")

    def images(self, pixels: Tensor) -> Tensor:
        """Returns the unit vectors `[N, 769]`, float32, of pictures `[N, 3, H, W]` in [-1, 1]."""
        small = F.interpolate(pixels.detach().float().cpu(), (GRID, GRID), mode="area")
        centred = (small - small.mean((2, 3), keepdim=True)).flatten(1)
        return F.normalize(torch.cat([centred, torch.full_like(centred[:, :1], _FLAT)], 1), dim=1)


def clip_t_per_frame(frames: Tensor, text: Tensor) -> Tensor:
    """Returns the cosine `[F]` of each frame (`[F, D]`) with the text (`[D]`). The mean is the clip's CLIP-T."""
    return clip_t(frames, text[None].expand(len(frames), -1))


def leakage(frames: Tensor, clips: Sequence[Tensor]) -> float:
    """Returns how much a clip looks like the clips that its motion was learned from: the highest cosine of each frame
    (`[F, D]`) with any frame of those clips (`[f, D]` each), averaged over the frames. The result is 1 if every
    frame equals a frame of those clips.

    Raises ValueError if there are no clips.
    """
    if not clips:
        raise ValueError("leakage compares a clip with the clips that its motion was learned from, but there are none")
    return float(cosine(frames, torch.cat(list(clips))).amax(1).clamp_max(1).mean())


def unrelated(clips: Sequence[Tensor]) -> list[float]:
    """Returns the `leakage` of each clip `[f, D]` from the others, which is the baseline for unrelated clips (different
    things in different places). The result is empty for fewer than two clips."""
    if len(clips) < 2:
        return []
    return [leakage(clip, [other for j, other in enumerate(clips) if j != i]) for i, clip in enumerate(clips)]


def subject_similarity(
    encoder: ImageEncoder, frames: tuple[Tensor, Tensor], references: tuple[Tensor, Tensor], how: CropSettings
) -> Tensor:
    """Returns each frame's masked likeness to the subject, `[F]`: its mean cosine with the references, all cropped to
    the thing (R-CLIP and R-DINO of MotionBooth, arXiv 2406.17758).

    Args:
        frames: pixels `[F, 3, H, W]` in [-1, 1], and the thing's position `[F, h, w]` in [0, 1] (a mask or a locator's map)
        references: pixels and positions of the references, in the same form
    """
    return clip_i(crop_embeddings(encoder, *frames, how), crop_embeddings(encoder, *references, how))


def seed_spread(embeddings: Tensor, groups: Sequence[Hashable]) -> dict[Hashable, float]:
    """Returns how much the clips of each group (one prompt, several seeds) differ: 1 minus the mean cosine of
    simultaneous frames, over all pairs of clips. Groups of one clip are left out.

    embeddings: one for each frame of N clips, `[N, F, D]`
    """
    if len(groups) != len(embeddings):
        raise ValueError(f"{len(embeddings)} clips and {len(groups)} groups")
    unit = F.normalize(embeddings.double(), dim=2)
    between = torch.einsum("afd,bfd->ab", unit, unit) / embeddings.shape[1]
    out: dict[Hashable, float] = {}
    for group in dict.fromkeys(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        if (n := len(members)) > 1:
            pairs = between[members][:, members][tuple(torch.triu_indices(n, n, 1))]
            out[group] = max(0.0, 1 - float(pairs.mean()))  # rounding can put a cosine above 1
    return out
