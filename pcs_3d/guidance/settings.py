"""One guidance: a table of terms, a noiser, a weighting, and what is done to the result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pcs_3d.guidance.noisers import Noiser, RandomNoise
from pcs_3d.guidance.perp_neg import PerpNeg
from pcs_3d.guidance.scores import Adapters, Ask, Told
from pcs_3d.guidance.student import StudentSettings
from pcs_3d.guidance.times import Times
from pcs_3d.regions import Region
from pcs_3d.schedules import Moment, Schedule
from shared.config import Part, Slot

Share = Annotated[float, Field(ge=0, le=1)]
Weighting = Literal["sds", "uniform", "fantasia3d", "noise_to_signal"]


class Term(Part):
    """One prediction in the sum. Its coefficient is `plain` + `scaled` · s, with s the guidance scale; 0 outside of the
    times [from_t, until_t), which are shares of the range of t."""

    kind: Told = "prompt"  # what the model is told; the term's name, where nothing is said
    adapters: Adapters = "teacher"
    at: Literal["t", "s"] = "t"
    plain: Schedule = 0.0
    scaled: Schedule = 0.0
    from_t: Share = 0.0
    until_t: Annotated[float, Field(ge=0)] = 1.0

    @property
    def ask(self) -> Ask:
        return Ask(self.kind, self.adapters)


class Guidance(Part):
    """grad = w(t) (sum_i a_i eps_i - target), on the latents of a view.

    Guidance scale, everywhere in this package: eps_u + s (eps_c - eps_u); 0 is without the prompt, 1 is plain. Papers and
    programs that write eps_c + s' (eps_c - eps_u) have s' = s - 1.

    w(t) with z_t = alpha z + sigma eps: `sds` sigma² (which is 1 - alpha_bar), `uniform` 1, `fantasia3d` alpha sigma²,
    `noise_to_signal` sigma / alpha, under which the gradient with random noise is z - x0(z_t).
    """

    terms: Slot[Term] = {  # type: ignore[assignment]
        "prompt": {"kind": "prompt", "scaled": 1.0},
        "negative": {"kind": "negative", "plain": 1.0, "scaled": -1.0},
    }
    target: Literal["noise", "none"] = "noise"  # the noiser's, or nothing
    scale: Schedule = 100.0
    noiser: Noiser = RandomNoise()
    times: Times = Times()
    weighting: Weighting = "sds"
    weight: Schedule = 1.0  # of the whole gradient
    normalize: Literal["sum", "mean"] = "sum"  # over channels and cells of a view; mean does not depend on their number
    clip: Schedule | None = None  # elementwise, of w(t) (…): score debiasing (https://arxiv.org/abs/2303.15413)
    rescale: Share = 0.0  # of x0 to its spread without guidance (https://arxiv.org/abs/2305.08891, eq. 15)
    rescale_over: Annotated[int, Field(ge=1)] = 1  # views whose spread is taken together: those of a ring
    regions: Slot[Region] = {}  # parts of space that are asked for something of their own
    joint_views: Annotated[int, Field(ge=1)] = 1  # views of a ring that attend to each other (`JointViews`)
    perp_neg: PerpNeg | None = None
    student: StudentSettings | None = None
    pixel_weight: Schedule = 0.0  # HiFA's loss between the view and the decoded x0
    space: Literal["pixels", "latents"] = "pixels"  # what fields show: colours that are encoded, or latents
    resolution: Annotated[int, Field(ge=8)] | None = (
        None  # pixels that a view is scaled to and encoded; the backbone's own
    )

    def speaks(self, moment: Moment) -> bool:
        """Whether the teacher is asked: where neither latents nor pixels weigh anything, penalties alone train the field."""
        return moment.of(self.weight) != 0 or moment.of(self.pixel_weight) != 0

    @model_validator(mode="after")
    def _consistent(self) -> Guidance:
        asks_student = any(term.adapters == "student" for term in self.terms.values())
        if asks_student and self.student is None:
            raise ValueError("terms: one asks the student, and nothing teaches it: add student: {}")
        if any(term.at == "s" for term in self.terms.values()) and self.noiser.kind != "interval":
            raise ValueError("terms: at: s is the earlier point of noiser.kind=interval")
        if not self.terms:
            raise ValueError("terms: there is none, so nothing guides")
        kinds = [term.kind for term in self.terms.values() if term.adapters == "teacher" and term.at == "t"]
        for need, why in (("prompt", self.rescale or self.perp_neg), ("null", self.perp_neg)):
            if why and need not in kinds:
                raise ValueError(f"rescale and perp_neg need a term of kind {need}, and there is none")
        if self.space == "latents" and (self.resolution is not None or self.pixel_weight != 0):
            raise ValueError("space: latents are not scaled to a resolution, and have no pixels to compare")
        return self
