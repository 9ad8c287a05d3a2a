"""The times of a step, which determine the noise levels at which guidance is computed."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from pcs_3d.schedules import Moment, Schedule
from shared.config import Part, Positive


class Times(Part):
    """Times t in [0, 1000). `low` and `high` are shares of that range.

    Without `anneal`, times are drawn uniformly between `low` and `high`. With `anneal`, they are deterministic and fall
    from high to low as high - (high - low) (step / steps)^anneal. `anneal` is 1 in DreamGaussian
    (https://arxiv.org/abs/2309.16653) and 0.5 in HiFA (https://arxiv.org/abs/2305.18766, section 3.3).
    """

    low: Schedule = 0.02
    high: Schedule = 0.98
    anneal: Positive | None = None
    same: bool = False  # whether all views of a step use the same time

    def draw(self, count: int, moment: Moment, generator: Generator, discrete: bool) -> Tensor:
        """Draws `count` times, which are integers if `discrete` is set. Raises ValueError unless 0 ≤ low ≤ high ≤ 1 at
        this step."""
        low, high = moment.of(self.low), moment.of(self.high)
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance.times: low = {low:g} and high = {high:g} at step {moment.step + 1}, but 0 ≤ low ≤ high ≤ 1 "
                "is required"
            )
        if self.anneal is None:
            u = torch.rand(1 if self.same else count, generator=generator)
        else:
            u = torch.full((1,), 1 - moment.share**self.anneal)
        return whole(1000 * (low + (high - low) * u).expand(count), discrete)


def whole(t: Tensor, discrete: bool) -> Tensor:
    """Restricts times to those that a model accepts. If `discrete` is set, these are the integers from 0 to 999.
    Otherwise, they lie strictly between no noise and full noise."""
    return t.floor().clamp(0, 999).long() if discrete else t.clamp(1e-3, 999.999)
