"""The one owner of attention: who changes it, who watches it, and how it is computed. Nothing else sets a processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from shared.backbones.attention_edits import At, Edit, Record, Rows, Site, Watch, Where
from shared.backbones.attention_processors import FluxProcessor, Plan, Processor, UNetProcessor


@dataclass
class PredictionRows:
    """Which prediction is under way, and whose rows it holds; remembered for forward passes that are recomputed."""

    number: int | None = None
    time: Tensor | None = None  # [B], of the prediction under way, or of the one that is recomputed
    _count: int = 0
    _rows: Rows | None = None
    _seen: dict[tuple[str, int], set[Rows]] = field(default_factory=dict)

    @contextmanager
    def under_way(self, batch: int, t: Tensor | None = None) -> Iterator[None]:
        """Inside, a new prediction of `batch` rows is made at the times t [B]: plain rows, or those that `holding` said."""
        before, rows = (self.number, self._rows, self.time), self._rows
        if rows is None or len(rows.index) != batch:
            rows = Rows.plain(batch)
        self._count += 1
        self.number, self._rows, self.time = self._count, rows, t
        try:
            yield
        finally:
            self.number, self._rows, self.time = before

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


class Attending:
    """The half of a backbone that owns its attention layers."""

    family: str
    _predictions: PredictionRows

    @property
    def denoiser(self) -> nn.Module:
        raise NotImplementedError

    def sites(self) -> tuple[Site, ...]:
        raise NotImplementedError

    @property
    def prediction_time(self) -> Tensor | None:
        """[B], the times of the prediction under way; None outside of one."""
        return self._predictions.time

    def recomputing(self) -> AbstractContextManager[None]:
        """A context for later, in which layers run again as of the prediction that is under way now."""
        return self._predictions.at_time(self._predictions.time)

    @contextmanager
    def attending(self, *edits: Edit | At | Watch) -> Iterator[Record]:
        """Inside, attention layers compute with these edits, in their order, and keep the maps that are watched.

        A plain edit acts at every site, `At(edit, where)` at some; layers that nobody edits or watches keep their own fast
        processor. Blocks nest: inner edits come after outer ones, and outer records go on. Processors come back as the
        same objects, also after exceptions. With gradient checkpointing, stay inside until the backward pass is over:
        it runs the layers again.

        A layer that carries a processor other than diffusers' default, somebody's own, is never replaced: an edit or
        record for it is refused.

        Raises:
            ValueError: when an edit or watch matches no site, or a site of it carries a processor of somebody's own
        """
        record = Record({s.name: s for s in self.sites() if any(isinstance(e, Watch) and s in e for e in edits)})
        plans = self._plans(edits, record)
        changed: list[tuple[Any, Any]] = []
        try:
            for layer, processor in plans:
                changed.append((layer, layer.processor))
                layer.processor = processor
            yield record
        finally:
            for layer, processor in changed:
                layer.processor = processor
            left = (_plan(self.denoiser.get_submodule(s.name)) for s in self.sites())
            if not any(plan is not None and plan.edits for plan in left):
                self._predictions.forget()

    def _plans(self, edits: tuple[Edit | At | Watch, ...], record: Record) -> list[tuple[Any, Any]]:
        """The layers to change, each with its new processor."""
        for edit in edits:
            where = edit.where if isinstance(edit, At) else edit
            if isinstance(where, Where) and not any(s in where for s in self.sites()):
                choices = ", ".join(sorted({f"{s.kind} at scale {s.scale}" for s in self.sites()}))
                raise ValueError(f"{self.family}: no attention layer is of {where}. There are: {choices}.")
        out = []
        for site in self.sites():
            layer: Any = self.denoiser.get_submodule(site.name)
            chosen = [e.edit if isinstance(e, At) else e for e in edits if not isinstance(e, Watch) and _acts(e, site)]
            records = [(e, record) for e in edits if isinstance(e, Watch) and site in e]
            if not (chosen or records):
                continue
            kind = _processor_for(layer)
            if kind is not None:
                plan = _plan(layer) or Plan(site, self._predictions)
                joined = ((*plan.edits, *chosen), (*plan.records, *records))
                out.append((layer, kind(Plan(site, self._predictions, *joined))))
            else:
                raise ValueError(
                    f"{self.family}: {site.name} computes with {type(layer.processor).__name__}, which is not diffusers' "
                    f"default: it cannot be edited or watched"
                )
        return out


def _acts(edit: Edit | At, site: Site) -> bool:
    return site in edit.where if isinstance(edit, At) else True


def _plan(layer: Any) -> Plan | None:
    """What is already planned for a layer by an outer block."""
    return layer.processor.plan if isinstance(layer.processor, Processor) else None


def _processor_for(layer: Any) -> type[Processor] | None:
    """The processor of ours that computes what this layer's does; None for a layer with one of somebody's own."""
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    now = layer.processor
    if isinstance(now, Processor):
        return type(now)
    if type(now) is AttnProcessor2_0:
        return UNetProcessor
    plain = type(now) is FluxAttnProcessor and now._attention_backend is None and not layer.fused_projections
    return FluxProcessor if plain else None
