"""Turns pictures into rows of a report, with flags for their faults."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from shared.metrics.encoders import to_pil
from shared.metrics.report import PICTURES, Kind, PictureRow
from shared.metrics.scorer import Measured
from shared.metrics.verification import SUBJECT


def picture_rows(
    kind: Kind,
    shots: Sequence[tuple[int, int]],
    texts: Sequence[str],
    pixels: Tensor,
    measured: Measured,
    expects: Sequence[Mapping[str, str]],
) -> tuple[list[PictureRow], dict[str, bytes]]:
    """Returns one row and one PNG per picture."""
    rows, thumbs = [], {}
    for n, ((prompt, seed), png) in enumerate(zip(shots, pngs(pixels), strict=True)):
        name = f"{PICTURES}/{kind}_{prompt:02d}_{seed}.png"
        thumbs[name] = png
        scores: dict[str, float | None] = {k: v[n] for k, v in measured.scores.items()}
        flags = _flags(measured, n, expects[n]) if kind in ("concept", "freedom") else []
        rows.append(
            PictureRow(
                kind=kind,
                prompt=prompt,
                text=texts[prompt],
                seed=seed,
                file=name,
                scores=scores,
                expects=dict(expects[n]),
                seen=measured.seen[n],
                nearest=measured.nearest[n],
                flags=flags,
                failed=bool(flags),
            )
        )
    return rows, thumbs


def _flags(measured: Measured, n: int, expects: Mapping[str, str]) -> list[str]:
    """Lists what is wrong with picture n."""
    flags = []
    if _is(measured, "copied", n):
        flags.append(f"copies reference {measured.look.source(n) + 1}")
    if _is(measured, "no_face", n):
        if not math.isnan(measured.scores["identity"][n]):  # NaN means that the prompt asks for a view without a face
            flags.append("no face")
    elif measured.nearest[n] and measured.nearest[n] != SUBJECT:
        flags.append(f"mistaken for {measured.nearest[n]}")
    elif not flags and "verified" in measured.scores and measured.scores["verified"][n] == 0:
        flags.append("recognized, but not as similar to the references as 95% of the true renders are")
    for name, hit in measured.hits[n].items():
        if not hit:
            flags.append(f"{name}: {measured.seen[n][name]}, but the prompt asks for {expects[name]}")
    return flags


def _is(measured: Measured, key: str, n: int) -> bool:
    return key in measured.scores and measured.scores[key][n] == 1


def pngs(pixels: Tensor) -> list[bytes]:
    """Encodes pictures `[N, 3, H, W]` in [-1, 1] as N PNG files."""
    out = []
    for picture in to_pil(pixels):
        stream = io.BytesIO()
        picture.save(stream, "PNG", optimize=True)
        out.append(stream.getvalue())
    return out
