"""The public interface of `pcs_image`, for the command line and for Python code. Its runner learns, generates and
evaluates."""

from __future__ import annotations

from shared.runner.base import Runner, attached

__all__ = ["ImageRunner", "attached"]


class ImageRunner(Runner):
    """A backbone and the concepts attached to it. It generates pictures [N, 3, H, W] in [-1, 1]."""
