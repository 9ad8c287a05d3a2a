"""The context that a run passes to a phase's task, and the base class of tasks that work on a concept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.recipe.schema import Recipe
from shared.sampling.settings import Start
from shared.train.learned_state import gather, restore
from shared.trainable import TrainableGroup
from shared.types import Example, Subject

if TYPE_CHECKING:
    from shared.train.task import Regrouped, Task


class MakeNow(Protocol):
    """Generates pictures with the model in its current state."""

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], recipe: Recipe, start: Start | None = None
    ) -> Tensor:
        """Returns pictures ([N, 3, H, W] in [-1, 1]) at the recipe's training resolution, on the CPU.

        Args:
            prompts: already expanded
            start: the latents that sampling starts from
        """
        ...


#: Scores pictures ([N, 3, H, W]), given their plain prompts. The scores include "score", for which higher is better.
Score = Callable[[Tensor, Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True)
class PhaseContext:
    """What a phase's task receives from the run."""

    backbone: Backbone
    name: str
    recipe: Recipe  # with the phase's overlay applied
    subjects: Mapping[str, Subject]
    names: Sequence[str]  # of all subjects; empty if the run does not learn subjects
    adapter_sets: Sequence[str]  # of the adapters being trained; the default set comes first
    trained: Sequence[TrainableGroup]  # what the phase trains
    loaded_strengths: Mapping[str, float]  # of the concepts loaded before the run, which stay on
    initial_parameters: Mapping[str, Sequence[Tensor]]  # of each concept's modifier, before any training
    examples: Callable[[], Iterable[Example]]  # read lazily from the phase's sources
    text_on_device: Callable[[], AbstractContextManager[None]]  # inside it, text encoders are on the device
    folder: Path  # for the phase's files
    make: MakeNow | None = None  # None if this run cannot generate pictures
    scorers: Mapping[str, Score] = field(default_factory=dict)  # by subject
    progress: Callable[[str, int, int], None] | None = None
    per_source: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # file -> its own adapter sets
    temporary: tuple[str, ...] = ()  # adapter sets that are on only in training steps
    # tensors that earlier phases passed on, in addition to what they learned
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    earlier: Sequence[Recipe] = ()  # recipes of the earlier phases, in order
    phase_folders: Mapping[str, Path] = field(default_factory=dict)  # earlier phase -> the folder for its files
    resumed_step: int = 0  # the step of this phase at which the run resumes; 0 if the phase starts afresh
    # the class nouns of the concepts loaded before the run
    loaded_nouns: Mapping[str, str] = field(default_factory=dict)

    @property
    def class_nouns(self) -> dict[str, str]:
        """The class nouns of the run's subjects."""
        return {name: subject.class_noun for name, subject in self.subjects.items()}

    @property
    def all_nouns(self) -> dict[str, str]:
        """The class nouns of the loaded concepts and of the run's subjects. Prompts may name any of them."""
        return {**self.class_nouns, **self.loaded_nouns}


class ConceptTask:
    """The base class of tasks that work on a concept. The state of such a task is everything learned so far."""

    rate_key = "trainable.*.lr"  # the recipe key that sets the learning rate

    def __init__(self, context: PhaseContext) -> None:
        self.context = context

    @property
    def networks_in_steps(self) -> frozenset[str]:
        """The autoencoder and all text encoders, unless a task overrides this."""
        return frozenset({"vae", *(c for c in self.context.backbone.components if c.startswith("text_encoder"))})

    def state_dict(self) -> dict[str, Tensor]:
        """Returns token vectors as `placeholder/<concept>/<key>`, and adapters as `adapter/<slot>/<tensor>`."""
        return gather(self.context.backbone, self.context.names, self.context.adapter_sets)

    @contextmanager
    def learning_from(
        self, sources: Sequence[str], strength: float = 1.0, resting: Sequence[str] = ()
    ) -> Iterator[None]:
        """Inside the context, these files' adapters are on at this strength, and temporary adapters are on.

        Args:
            sources: the files
            strength: the strength of the files' adapters
            resting: adapter sets to switch off

        Raises ValueError if there are several files and each file has its own adapters, because an adapter cannot be
        applied to individual rows of a batch.
        """
        context, backbone = self.context, self.context.backbone
        now = {name: 1.0 for name in context.temporary if name in backbone.adapters}
        if context.per_source:
            if len(set(sources)) > 1:
                raise ValueError("per_source: a batch can hold only one picture or clip; set train.batch_size=1")
            now |= dict.fromkeys(context.per_source.get(sources[0], ()), strength)
        now |= dict.fromkeys((name for name in resting if name in backbone.adapters), 0.0)
        if not now:
            yield
            return
        with backbone.active({**backbone.strengths, **now}):
            yield

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned.

        At the start of a phase, an adapter without saved tensors keeps its initial values, because the phase has just
        added it. Raises ValueError when tensors are missing, unexpected or of the wrong shape.
        """
        fresh = self.context.resumed_step == 0
        restore(self.context.backbone, self.context.names, self.context.adapter_sets, state, fresh)

    def groups(self) -> dict[str, list[TrainableGroup]]:
        """Returns the trainable parts of each optimizer group."""
        out: dict[str, list[TrainableGroup]] = {}
        for group in self.context.trained:
            out.setdefault(group.group, []).append(group)
        return out

    def regrouped(self, step: int) -> Regrouped | None:
        """Returns None, because the trained parameters stay the same."""
        return None

    def carried(self) -> dict[str, Tensor]:
        """Returns an empty mapping, because everything learned is attached to the backbone."""
        return {}

    def result(self) -> Any:
        """Returns everything learned, which also stays attached to the backbone."""
        return self.state_dict()


#: Maps the class of a recipe's task part to a function that builds the task. Packages add their own entries.
TaskTable = Mapping[type, Callable[[PhaseContext], "Task"]]
