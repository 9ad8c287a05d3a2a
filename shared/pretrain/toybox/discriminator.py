"""The network that distinguishes decoded pictures from rendered pictures, patch by patch (arXiv 1611.07004)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Discriminator(nn.Module):
    """Maps pictures [B, 3, H, W] to one logit per patch, [B, 1, H / 4, W / 4]. Also returns each layer's features.

    In addition to the picture, the first layer sees the detail that blurring would remove. Without this input, training
    takes many times as many steps.
    """

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        a, b, c = widths
        plan = [(6, a, 3, 1), (a, b, 4, 2), (b, c, 4, 2), (c, c, 3, 1)]
        layers = [nn.Conv2d(i, o, k, stride, 1) for i, o, k, stride in plan]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList([nn.Identity(), *(nn.GroupNorm(8, o) for _, o, _, _ in plan[1:])])
        self.last = nn.Conv2d(c, 1, 3, padding=1)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, 0.2)
        nn.init.normal_(self.last.weight, std=1e-2)

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x, features = torch.cat([pictures, 4 * (pictures - blurred)], 1), []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
            features.append(x)
        return self.last(x), features


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the hinge loss (arXiv 1705.02894), a scalar. The loss is 0 if all logits are above 1 for rendered
    pictures and below -1 for decoded pictures."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def feature_distance(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """Returns the mean absolute difference between the features, averaged over layers (arXiv 1711.11585, eq. 2)."""
    return torch.stack([(a - b).float().abs().mean() for a, b in zip(fake, real, strict=True)]).mean()
