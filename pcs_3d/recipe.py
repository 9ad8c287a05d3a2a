"""The recipe for an asset. It determines how renders are guided, which field is optimized, and how the field is
rendered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import model_validator

from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.export.settings import ExportSettings
from pcs_3d.fields import FieldSettings, Voxels
from pcs_3d.renderers import RendererSettings, Volume

_FIELDS = {part.model_fields["kind"].default: part for part in get_args(get_args(FieldSettings)[0])}


class Recipe3D(DistillRecipe):
    """The resolved, typed description of how an asset is made. By default, `renderer.kind` is the kind of renderer that
    the field needs."""

    field: FieldSettings = Voxels()
    renderer: RendererSettings = Volume()
    export: ExportSettings | None = ExportSettings()  # if null, renders and a turntable are written, but no mesh

    @model_validator(mode="before")
    @classmethod
    def _drawn_by_its_own(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        field, renderer = data.get("field", {}), data.get("renderer", {})
        kind = field.get("kind", "voxels") if isinstance(field, Mapping) else getattr(field, "kind", None)
        if kind in _FIELDS and isinstance(renderer, Mapping) and "kind" not in renderer:
            return {**data, "renderer": {"kind": _FIELDS[kind].drawn_by, **renderer}}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Recipe3D:
        if self.renderer.kind != self.field.drawn_by:
            raise ValueError(
                f"renderer.kind = {self.renderer.kind} does not match the field: a field of kind {self.field.kind} "
                f"needs renderer.kind={self.field.drawn_by}"
            )
        if self.guidance.space == "latents" and self.export is not None:
            raise ValueError("guidance.space = latents gives the field no colours to write to files: set export=null")
        return self
