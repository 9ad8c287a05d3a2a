"""The public face of `pcs_image`: personalize, generate, evaluate. Command line, Python and web page are doors to this."""

from __future__ import annotations

from shared.runner.base import Runner, attached

__all__ = ["ImageRunner", "attached"]


class ImageRunner(Runner):
    """One backbone and the concepts attached to it; what it makes are pictures [N, 3, H, W] in [-1, 1]."""
