"""Guidance settings: a table of terms, a noiser, a weighting and post-processing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pcs_3d.guidance.noisers import Noiser, RandomNoise
from pcs_3d.guidance.perp_neg import PerpNeg
from pcs_3d.guidance.scores import Ask, Told
from pcs_3d.guidance.student import StudentSettings
from pcs_3d.guidance.times import Times
from pcs_3d.regions import Region
from pcs_3d.schedules import Moment, Schedule
from shared.config import NAME, BatchSize, NotNegative, Part, Slot, unknown

Names = Annotated[tuple[Annotated[str, Field(pattern=NAME)], ...], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weighting = Literal["sds", "uniform", "fantasia3d", "noise_to_signal"]


class Term(Part):
    """One prediction in the sum. At times in [from_t, until_t), its coefficient is `plain` + `scaled` · s, where s is
    the guidance scale. At other times it is 0."""

    kind: Told = "prompt"  # the kind of conditioning; by default, the term's name
    # the adapters that are on: those of no concept, of all concepts, of all concepts and the student, or of [named ones]
    adapters: Literal["base", "teacher", "student"] | Names = "teacher"
    at: Literal["t", "s"] = "t"  # t is the view's noise level, and s is the earlier level of noiser.kind=interval
    plain: Schedule = 0.0
    scaled: Schedule = 0.0
    from_t: Share = 0.0  # lower limit, as a share of the range of t
    until_t: NotNegative = 1.0  # upper limit, as a share of the range of t

    @property
    def ask(self) -> Ask:
        return Ask(self.kind, self.adapters)


class Guidance(Part):
    """The gradient with respect to the latents of a view, grad = w(t) (sum_i a_i eps_i - target).

    In this package, the guidance scale s always refers to the formula eps_u + s (eps_c - eps_u). With a scale of 0, the
    prompt is ignored. A scale of 1 means no guidance. Some papers and programs write eps_c + s' (eps_c - eps_u)
    instead, where s' = s - 1.

    `weighting` determines w(t). With z_t = alpha z + sigma eps, it is sigma² = 1 - alpha_bar for `sds`, 1 for
    `uniform`, alpha sigma² for `fantasia3d`, and sigma / alpha for `noise_to_signal`. With random noise,
    `noise_to_signal` makes the gradient equal to z - x0(z_t).
    """

    terms: Slot[Term] = {  # type: ignore[assignment]
        "prompt": {"kind": "prompt", "scaled": 1.0},
        "negative": {"kind": "negative", "plain": 1.0, "scaled": -1.0},
    }
    target: Literal["noise", "none"] = "noise"  # what is subtracted: the noiser's noise, or nothing
    scale: Schedule = 100.0  # the guidance scale s
    noiser: Noiser = RandomNoise()
    times: Times = Times()
    weighting: Weighting = "sds"
    weight: Schedule = 1.0  # factor by which the whole gradient is multiplied
    # whether a view's loss is the sum or the mean over channels and cells; a mean does not depend on their number
    normalize: Literal["sum", "mean"] = "sum"
    # largest absolute value of the gradient's elements, for score debiasing (https://arxiv.org/abs/2303.15413)
    clip: Schedule | None = None
    # how far the standard deviation of x0 is moved towards the unguided one, from 0 to 1
    # (https://arxiv.org/abs/2305.08891, eq. 15)
    rescale: Share = 0.0
    rescale_over: BatchSize = 1  # number of consecutive views that share a standard deviation, such as those in a ring
    regions: Slot[Region] = {}  # parts of space with their own prompts or concepts
    joint_views: BatchSize = 1  # number of views in a ring that attend to each other (`JointViews`)
    perp_neg: PerpNeg | None = None  # Perp-Neg (https://arxiv.org/abs/2304.04968); off if null
    student: StudentSettings | None = None  # the student of variational score distillation; if null, none is trained
    pixel_weight: Schedule = 0.0  # weight of HiFA's loss between the view and the decoded x0
    space: Literal["pixels", "latents"] = "pixels"  # whether renders are latents, or colours that are then encoded
    # length, in pixels, to which the shorter side of each view is scaled before encoding; by default, the backbone's
    # own resolution
    resolution: Annotated[int, Field(ge=8, le=8192)] | None = None

    def check_adapters(self, known: Collection[str]) -> None:
        """Raises ValueError if a term names a concept or adapter set that is not among the known ones."""
        for key, term in self.terms.items():
            for name in term.adapters if isinstance(term.adapters, tuple) else ():
                if name not in known:
                    raise ValueError(f"guidance.terms.{key}.adapters: {unknown(name, known, 'concept with adapters')}")

    def speaks(self, moment: Moment) -> bool:
        """Returns whether the teacher is needed. If the weights on latents and pixels are both 0, only penalties train
        the field."""
        return moment.of(self.weight) != 0 or moment.of(self.pixel_weight) != 0

    @model_validator(mode="after")
    def _consistent(self) -> Guidance:
        asks_student = any(term.adapters == "student" for term in self.terms.values())
        if asks_student and self.student is None:
            raise ValueError("terms: a term uses the student, but nothing trains the student: set student={}")
        if any(term.at == "s" for term in self.terms.values()) and self.noiser.kind != "interval":
            raise ValueError(
                "terms: at=s needs the earlier point of noiser.kind=interval, so set that noiser or remove at=s"
            )
        if not self.terms:
            raise ValueError("terms is empty, so nothing guides the field: set at least one term")
        kinds = [term.kind for term in self.terms.values() if term.adapters == "teacher" and term.at == "t"]
        for need, why in (("prompt", self.rescale or self.perp_neg), ("null", self.perp_neg)):
            if why and need not in kinds:
                raise ValueError(f"rescale or perp_neg needs a term of kind {need}, but there is no such term")
        if self.space == "latents" and (self.resolution is not None or self.pixel_weight != 0):
            raise ValueError(
                "space = latents: latents cannot be scaled and have no pixels to compare, so remove resolution and "
                "pixel_weight"
            )
        return self
