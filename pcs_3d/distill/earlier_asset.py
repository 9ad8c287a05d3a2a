"""The asset made by an earlier phase of the run."""

from __future__ import annotations

from typing import Any

from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import shown
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.hand_over import FIELD, restored, under
from pcs_3d.renderers.rendering import Rendering
from shared.train.phase_context import PhaseContext


class EarlierAsset:
    """The latest asset made before this phase. Raises ValueError if no earlier phase makes one."""

    def __init__(self, context: PhaseContext) -> None:
        made = [r for r in context.earlier if isinstance(r, DistillRecipe) and isinstance(r.task, DistillTask)]
        if not made:
            raise ValueError(
                f"phases.{context.name} renders views, but no earlier phase makes an asset: put a distill phase first"
            )
        self.context, self.recipe = context, made[-1]
        self._field: Any = None

    @property
    def in_latents(self) -> bool:
        """Whether the field contains latents instead of colours."""
        return self.recipe.guidance.space == "latents"

    @property
    def field(self) -> Any:
        """The field as the earlier phase left it."""
        if self._field is None:
            backbone = self.context.backbone
            channels = backbone.latent_shape(backbone.resolution, backbone.resolution)[0] if self.in_latents else 3
            found = restored(self.recipe.made, channels, self.recipe.seed, under(self.context.carried, FIELD))
            self._field = found.to(backbone.device)
        return self._field

    def shown(self, cameras: Cameras, side: int) -> Rendering:
        """Renders the field on white, `side` pixels wide. If it is in latent space, its renders are decoded."""
        backbone = self.context.backbone
        cells = backbone.latent_shape(side, side)[-1] if self.in_latents else side
        return shown(self.recipe, self.field, cameras, cells, lambda z: (backbone.decode(z).float() + 1) / 2)
