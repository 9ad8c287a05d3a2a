"""Pictures of the subject from all around, made from renders of an asset that only resembles it so far."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import recipe_of, shown
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.hand_over import FIELD, restored, under
from pcs_3d.distill.pseudo_views_task import PseudoViewsTask
from pcs_3d.distill.regional import scene_prompts
from shared.io.contact_sheets import write_picture
from shared.io.outputs import write_text
from shared.sampling.settings import Start
from shared.sources.phase_pictures import KEPT
from shared.train.generate import Generate, Shot
from shared.train.phase_context import PhaseContext

_ASSET = "asset"  # the subject of the pictures if the prompt uses only concepts learned before


class PseudoViews(Generate):
    """See `PseudoViewsTask`. Raises ValueError if no earlier phase makes an asset, or several subjects are learned."""

    def __init__(self, context: PhaseContext) -> None:
        self.recipe = recipe_of(context)
        task: Any = self.recipe.task
        self.task: PseudoViewsTask = task
        made = [r for r in context.earlier if isinstance(r, DistillRecipe) and isinstance(r.task, DistillTask)]
        if not made:
            raise ValueError(f"phases.{context.name}: no earlier phase makes an asset to render views of")
        if len(context.subjects) > 1:
            raise ValueError(
                f"phases.{context.name}: its pictures show one subject, but {len(context.subjects)} are learned"
            )
        if not context.subjects and any("{concept}" in prompt for prompt in self.task.prompts):
            raise ValueError(
                f"phases.{context.name}.task.prompts: {{concept}} stands for the learned subject, but none is learned: use a "
                "loaded concept's name"
            )
        self.shown_by, self.cameras = made[-1], self.task.cameras()
        super().__init__(context)
        self._field: Any = None

    @property
    def field(self) -> Any:
        """The asset's field as the earlier phase left it."""
        if self._field is None:
            by, backbone = self.shown_by, self.context.backbone
            channels = 3
            if by.guidance.space == "latents":
                channels = backbone.latent_shape(backbone.resolution, backbone.resolution)[0]
            found = restored(by.made, channels, by.seed, under(self.context.carried, FIELD))
            self._field = found.to(backbone.device)
        return self._field

    def planned(self) -> Iterator[Shot]:
        """One for each view and prompt, with words for the side that it shows."""
        owner = next(iter(self.context.subjects), _ASSET)
        for number, prompt in enumerate(self.task.prompts or (self.recipe.prompt,)):
            named = prompt.replace("{concept}", f"<{owner}>")
            said = scene_prompts(self.recipe.model_copy(update={"prompt": named}), self.context.class_nouns)
            for i, direction in enumerate(said.words.directions(self.cameras)):
                text = said.text(direction).replace(f"<{owner}>", "{concept}")
                about = {"view": i, **_seen_from(self.cameras, i)}
                yield Shot(f"{owner}-{number:03d}-{i:04d}.png", owner, text, self.seed(f"{number}/{i}"), about)

    @torch.no_grad()
    def pictures(self, shots: Sequence[Shot]) -> Tensor:
        context, backbone = self.context, self.context.backbone
        assert context.make is not None
        side = self.recipe.train.resolution or backbone.resolution
        cells = backbone.latent_shape(side, side)[-1]
        cameras = Cameras.cat([self.cameras[i : i + 1] for i in (shot.about["view"] for shot in shots)])
        latent = self.shown_by.guidance.space == "latents"

        def decode(latents: Tensor) -> Tensor:
            return (backbone.decode(latents).float() + 1) / 2

        renders = shown(self.shown_by, self.field, cameras, cells if latent else side, decode).pixels
        with torch.autocast(backbone.device.type, enabled=False):
            clean = backbone.encode_pixels(2 * renders.to(backbone.device) - 1)
        start = Start(clean, self.task.strength)
        return context.make(self.texts(shots), [shot.seed for shot in shots], self.recipe, start)

    def depends_on(self) -> Mapping[str, Tensor]:
        """The learned tensors, and the asset's field."""
        return {**self.state_dict(), **{k: v for k, v in self.context.carried.items() if k.startswith(FIELD)}}


def blank_views(task: PseudoViewsTask, folder: Path) -> Path:
    """A folder with white pictures instead of the views that a phase will make, for trying out later phases."""
    cameras, kept = task.cameras(), []
    write_picture(torch.ones(3, 16, 16), folder / "blank.png", {})
    for i in range(len(cameras)):
        kept.append({"file": "blank.png", "owner": _ASSET, "caption": "", "score": None, **_seen_from(cameras, i)})
    write_text(folder / KEPT, json.dumps({"kept": kept}))
    return folder


def _seen_from(cameras: Cameras, i: int) -> dict[str, Any]:
    """One of the cameras, as stored in the list of kept pictures."""
    return {name: value.tolist()[0] for name, value in vars(cameras[i : i + 1]).items()}
