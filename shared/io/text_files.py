"""Reads users' text files, which must be in UTF-8 (with or without a byte-order mark) and must not be too large."""

from __future__ import annotations

import os
from pathlib import Path

from shared.config import expanded
from shared.io.failures import reading

MAX_BYTES = 10_000_000


def read_text_file(path: str | os.PathLike[str], what: str, max_bytes: int = MAX_BYTES) -> str:
    """Returns the text of a file. Raises ValueError, naming `what` and the file, if the file cannot be opened, is
    larger than `max_bytes`, or is not UTF-8.

    Args:
        what: how errors refer to the file, for example "the caption"
    """
    path = Path(expanded(path))
    try:
        with reading(f"{what} {path}"):
            size = path.stat().st_size
            if size > max_bytes:
                raise ValueError(
                    f"{what} {path} is {size:,} bytes, above the limit of {max_bytes:,}: is it the right file?"
                )
            return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{what} {path} is not UTF-8 text: save it as UTF-8") from None
