"""Runs commands that must fail with a clear message and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def tree(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.lstat().st_size for p in sorted(root.rglob("*"))}


def refusing(pcs: Callable, root: Path) -> Callable[..., str]:
    """Returns a function that runs a command and returns its error message.

    The command must fail and leave `root` unchanged.
    """

    def call(*arguments, code: int = 2) -> str:
        before = tree(root)
        ran = pcs(*arguments)
        assert ran.code == code, (ran.code, ran.err)
        assert "Traceback" not in ran.err and ran.err.strip() and ran.out == ""
        assert tree(root) == before
        return ran.err

    return call
