"""Values that a penalty may need from a step besides the prediction.

A need computes such a value. It can also keep a context open around the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from shared.backbones.protocol import Backbone
from shared.types import Batch, Step


class Need(Protocol):
    """A value that parts can request by name in `needs`."""

    @property
    def name(self) -> str: ...

    def around(self, backbone: Backbone, batch: Batch) -> AbstractContextManager[Any]:
        """Returns a context that stays open from before the prediction until after the backward pass.

        The value that the context yields is passed to `value` as `entered`.
        """
        ...

    def value(self, step: Step, entered: Any) -> Any:
        """Computes the value. Called at most once per step, when a part first asks for it."""
        ...


class Needing(Protocol):
    """A part that needs something from a step."""

    needs: ClassVar[frozenset[str]]  # the names of the needs

    @property
    def provides(self) -> Sequence[Need]:
        """The needs that the part itself provides."""
        ...


@dataclass(frozen=True)
class Computed:
    """A need computed from the step itself, without a context around the prediction."""

    name: str
    compute: Callable[[Step], Any]

    def around(self, backbone: Backbone, batch: Batch) -> AbstractContextManager[Any]:
        return nullcontext()

    def value(self, step: Step, entered: Any) -> Any:
        return self.compute(step)


def needs_by_name(task_needs: Iterable[Need], parts: Mapping[str, Needing]) -> dict[str, Need]:
    """Returns every available need by name, both the task's own needs and those that parts provide.

    Raises ValueError when two different needs share a name.
    """
    out = {need.name: need for need in task_needs}
    for place, part in parts.items():
        for need in part.provides:
            if out.setdefault(need.name, need) != need:
                raise ValueError(
                    f"{place} provides a need called {need.name!r}, but a different need already has that name"
                )
    return out


def check_needs(parts: Mapping[str, Needing], served: Mapping[str, Need]) -> frozenset[str]:
    """Returns the names of all needs that the parts declare. Raises ValueError for a need that nothing provides.

    Args:
        parts: the parts by their keys in the recipe
        served: the available needs by name
    """
    for place, part in parts.items():
        missing = sorted(part.needs - served.keys())
        if missing:
            choices = ", ".join(sorted(served))
            raise ValueError(f"{place} needs {missing[0]!r}, which nothing here provides. Available: {choices}.")
    return frozenset().union(*(p.needs for p in parts.values()))
