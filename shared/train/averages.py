"""Moving averages of parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Averages:
    """An exponential moving average of parameters, in fp32.

    The decay rises as (1 + step) / (10 + step) up to a cap, so early averages forget the initial values quickly.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], cap: float) -> None:
        self.parameters, self.cap = dict(parameters), cap
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the parameters at the end of `step`, which is counted from 0."""
        weight = 1.0 - min(self.cap, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.parameters.values()], weight)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: shadow.cpu().clone() for name, shadow in self.shadow.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads saved averages, whose order does not matter. Raises ValueError if their names differ from those of the
        parameters."""
        if state.keys() != self.shadow.keys():
            raise ValueError(
                f"the names of the {len(state)} saved averages do not match those of the {len(self.shadow)} "
                "parameters, so the averages belong to another run"
            )
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copies the averages into the parameters with the same names."""
        for name, parameter in parameters.items():
            parameter.copy_(self.shadow[name])
