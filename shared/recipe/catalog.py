"""Finds the available recipes, and defines the taxonomy in which each recipe has its place.

This module is cheap to import, because it does not need torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shared.config import Part, absent, expanded, unknown


class Taxonomy(Part):
    """A method's place in the taxonomy of the survey (https://arxiv.org/abs/2405.05538).

    Recipes set the scheme and the concept. The other fields are derived from a recipe's parts
    (`shared.recipe.taxonomy`), unless the recipe sets them itself.
    """

    # whether the model is trained for each concept, or once in advance
    scheme: Literal["test-time fine-tuning", "pre-trained adaptation"] = "test-time fine-tuning"
    concept: tuple[Literal["subject", "face", "style", "high-level semantics"], ...] = ("subject",)  # what is learned
    modifier: str = ""  # the words that stand for the concept
    trains: str = ""  # which parameters are trained
    prompt_engineering: str = ""  # how training prompts are made
    attention: str = ""  # changes to attention
    mask: str = ""  # how masks are used
    augmentation: str = ""  # how pictures are varied
    regularization: str = ""  # what limits overfitting


def config_folder() -> Path:
    """Returns the `configs` folder, which is next to the installed packages, or at the root of a checkout. It is not found
    by importing it, because a working directory or a program that uses the suite may have a folder of that name."""
    return Path(__file__).resolve().parents[2] / "configs"


def recipe_files(modality: str) -> dict[str, Path]:
    """Returns the file of each shipped recipe of a modality ("image", "video", "3d"), by name."""
    return {p.stem: p for p in sorted((config_folder() / modality).glob("*.yaml"))}


def find(recipe: str, modality: str) -> Path:
    """Finds a recipe by name or path. Raises ValueError, listing the available names, if there is no such recipe."""
    known = recipe_files(modality)
    if recipe in known:
        return known[recipe]
    path = expanded(recipe)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ValueError(f"recipe file {recipe} {absent(path)}")
    if looped := absent(path, ""):
        raise ValueError(f"recipe file {recipe} {looped}")
    raise ValueError(unknown(recipe, known, "recipe"))
