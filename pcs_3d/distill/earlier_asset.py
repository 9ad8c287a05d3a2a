"""The asset that a phase renders: the result of an earlier phase, or the mesh that the recipe starts from."""

from __future__ import annotations

from typing import Any

from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import recipe_of, shown
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.hand_over import FIELD, restored, under
from pcs_3d.fields.starts import MeshFile
from pcs_3d.renderers.rendering import Rendering
from shared.train.phase_context import PhaseContext


class EarlierAsset:
    """The latest asset made before this phase or, if no earlier phase makes one, the mesh file that the phase's field
    starts from. Raises ValueError if there is neither."""

    def __init__(self, context: PhaseContext) -> None:
        made = [r for r in context.earlier if isinstance(r, DistillRecipe) and isinstance(r.task, DistillTask)]
        mine = recipe_of(context)
        if not made and not isinstance(mine.field.start, MeshFile):
            raise ValueError(
                f"phases.{context.name} renders views, but no earlier phase makes an asset: put a distill phase first, "
                "or start from a mesh (field.start.kind=file)"
            )
        self.context, self.recipe = context, (made or [mine])[-1]
        self._given = not made
        self._field: Any = None

    @property
    def in_latents(self) -> bool:
        """Whether the field contains latents instead of colours."""
        return self.recipe.guidance.space == "latents"

    @property
    def field(self) -> Any:
        """The field as the earlier phase left it, or as built from the mesh file."""
        if self._field is None:
            backbone = self.context.backbone
            channels = backbone.latent_shape(backbone.resolution, backbone.resolution)[0] if self.in_latents else 3
            part, seed = self.recipe.made, self.recipe.seed
            state = under(self.context.carried, FIELD)
            found = part.build(channels, seed) if self._given else restored(part, channels, seed, state)
            self._field = found.to(backbone.device)
        return self._field

    def shown(self, cameras: Cameras, side: int) -> Rendering:
        """Renders the field on white, `side` pixels wide. If it is in latent space, its renders are decoded."""
        backbone = self.context.backbone
        cells = backbone.latent_shape(side, side)[-1] if self.in_latents else side
        return shown(self.recipe, self.field, cameras, cells, lambda z: (backbone.decode(z).float() + 1) / 2)
