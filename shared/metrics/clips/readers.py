"""Chooses the network that reads things' paths from clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shared.metrics.clips.paths import PathReader


def _toybox() -> PathReader:
    from shared.toybox.evaluators.pose import load_pose

    return load_pose().path


#: The path readers of the worlds that have one, keyed by the backbone's `World.instruments`.
OWN: Mapping[str, Callable[[], PathReader]] = {"toybox": _toybox}


def load_path_reader(world: str) -> PathReader | None:
    """Loads the path reader of a world, or returns None if the world has none."""
    make = OWN.get(world)
    return None if make is None else make()
