"""The families of methods. Each family has an equation, key settings, a use and a cost."""

from __future__ import annotations

from typing import Annotated

import yaml
from pydantic import Field

from shared.config import Part
from shared.recipe.catalog import config_folder


class Family(Part):
    """A family of methods that share an objective and train the same parameters."""

    title: str
    equation: str
    settings: dict[str, str]  # key in the family's recipes -> what it does
    use: str
    cost: str
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]


def families(modality: str) -> dict[str, Family]:
    """Returns the families of a modality ("image", "video", "3d") by name, from `configs/families.yaml`."""
    known = yaml.safe_load((config_folder() / "families.yaml").read_text("utf-8"))
    return {name: Family(**entry) for name, entry in known[modality].items()}
