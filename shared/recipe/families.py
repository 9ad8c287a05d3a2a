"""The families of methods: the equation of each, the settings that matter, when to use it, and what it costs."""

from __future__ import annotations

from typing import Annotated

import yaml
from pydantic import Field

from shared.config import Part
from shared.recipe.catalog import config_folder


class Family(Part):
    """Methods with the same objective, trained on the same parameters."""

    title: str
    equation: str
    settings: dict[str, str]  # a key of its recipes -> what the key does
    use: str
    cost: str
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]


def families(modality: str) -> dict[str, Family]:
    """Returns the families of a modality ("image", "video", "3d") by name, from `configs/families.yaml`."""
    known = yaml.safe_load((config_folder() / "families.yaml").read_text("utf-8"))
    return {name: Family(**entry) for name, entry in known[modality].items()}
