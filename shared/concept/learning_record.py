"""Validates the parts of a concept's recipe that other code reads; the rest is stored only for display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StrictInt, StrictStr

from shared.config import validate
from shared.io.noise_prior_settings import NoisePriorSettings
from shared.io.trajectory_settings import Trajectory


def _nothing(value: Any) -> Any:
    return {} if value is None else value


def _names(value: Any) -> Any:
    names = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("must be the name of a folder, or a list of file names")
    return value


def _points(text: str) -> str:
    from shared.sampling.hooks import check_points

    return check_points(text)


class _Read(BaseModel):
    """A pydantic model that ignores unknown keys, because recipes from other packages have additional ones."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LearnedSampling(_Read):
    """The sampling settings in the concept's recipe. None means the backbone's default."""

    steps: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    guidance: Annotated[FiniteFloat, Field(strict=True)] | None = None
    scheduler: StrictStr | None = None
    strength: Annotated[StrictStr, AfterValidator(_points)] = ""  # the concept's strength schedule
    trajectory: Trajectory | None = None
    noise_prior: NoisePriorSettings | None = None


class LearnedSubject(_Read):
    """The names of the folder or files with the subject's pictures or clips, without their parent folders."""

    images: Annotated[Any, AfterValidator(_names)] = None
    clips: Annotated[Any, AfterValidator(_names)] = None


class LearnedTrain(_Read):
    steps: Annotated[StrictInt, Field(ge=0)] | None = None
    batch_size: Annotated[StrictInt, Field(ge=1)] | None = None


class LearnedPhase(_Read):
    train: Annotated[LearnedTrain, BeforeValidator(_nothing)] = LearnedTrain()


class LearnedWith(_Read):
    """The parts of a concept's recipe that other code reads."""

    method: StrictStr = ""
    subject: LearnedSubject | None = None
    subjects: Annotated[dict[str, LearnedSubject], BeforeValidator(_nothing)] = {}
    train: Annotated[LearnedTrain, BeforeValidator(_nothing)] = LearnedTrain()
    sampling: Annotated[LearnedSampling, BeforeValidator(_nothing)] = LearnedSampling()
    phases: Annotated[dict[str, Annotated[LearnedPhase, BeforeValidator(_nothing)]], BeforeValidator(_nothing)] = {}

    def folder_of(self, name: str) -> str | None:
        """Returns the name of the folder with the pictures or clips of the subject `name`, or None if no folder is
        recorded."""
        subject = self.subject or self.subjects.get(name)
        given = None if subject is None else subject.images or subject.clips
        return given if isinstance(given, str) else None


class _Metrics(_Read):
    training_seconds: Annotated[FiniteFloat, Field(strict=True, ge=0)] | None = None


class _Used(_Read):
    recipe: LearnedWith
    metrics: _Metrics


def learned_with(recipe: Mapping[str, Any], metrics: Mapping[str, Any], where: str) -> LearnedWith:
    """Validates the parts of a concept's recipe and metrics that other code reads. Raises ValueError, naming `where`
    and the key, if one of them is invalid."""
    return validate(_Used, {"recipe": recipe, "metrics": metrics}, where=where).recipe
