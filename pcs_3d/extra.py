"""Checks that the packages that only assets need are installed."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = {"nerfacc": "nerfacc", "scipy": "scipy", "skimage": "scikit-image", "trimesh": "trimesh", "xatlas": "xatlas"}


def check_installed() -> None:
    """Raises ValueError, with the names of the missing packages, if any package is missing."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"packages for assets are not installed ({', '.join(missing)}): pip install 'personalization-suite[3d]'"
        )
