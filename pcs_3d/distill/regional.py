"""Determines which scores guide each region of a phase, and where each region appears in the views."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.guidance.regional_scores import RegionalScores
from pcs_3d.guidance.scores import Scores
from pcs_3d.regions import Inside, RegionPart, seen
from pcs_3d.regularize.base import Seen
from pcs_3d.view_prompts import ScenePrompts
from shared.config import unknown

#: Takes prompts and the concepts' strengths. Returns the scores that guide a scene.
Opened = Callable[[ScenePrompts, Mapping[str, float]], Scores]


def scene_prompts(
    recipe: DistillRecipe, class_nouns: Mapping[str, str], region: RegionPart | None = None
) -> ScenePrompts:
    """Returns the recipe's prompts for the teacher. If a region is given, its own prompts replace the recipe's."""
    said = (region.prompt if region else "") or recipe.prompt
    negative = (region.negative if region else "") or recipe.negative
    prompt = f"{said} {recipe.setting}".strip()
    by_direction = recipe.debias.prompts(prompt, class_nouns) if recipe.debias else {}
    return ScenePrompts(prompt, negative, recipe.views, class_nouns, by_direction)


def regional_scores(
    recipe: DistillRecipe, class_nouns: Mapping[str, str], strengths: Mapping[str, float], opened: Opened
) -> Scores:
    """Returns the scores that guide a phase. They combine scores for the whole scene with scores for each region that
    has its own prompt or concepts.

    Args:
        strengths: the strength of each concept that has adapters

    Raises:
        ValueError: a region names an unknown concept, or a term names one that is unknown or used only in a region
    """
    parts: Mapping[str, RegionPart] = recipe.guidance.regions
    owned = {concept for part in parts.values() for concept in part.concepts or ()}
    for name, part in parts.items():
        for concept in part.concepts or ():
            if concept not in strengths:
                raise ValueError(
                    f"guidance.regions.{name}.concepts: {unknown(concept, strengths, 'concept with adapters')} Learned "
                    "words need no adapters and take effect wherever a prompt uses them."
                )
    shared = {name: strength for name, strength in strengths.items() if name not in owned}
    recipe.guidance.check_adapters(shared)
    whole = opened(scene_prompts(recipe, class_nouns), shared)
    regions = {
        name: opened(
            scene_prompts(recipe, class_nouns, part),
            shared if part.concepts is None else {n: strengths[n] for n in part.concepts},
        )
        for name, part in parts.items()
        if part.is_told_more
    }
    return RegionalScores(whole, regions) if regions else whole


class ShownRegions:
    """Locates, in the views of a phase, the regions that have their own guidance."""

    def __init__(self, parts: Mapping[str, RegionPart]) -> None:
        self.regions: dict[str, Inside] = {name: part.build() for name, part in parts.items() if part.is_told_more}

    def of(self, views: Seen, cells: tuple[int, int]) -> dict[str, Tensor]:
        """Returns, for each region, the share of each cell that it covers, as `[B, 1, h, w]`."""
        depth, opacity, reach = views.rendering.depth, views.rendering.opacity.detach(), views.field.bound
        return {
            name: seen(inside, views.cameras, depth.detach(), opacity, cells, reach)
            for name, inside in self.regions.items()
        }
