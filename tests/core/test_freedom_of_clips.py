"""The freedom of clips measures how much the subject's pose at each moment differs between clips of the same prompt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from shared.metrics.clips.freedom import freedom_of_clips
from shared.metrics.clips.scorer import MeasuredClips, SubjectFrames, joined
from shared.metrics.freedom import Range

SCALE = Range(free=0.6, fixed=0.1)
SEEN = torch.ones(2, 4, dtype=torch.bool)


def turned(degrees: float) -> Tensor:
    """Returns the embeddings (`[4, 2]`) of four frames that turn the subject by 20° each, starting at `degrees`."""
    angles = torch.deg2rad(degrees + 20 * torch.arange(4.0))
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_clips_that_turn_in_the_same_way_have_no_freedom_and_distances_are_scaled_as_for_pictures() -> None:
    assert freedom_of_clips(torch.stack([turned(0), 3 * turned(0)]), SEEN, [0, 0], SCALE) == [0, 0]
    distance = 1 - math.cos(math.radians(60))
    apart = freedom_of_clips(torch.stack([turned(0), turned(60)]), SEEN, [0, 0], SCALE)
    assert apart == pytest.approx([(distance - 0.1) / 0.5] * 2)
    assert freedom_of_clips(torch.stack([turned(0), turned(120)]), SEEN, [0, 0], SCALE) == [1, 1]


def test_only_clips_of_the_same_prompt_and_verified_frames_at_the_same_moment_are_compared() -> None:
    clips = torch.stack([turned(0), turned(60), turned(0)])
    verified = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    found = freedom_of_clips(clips, verified, ["beach", "beach", "snow"], SCALE)
    assert found[:2] == pytest.approx([0.8, 0.8]) and math.isnan(found[2])
    verified[1, 1] = False  # one of four moments is a smaller share than `ENOUGH`
    assert all(math.isnan(v) for v in freedom_of_clips(clips, verified, ["beach", "beach", "snow"], SCALE))
    clips[1, 0] = normalize(torch.randn(2), dim=0)
    verified[1] = torch.tensor([False, True, True, True])
    assert freedom_of_clips(clips, verified, [0, 0, 1], SCALE)[:2] == pytest.approx([0.8, 0.8])
    with pytest.raises(ValueError, match="2 prompts"):
        freedom_of_clips(clips, verified, [0, 1], SCALE)


def test_joined_batches_have_no_subject_if_any_of_them_lacks_one() -> None:
    def batch(*degrees: float, subject: bool = True, **scores: float) -> MeasuredClips:
        crops = torch.stack([turned(d) for d in degrees])
        seen = SubjectFrames(crops, torch.ones(len(degrees), 4, dtype=torch.bool)) if subject else None
        n = len(degrees)
        return MeasuredClips({k: [v] * n for k, v in scores.items()}, [{}] * n, [""] * n, crops, seen)

    both = joined([batch(0, 60, clip_t=0.3), batch(90)])
    assert both.subject is not None and torch.equal(both.subject.crops[2], turned(90))
    assert both.subject.verified.shape == (3, 4) and both.scores["clip_t"][:2] == [0.3, 0.3]
    assert math.isnan(both.scores["clip_t"][2])
    assert joined([batch(0), batch(1, subject=False)]).subject is None and joined([]).seen == []
