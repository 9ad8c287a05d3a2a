"""What threestudio's YAML says of a teacher: a backbone with concepts, and the recipe that it guides by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.distill.regional import scene_prompts
from pcs_3d.guidance.backbone_scores import BackboneScores
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from pcs_3d.threestudio.student import Student
from pcs_3d.view_prompts import ScenePrompts, Views
from shared.recipe.resolve import load
from shared.runner.open_runner import check_precision, open_runner


@dataclass(frozen=True)
class Asked:
    """backbone: a folder, a file or a hub id; "": the one that the first concept was learned on, without concepts the toybox.
    concepts: (folder, strength). recipe: its name; settings: `key=value`, over the recipe's."""

    backbone: str
    concepts: tuple[tuple[str, float], ...]
    recipe: str
    settings: tuple[str, ...]
    device: str
    precision: str

    @staticmethod
    def of(
        backbone: str, concepts: Mapping[str, float], recipe: str, settings: Sequence[str], device: str, precision: str
    ) -> Asked:
        """The same from what a YAML holds."""
        return Asked(backbone, tuple(concepts.items()), recipe, tuple(settings), device, precision)


class Teacher:
    """A runner with its concepts, a recipe, and the student where the recipe has one. ValueError for a recipe of several
    phases."""

    def __init__(self, asked: Asked) -> None:
        self.recipe = recipe_for(asked)
        check_precision(asked.precision)
        concepts = [f"{path}:{strength}" for path, strength in asked.concepts]
        backbone = asked.backbone or None
        self.runner = open_runner(Runner3D, backbone or self.recipe.backbone, concepts, asked.device, asked.precision)
        self.concepts = self.runner.strengths
        has_student = self.recipe.guidance.student is not None
        self.student = Student(self.runner.backbone, self.recipe) if has_student else None


_OPEN: WeakValueDictionary[Asked, Teacher] = WeakValueDictionary()


def open_teacher(asked: Asked) -> Teacher:
    """One for all that ask the same, for as long as any of them holds it: what is learned anew in between is read anew."""
    found = _OPEN.get(asked)
    if found is None:
        _OPEN[asked] = found = Teacher(asked)
    return found


def recipe_for(asked: Asked) -> Recipe3D:
    """The recipe, of which guidance and the words for views are used. ValueError where threestudio cannot follow it."""
    backbone = [f"backbone={asked.backbone}"] if asked.backbone else []
    recipe = load(asked.recipe, [*backbone, *asked.settings], "3d", Recipe3D)
    if recipe.phases:
        raise ValueError(
            f"recipe = {asked.recipe}: it has phases ({', '.join(recipe.phases)}), and threestudio's stages are runs of "
            "their own: choose a recipe without, such as dreamfusion or csd"
        )
    for key, there in (("regions", bool(recipe.guidance.regions)), ("joint_views", recipe.guidance.joint_views > 1)):
        if there:
            raise ValueError(f"guidance.{key}: threestudio's batches and fields know nothing of it: leave it out")
    return recipe


class Prompts:
    """What the prompt processor hands to a guidance, ours or threestudio's own.

    ValueError for a prompt that is empty or too long, or does not name a loaded subject.
    """

    use_perp_neg = False  # threestudio's own guidance asks for it; ours has a part for it

    def __init__(self, teacher: Teacher, prompt: str, negative: str | None = None) -> None:
        changes = {"prompt": prompt} if negative is None else {"prompt": prompt, "negative": negative}
        recipe = teacher.recipe.model_copy(update=changes)
        teacher.runner.check(recipe, {})
        self.teacher, self.prompt = teacher, prompt
        self.scene: ScenePrompts = scene_prompts(recipe, teacher.runner.class_nouns)
        guidance = recipe.guidance
        self.scores = BackboneScores(
            teacher.runner.backbone, self.scene, teacher.concepts, guidance.perp_neg, guidance.resolution
        )

    @torch.no_grad()
    def get_text_embeddings(
        self, elevation: Tensor, azimuth: Tensor, camera_distances: Tensor, view_dependent_prompting: bool = True
    ) -> Tensor:
        """[2 B, L, D] for views from elevation [B] and azimuth [B] in degrees: those of the prompt, then those of the
        negative prompt. ValueError for a concept whose words differ by layer or by time."""
        seen = Views(Cameras.of(azimuth.cpu(), elevation.cpu()), (False,) * len(azimuth))
        told = "prompt" if view_dependent_prompting else "plain_prompt"
        rows = [*self.scene.rows(told, seen), *self.scene.rows("negative", seen)]
        backbone = self.teacher.runner.backbone
        if backbone.varies_with([self.scene.text(None)]):
            raise ValueError(
                "a concept's words differ by layer or by time, and threestudio's own guidance takes one text for all: "
                "use guidance_type: pcs-guidance"
            )
        with self.scores.under("teacher"):
            context = self.scores.texts.mixed(rows, torch.zeros(len(rows), device=backbone.device)).context
        assert isinstance(context, Tensor)
        return context
