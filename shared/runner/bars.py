"""What shows progress, for what several packages do in one command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bars:
    """What shows the progress: `bar()` of a training, `counter()` of everything else."""

    bar: Callable[[], Any]
    counter: Callable[[], Any]
