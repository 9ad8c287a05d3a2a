"""A single mask for a clip's first frame is tracked through the clip and then used like masks for all frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pcs_video.motion.clip_source import Clips
from pcs_video.motion.trajectory import measure
from pcs_video.recipe import ClipSubject
from shared.concept import read
from shared.io.clips.window import ClipWindow
from shared.io.clips.write_clip import write_clip
from shared.sources import SourceContext
from shared.types import Example, Subject
from tests.core.moving_patches import moving_patch
from tests.video.conftest import FAST

FRAMES, STEP = 4, 4


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """Writes a clip of a sliding patch, and one mask that marks the patch in the first frame."""
    folder = tmp_path / "clips"
    write_clip(folder / "a", moving_patch((STEP, 0), FRAMES + 2), 8)
    (folder / "masks").mkdir()
    Image.fromarray((truth()[0] * 255).byte().numpy()).save(folder / "masks/a.png")
    return folder


def subject(folder: Path) -> Subject:
    return ClipSubject(clips=folder, class_noun="mug").read()


def examples(folder: Path, **settings: Any) -> list[Example]:
    source = Clips(window=ClipWindow(length=FRAMES), **settings)
    return list(
        source.examples(SourceContext({"mug": subject(folder)}, 64, 0, folder.parent / "cache", None, "a model"))
    )


def truth() -> Tensor:
    """Returns the true masks of the patch in `marked`, `[F, 64, 64]`."""
    masks = torch.zeros(FRAMES, 64, 64)
    for i in range(FRAMES):
        left = round(22 + STEP * (i - (FRAMES + 1) / 2))
        masks[i, 22:42, left : left + 20] = 1
    return masks


def test_every_frame_gets_a_mask_that_follows_the_subject(marked: Path) -> None:
    (whole,) = examples(marked)
    masks = whole.masks["mug"][0]
    both, either = torch.minimum(masks, truth()).sum((1, 2)), torch.maximum(masks, truth()).sum((1, 2))
    assert bool((both / either > 0.75).all())
    # a mask that did not move would miss most of the patch in the last frame
    assert float((truth()[0] * truth()[-1]).sum() / truth()[0].sum()) < 0.5
    apart = examples(marked, apart=True)
    assert torch.equal(torch.cat([frame.masks["mug"] for frame in apart]), masks)


def test_a_trajectory_is_measured_on_the_same_masks(marked: Path) -> None:
    path = measure(subject(marked), Clips(window=ClipWindow(length=FRAMES)), 64)
    assert path[-1][0] - path[0][0] == pytest.approx((FRAMES - 1) * STEP / 64, abs=0.02)


@pytest.mark.parametrize("recipe", ["animatediff_motion_lora", "set_then_sequence"])
def test_one_mask_restricts_the_loss_of_a_whole_run(
    recipe: str, pcs: Callable[..., Any], clip_model: Path, marked: Path, tmp_path: Path
) -> None:
    """One recipe uses whole clips, and the other uses separate frames. Without masks, each learns different weights."""
    settings = [*FAST, "preview.num=0", "subject.class_noun=mug", f"backbone={clip_model}", f"subject.clips={marked}"]
    for name, masked in (("on", "true"), ("off", "false")):
        ran = pcs("video", "personalize", recipe, *settings, f"objective.masked={masked}", f"output={tmp_path / name}")
        assert ran.code == 0 and "no picture has a mask" not in ran.err, ran.err
    on, off = (read(tmp_path / name).tensors for name in ("on", "off"))
    assert on.keys() == off.keys() and on
    assert any(not torch.equal(v, off[part][k]) for part, tensors in on.items() for k, v in tensors.items())


def test_a_window_that_does_not_begin_at_the_mask_is_refused_before_a_model_is_loaded(marked: Path) -> None:
    given = {"mug": subject(marked)}
    assert Clips(window=ClipWindow(length=FRAMES)).check(given, ())
    with pytest.raises(
        ValueError, match="a.png is the mask of the clip's first frame, but this window begins at frame 2"
    ):
        Clips(window=ClipWindow(length=FRAMES, start=0.25)).check(given, ())
