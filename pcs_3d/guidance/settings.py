"""One guidance: a table of terms, a noiser, a weighting, and how the result is post-processed."""

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
from shared.config import BatchSize, NotNegative, Part, Slot

Share = Annotated[float, Field(ge=0, le=1)]
Weighting = Literal["sds", "uniform", "fantasia3d", "noise_to_signal"]


class Term(Part):
    """One prediction in the sum. Its coefficient is `plain` + `scaled` · s, where s is the guidance scale, and 0 outside the
    times [from_t, until_t), which are shares of the range of t."""

    kind: Told = "prompt"  # kind of conditioning; default: the term's name
    adapters: Adapters = "teacher"  # which adapters are on
    at: Literal["t", "s"] = "t"  # t: at the view's noise level; s: at the earlier one of the noiser's interval
    plain: Schedule = 0.0
    scaled: Schedule = 0.0
    from_t: Share = 0.0  # share of the range of t
    until_t: NotNegative = 1.0  # share of the range of t

    @property
    def ask(self) -> Ask:
        return Ask(self.kind, self.adapters)


class Guidance(Part):
    """grad = w(t) (sum_i a_i eps_i - target), on the latents of a view.

    The guidance scale s is used as eps_u + s (eps_c - eps_u) everywhere in this package: 0 ignores the prompt, 1 is no
    guidance. Papers and programs that write eps_c + s' (eps_c - eps_u) have s' = s - 1.

    `weighting` sets w(t), where z_t = alpha z + sigma eps. `sds`: sigma², which is 1 - alpha_bar. `uniform`: 1. `fantasia3d`:
    alpha sigma². `noise_to_signal`: sigma / alpha, which makes the gradient z - x0(z_t) if the noise is random.
    """

    terms: Slot[Term] = {  # type: ignore[assignment]
        "prompt": {"kind": "prompt", "scaled": 1.0},
        "negative": {"kind": "negative", "plain": 1.0, "scaled": -1.0},
    }
    target: Literal["noise", "none"] = "noise"  # the noiser's noise, or nothing
    scale: Schedule = 100.0  # the guidance scale s
    noiser: Noiser = RandomNoise()
    times: Times = Times()
    weighting: Weighting = "sds"
    weight: Schedule = 1.0  # factor of the whole gradient
    normalize: Literal["sum", "mean"] = "sum"  # over a view's channels and cells; a mean is independent of their number
    clip: Schedule | None = None  # limit on elements of w(t) (…): score debiasing (https://arxiv.org/abs/2303.15413)
    rescale: Share = 0.0  # how far x0 is rescaled to its unguided spread (https://arxiv.org/abs/2305.08891, eq. 15)
    rescale_over: BatchSize = 1  # number of views whose spread is computed together: those of a ring
    regions: Slot[Region] = {}  # parts of space with their own prompt or concepts
    joint_views: BatchSize = 1  # number of views in a ring that attend to each other (`JointViews`)
    perp_neg: PerpNeg | None = None  # Perp-Neg (https://arxiv.org/abs/2304.04968); null: off
    student: StudentSettings | None = None  # how the student learns (VSD); null: no student
    pixel_weight: Schedule = 0.0  # weight of HiFA's loss between the view and the decoded x0
    space: Literal["pixels", "latents"] = "pixels"  # what fields render: colours, which are then encoded, or latents
    resolution: Annotated[int, Field(ge=8, le=8192)] | None = (
        None  # pixels that views are scaled to before encoding; default: the backbone's own
    )

    def speaks(self, moment: Moment) -> bool:
        """Whether the teacher is needed. If the weights of latents and pixels are both 0, only penalties train the field."""
        return moment.of(self.weight) != 0 or moment.of(self.pixel_weight) != 0

    @model_validator(mode="after")
    def _consistent(self) -> Guidance:
        asks_student = any(term.adapters == "student" for term in self.terms.values())
        if asks_student and self.student is None:
            raise ValueError("terms: one uses the student, but nothing trains it: add student: {}")
        if any(term.at == "s" for term in self.terms.values()) and self.noiser.kind != "interval":
            raise ValueError("terms: at: s is the earlier point of noiser.kind=interval: set that, or leave out at")
        if not self.terms:
            raise ValueError("terms: none is set, so nothing guides the field")
        kinds = [term.kind for term in self.terms.values() if term.adapters == "teacher" and term.at == "t"]
        for need, why in (("prompt", self.rescale or self.perp_neg), ("null", self.perp_neg)):
            if why and need not in kinds:
                raise ValueError(f"rescale and perp_neg need a term of kind {need}, but there is none")
        if self.space == "latents" and (self.resolution is not None or self.pixel_weight != 0):
            raise ValueError(
                "space = latents: latents cannot be scaled and have no pixels to compare: leave out resolution and pixel_weight"
            )
        return self
