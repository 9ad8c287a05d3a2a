"""The settings of an asset recipe that do not depend on the kind of field."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pcs_3d.backgrounds import Backgrounds
from pcs_3d.camera_sampling import CameraSampling
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.pseudo_views_task import PseudoViewsTask
from pcs_3d.distill.reference_cameras_task import ReferenceCamerasTask
from pcs_3d.guidance.camera_embedding import CameraEmbedding
from pcs_3d.guidance.prompt_debias import PromptDebias
from pcs_3d.guidance.settings import Guidance
from pcs_3d.references import KnownViews
from pcs_3d.regularize import GeometryRegularizer
from pcs_3d.shadings import Shadings
from pcs_3d.view_prompts import ViewWords
from shared.config import Slot, default_kind
from shared.recipe.schema import Recipe
from shared.recipe.tasks import GenerateTask, TuneTask, named
from shared.sources import Source
from shared.trainable import Trainable

AssetTask = Annotated[
    DistillTask | TuneTask | GenerateTask | PseudoViewsTask | ReferenceCamerasTask,
    Field(discriminator="kind"),
    default_kind("distill"),
    BeforeValidator(named),
]
AssetTrainable = Annotated[Trainable | CameraEmbedding, Field(discriminator="kind")]


class DistillRecipe(Recipe):
    """An asset recipe. The types of `field`, `renderer` and `export` are left open; `Recipe3D` defines them."""

    prompt: str = ""  # what the asset shows; `<name>` stands for a concept
    # a description of the scene, such as "in a white studio", that is appended to the prompt; a plain scene keeps other
    # objects out of the field
    setting: str = ""
    negative: str = ""  # what the asset should not show
    views: ViewWords = ViewWords()
    debias: PromptDebias | None = None  # removes words from the prompts for some views
    cameras: CameraSampling = CameraSampling()
    background: Backgrounds = Backgrounds()
    shading: Shadings = Shadings()
    guidance: Guidance = Guidance()
    field: Any = None
    renderer: Any = None
    penalties: Slot[GeometryRegularizer] = {}  # geometry penalties, added to the guidance
    references: KnownViews | None = None  # pictures of the object with their cameras, for penalties that use them
    export: Any = None  # how the field is written to files
    sources: Slot[Source] = {}  # pictures for the phases that learn from them
    trainable: Slot[AssetTrainable] = {}  # parts trained besides the field, such as a student's adapters
    task: AssetTask = DistillTask()

    @property
    def made(self) -> Any:
        """The settings of the field, with the guidance's regions."""
        return self.field.within(self.guidance.regions)

    @property
    def leaves_out_names(self) -> bool:
        """Whether the teacher also reads prompts in which class nouns replace the concepts' names."""
        base = any(term.adapters == "base" for term in self.guidance.terms.values())
        return base or self.views.drop_subject > 0

    @model_validator(mode="after")
    def _in_rings(self) -> DistillRecipe:
        joint, ring = self.guidance.joint_views, self.cameras.ring
        if joint > 1 and ring != joint:
            raise ValueError(
                f"guidance.joint_views = {joint} but cameras.ring = {ring}: the views of a ring attend to each other, "
                "so set both to the same number"
            )
        return self

    @model_validator(mode="after")
    def _is_guided(self) -> DistillRecipe:
        silent = self.guidance.weight == 0 and self.guidance.pixel_weight == 0
        if silent and not self.penalties and isinstance(self.task, DistillTask) and not self.phases:
            raise ValueError(
                "guidance.weight = 0 and guidance.pixel_weight = 0 without penalties: nothing trains the field, so set "
                "one of the weights or add a penalty"
            )
        return self

    @model_validator(mode="after")
    def _knows_its_pictures(self) -> DistillRecipe:
        for name, penalty in self.penalties.items():
            if penalty.needs_pictures and self.guidance.space == "latents":
                raise ValueError(
                    f"penalties.{name} compares views with pictures, but views have no pixels with guidance.space = "
                    f"latents: set penalties.{name}=null"
                )
            if penalty.needs_pictures and self.references is None:
                raise ValueError(
                    f"penalties.{name} compares views with the subject's pictures, so it needs their camera angles: set "
                    "references.azimuth_deg=[0,90,…], one per picture, in file-name order"
                )
        return self
