"""Makes pictures of the subject from all around, using renders of a preliminary asset or of a given mesh."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import recipe_of
from pcs_3d.distill.earlier_asset import EarlierAsset
from pcs_3d.distill.hand_over import FIELD
from pcs_3d.distill.pseudo_views_task import PseudoViewsTask
from pcs_3d.distill.regional import scene_prompts
from pcs_3d.references import camera_entry
from shared.io.contact_sheets import write_picture
from shared.io.outputs import write_text
from shared.sampling.settings import Start
from shared.sources.phase_pictures import KEPT
from shared.train.generate import Generate, Shot
from shared.train.phase_context import PhaseContext

_ASSET = "asset"  # the subject's name in the list of pictures if the run itself learns no subject


class PseudoViews(Generate):
    """See `PseudoViewsTask`. Raises ValueError if there is no asset to render (see `EarlierAsset`) or if several
    subjects are learned."""

    def __init__(self, context: PhaseContext) -> None:
        self.recipe = recipe_of(context)
        task: Any = self.recipe.task
        self.task: PseudoViewsTask = task
        self.asset = EarlierAsset(context)
        if len(context.names) > 1:
            raise ValueError(
                f"phases.{context.name} makes pictures of one subject, but {len(context.names)} are learned: learn "
                "only one"
            )
        if not context.names and any("{concept}" in prompt for prompt in self.task.prompts):
            raise ValueError(
                f"phases.{context.name}.task.prompts: {{concept}} stands for the learned subject, but no subject is "
                "learned; use a loaded concept's name"
            )
        self.cameras = self.task.cameras()
        super().__init__(context)

    def planned(self) -> Iterator[Shot]:
        """Yields one shot for each prompt and view. Each shot's prompt includes words for the visible side."""
        owner = next(iter(self.context.names), _ASSET)
        for number, prompt in enumerate(self.task.prompts or (self.recipe.prompt,)):
            named = prompt.replace("{concept}", f"<{owner}>")
            said = scene_prompts(self.recipe.model_copy(update={"prompt": named}), self.context.all_nouns)
            for i, direction in enumerate(said.words.directions(self.cameras)):
                text = said.text(direction).replace(f"<{owner}>", "{concept}")
                about = {"view": i, **camera_entry(self.cameras, i)}
                yield Shot(f"{owner}-{number:03d}-{i:04d}.png", owner, text, self.seed(f"{number}/{i}"), about)

    @torch.no_grad()
    def pictures(self, shots: Sequence[Shot]) -> Tensor:
        context, backbone = self.context, self.context.backbone
        assert context.make is not None
        side = self.recipe.train.resolution or backbone.resolution
        cameras = Cameras.cat([self.cameras[i : i + 1] for i in (shot.about["view"] for shot in shots)])
        renders = self.asset.shown(cameras, side).pixels
        with torch.autocast(backbone.device.type, enabled=False):
            clean = backbone.encode_pixels(2 * renders.to(backbone.device) - 1)
        start = Start(clean, self.task.strength)
        return context.make(self.texts(shots), [shot.seed for shot in shots], self.recipe, start)

    def depends_on(self) -> Mapping[str, Tensor]:
        """Returns the learned tensors and those of the asset's field."""
        return {**self.state_dict(), **{k: v for k, v in self.context.carried.items() if k.startswith(FIELD)}}


def blank_views(cameras: Cameras, folder: Path) -> Path:
    """Fills a folder with white pictures and masks for these cameras, so that a phase can be tried before its reference
    pictures exist. Returns the folder."""
    kept = []
    write_picture(torch.ones(3, 16, 16), folder / "blank.png", {})
    for i in range(len(cameras)):
        seen = {"file": "blank.png", "mask": "blank.png", **camera_entry(cameras, i)}
        kept.append({**seen, "owner": _ASSET, "caption": "", "score": None})
    write_text(folder / KEPT, json.dumps({"kept": kept}))
    return folder
