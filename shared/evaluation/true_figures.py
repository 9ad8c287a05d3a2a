"""Measures a subject's true pictures, and caches the figures on disk under a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from shared.evaluation.prompt_sets import PromptSet
from shared.evaluation.report_facts import Case
from shared.io.outputs import write_text
from shared.metrics import copied_things, copying, crops, encoders, freedom, measure_true, scores, verification
from shared.metrics.measure_true import measure_true as measure
from shared.metrics.scorer import Scorer
from shared.metrics.true_thing import Asked, TrueFigures

FOLDER = "true-figures"  # a folder in the cache
_CODE = (copied_things, copying, crops, encoders, freedom, measure_true, scores, verification)
Progress = Callable[[str, int, int], None]


def true_figures(
    scorer: Scorer, case: Case, prompts: PromptSet, progress: Progress | None = None
) -> TrueFigures | None:
    """Returns the thresholds and the pose range for a case's subject, from the cache if possible. Returns None for a
    style, if no synthetic world can draw the subject, or if there are no look-alikes or no recognizer.

    progress: called with ("true pictures of the subject", done, total)
    """
    tools = scorer.instruments
    if case.true is None or case.kind == "style" or scorer.chance is None or tools.attributes is None:
        return None
    asked = [Asked(p.expects, p.free) for p in prompts.prompts]
    key = _key(scorer, case, asked)
    file = case.cache / FOLDER / f"{key}.json" if case.cache and key else None
    known = _read(file) if file else None
    if known is not None:
        return known
    tell = (lambda done, of: progress("true pictures of the subject", done, of)) if progress else None
    figures = measure(scorer.verifier, case.true, asked, tools, tell)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, figures.model_dump_json())
    return figures


def _read(file: Path) -> TrueFigures | None:
    """Reads cached figures. Returns None if there are none or the file is damaged, because they can be measured again."""
    try:
        return TrueFigures.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError):
        return None


def _key(scorer: Scorer, case: Case, asked: Sequence[Asked]) -> str:
    """Returns a hash of everything the figures depend on, or "" if something has no fingerprint."""
    assert case.true is not None
    tools = scorer.instruments
    prints = [i.fingerprint for i in tools.infos()]
    if not all(prints) or not case.true.key or (case.through is not None and not case.through_key):
        return ""
    facts = {
        "thing": case.true.key,
        "instruments": prints,
        "crops": [tools.crops.margin, tools.crops.cells],
        "through": case.through_key,
        "code": _code(),
        "class": case.class_noun,
        "prompts": [[dict(a.expects), a.free] for a in asked],
        "references": _pixels(case.references),
        "gallery": {n: _pixels(p) for n, p in (case.gallery or {}).items()},
        "fresh": _pixels(case.fresh) if case.fresh is not None else "",
        "masks": _pixels(case.masks[:, None].expand(-1, 3, -1, -1) * 2 - 1) if case.masks is not None else "",
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _pixels(pictures: Tensor) -> str:
    return hashlib.sha256(encoders.to_bytes(pictures)).hexdigest()


@lru_cache(maxsize=1)
def _code() -> str:
    """Returns a hash of the code that takes the measurements."""
    digest = hashlib.sha256()
    for module in _CODE:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()
