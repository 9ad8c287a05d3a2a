"""A field of Gaussians that are split and pruned during training (3DGS, https://arxiv.org/abs/2308.04079)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field as Setting
from torch import Tensor, nn
from torch.nn import functional as F

from pcs_3d.fields.base import BaseVolume, FieldPart
from pcs_3d.fields.field import Replaced, Sample, Splats
from pcs_3d.fields.starts import raw_colors
from shared.config import Positive, Steps
from shared.trainable.base import Rate

#: Opacities are capped here when they are turned into densities, because a density of infinity would be needed for 1.
MOST_OPAQUE = 0.995
_TRAINED = ("means", "log_scales", "rotations", "raw_opacities", "raw_features")


class Gaussians(FieldPart):
    """Gaussians that are split and pruned during training (3DGS).

    count: the initial number of Gaussians. They are spread over the surface of the start, or throughout the ball if the
    start is a blob.
    opacity: the initial opacity of each Gaussian.
    every: the number of steps between rounds of splitting and pruning. If 0, Gaussians are neither split nor pruned.
    until: the share of the run after which splitting and pruning stop.
    threshold: a Gaussian is split or copied if the mean norm of its position gradients exceeds this value.
    prune: the opacity below which Gaussians are removed.
    most: the number of Gaussians at which splitting and copying stop.
    """

    drawn_by: ClassVar[str] = "splat"
    kind: Literal["gaussians"] = "gaussians"
    count: Annotated[int, Setting(ge=8, le=2_000_000)] = 1000
    opacity: Annotated[float, Setting(gt=0, lt=1)] = 0.3
    every: Steps = 0
    until: Annotated[float, Setting(gt=0, le=1)] = 0.8
    threshold: Positive = 1e-3
    prune: Annotated[float, Setting(ge=0, lt=1)] = 0.01
    most: Annotated[int, Setting(ge=8, le=10_000_000)] = 20_000
    lr: Rate = 3e-3
    lr_features: Rate | None = 2e-2

    def build(self, channels: int = 3, seed: int = 0) -> GaussianField:
        return GaussianField(self, channels, seed)


class GaussianField(BaseVolume):
    """N trained Gaussians.

    means, log_scales: [N, 3].
    rotations: [N, 4], quaternions of any length.
    raw_opacities: [N], before the sigmoid is applied.
    raw_features: [N, K]; colours are stored before the sigmoid is applied.
    pull, pulled: [N]; the sum of the gradient norms of each position since the last split, and the number of nonzero
    norms in that sum.
    advanced: the step of the last split. It is saved so that the split is not repeated when training resumes.
    """

    means: nn.Parameter
    log_scales: nn.Parameter
    rotations: nn.Parameter
    raw_opacities: nn.Parameter
    raw_features: nn.Parameter
    pull: Tensor
    pulled: Tensor
    advanced: Tensor

    def __init__(self, part: Gaussians, channels: int, seed: int) -> None:
        super().__init__(part.bound, channels)
        self.part, self.seed = part, seed
        draw, shape, n = torch.Generator().manual_seed(seed), part.start.shape(), part.count
        means = shape.surface_points(n, draw)
        if part.start.kind == "blob":  # inside the ball, not on its surface
            means = 0.85 * means * torch.rand(n, 1, generator=draw) ** (1 / 3)
        colors = shape.colors(means) if channels == 3 else None
        features = torch.zeros(n, channels) if colors is None else raw_colors(colors)
        size = _spacing(means)
        opacity = torch.full((n,), part.opacity).logit()
        turn = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1)
        self.register_buffer("advanced", torch.zeros((), dtype=torch.long))
        self._become([means, size[:, None].expand(n, 3).log(), turn, opacity, features])

    def _become(self, values: list[Tensor]) -> None:
        for name, value in zip(_TRAINED, values, strict=True):
            setattr(self, name, nn.Parameter(value.detach().clone().contiguous()))
        n, device = len(values[0]), values[0].device
        self.register_buffer("pull", torch.zeros(n, device=device))
        self.register_buffer("pulled", torch.zeros(n, device=device))
        if self.part.every:
            self.means.register_hook(self._watch)

    def _watch(self, grad: Tensor) -> None:
        # NaN and Inf are not counted, because the training loop reverts the steps in which they occur
        length = grad.detach().norm(dim=-1).nan_to_num(0.0, 0.0, 0.0)
        self.pull += length
        self.pulled += length > 0

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        rates = dict.fromkeys(_TRAINED, self.part.lr) | {"raw_features": self.part.feature_rate}
        rates["raw_opacities"] = 10 * self.part.lr
        return [(name, [getattr(self, name)], rate) for name, rate in rates.items()]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        means = state.get("means")
        if means is not None and means.ndim == 2 and len(means) != len(self.means):  # resize first
            sized = [v.detach().new_zeros(len(means), *v.shape[1:]) for v in (getattr(self, k) for k in _TRAINED)]
            self._become(sized)
        super().load_state_dict(state)

    def splats(self) -> Splats:
        return Splats(
            self.means, self.log_scales.exp(), F.normalize(self.rotations, dim=-1),
            self.raw_opacities.sigmoid(), self.colored(self.raw_features),
        )  # fmt: skip

    def advance(self, step: int, steps: int) -> Replaced | None:
        if step == 0:  # each phase counts its steps from 0
            self.advanced.zero_()
        due = self.part.every and step and step % self.part.every == 0 and step <= self.part.until * steps
        if not due or int(self.advanced) == step:
            return None
        former = [getattr(self, name) for name in _TRAINED]
        with torch.no_grad():
            rows = self._regroup(step)
        self.advanced.fill_(step)
        return {getattr(self, name): (old, rows) for name, old in zip(_TRAINED, former, strict=True)}

    def _regroup(self, step: int) -> Tensor:
        """Splits, copies and removes Gaussians. Among the Gaussians whose positions have large gradients, large ones
        are split in two and small ones are copied. Nearly transparent Gaussians are removed. Returns the former index
        of each Gaussian (int64 `[N]`), or -1 if it is new."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        values = [getattr(self, name).detach() for name in _TRAINED]
        keep = values[3].sigmoid() >= self.part.prune
        if not keep.any():
            keep = values[3] == values[3].max()  # keep at least one
        pulled = self.pull / self.pulled.clamp_min(1)
        more = ((pulled > self.part.threshold) & keep).nonzero()[:, 0]
        more = more[pulled[more].argsort(descending=True, stable=True)][: max(0, self.part.most - int(keep.sum()))]
        large = values[1].exp().amax(-1) > 0.02 * self.bound
        split = torch.zeros_like(keep).index_fill(0, more, True) & large
        rows = torch.where(split, -1, torch.arange(len(keep), device=keep.device))
        values[1] = torch.where(split[:, None], values[1] - 0.47, values[1])  # divides scales by 1.6, as in the paper
        new = [v[more].clone() for v in values]
        offset = torch.randn(len(more), 3, generator=draw).to(new[0]) * values[1][more].exp()
        new[0] = new[0] + torch.einsum("nij,nj->ni", rotation_matrices(F.normalize(new[2], dim=-1)), offset)
        self._become([torch.cat([v[keep], n]) for v, n in zip(values, new, strict=True)])
        return torch.cat([rows[keep], torch.full_like(more, -1)])

    def density(self, points: Tensor) -> Tensor:
        return self.at(points).density

    def at(self, points: Tensor) -> Sample:
        """Sums the Gaussians at each point. Points are handled in blocks, and only the Gaussians that reach a block are
        evaluated there (DreamGaussian, https://arxiv.org/abs/2309.16653, section 3.3). This method is used for export,
        not for rendering.

        DreamGaussian sums opacities, which do not say how dense a Gaussian is: the same opacity can belong to a thin and
        to a thick one. Here, a Gaussian has the density, per radius, with which a ray through its centre is blocked as
        much as its opacity says. The width along the ray is the geometric mean of its scales."""
        flat, splats = points.reshape(-1, 3), self.splats()
        blocks = ((flat / self.bound + 1) * 4).long().clamp(0, 7)
        key = (blocks[:, 0] * 8 + blocks[:, 1]) * 8 + blocks[:, 2]
        order = key.argsort(stable=True)
        parts = [_local(splats, flat[mine]) for block in order.split(torch.bincount(key, minlength=512).tolist())
                 if len(block) for mine in block.split(8192)]  # fmt: skip
        density, features = (torch.cat(p)[order.argsort()] for p in zip(*parts, strict=True))
        inside = self.inside(points)
        return Sample(density.view(inside.shape) * inside, features.view(*inside.shape, -1))


def _spacing(points: Tensor) -> Tensor:
    """Returns the mean distance from each point to its three nearest neighbours (`[N]`), as in 3DGS."""
    from scipy.spatial import KDTree

    table = points.numpy()
    away, _ = KDTree(table).query(table, k=4)
    return torch.from_numpy(np.asarray(away)[:, 1:].mean(1)).float().clamp_min(1e-3)


def _local(splats: Splats, points: Tensor) -> tuple[Tensor, Tensor]:
    reach = 3 * splats.scales.detach().amax(-1, keepdim=True)
    low, high = points.amin(0), points.amax(0)
    near = ((splats.means.detach() > low - reach) & (splats.means.detach() < high + reach)).all(-1).nonzero()[:, 0]
    if not len(near):
        return points.new_zeros(len(points)), points.new_full((len(points), splats.features.shape[1]), 0.5)
    away = points[:, None] - splats.means[near]
    local = torch.einsum("nji,pnj->pni", rotation_matrices(splats.rotations[near]), away) / splats.scales[near]
    width = math.sqrt(2 * math.pi) * splats.scales[near].log().mean(-1).exp()
    peak = -torch.log1p(-splats.opacities[near].clamp_max(MOST_OPAQUE)) / width
    weights = peak * torch.exp(-0.5 * local.square().sum(-1))
    total = weights.sum(-1)
    return total, weights @ splats.features[near] / total.clamp_min(1e-8)[:, None]


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Converts unit quaternions (`[N, 4]`, w first) to rotation matrices (`[N, 3, 3]`)."""
    w, x, y, z = quaternions.unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(*quaternions.shape[:-1], 3, 3)
