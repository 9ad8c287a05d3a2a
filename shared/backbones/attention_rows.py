"""Which rows of a caller's batch a layer's tensors belong to, also under guidance and when a pass is recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shared.backbones.attention_sites import Site


@dataclass(frozen=True)
class Rows:
    """Which rows of a caller's batch a layer's tensors belong to.

    Along the batch, a layer's tensors hold `len(index) * repeat` entries: each row `repeat` times in a row (once in a
    picture model; once for each frame or place in a model of clips).
    """

    index: tuple[int, ...]  # row of the batch that was asked for; under classifier-free guidance each comes twice
    negative: tuple[bool, ...]  # whether it is told the negative prompt
    repeat: int = 1

    @staticmethod
    def plain(batch: int) -> Rows:
        """Each row once, none of them negative."""
        return Rows(tuple(range(batch)), (False,) * batch)

    @staticmethod
    def guided(batch: int) -> Rows:
        """The negative half first, as `predict_guided` asks for them."""
        return Rows(tuple(range(batch)) * 2, (True,) * batch + (False,) * batch)

    def indices(self, device: torch.device) -> Tensor:
        """int64, one for each entry of the layer's batch."""
        return torch.tensor(self.index, device=device).repeat_interleave(self.repeat)

    def negatives(self, device: torch.device) -> Tensor:
        """bool, one for each entry of the layer's batch."""
        return torch.tensor(self.negative, device=device).repeat_interleave(self.repeat)


@dataclass
class PredictionRows:
    """Which prediction is under way, and whose rows it holds; remembered for forward passes that are recomputed."""

    number: int | None = None
    time: Tensor | None = None  # [B], of the prediction under way, or of the one that is recomputed
    _count: int = 0
    _recomputes: bool = False  # whether the prediction under way can be: it has a gradient
    _rows: Rows | None = None
    _seen: dict[tuple[str, int], set[Rows]] = field(default_factory=dict)

    @contextmanager
    def under_way(self, batch: int, t: Tensor | None = None) -> Iterator[None]:
        """Inside, a new prediction of `batch` rows is made at the times t [B]: plain rows, or those that `holding` said."""
        before, rows = (self.number, self._rows, self.time, self._recomputes), self._rows
        if rows is None or len(rows.index) != batch:
            rows = Rows.plain(batch)
        self._count += 1
        self.number, self._rows, self.time, self._recomputes = self._count, rows, t, torch.is_grad_enabled()
        try:
            yield
        finally:
            self.number, self._rows, self.time, self._recomputes = before

    @contextmanager
    def at_time(self, t: Tensor | None) -> Iterator[None]:
        """Inside, what is recomputed belongs to a prediction at these times."""
        before, self.time = self.time, t
        try:
            yield
        finally:
            self.time = before

    @contextmanager
    def holding(self, rows: Rows) -> Iterator[None]:
        """Inside, a prediction of this many rows is one of these rows."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def rows(self, site: Site, entries: int) -> Rows:
        """The rows behind `entries` along a layer's batch: of the prediction under way, or of the one that is recomputed.

        Raises:
            ValueError: in a recomputed pass, where two predictions of this size differed in their rows
        """
        key = (site.name, entries)
        if self.number is not None and self._rows is not None:
            assert entries % len(self._rows.index) == 0, f"{site.name}: {entries} are no multiple of {self._rows}"
            rows = replace(self._rows, repeat=entries // len(self._rows.index))
            if self._recomputes:
                self._seen.setdefault(key, set()).add(rows)
            return rows
        seen = self._seen.get(key) or {Rows.plain(entries)}
        if len(seen) > 1:
            raise ValueError(
                f"{site.name} is recomputed for its gradient, and predictions with and without guidance had "
                f"{entries} rows: edits cannot tell which it was. Predict them under `attending` blocks of their own."
            )
        return next(iter(seen))

    def forget(self) -> None:
        """What was remembered goes."""
        self._seen.clear()
