"""Trains a field by score distillation, so that a diffusion model finds the field's renders likely (as in DreamFusion
and its successors)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras, turntable
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.hand_over import FIELD, first_field, under
from pcs_3d.distill.regional import ShownRegions, regional_scores, scene_prompts
from pcs_3d.fields.field import Field
from pcs_3d.guidance.backbone_scores import BackboneScores
from pcs_3d.guidance.engine import guide, surrogate
from pcs_3d.guidance.pixel_loss import pixel_loss
from pcs_3d.guidance.scores import Scores
from pcs_3d.guidance.student import STUDENT
from pcs_3d.regularize.base import Seen
from pcs_3d.renderers.rendering import Rendering, RenderSettings
from pcs_3d.schedules import Moment
from pcs_3d.view_prompts import ScenePrompts
from shared.backbones.protocol import Backbone
from shared.train.loop import generator
from shared.train.memory import recomputed_encoder
from shared.train.phase_context import ConceptTask, PhaseContext
from shared.train.task import Regrouped, Update, Updates
from shared.trainable import TrainableGroup

_VIEWS, _NOISE, _STUDENT = 2**45, 2**46, 2**47  # separate random streams

#: Takes the phase, its prompts and the concepts' strengths. Returns the scores that guide the phase.
OpenScores = Callable[[PhaseContext, ScenePrompts, Mapping[str, float]], Scores]


def backbone_scores(context: PhaseContext, prompts: ScenePrompts, concepts: Mapping[str, float]) -> Scores:
    """Returns the scores of the run's own backbone."""
    guidance = recipe_of(context).guidance
    return BackboneScores(
        context.backbone,
        prompts,
        concepts,
        guidance.perp_neg,
        guidance.resolution,
        context.text_on_device,
        guidance.joint_views,
    )


class Distill(ConceptTask):
    """See `DistillTask`. Each step updates the field. If there is a student, the step also updates the student on the
    same views.

    If an earlier phase made a field, this phase continues from it (`first_field`). The teacher uses the loaded concepts
    and those learned by earlier phases of this run. Only the student uses the adapter set `student`.

    Raises:
        ValueError: sizes, prompts, optimizer groups or parts are incompatible
    """

    rate_key = "field.lr"

    def __init__(self, context: PhaseContext, scores: OpenScores = backbone_scores) -> None:
        super().__init__(context)
        self.recipe = recipe = recipe_of(context)
        self.steps, self.guidance = recipe.train.steps, recipe.guidance
        self.side = view_side(recipe, context.backbone)
        channels = 3
        if self.guidance.space == "latents":
            channels = context.backbone.latent_shape(*(2 * [context.backbone.resolution]))[0]
        elif self.guidance.resolution is not None:
            context.backbone.latent_shape(self.guidance.resolution, self.guidance.resolution)
        field = first_field(recipe, channels, context.earlier, context.carried, context.resumed_step > 0)
        self.field: Field = field.to(context.backbone.device)
        self.prompts = scene_prompts(recipe, context.all_nouns)
        self.regions = ShownRegions(recipe.guidance.regions)
        off = {STUDENT, *recipe.task.off}
        on = {name: 1.0 for name in context.adapter_sets if name in context.backbone.adapters and name not in off}
        strengths = {**context.loaded_strengths, **on}
        self.scores = regional_scores(recipe, context.all_nouns, strengths, partial(scores, context))
        self.pictures = None
        if recipe.references is not None and any(p.needs_pictures for p in recipe.penalties.values()):
            known = recipe.references.pictures(context.subjects, self.side, context.phase_folders)
            self.pictures = known.to(context.backbone.device)
        self._check_groups()
        self._try()

    def _check_groups(self) -> None:
        student, mine = self.guidance.student, super().groups()
        if student is not None and student.group not in mine:
            raise ValueError(
                f"guidance.student is set, but nothing is trained in the optimizer group {student.group!r}: set "
                f"group={student.group} and adapter_set={STUDENT} for a part under trainable"
            )
        allowed = {student.group} if student else set()
        for name, parts in mine.items():
            if name not in allowed:
                raise ValueError(
                    f"trainable.{parts[0].slot}: a distill phase trains only the field and a student "
                    "(guidance.student), because the model that guides the field is fixed; remove this part"
                )

    @torch.no_grad()
    def _try(self) -> None:
        """Raises ValueError if the field, renderer and penalties are incompatible. Penalties whose weight starts at 0
        are tried too."""
        draw, device, side = generator(self.recipe.seed, _VIEWS), self.field.device, 16
        behind = torch.zeros(1, self.field.channels, 1, 1, device=device)
        settings = RenderSettings(side, side, behind, normals=self._normals, generator=draw)
        seen = self._seen(turntable(1).to(device), settings, Moment(0, self.steps))
        for name, penalty in self.recipe.penalties.items():
            try:
                penalty.value(seen)
            except ValueError as error:
                raise ValueError(f"{error}; to leave this penalty out, set penalties.{name}=null") from None

    # --- the loop's interface ------------------------------------------------------------------------------

    @property
    def networks_in_steps(self) -> frozenset[str]:
        """The networks that run at every step: the autoencoder if views are encoded, and the text encoder if the
        embedding of a name varies with time. Otherwise, texts are encoded only once."""
        vae = frozenset({"vae"}) if self.guidance.space == "pixels" else frozenset()
        timed = any("time" in p.varies_with for p in self.context.backbone.placeholders.values())
        return vae | (super().networks_in_steps - {"vae"} if timed else frozenset())

    def groups(self) -> dict[str, list[TrainableGroup]]:
        """Returns the optimizer groups of the field and of the student."""
        out = {name: list(parts) for name, parts in self.field.groups().items()}
        for name, parts in super().groups().items():
            out.setdefault(name, []).extend(parts)
        return out

    def regrouped(self, step: int) -> Regrouped | None:
        """Advances the field to this step. Returns the new groups if they have changed, and None otherwise."""
        came_from = self.field.advance(step, self.steps)
        return None if came_from is None else Regrouped(self.groups(), came_from)

    def updates(self, step: int, micro: int) -> Updates:
        """Yields the field's loss, which is the sum of guidance and penalties, and then the student's loss."""
        moment = Moment(step, self.steps)
        noise = generator(self.recipe.seed, _NOISE + step, micro)
        seen = self._drawn(moment, micro)
        views = self.prompts.views(seen.cameras.to("cpu"), noise)
        z = None
        parts: dict[str, Tensor] = {}
        if self.guidance.student is not None or self.guidance.speaks(moment):
            z, pixels = self._latents(seen.rendering)
            views = replace(views, regions=self.regions.of(seen, (z.shape[-2], z.shape[-1])))
            guided = guide(self.guidance, self.scores, z.detach(), views, self.prompts, moment, noise)
            parts["guidance"] = surrogate(z, guided.grad.to(z))
            weight = moment.of(self.guidance.pixel_weight)
            if weight:
                parts["pixels"] = weight * pixel_loss(self.guidance, self.scores, guided, pixels)
        with torch.autocast(self.field.device.type, enabled=False):
            parts |= {name: penalty(seen) for name, penalty in self.recipe.penalties.items()}
        if not parts:  # all weights are 0 at this step
            parts["guidance"] = 0.0 * seen.rendering.pixels.sum()
        loss = torch.stack(list(parts.values())).sum()
        yield Update(loss, tuple(self.field.groups()), {k: v.detach() for k, v in parts.items()})
        student = self.guidance.student
        if student is not None and z is not None:
            draw = generator(self.recipe.seed, _STUDENT + step, micro)
            with self.scores.under(STUDENT):
                loss = student.loss(self.scores, z.detach(), views, moment, draw)
                yield Update(loss, (student.group,), {STUDENT: loss.detach()})

    def _drawn(self, moment: Moment, micro: int) -> Seen:
        """Draws cameras, lights and backgrounds for a step, and renders its views."""
        recipe, draw = self.recipe, generator(self.recipe.seed, _VIEWS + moment.step, micro)
        device, channels = self.context.backbone.device, self.field.channels
        cameras = recipe.cameras.sample(recipe.train.batch_size, moment, draw)
        shading, light = recipe.shading.draw(cameras, moment, draw)
        background = recipe.background.draw(len(cameras), channels, draw)
        settings = RenderSettings(
            self.side,
            self.side,
            background.to(device),
            "albedo" if channels != 3 else shading,
            light.to(device),
            normals=self._normals,
            generator=draw,
        )
        return self._seen(cameras.to(device), settings, moment)

    @property
    def _normals(self) -> bool:
        return any(penalty.needs_normals for penalty in self.recipe.penalties.values())

    def _seen(self, cameras: Cameras, settings: RenderSettings, moment: Moment) -> Seen:
        """Renders views in full precision."""

        def view(cameras: Cameras, settings: RenderSettings) -> Rendering:
            with torch.autocast(self.field.device.type, enabled=False):
                return self.recipe.renderer.render(self.field, cameras, settings)

        rendering = view(cameras, settings)
        return Seen(self.field, cameras, rendering, moment, settings.generator, view, settings, self.pictures)

    def _latents(self, rendering: Rendering) -> tuple[Tensor, Tensor]:
        """Returns the latents that the guidance applies to, and the rendered views. If the views consist of pixels, the
        latents are their encodings. If the field is in latent space, the views are already latents and are returned
        twice."""
        pixels = rendering.pixels
        if self.guidance.space == "latents":
            return pixels, pixels
        with recomputed_encoder(self.context.backbone.vae, self.recipe.train.gradient_checkpointing):
            return self.scores.encode(pixels), pixels

    # --- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the tensors of the field (`field/…`) and of the adapters being trained, including the student's.
        Schedules depend only on the step and therefore have no state."""
        return {**super().state_dict(), **self.carried()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a saved state. Raises ValueError if tensors are missing, unexpected or of the wrong shape."""
        mine = under(state, FIELD)
        super().load_state_dict({k: v for k, v in state.items() if not k.startswith(FIELD)})
        if mine or self.context.resumed_step:
            self.field.load_state_dict(mine)

    def carried(self) -> dict[str, Tensor]:
        """Returns the tensors of the field, for later phases and for export."""
        return {FIELD + key: value for key, value in self.field.state_dict().items()}

    def result(self) -> Field:
        """Returns the finished field."""
        return self.field

    @torch.no_grad()
    def picture(self, cameras: Cameras, side: int | None = None) -> Rendering:
        """Renders views on white, without jitter. Views of a field in latent space are decoded."""
        return shown(self.recipe, self.field, cameras, side or self.side, self.scores.decode)


@torch.no_grad()
def shown(
    recipe: DistillRecipe, field: Any, cameras: Cameras, side: int, decode: Callable[[Tensor], Tensor]
) -> Rendering:
    """Renders a field on white, one view at a time. Returns pixels `[B, 3, H, W]` in [0, 1], on the CPU."""
    channels, device = field.channels, field.device
    behind = torch.full((1, channels, 1, 1), 1.0 if channels == 3 else 0.0, device=device)
    made = []
    for i in range(len(cameras)):
        one = recipe.renderer.render(field, cameras[i : i + 1].to(device), RenderSettings(side, side, behind))
        made.append(replace(one, pixels=decode(one.pixels).clamp(0, 1)) if channels != 3 else one)
    return Rendering(*(torch.cat([getattr(m, name) for m in made]).cpu() for name in ("pixels", "opacity", "depth")))


def recipe_of(context: PhaseContext) -> DistillRecipe:
    """Returns the phase's recipe. Raises AssertionError if it is not an asset recipe."""
    recipe = context.recipe
    assert isinstance(recipe, DistillRecipe), f"{type(recipe).__name__} has no field and no guidance"
    return recipe


def view_side(recipe: DistillRecipe, backbone: Backbone) -> int:
    """Returns the side length of a view in pixels or, in latent space, in cells. This is `train.resolution` or, if that
    is None, the backbone's own resolution."""
    if recipe.train.resolution is not None:
        return recipe.train.resolution
    own = backbone.resolution
    return backbone.latent_shape(own, own)[-1] if recipe.guidance.space == "latents" else own
