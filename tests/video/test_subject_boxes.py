"""Tests the file format of boxes that place a subject, and the effect of these boxes on attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.backbones.wan import WanBackbone
from shared.backbones.attention_maps import Watch
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.sampling import DenoisingStep
from shared.sampling.box_tracks import at, box_masks, latent_frame_times, read_tracks
from shared.sampling.subject_boxes import SubjectBoxes
from tests.core.runs import sample
from tests.video.clip_models import build_animatediff
from tests.video.transformer_models import build_wan


def test_boxes_are_interpolated_linearly() -> None:
    track = {2: (0.0, 0.0, 0.5, 0.5), 6: (0.4, 0.2, 0.9, 0.7)}
    assert at(track, 0) == at(track, 2) == track[2] and at(track, 9) == track[6]
    assert at(track, 3) == pytest.approx((0.1, 0.05, 0.6, 0.55))
    assert latent_frame_times(3, 4) == [0, 2.5, 6.5]  # the midpoints of frames 1 to 4 and of frames 5 to 8
    masks = box_masks(track, [0, 6], 10, 10)
    assert masks.sum((1, 2)).tolist() == [25, 25] and bool(masks[1, 2:7, 4:9].all())
    assert box_masks({0: (0.41, 0.5, 0.44, 0.52)}, [0], 4, 4).sum() == 1  # a box narrower than a cell covers one cell


def test_boxes_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"my-mug": [0, 0, 0.5, 1], "dog": {"0": [0, 0, 1, 1], "7": [0, 0, 0.1, 0.1]}}))
    assert read_tracks(path) == {"my-mug": {0: (0, 0, 0.5, 1)}, "dog": {0: (0, 0, 1, 1), 7: (0, 0, 0.1, 0.1)}}
    for text, message in [
        ("{", "is not readable JSON"),
        ("[1]", 'write {"NAME": '),
        ('{"a": [0, 0, 2, 1]}', r"a, frame 0: .* is not a box \[left, top, right, bottom\] in fractions"),
        ('{"a": [0.5, 0, 0.5, 1]}', "is empty; left must be less than right"),
        ('{"a": {"x": [0, 0, 1, 1]}}', "'x' is not a frame"),
        ('{"a": "b"}', "give a box"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_tracks(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_tracks(tmp_path / "gone.json")


#: The number of latent frames that each family is tested with, or an empty tuple for pictures.
BACKBONES: dict[str, tuple[int, ...]] = {
    "sd": (),
    "animatediff": (4,),
    "wan": (2,),
}
BOXES = {"red mug": {0: (0.0, 0.0, 0.5, 0.5), 3: (0.5, 0.5, 1.0, 1.0)}}


def make(family: str, make_tiny_sd: Callable[..., Any]) -> Any:
    if family == "wan":
        return WanBackbone(build_wan(), "tiny")
    pipe = make_tiny_sd()
    return StableDiffusionBackbone(pipe) if family == "sd" else AnimateDiffBackbone(build_animatediff(pipe))


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_words_are_attended_to_only_inside_the_box_of_each_frame(family: str, make_tiny_sd: Any) -> None:
    """The attention maps equal softmax(log(map without boxes) + bias)."""
    backbone, prompts = make(family, make_tiny_sd), ["a red mug on a table", "a dog and a red mug"]
    side = 4 if family == "wan" else 8
    x = torch.randn(2, 4, *BACKBONES[family], side, side, generator=torch.Generator().manual_seed(0))
    boxes = SubjectBoxes(boxes=BOXES if family != "sd" else {"red mug": BOXES["red mug"][0]}, strength=2.0)
    step = DenoisingStep(0, 50, torch.tensor(900), backbone, prompts, [1, 2], x)
    texts, plain = backbone.encode(prompts), backbone.encode(["", ""])
    watch = Watch(kinds=frozenset({"cross"}), heads="all")
    maps: list[dict[str, Any]] = []
    for hook in (None, boxes):
        with hook.during(step) if hook else torch.no_grad(), backbone.attending(watch) as record:
            backbone.predict_guided(x, torch.tensor(900), texts, plain, 4.0)
            maps.append({name: record[name] for name in record})
    words = backbone.word_positions(prompts, "red mug")
    name = next(iter(maps[0]))  # in the first layer, the queries are the same with and without boxes
    site = next(s for s in backbone.sites() if s.name == name)
    frames = x.shape[2] if x.ndim == 5 else 1
    times = [0, 2.5] if family == "wan" else list(range(frames))
    inside = box_masks(boxes.boxes["red mug"], [float(t) for t in times], *site.grid(side, side)).flatten(1)
    before, after = maps[0][name], maps[1][name]
    if family == "wan":  # the queries of a row contain its frames one after another
        before, after = (m.unflatten(2, (frames, -1)).transpose(1, 2) for m in (before, after))
    else:
        before, after = (m.unflatten(0, (4, frames)) for m in (before, after))
    assert torch.equal(before[:2], after[:2])  # boxes do not affect the rows of the negative prompt
    for row in range(2):
        for frame in range(frames):
            grown = 2.0 * (1 - inside[frame].float().mean())
            bias = torch.where(inside[frame], grown, torch.tensor(-1e4))[:, None] * words[row]
            expected = (before[2 + row, frame].clamp_min(1e-30).log() + bias).softmax(-1)
            torch.testing.assert_close(after[2 + row, frame], expected, atol=1e-5, rtol=1e-4)


def test_boxes_take_effect_only_in_the_first_steps(make_tiny_sd: Any) -> None:
    sd = StableDiffusionBackbone(make_tiny_sd())
    how: dict[str, Any] = {"seeds": [1], "guidance": 4.0, "steps": 4}
    plain = sample(sd, ["a red mug"], **how)
    part = {"boxes": {"red mug": [0, 0, 0.5, 0.5]}, "strength": 20.0}
    early = sample(sd, ["a red mug"], hooks=(SubjectBoxes(**part, until=0.25),), **how)
    always = sample(sd, ["a red mug"], hooks=(SubjectBoxes(**part, until=1.0),), **how)
    assert not torch.equal(early, plain) and not torch.equal(early, always)
    assert torch.equal(sample(sd, ["a red mug"], hooks=(SubjectBoxes(**part, until=0.0),), **how), plain)
    for boxes, message in [
        ({"cat": [0, 0, 1, 1]}, "'cat' has a box, but does not occur in the prompt 'a red mug'"),
        (
            {"red mug": {0: [0, 0, 1, 1], 3: [0, 0, 1, 1]}},
            r"go up to frame 3 \(counted from 0\), but only 1 frame is generated",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(sd, ["a red mug"], hooks=(SubjectBoxes(boxes=boxes),), **how)
