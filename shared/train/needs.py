"""What a penalty may ask of a step besides the prediction: objects that may hold a context around the prediction and then
give a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from shared.backbones.protocol import Backbone
from shared.types import Batch, Step


class Need(Protocol):
    """One thing that parts may declare in `needs`, by its name."""

    @property
    def name(self) -> str: ...

    def around(self, backbone: Backbone, batch: Batch) -> AbstractContextManager[Any]:
        """Entered before the prediction and left after the backward pass; what it gives goes to `value`."""
        ...

    def value(self, step: Step, entered: Any) -> Any:
        """Computed when a part first asks, at most once a step."""
        ...


class Needing(Protocol):
    """A part that asks something of a step."""

    needs: ClassVar[frozenset[str]]  # by name

    @property
    def provides(self) -> Sequence[Need]:
        """The needs that it brings itself."""
        ...


@dataclass(frozen=True)
class Computed:
    """A need that watches nothing: a function of the step."""

    name: str
    compute: Callable[[Step], Any]

    def around(self, backbone: Backbone, batch: Batch) -> AbstractContextManager[Any]:
        return nullcontext()

    def value(self, step: Step, entered: Any) -> Any:
        return self.compute(step)


def needs_by_name(task_needs: Iterable[Need], parts: Mapping[str, Needing]) -> dict[str, Need]:
    """Every need that can be served, by name: a task's own, and those that the parts bring (`provides`).

    Raises ValueError when two of one name are not the same.
    """
    out = {need.name: need for need in task_needs}
    for place, part in parts.items():
        for need in part.provides:
            if out.setdefault(need.name, need) != need:
                raise ValueError(f"{place} brings a need called {need.name!r}, and there is another of that name")
    return out


def check_needs(parts: Mapping[str, Needing], served: Mapping[str, Need]) -> frozenset[str]:
    """All that the parts (place in the recipe -> part) declare. ValueError for a need that nothing can serve."""
    for place, part in parts.items():
        missing = sorted(part.needs - served.keys())
        if missing:
            choices = ", ".join(sorted(served))
            raise ValueError(f"{place} needs {missing[0]!r}, and nothing here can give it. There are: {choices}.")
    return frozenset().union(*(p.needs for p in parts.values()))
