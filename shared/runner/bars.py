"""Progress displays for commands that involve several packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bars:
    """Creates progress displays: `bar()` for training, `counter()` for everything else."""

    bar: Callable[[], Any]
    counter: Callable[[], Any]
