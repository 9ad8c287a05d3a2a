"""Opens the teacher that a threestudio YAML file requests. A teacher is a backbone with concepts, together with a
recipe whose guidance is used."""

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
from shared.runner.open_runner import check_precision, model_asked_for, open_runner


@dataclass(frozen=True)
class Asked:
    """A request for a teacher.

    backbone: a folder, a file or a hub id. If empty, the recipe's backbone is used, and if the recipe has
        none, the first concept's model or, without concepts, the toybox.
    concepts: the folder and the strength of each concept.
    recipe: the name of the recipe.
    settings: settings that are applied on top of the recipe, each as `key=value`.
    """

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
        """Builds a request from the values in a YAML file."""
        return Asked(backbone, tuple(concepts.items()), recipe, tuple(settings), device, precision)

    def loads(self) -> list[str]:
        """Returns the concepts as `PATH:STRENGTH`."""
        return [f"{path}:{strength}" for path, strength in self.concepts]


class Teacher:
    """A runner with its concepts, a recipe, and a student if the recipe has one. Raises ValueError if the recipe cannot
    be used with threestudio."""

    def __init__(self, asked: Asked) -> None:
        self.recipe = recipe_for(asked)
        check_precision(asked.precision)
        self.runner = open_runner(Runner3D, self.recipe.backbone, asked.loads(), asked.device, asked.precision)
        self.concepts = self.runner.strengths
        self.recipe.guidance.check_adapters(self.concepts)
        has_student = self.recipe.guidance.student is not None
        self.student = Student(self.runner.backbone, self.recipe) if has_student else None


_OPEN: WeakValueDictionary[Asked, Teacher] = WeakValueDictionary()


def open_teacher(asked: Asked) -> Teacher:
    """Opens a teacher. Equal requests share one teacher for as long as it is in use. A request after that opens a
    new teacher and reads the concepts again."""
    found = _OPEN.get(asked)
    if found is None:
        _OPEN[asked] = found = Teacher(asked)
    return found


def recipe_for(asked: Asked) -> Recipe3D:
    """Loads the recipe. Only its prompts, guidance and student are used. Raises ValueError if the recipe cannot be used
    with threestudio."""
    backbone = [f"backbone={asked.backbone}"] if asked.backbone else []
    model = model_asked_for(None, asked.loads())
    recipe = load(asked.recipe, [*backbone, *asked.settings], "3d", Recipe3D, model)
    if recipe.phases:
        raise ValueError(
            f"recipe = {asked.recipe} has phases ({', '.join(recipe.phases)}), but threestudio's stages are separate "
            "runs: choose a recipe without phases, such as dreamfusion or csd"
        )
    for key, there in (("regions", bool(recipe.guidance.regions)), ("joint_views", recipe.guidance.joint_views > 1)):
        if there:
            raise ValueError(f"guidance.{key} is not supported by threestudio's batches and fields: remove it")
    return recipe


class Prompts:
    """The prompts that the prompt processor passes to pcs-guidance or to threestudio's own guidance.

    Raises ValueError if the prompt is empty, is too long, or does not name a loaded subject.
    """

    use_perp_neg = False  # for threestudio's own guidance; pcs-guidance has a setting for Perp-Neg

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
        """Returns the embeddings of the prompts for B views, followed by those of the negative prompts, `[2 B, L, D]`.

        `elevation` and `azimuth` are [B], in degrees. Raises ValueError if the embeddings of a concept's words depend
        on the layer or on the time.
        """
        seen = Views(Cameras.of(azimuth.cpu(), elevation.cpu()), (False,) * len(azimuth))
        told = "prompt" if view_dependent_prompting else "plain_prompt"
        rows = [*self.scene.rows(told, seen), *self.scene.rows("negative", seen)]
        backbone = self.teacher.runner.backbone
        if backbone.varies_with([self.scene.text(None)]):
            raise ValueError(
                "the embeddings of a concept's words depend on the layer or on the time, but threestudio's own "
                "guidance uses one embedding for all layers and times: use guidance_type: pcs-guidance"
            )
        with self.scores.under("teacher"):
            context = self.scores.texts.mixed(rows, torch.zeros(len(rows), device=backbone.device)).context
        assert isinstance(context, Tensor)
        return context
