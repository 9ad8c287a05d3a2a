"""The public interface of `pcs_image`: personalize, generate, evaluate. The command line and Python code both use it."""

from __future__ import annotations

from shared.runner.base import Runner, attached

__all__ = ["ImageRunner", "attached"]


class ImageRunner(Runner):
    """One backbone and the concepts attached to it; makes pictures [N, 3, H, W] in [-1, 1]."""
