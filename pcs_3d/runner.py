"""The public interface of `pcs_3d` for creating assets. It is used by the command line and from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pcs_3d.cameras import Cameras, turntable
from pcs_3d.distill.distill import Distill, shown, view_side
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.hand_over import FIELD, check_fields, restored, under
from pcs_3d.distill.memory_plan import MemoryPlan, plan_memory
from pcs_3d.distill.pseudo_views import PseudoViews
from pcs_3d.distill.pseudo_views_task import PseudoViewsTask
from pcs_3d.distill.reference_cameras import ReferenceCameras, check_subject
from pcs_3d.distill.reference_cameras_task import ReferenceCamerasTask
from pcs_3d.distill.regional import scene_prompts
from pcs_3d.fields.field import Field
from pcs_3d.regions import RegionPart
from pcs_3d.renderers.rendering import Rendering
from shared.backbones import Backbone
from shared.prompts import check_known, check_named, expand, names_in, without
from shared.recipe.phases import expand_phases, learns_subjects
from shared.runner.base import Progress, Runner, attached, own_randomness
from shared.train.phase_context import PhaseContext
from shared.train.training_run import TrainingRun
from shared.types import Subject

__all__ = ["Asset", "Runner3D", "attached"]


@dataclass(frozen=True)
class Asset:
    """A finished field and its provenance. `costs` contains the time and memory used (`TrainingRun.costs`)."""

    field: Field
    recipe: DistillRecipe  # the recipe of the phase that finished the field
    costs: Mapping[str, Any]
    decode: Callable[[Tensor], Tensor]  # decodes latents to pixels in [0, 1], for fields that contain latents
    side: int  # side length of the training views, in pixels or latent cells

    def views(self, cameras: Cameras, side: int | None = None) -> Rendering:
        """Renders views on a white background. The pixels (`[B, 3, H, W]` in [0, 1]) are on the CPU."""
        return shown(self.recipe, self.field, cameras, side or self.side, self.decode)


class Runner3D(Runner):
    """A backbone with its attached concepts, for creating 3D fields."""

    makes = "assets"
    tasks = {**Runner.tasks, DistillTask: Distill, PseudoViewsTask: PseudoViews, ReferenceCamerasTask: ReferenceCameras}

    def create(
        self,
        recipe: DistillRecipe,
        workdir: Path,
        subjects: Mapping[str, Subject] | None = None,
        *,
        resume: bool = False,
        progress: Progress | None = None,
        tensorboard: bool = True,
    ) -> Asset:
        """Creates an asset of what `recipe.prompt` describes, using the loaded concepts.

        Args:
            workdir: folder for training state, logs and sample renders
            subjects: the pictures of each subject, by name, for recipes that learn a subject or compare renders with
                its pictures. The names and adapters of learned subjects are detached afterwards.
            resume: whether to continue from the newest checkpoint in `workdir`

        Raises:
            ValueError: the prompt, concepts and recipe are incompatible
            NotFinite, Interrupted: training failed or was interrupted; the last good state is saved first
        """
        subjects = subjects or {}
        self.check(recipe, subjects)
        last = next((p for _, p in reversed(list(expand_phases(recipe))) if isinstance(p.task, DistillTask)), None)
        if last is None:
            raise ValueError("no phase of the recipe makes an asset: set task=distill in one of them")
        current = _Current(self)
        run = self._training(
            recipe,
            subjects,
            workdir,
            progress,
            preview=current.preview(self._preview(subjects, recipe, {}, progress)),
            scored=False,
            tensorboard=tensorboard,
            tasks={**self.tasks, DistillTask: current.build},
        )
        try:
            with own_randomness():
                for phase, record in run.steps(resume):
                    if progress:
                        progress.step(phase, record, run.total_steps)
            return self._finished(run, last)
        finally:
            self._forget(run)

    def fit(
        self,
        recipe: DistillRecipe,
        workdir: Path,
        subjects: Mapping[str, Subject] | None = None,
        *,
        memory: int,
        sides_fixed: bool = False,
    ) -> MemoryPlan:
        """Changes the recipe so that the asset can be made with `memory` bytes of GPU memory or, on a CPU, of process
        memory (`plan_memory`). Raises ValueError in the same cases as `create`, and also if no plan fits the budget. In
        that case, the message states the smallest budget that would be enough."""
        subjects = subjects or {}
        self.check(recipe, subjects)
        run = self._training(recipe, subjects, workdir, None, tensorboard=False)
        try:
            with own_randomness():
                return plan_memory(run, recipe, memory, sides_fixed)
        finally:
            self._forget(run)

    def _finished(self, run: TrainingRun, recipe: DistillRecipe) -> Asset:
        side = view_side(recipe, self.backbone)
        channels = 3
        if recipe.guidance.space == "latents":
            channels = self.backbone.latent_shape(self.backbone.resolution, self.backbone.resolution)[0]
        field = restored(recipe.made, channels, recipe.seed, under(run.carried, FIELD))
        return Asset(field.to(self.backbone.device), recipe, run.costs, decoder(self.backbone), side)

    def check(self, recipe: DistillRecipe, subjects: Mapping[str, Subject]) -> None:
        """Checks a recipe before it runs.

        Raises ValueError in the same cases as `check_asked`, and also if a prompt is too long, or if a field cannot start as
        configured or cannot continue the earlier phase's field.
        """
        check_fields(recipe)
        check_asked(recipe, {name: loaded.concept.meta.kind for name, loaded in self.loaded.items()}, subjects)
        learned = list(subjects) if learns_subjects(recipe) else []
        nouns = {**{name: subject.class_noun for name, subject in subjects.items()}, **self.class_nouns}
        for _, phase in expand_phases(recipe):
            if not isinstance(phase.task, DistillTask | PseudoViewsTask):
                continue
            regions: Mapping[str, RegionPart] = phase.guidance.regions
            for region in (None, *regions.values()):
                for text in scene_prompts(phase, nouns, region).all_texts():
                    if not set(names_in(text)) & set(learned):  # names that are still to be learned have no words yet
                        self.backbone.check_prompt(expand(text, self.backbone.placeholders))
                    if phase.leaves_out_names:
                        self.backbone.check_prompt(without(text, nouns))


def check_asked(recipe: DistillRecipe, kinds: Mapping[str, str], subjects: Mapping[str, Subject]) -> None:
    """Checks what can be checked without loading a model.

    Raises ValueError if:
    - a prompt is empty, leaves out a subject, or names a concept that is not given
    - a region's file cannot be read
    - reference pictures lack masks that a phase needs, or do not match their cameras
    - a phase would perform none of its denoising steps

    Args:
        kinds: the kind of each given concept, by name
        subjects: the pictures of each subject, by name
    """
    # If no phase learns the subject, its pictures are used only for comparison, and prompts refer to a given concept.
    learned = dict.fromkeys(subjects if learns_subjects(recipe) else (), "subject")
    views: dict[str, bool] = {}  # the phases that write pictures with cameras, and whether they also write masks
    for name, phase in expand_phases(recipe):
        if isinstance(phase.task, ReferenceCamerasTask):
            check_subject(name, phase.task, subjects)
        if isinstance(phase.task, PseudoViewsTask):
            _check_strength(name, phase.task.strength, phase.sampling.steps)
        if isinstance(phase.task, PseudoViewsTask | ReferenceCamerasTask):
            views[name] = isinstance(phase.task, ReferenceCamerasTask)
        if isinstance(phase.task, DistillTask | PseudoViewsTask):
            if not phase.prompt.strip():
                raise ValueError('prompt is empty: describe what to make, as in prompt="a photo of a <my-mug>"')
            regions: Mapping[str, RegionPart] = phase.guidance.regions
            said = " / ".join(dict.fromkeys([phase.prompt, *(r.prompt for r in regions.values() if r.prompt)]))
            check_named(said, kinds)
            check_named(said, learned)
            check_known(said, {**kinds, **learned})
            for region in regions.values():
                region.check()
        if phase.references is not None and isinstance(phase.task, DistillTask):
            masks = any(p.needs_masks for p in phase.penalties.values())
            phase.references.check(subjects, masks, views)


def _check_strength(phase: str, strength: float, steps: int | None) -> None:
    """Raises ValueError if a share `strength` of `steps` denoising steps rounds down to 0 steps."""
    if steps is not None and int(steps * strength) == 0:
        raise ValueError(
            f"phases.{phase}.task.strength = {strength:g} leaves none of the {steps} denoising steps: use more steps "
            "(sampling.steps) or a larger strength"
        )


class _Current:
    """Keeps the current phase's task for previews."""

    def __init__(self, runner: Runner3D) -> None:
        self.build_task, self.task = runner.tasks[DistillTask], None

    def build(self, context: PhaseContext) -> Any:
        self.task: Any = self.build_task(context)
        return self.task

    def preview(self, of_pictures: Any) -> Any:
        """Returns a preview function that shows four sides of the current field. In phases without a field, it calls
        `of_pictures`."""

        def preview(phase: str, step: int) -> tuple[Tensor, Mapping[str, float]]:
            if self.task is None or self.task.context.name != phase:
                return of_pictures(phase, step)
            return 2 * self.task.picture(turntable(4)).pixels - 1, {}

        return preview


def decoder(backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Returns a function that decodes latents to pixels in [0, 1]."""
    return lambda latents: (backbone.decode(latents).float() + 1) / 2
