"""Builds an asset's self-contained page, which shows the mesh in a viewer, what was requested, and how much time and
memory were used."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcs_3d.meshes.read_mesh import read_mesh
from pcs_3d.meshes.viewer import viewer_html
from shared.metrics.html import inline, render, seconds, size

PAGE = "report.html"
_STILLS = {"000": "front", "090": "left side", "180": "back", "270": "right side"}  # labels of the renders
_LARGEST = 448  # maximum side length, in pixels, of the pictures that the model learned from


def page_html(folder: Path, about: Mapping[str, Any], recipe: Any, known: Sequence[tuple[str, bytes]] = ()) -> str:
    """Builds the page for the asset in `folder`.

    Args:
        about: the contents of asset.json in the folder
        recipe: the recipe of the phase that finished the asset
        known: the label and the PNG data of each picture that the model learned from
    """
    mesh = folder / "asset.glb"
    return render(
        "created.html.j2",
        about=about,
        recipe=about["recipe"],
        known=[(label, inline(png, _LARGEST)) for label, png in known],
        viewer=viewer_html(read_mesh(mesh)) if mesh.is_file() else "",
        turntable="data:video/mp4;base64," + base64.b64encode((folder / "turntable.mp4").read_bytes()).decode(),
        stills=[(label, inline((folder / "renders" / f"{name}.png").read_bytes())) for name, label in _STILLS.items()],
        asked=_asked(recipe, about),
        spent=_spent(about["costs"]),
    )


def _asked(recipe: Any, about: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, guidance = recipe.train, recipe.guidance
    micro = train.gradient_accumulation
    side = f" of {train.resolution}×{train.resolution}" if train.resolution else ""
    rows = [
        ("Prompt", f"{recipe.prompt} {recipe.setting}".strip()),
        ("Negative prompt", recipe.negative),
        ("Concepts", ", ".join(f"{name}: {strength:g}" for name, strength in about["concepts"].items()) or "none"),
        ("Recipe", " ".join([recipe.title or recipe.method, *recipe.papers])),
        ("Phases", ", ".join(about["recipe"].get("phases") or {})),
        ("Steps", f"{train.steps}, with {train.batch_size * micro} views{side} each"),
        ("Guidance scale", str(guidance.scale)),
        ("Field", f"{recipe.field.kind}, rendered with {recipe.renderer.kind}"),
        ("Penalties", ", ".join(recipe.penalties) or "none"),
        ("Model", f"{about['backbone']} ({about['checkpoint'][:12]}…)"),
        ("Seed", str(recipe.seed)),
    ]
    return [(what, value) for what, value in rows if value]


def _spent(costs: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {
        "training_seconds": "Optimization",
        "validation_seconds": "Validation pictures",
        "class_pictures_seconds": "Reading and generating training pictures",
    }
    rows = [(name, seconds(costs[key])) for key, name in names.items() if costs.get(key)]
    if "training_peak_memory" in costs:
        of = "whole process" if costs.get("training_peak_memory_of") == "process" else "tensors on the GPU"
        rows.append((f"Peak memory ({of})", size(costs["training_peak_memory"])))
    if "estimated_memory" in costs:
        rows.append(
            ("Estimated beforehand", f"{size(costs['estimated_memory'])} (budget: {size(costs['memory_budget'])})")
        )
    return [*rows, ("Precision", str(costs.get("mixed_precision", "")))]
