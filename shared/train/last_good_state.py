"""Keeps the state from before the last update, so that a non-finite loss costs one step rather than the whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shared.train.optim import Optimizers

MOST = 2**26  # maximum number of trained values; above it, no copy is kept, and only checkpoints can be restored
_WILD = 1000.0  # a loss above this multiple of the lowest loss does not count as good


class LastGood:
    """A copy of the parameters that produced the last good loss, with their moments, made before the next update.

    A non-finite loss comes from the current parameters, so training cannot continue from them.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self.optimizers = optimizers
        self.step: int | None = None  # steps done in the kept state; None if nothing is kept
        self.small = self._is_small()
        self._lowest = math.inf
        self._kept: list[tuple[Tensor, dict[str, Any]]] = []
        self._progress: dict[str, Any] = {}

    @torch.no_grad()
    def keep(self, step: int, loss: float) -> None:
        """Keeps the current state, unless it is too large or the loss is far above the lowest loss so far.

        Call this before an update, with the number of steps done and the loss of the current parameters.
        """
        if not self.small or (self._lowest > 0 and loss > _WILD * self._lowest):
            return
        self._lowest = min(self._lowest, loss)
        self.step = step
        now = list(self.optimizers.states())
        if not self._refilled(now):
            self._kept = [(p.detach().clone(), {k: _copied(v) for k, v in state.items()}) for p, state in now]
        self._progress = self.optimizers.progress()

    def _refilled(self, now: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> bool:
        """Copies the current state into the tensors already kept, which is cheaper than allocating new ones.

        Returns False, without copying anything, if the current parameters do not match the kept ones.
        """
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        others: list[tuple[dict[str, Any], str, Any]] = []
        if len(now) != len(self._kept):
            return False
        for (parameter, state), (values, moments) in zip(now, self._kept, strict=True):
            if state.keys() != moments.keys():
                return False
            for key, new, old in (("", parameter, values), *((k, v, moments[k]) for k, v in state.items())):
                if _alike(new, old):
                    sources.append(new.detach())
                    targets.append(old)
                else:
                    others.append((moments, key, new))
        if any(not key for _, key, _ in others):  # a parameter whose shape, dtype or device has changed
            return False
        torch._foreach_copy_(targets, sources)
        for moments, key, new in others:
            moments[key] = _copied(new)
        return True

    def forget(self) -> None:
        """Drops the kept state. Must be called when the set of trained parameters changes."""
        self.step, self._kept, self._progress = None, [], {}
        self.small = self._is_small()

    def _is_small(self) -> bool:
        return sum(p.numel() for p in self.optimizers.parameters()) <= MOST

    @torch.no_grad()
    def put_back(self) -> int | None:
        """Restores the kept parameters and moments.

        Returns the number of steps done in the restored state, or None if no good state is kept.
        """
        if self.step is None or not all(bool(values.isfinite().all()) for values, _ in self._kept):
            return None
        for (parameter, state), (values, moments) in zip(self.optimizers.states(), self._kept, strict=True):
            parameter.copy_(values)
            state.clear()
            state.update({k: _copied(v) for k, v in moments.items()})
        self.optimizers.load_progress(self._progress)
        self.optimizers.zero_grad()
        return self.step


def _alike(new: Any, old: Any) -> bool:
    """Whether `new` can be copied into `old`."""
    both = isinstance(new, Tensor) and isinstance(old, Tensor)
    return both and new.shape == old.shape and new.dtype == old.dtype and new.device == old.device


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [_copied(v) for v in value] if isinstance(value, list) else value
