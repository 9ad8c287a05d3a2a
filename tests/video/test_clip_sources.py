"""Tests sources that make still clips from pictures, split clips into frames, or let the base model generate clips."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_video.motion.clip_source import Clips
from pcs_video.motion.frozen_clips import FrozenClips
from pcs_video.motion.generated_clips import GeneratedClips
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.config import validate
from shared.io.clips.find_clips import find_clips
from shared.io.clips.window import ClipWindow
from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.sources import Generated, References, SourceContext
from shared.types import Subject
from tests.core.runs import paint
from tests.video.conftest import FAST


def context(subject: Subject, cache: Path, generate: Any = None) -> SourceContext:
    return SourceContext({"mug": subject}, 32, 0, cache, generate, "a model")


def test_frozen_clips_repeat_a_picture_and_its_mask(tmp_path: Path) -> None:
    subject = read_subject(paint(tmp_path / "photos"), "mug")
    pictures = list(References().examples(context(subject, tmp_path)))
    source = FrozenClips(length=3)
    assert source.gives == "instance" and source.check({"mug": subject}, ()) == References().check({"mug": subject}, ())
    clips = list(source.examples(context(subject, tmp_path)))
    assert len(clips) == 3
    for clip, picture in zip(clips, pictures, strict=True):
        assert clip.pixels.shape == (3, 3, 32, 32) and (clip.owners, clip.source) == (picture.owners, picture.source)
        assert all(torch.equal(frame.pixels, picture.pixels) for frame in clip.frames())
        assert all(torch.equal(frame.masks["mug"], picture.masks["mug"]) for frame in clip.frames())


def test_frames_can_be_read_as_separate_pictures(clip_folder: Path, tmp_path: Path) -> None:
    found = find_clips(clip_folder)
    subject = Subject(class_noun="mug", captions=found.captions, clips=found.clips)
    whole = list(Clips(window=ClipWindow(length=4)).examples(context(subject, tmp_path)))
    apart = list(Clips(window=ClipWindow(length=4), apart=True).examples(context(subject, tmp_path)))
    assert len(apart) == 4 * len(whole)
    assert torch.equal(torch.stack([e.pixels for e in apart[:4]], dim=1), whole[0].pixels)
    assert {e.caption for e in apart[:4]} == {whole[0].caption}


def test_frames_need_not_be_square(clip_folder: Path, clip_model: Path, tmp_path: Path) -> None:
    found = find_clips(clip_folder)
    subject = Subject(class_noun="mug", captions=found.captions, clips=found.clips)
    wide = next(Clips(window=ClipWindow(length=4), size=(16, 32)).examples(context(subject, tmp_path))).pixels
    square = next(Clips(window=ClipWindow(length=4)).examples(context(subject, tmp_path))).pixels
    # the clip is cropped around its centre, not stretched
    assert wide.shape == (3, 4, 16, 32) and torch.equal(wide, square[:, :, 8:24])
    places = [f"backbone={clip_model}", f"subject.clips={clip_folder}", f"output={tmp_path / 'slide.concept'}"]
    for size, wrong in (([16, 32], ""), ([16, 30], r"sources\.clips\.size = \[16, 30\]: .*multiple")):
        settings = [*places, *FAST, "preview.num=0", f"sources.clips.size={size}"]
        recipe: Any = load("animatediff_motion_lora", settings, "video", VideoRecipe)
        runner = open_runner(VideoRunner, recipe.backbone, [], "cpu", **recipe.opening())
        with pytest.raises(ValueError, match=wrong) if wrong else nullcontext():
            assert personalize(plan(recipe, overwrite=True), runner, overwrite=True)["slide"].is_dir()


class Maker:
    """A fake model that returns noise and records the requested seeds."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], **how: Any) -> Tensor:
        self.asked += seeds
        return torch.stack([noise(seed, how.get("frames", 0)) for seed in seeds])


def noise(seed: int, frames: int) -> Tensor:
    """Returns a noise picture or a noise clip, `[3, (frames), 32, 32]`. The first two frames of a clip are equal."""
    size = (3, frames, 32, 32) if frames else (3, 32, 32)
    made = torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    if frames:
        made[:, 1] = made[:, 0]
    return made


def test_class_clips_are_generated_once_and_cached_without_loss(tmp_path: Path) -> None:
    make, subject = Maker(), Subject(class_noun="mug")
    source = GeneratedClips(num_images=3, frames=4, steps=2)
    first = list(source.examples(context(subject, tmp_path, make)))
    assert len(make.asked) == len(set(make.asked)) == 3 and source.gives == "prior"
    assert {(e.role, e.caption, e.owners) for e in first} == {("prior", "a photo of a mug", ("mug",))}
    for example, seed in zip(first, make.asked, strict=True):
        assert float((example.pixels - noise(seed, 4)).abs().max()) <= 1.01 / 255  # equal up to rounding to 8 bits
    again = list(source.model_copy(update={"num_images": 4}).examples(context(subject, tmp_path, make)))
    assert len(make.asked) == 4 and all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=False))
    next(Path(first[1].source).glob("*.png")).write_bytes(b"damaged")
    assert torch.equal(list(source.examples(context(subject, tmp_path, make)))[1].pixels, first[1].pixels)
    assert len(make.asked) == 5
    other = source.model_copy(update={"frames": 5})
    assert source.key(context(subject, tmp_path), "a") != other.key(context(subject, tmp_path), "a")
    with pytest.raises(ValueError, match=r"lacks 3 class clips of 'a photo of a mug' \(in .* cannot generate clips"):
        list(other.examples(context(subject, tmp_path)))


def test_frozen_class_pictures_have_the_requested_role(tmp_path: Path) -> None:
    asked = {"kind": "frozen_clips", "length": 2, "role": "prior", "pictures": {"kind": "generated", "num_images": 2}}
    source = validate(FrozenClips, asked)
    assert isinstance(source.pictures, Generated) and source.gives == "prior"
    examples = list(source.examples(context(Subject(class_noun="mug"), tmp_path, Maker())))
    assert [(e.role, e.pixels.shape) for e in examples] == [("prior", (3, 2, 32, 32))] * 2
