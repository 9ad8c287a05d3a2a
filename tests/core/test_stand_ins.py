"""Checks the score that selects the best checkpoint against closed forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics.copying import Copying
from shared.metrics.encoders import InstrumentInfo, Instruments, Typical
from shared.metrics.scores import trade_off
from shared.metrics.stand_ins import FLOOR, Previewed, soft_freedom, soft_identity, stand_ins
from shared.metrics.verification import Look

TYPICAL = Typical(same=0.9, other=0.5, free=0.4, fixed=0.1)


def _look(likeness: Sequence[float], crops: Tensor | None = None, copied: Sequence[bool] = ()) -> Look:
    n = len(likeness)
    zero, flags = torch.zeros(n, dtype=torch.float64), torch.tensor(list(copied) or [False] * n)
    copying = Copying(torch.zeros(n, dtype=torch.long), zero, zero, flags)
    return Look(
        torch.zeros(n, 2), torch.zeros(n, 2), copying, None, torch.tensor(likeness).double(), None, crops, None, None
    )


def _made(look: Look, prompts: Sequence[str], expects: Sequence[Mapping[str, str]] | None = None) -> Previewed:
    n = len(prompts)
    return Previewed(torch.zeros(n, 3, 8, 8), prompts, expects or [{}] * n, look, {"identity_i": [0.3] * n})


def test_soft_identity_is_0_for_another_thing_and_1_for_the_thing_itself() -> None:
    look = _look([0.5, 0.7, 0.9, 0.99, 0.9], copied=[False, False, False, False, True])
    assert soft_identity(look, TYPICAL, {}).tolist() == pytest.approx([0, 0.5, 1, 1, 0])
    assert soft_identity(look, None, {"dino_i": [0.2] * 5}).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0])


def test_soft_freedom_weights_each_pair_by_how_clearly_both_pictures_show_the_thing() -> None:
    axes = torch.eye(3)
    crops = torch.stack([axes[0], axes[0], axes[1]])
    made = _made(_look([0.9] * 3, crops), ["p"] * 3)
    every = soft_freedom(made, torch.ones(3).double(), TYPICAL)
    assert every == pytest.approx((2 / 3 - 0.1) / 0.3, abs=1e-4) or every == 1.0
    same = soft_freedom(made, torch.tensor([1.0, 1.0, 0.0]).double(), TYPICAL)
    assert same == pytest.approx(0, abs=1e-3), "the third picture does not show the thing"
    near = F.normalize(torch.stack([axes[0], axes[0] + 0.8 * axes[1]]), dim=1)
    half = soft_freedom(_made(_look([0.9] * 2, near), ["p"] * 2), torch.ones(2).double(), TYPICAL)
    assert half == pytest.approx((1 - float(near[0] @ near[1]) - 0.1) / 0.3, abs=1e-5)
    asked = _made(_look([0.9] * 2, near), ["p"] * 2, [{"view": "side"}] * 2)
    assert soft_freedom(asked, torch.ones(2).double(), TYPICAL) is None
    assert soft_freedom(_made(_look([0.9] * 2, near), ["p", "q"]), torch.ones(2).double(), TYPICAL) is None


class _Sure:
    info = InstrumentInfo("reader", "test")

    def read(self, pixels: Tensor) -> dict[str, list[str]]:
        return {"background": ["snow"] * len(pixels)}

    def chances(self, pixels: Tensor, asked: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
        return [dict.fromkeys(of, 0.4) for of in asked]


def test_the_score_is_the_harmonic_mean_of_the_stand_ins() -> None:
    crops = torch.eye(2)[[0, 0]]
    made = _made(_look([0.7, 0.7], crops), ["p", "p"], [{"background": "beach"}] * 2)
    found = stand_ins(made, Instruments(attributes=_Sure(), typical=TYPICAL))
    assert found["stand_in_text"] == pytest.approx(0.4), "the reading is wrong, but only by a small margin"
    assert found["stand_in_freedom"] == 0 and found["score"] == pytest.approx(trade_off(0.5, 0.4, FLOOR))
    better = stand_ins(
        _made(_look([0.8, 0.8], crops), ["p", "p"], made.expects), Instruments(attributes=_Sure(), typical=TYPICAL)
    )
    assert better["score"] > found["score"], "two checkpoints with no freedom still differ in the other stand-ins"
