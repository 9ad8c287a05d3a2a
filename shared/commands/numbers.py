"""Keyword arguments for numeric typer options, for example `typer.Option(None, **GUIDANCE)`."""

from __future__ import annotations

from typing import Any

import typer


def number(low: float, high: float) -> dict[str, Any]:
    """Returns the arguments for a number from `low` to `high`. Unlike typer's own `min` and `max`, they also reject NaN."""

    def parsed(text: Any) -> float:
        try:
            value = float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise typer.BadParameter(f"{text} is not a number between {low:g} and {high:g}")
        return value

    return {"parser": parsed, "metavar": f"NUMBER [{low:g}<=x<={high:g}]"}


#: The limits are the same as those of recipes (`shared.config`) and of clip files, which check the numbers again.
GUIDANCE, STRENGTH, FPS = number(-1000, 1000), number(-100, 100), number(0.1, 1000)
SHARE = number(0, 1)
