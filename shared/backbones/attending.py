"""Applies edits to attention layers and records their maps. No other module sets an attention processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shared.backbones.attention_edits import At, Edit
from shared.backbones.attention_maps import Record, Watch
from shared.backbones.attention_processors import FluxProcessor, Plan, Processor, UNetProcessor
from shared.backbones.attention_rows import PredictionRows, Rows
from shared.backbones.attention_sites import Site, Where


class Attending:
    """The part of a backbone that manages the attention layers."""

    family: str
    _predictions: PredictionRows
    _components: dict[str, nn.Module]
    _kept_edits: dict[str, tuple[At, ...]]  # by concept
    _replaced: list[tuple[Any, Any]]  # layers with kept edits, each with its original processor

    @property
    def strengths(self) -> dict[str, float]:
        raise NotImplementedError

    @property
    def noise_ranges(self) -> Mapping[str, tuple[float, float]]:
        raise NotImplementedError

    def sites(self) -> tuple[Site, ...]:
        raise NotImplementedError

    @property
    def prediction_time(self) -> Tensor | None:
        """The times [B] of the current prediction, or None outside a prediction."""
        return self._predictions.time

    def recomputing(self) -> AbstractContextManager[None]:
        """Returns a context for layers that gradient checkpointing reruns later. Inside it, `prediction_time` is the
        time of the prediction that was current when this method was called."""
        return self._predictions.at_time(self._predictions.time)

    @contextmanager
    def attending(self, *edits: Edit | At | Watch) -> Iterator[Record]:
        """Inside the context, attention layers apply these edits in order and record the maps of the watched sites.

        A plain edit applies at every site, and `At(edit, where)` applies at the sites that match `where`. Layers that
        are neither edited nor watched keep their own fast processor. Contexts can be nested: inner edits are applied
        after outer ones, and outer watches keep recording. The original processor objects are restored, even after
        exceptions. With gradient checkpointing, leave the context only after the backward pass, because the backward
        pass runs the layers again.

        A custom processor (anything but diffusers' default) is never replaced, so a layer with one can be neither
        edited nor watched.

        Raises:
            ValueError: when an edit or watch matches no site, or one of its sites has a custom processor
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
            left = (_plan(layer) for s in self.sites() for layer in self._layers(s))
            if not any(plan is not None and plan.edits for plan in left):
                self._predictions.forget()

    def keep_attending(self, name: str, *edits: At) -> None:
        """Applies these edits from now on, whenever the concept `name` has a nonzero strength. They replace the
        concept's earlier edits. If none are given, the concept has no edits afterwards.

        An edit that several concepts share is applied only once. Must not be called inside `attending`. Raises
        ValueError under the same conditions as `attending`. In that case, nothing is changed.
        """
        before = self._kept_edits
        self._kept_edits = {**{k: v for k, v in before.items() if k != name}, **({name: edits} if edits else {})}
        try:
            self._lay_kept_edits()
        except ValueError:
            self._kept_edits = before
            self._lay_kept_edits()
            raise

    def _lay_kept_edits(self) -> None:
        for layer, processor in self._replaced:
            layer.processor = processor
        self._replaced = []
        owners: dict[At, list[str]] = {}
        for name, edits in self._kept_edits.items():
            for edit in edits:
                owners.setdefault(edit, []).append(name)
        kept = tuple(At(_WhileOn(at.edit, tuple(names), self), at.where) for at, names in owners.items())
        for layer, processor in self._plans(kept, Record({})):
            self._replaced.append((layer, layer.processor))
            layer.processor = processor

    def _layers(self, site: Site) -> list[Any]:
        """Returns the layers at a site, one per component that predicts."""
        return [self._components[name].get_submodule(site.name) for name in self.noise_ranges]

    @property
    def _is_attended(self) -> bool:
        """Whether any layer is currently edited or watched."""
        return any(_plan(layer) is not None for site in self.sites() for layer in self._layers(site))

    def _plans(self, edits: tuple[Edit | At | Watch, ...], record: Record) -> list[tuple[Any, Any]]:
        """Returns the layers to change, each with its new processor."""
        for edit in edits:
            where = edit.where if isinstance(edit, At) else edit
            if isinstance(where, Where) and not any(s in where for s in self.sites()):
                choices = ", ".join(sorted({f"{s.kind} at scale {s.scale}" for s in self.sites()}))
                raise ValueError(f"{self.family}: no attention layer matches {where}. Available: {choices}.")
        out = []
        for site in self.sites():
            chosen = [e.edit if isinstance(e, At) else e for e in edits if not isinstance(e, Watch) and _acts(e, site)]
            records = [(e, record) for e in edits if isinstance(e, Watch) and site in e]
            if not (chosen or records):
                continue
            for layer in self._layers(site):
                kind = self._processor_for(layer)
                if kind is None:
                    raise ValueError(
                        f"{self.family}: {site.name} has the processor {type(layer.processor).__name__}, which is not "
                        f"diffusers' default, so this layer cannot be edited or watched"
                    )
                plan = _plan(layer) or Plan(site, self._predictions)
                joined = ((*plan.edits, *chosen), (*plan.records, *records))
                out.append((layer, kind(Plan(site, self._predictions, *joined))))
        return out

    def _processor_for(self, layer: Any) -> type[Processor] | None:
        """Returns our processor class for this layer's computation, or None if the layer has a custom processor."""
        return type(layer.processor) if isinstance(layer.processor, Processor) else _processor_of(layer)


@dataclass(frozen=True)
class _WhileOn:
    """An edit that has no effect while all concepts that use it are off."""

    edit: Edit
    owners: tuple[str, ...]
    backbone: Attending

    def __call__(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        strengths = self.backbone.strengths
        if not any(strengths.get(name, 0.0) for name in self.owners):
            return q, k, v, bias
        return self.edit(site, q, k, v, bias, rows)


def _acts(edit: Edit | At, site: Site) -> bool:
    return site in edit.where if isinstance(edit, At) else True


def _plan(layer: Any) -> Plan | None:
    """Returns the plan that is set for a layer, or None."""
    return layer.processor.plan if isinstance(layer.processor, Processor) else None


def _processor_of(layer: Any) -> type[Processor] | None:
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    now = layer.processor
    if type(now) is AttnProcessor2_0:
        return UNetProcessor
    plain = type(now) is FluxAttnProcessor and now._attention_backend is None and not layer.fused_projections
    return FluxProcessor if plain else None
