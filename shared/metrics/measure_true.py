"""Measures true pictures of a thing, which set the bars that a recipe's pictures must reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics.encoders import Instruments
from shared.metrics.freedom import Pairs, effective_views, pairs, placement_spread, pooled
from shared.metrics.true_thing import Asked, Bar, TrueFigures, TrueThing, style_of
from shared.metrics.verification import PASSING, Look, Verifier

#: The minimum number of pictures drawn per style, and the minimum number per prompt, in each of the two sets.
BEHIND, PER_PROMPT = 120, 16
#: The number of pictures per prompt in one pose and place, and the number of poses tried before a prompt is left out.
FIXED, POSES = 6, 8
#: The share of true pictures that may count as pasted from a reference. The limit is set accordingly.
PASTED = 0.03
_BARS, _OTHERS, _FIXED = 1000, 1001, 1002  # seeds of the three sets of pictures
CHUNK = 256  # pictures per batch


@dataclass(frozen=True)
class _Set:
    """Pictures of several prompts, where row i shows prompt `prompts[i]`."""

    prompts: Sequence[int]
    look: Look
    views: Sequence[str]


def measure_true(
    verifier: Verifier,
    thing: TrueThing,
    prompts: Sequence[Asked],
    instruments: Instruments,
    progress: Callable[[int, int], None] | None = None,
) -> TrueFigures:
    """Measures the bar for each style among the prompts, and the range of freedom if poses can be compared.

    Two sets of pictures are drawn for every prompt: one sets the bar, and the other is judged against it. The pictures
    of the second set that pass also give R, the distance between random views. The verifier must have look-alikes.
    """
    sets = []
    for number, seed in enumerate((_BARS, _OTHERS)):
        sets.append(_drawn(verifier, thing, prompts, instruments, seed))
        if progress is not None:
            progress(number + 1, 3)
    first, second = sets
    limit = None if first.look.pasted is None else float(torch.quantile(first.look.pasted.amax(1), 1 - PASTED))
    bars, passed = {}, torch.zeros(len(second.prompts), dtype=torch.bool)
    for style in dict.fromkeys(style_of(p.expects) for p in prompts):
        rows, others = (_rows_of(style, prompts, s) for s in (first, second))
        judged = rows if first.look.face is None else rows[first.look.face[rows]]
        likeness = first.look.likeness[judged if len(judged) else rows]
        least = float(torch.quantile(likeness, 1 - PASSING))
        passed[others] = second.look.passes([least] * len(second.prompts), limit)[others]
        faced = others if second.look.face is None else others[second.look.face[others]]
        share = float(passed[faced].double().mean()) if len(faced) else 0.0
        bars[style] = Bar(least=least, passed=share, pictures=len(others), faceless=len(others) - len(faced))
    figures = TrueFigures(bars=bars, pasted=limit)
    free = [i for i, p in enumerate(prompts) if p.free]
    if not free or second.look.crops is None or second.look.places is None:
        return figures
    update = _free(verifier, thing, prompts, figures, _of(free, second, passed))
    if progress is not None:
        progress(3, 3)
    return figures.model_copy(update=update)


@dataclass(frozen=True)
class _Passed:
    """The pictures of the prompts that leave the pose open, and which of them are verified."""

    prompts: Sequence[int]
    crops: Tensor
    places: Tensor
    views: Sequence[str]
    passed: Tensor


def _of(free: Sequence[int], drawn: _Set, passed: Tensor) -> _Passed:
    rows = [i for i, p in enumerate(drawn.prompts) if p in set(free)]
    assert drawn.look.crops is not None and drawn.look.places is not None
    views = [drawn.views[i] for i in rows if passed[i]] if drawn.views else []
    at = torch.tensor(rows)
    return _Passed([drawn.prompts[i] for i in rows], drawn.look.crops[at], drawn.look.places[at], views, passed[at])


def _free(
    verifier: Verifier, thing: TrueThing, prompts: Sequence[Asked], figures: TrueFigures, drawn: _Passed
) -> dict[str, float | None]:
    """Computes R, F, and the spread of place, size and view."""
    spread = pooled(pairs(drawn.crops, drawn.prompts, drawn.passed).values())
    kept = drawn.passed.nonzero()[:, 0]
    place, size = placement_spread(drawn.places[kept], [drawn.prompts[i] for i in kept.tolist()])
    fixed = _fixed(verifier, thing, prompts, figures)
    values = {
        "free": spread.mean,
        "fixed": fixed.mean,
        "place": place,
        "size": size,
        "views": effective_views(drawn.views),
    }
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def _fixed(verifier: Verifier, thing: TrueThing, prompts: Sequence[Asked], figures: TrueFigures) -> Pairs:
    """Compares pictures in one pose and place. Each prompt uses the first pose in which at least half of its
    pictures are verified."""
    left = [i for i, p in enumerate(prompts) if p.free]
    found: dict[int, Pairs] = {}
    for pose in range(POSES):
        if not left:
            break
        of = [i for i in left for _ in range(FIXED)]
        asked = [prompts[i].expects for i in of]
        look = verifier.look(verifier.through(thing.pictures(asked, _FIXED + pose, pose)))
        assert look.crops is not None
        passed = look.passes([figures.bars[style_of(e)].least for e in asked], figures.pasted)
        by_prompt = pairs(look.crops, of, passed)
        for i in left:
            if int(passed[torch.tensor(of) == i].sum()) * 2 >= FIXED:
                found[i] = by_prompt[i]
        left = [i for i in left if i not in found]
    return pooled(found.values())


def _drawn(verifier: Verifier, thing: TrueThing, prompts: Sequence[Asked], instruments: Instruments, seed: int) -> _Set:
    """Draws at least `BEHIND` pictures of every style, spread evenly over its prompts, and passes them through the
    autoencoder."""
    styles = [style_of(p.expects) for p in prompts]
    counts = [max(PER_PROMPT, math.ceil(BEHIND / styles.count(style))) for style in styles]
    of = [i for i, count in enumerate(counts) for _ in range(count)]
    looks, views = [], []
    for start in range(0, len(of), CHUNK):
        asked = [prompts[i].expects for i in of[start : start + CHUNK]]
        pixels = verifier.through(thing.pictures(asked, seed + 10_000 * start))
        looks.append(verifier.look(pixels))
        if instruments.attributes is not None:
            views += instruments.attributes.read(pixels).get("view", [])
    return _Set(of, Look.joined(looks), views)


def _rows_of(style: str, prompts: Sequence[Asked], drawn: _Set) -> Tensor:
    return torch.tensor([i for i, p in enumerate(drawn.prompts) if style_of(prompts[p].expects) == style])


def ceilings(figures: TrueFigures, expects: Sequence[Mapping[str, str]]) -> tuple[list[float], list[float]]:
    """Returns, for each picture, the likeness that it must reach, and the share of true pictures of its style that pass
    (both NaN if the style has no bar)."""
    bars = [figures.bar(e) for e in expects]
    return [b.least if b else math.nan for b in bars], [b.passed if b else math.nan for b in bars]
