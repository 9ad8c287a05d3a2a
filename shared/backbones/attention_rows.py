"""Maps a layer's tensors to rows of the caller's batch, even in guided predictions and recomputed forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shared.backbones.attention_sites import Site


@dataclass(frozen=True)
class Rows:
    """The rows of the caller's batch to which a layer's tensors belong.

    Along the batch axis, a layer's tensors have `len(index) * repeat` entries, with `repeat` consecutive entries per
    row. In a picture model, `repeat` is 1. In a clip model, it can be the number of frames or of positions.
    """

    index: tuple[int, ...]  # rows of the caller's batch; with classifier-free guidance, each appears twice
    negative: tuple[bool, ...]  # whether each row has the negative prompt
    repeat: int = 1

    @staticmethod
    def plain(batch: int) -> Rows:
        """Returns every row of a batch once, without the negative prompt."""
        return Rows(tuple(range(batch)), (False,) * batch)

    @staticmethod
    def guided(batch: int) -> Rows:
        """Returns every row of a batch twice, in the order of `predict_guided`. The rows with the negative prompt come
        first."""
        return Rows(tuple(range(batch)) * 2, (True,) * batch + (False,) * batch)

    def indices(self, device: torch.device) -> Tensor:
        """Returns, as int64, the index of the caller's row for each entry of the layer's batch."""
        return torch.tensor(self.index, device=device).repeat_interleave(self.repeat)

    def negatives(self, device: torch.device) -> Tensor:
        """Returns, as bool, whether each entry of the layer's batch has the negative prompt."""
        return torch.tensor(self.negative, device=device).repeat_interleave(self.repeat)


@dataclass
class PredictionRows:
    """The current prediction and its batch rows, which are remembered for recomputed forward passes."""

    number: int | None = None  # the current prediction's number; None outside a prediction and during a recomputation
    time: Tensor | None = None  # the times [B] of the current prediction or of the one being recomputed
    _count: int = 0
    _recomputes: bool = False  # whether the current prediction can be recomputed, because it has a gradient
    _rows: Rows | None = None
    _seen: dict[tuple[str, int], set[Rows]] = field(default_factory=dict)

    @contextmanager
    def under_way(self, batch: int, t: Tensor | None = None) -> Iterator[None]:
        """Inside the context, a new prediction of `batch` rows runs at times t [B]. Its rows are those set by `holding`
        if there are exactly this many of them, and `Rows.plain` otherwise."""
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
        """Inside the context, layers are recomputed as part of a prediction at these times."""
        before, self.time = self.time, t
        try:
            yield
        finally:
            self.time = before

    @contextmanager
    def holding(self, rows: Rows) -> Iterator[None]:
        """Inside the context, predictions whose batch has as many rows as `rows` use these rows."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def rows(self, site: Site, entries: int) -> Rows:
        """Returns the rows for a layer with this many batch entries, in the current prediction or in the one being
        recomputed.

        Raises:
            ValueError: when the layer is being recomputed and two predictions of this size had different rows
        """
        key = (site.name, entries)
        if self.number is not None and self._rows is not None:
            assert entries % len(self._rows.index) == 0, f"{site.name}: {entries} entries do not match {self._rows}"
            rows = replace(self._rows, repeat=entries // len(self._rows.index))
            if self._recomputes:
                self._seen.setdefault(key, set()).add(rows)
            return rows
        seen = self._seen.get(key) or {Rows.plain(entries)}
        if len(seen) > 1:
            raise ValueError(
                f"{site.name} is recomputed for its gradient, but predictions with and without guidance both had "
                f"{entries} rows, so edits cannot tell which of them is being recomputed. Run them in separate "
                "`attending` blocks."
            )
        return next(iter(seen))

    def forget(self) -> None:
        """Clears the rows that were remembered for recomputed passes."""
        self._seen.clear()
