"""Checks for libraries that only assets need."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = {"nerfacc": "nerfacc", "scipy": "scipy", "skimage": "scikit-image", "trimesh": "trimesh", "xatlas": "xatlas"}


def check_installed() -> None:
    """Raises ValueError naming the libraries that are missing."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"assets need {', '.join(missing)}: pip install 'personalization-suite[3d]'")
