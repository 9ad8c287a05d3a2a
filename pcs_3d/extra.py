"""Checks that the packages needed only for assets are installed."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = {"nerfacc": "nerfacc", "scipy": "scipy", "skimage": "scikit-image", "trimesh": "trimesh", "xatlas": "xatlas"}


def check_installed() -> None:
    """Raises ValueError if any packages are missing. The message names them."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"packages needed for assets are not installed ({', '.join(missing)}): "
            "pip install 'personalization-suite[3d]'"
        )
