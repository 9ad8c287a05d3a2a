"""What a recipe of assets says: how renders are guided, what is optimised and how it is drawn."""

from __future__ import annotations

from pcs_3d.distill.distill_recipe import DistillRecipe


class Recipe3D(DistillRecipe):
    """The resolved, typed description of how an asset is made."""
