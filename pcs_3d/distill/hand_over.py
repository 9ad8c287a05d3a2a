"""Hands one phase's field over to a later phase, whose field may be of a different kind."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.export.asset import surface_colors
from pcs_3d.export.extract import extract, simplified
from pcs_3d.fields.base import FieldPart
from pcs_3d.fields.field import Field, SplatField, Surface, VolumeField
from pcs_3d.fields.grids import by_chunks
from pcs_3d.fields.starts import Handed, PhaseStart
from pcs_3d.fields.textured_mesh import TexturedMesh
from pcs_3d.meshes.shape import BallShape, SampledShape
from pcs_3d.regions.box import Box
from shared.recipe.phases import expand_phases
from shared.recipe.schema import Recipe

FIELD = "field/"  # prefix of the names of a field's tensors in the saved state
_SAMPLES = 120_000  # number of points sampled on a surface that is handed over


def check_fields(recipe: DistillRecipe) -> None:
    """Checks that every phase's field can be built as configured.

    Raises ValueError if a field's file cannot be read, if a field is set to start from an earlier phase but no earlier
    phase makes an asset, if a box region lies outside the field, or if a field's kind or space differs from that of the
    earlier phase's field. A different kind is allowed if the field starts from the earlier phase
    (`start.kind` is phase).
    """
    earlier: DistillRecipe | None = None
    for name, phase in expand_phases(recipe):
        if isinstance(phase.task, DistillTask):
            where = f"phases.{name}.field" if recipe.phases else "field"
            _check_start(where, phase, earlier)
            phase.made.check()
            for key, region in phase.guidance.regions.items():
                if isinstance(region, Box) and region.is_outside(phase.made.bound):
                    raise ValueError(
                        f"guidance.regions.{key}: the box lies outside the field, which extends from -{phase.made.bound:g} to "
                        f"{phase.made.bound:g} on each axis (coordinates are in object radii)"
                    )
            earlier = phase


def _check_start(where: str, phase: DistillRecipe, earlier: DistillRecipe | None) -> None:
    mine: FieldPart = phase.made
    if earlier is None:
        if isinstance(mine.start, PhaseStart):
            raise ValueError(
                f"{where}.start.kind = phase, but no earlier phase makes an asset: set it to blob or file instead"
            )
        return
    before: FieldPart = earlier.field
    if earlier.guidance.space != phase.guidance.space:
        raise ValueError(
            f"{where} shows {phase.guidance.space}, but the earlier phase's field shows {earlier.guidance.space}: set "
            "the same guidance.space in both phases"
        )
    if before.kind != mine.kind and not isinstance(mine.start, PhaseStart):
        raise ValueError(
            f"{where}.kind = {mine.kind}: the earlier phase's field is of kind {before.kind}; to start from its result, "
            f"set {where}.start.kind=phase"
        )


def first_field(
    recipe: DistillRecipe,
    channels: int,
    earlier: Iterable[Recipe],
    carried: Mapping[str, Tensor],
    resumed: bool = False,
) -> Field:
    """Returns the field that a phase begins with, on the CPU.

    If no earlier phase made a field, the field is built from its settings. If its `start.kind` is phase and its
    settings differ from the earlier field's in more than just the learning rates, it is rebuilt from the earlier
    field's shape and colours. Otherwise, the earlier field continues unchanged.

    Args:
        earlier: the recipes of the earlier phases
        carried: the state that those phases left (`field/...`)
        resumed: whether the state will be loaded from a checkpoint

    Raises:
        ValueError: the field is set to start from an earlier phase, but no earlier phase made a field; or the earlier
            field is empty or does not match
    """
    part, state = recipe.made, under(carried, FIELD)
    if resumed:
        return blank(part, channels, recipe.seed)
    made = [r for r in earlier if isinstance(r, DistillRecipe) and isinstance(r.task, DistillTask)]
    if not state or not made:
        return part.build(channels, recipe.seed)
    before = made[-1]
    if isinstance(part.start, PhaseStart) and _settings(part) != _settings(before.made):
        found = restored(before.made, channels, before.seed, state)
        start = handed(found, part.start, recipe.seed)
        return part.model_copy(update={"start": start}).build(channels, recipe.seed)
    return restored(part, channels, recipe.seed, state)


def restored(part: FieldPart, channels: int, seed: int, state: Mapping[str, Tensor]) -> Field:
    """Rebuilds the saved field on the CPU. Raises ValueError if the state belongs to another field."""
    field = blank(part, channels, seed)
    field.load_state_dict(state)
    return field


def blank(part: FieldPart, channels: int, seed: int) -> Field:
    """Builds a field whose state will be loaded later. If it starts from an earlier phase, a simple shape stands in for
    that phase's result."""
    if isinstance(part.start, PhaseStart):
        corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
        sides = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
        part = part.model_copy(update={"start": Handed(surface=Surface(corners, sides), known=BallShape(0.5))})
    return part.build(channels, seed)


def _settings(part: FieldPart) -> dict[str, Any]:
    """Returns all settings except the start and the learning rates."""
    return {k: v for k, v in dict(part).items() if k != "start" and not k.startswith("lr")}


def handed(field: Any, start: PhaseStart, seed: int = 0) -> Handed:
    """Returns the shape and colours of a field, for another field to start from. Raises ValueError if the field is
    empty."""
    try:
        found = extract(field, start.resolution, start.threshold, start.all_parts)
    except ValueError as error:
        raise ValueError(
            f"field.start.kind = phase, but the earlier phase left nothing to start from: {error}"
        ) from None
    mesh = simplified(found, start.faces)
    left = [note for note in mesh.notes if not note.startswith("threshold")]
    if left:
        warnings.warn(f"field.start.kind = phase: {'; '.join(left)}", stacklevel=2)
    points, normals = _spread(mesh.vertices, mesh.faces, seed)
    colors = by_chunks(surface_colors(field), torch.from_numpy(points).float()).double().numpy()
    sure = None if isinstance(getattr(field, "part", None), TexturedMesh) else normals
    surface = Surface(torch.from_numpy(mesh.vertices).float(), torch.from_numpy(mesh.faces))
    return Handed(
        density=start.density,
        softness=start.softness,
        surface=surface,
        known=SampledShape(points, colors, sure, field.bound),
        volume=field if isinstance(field, VolumeField) and not isinstance(field, SplatField) else None,
    )


def _spread(vertices: np.ndarray, faces: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random points spread evenly over the triangles, and the unit normals at these points, both `[N, 3]`."""
    rng = np.random.default_rng(seed)
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    size = np.linalg.norm(normals, axis=1)
    which = rng.choice(len(faces), _SAMPLES, p=size / size.sum())
    points = np.einsum("nk,nkd->nd", rng.dirichlet((1, 1, 1), len(which)), np.stack([a, b, c], 1)[which])
    return points, normals[which] / size[which, None]


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names start with a prefix, with the prefix removed."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
