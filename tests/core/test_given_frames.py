"""Given regions of a picture are kept, and the results match diffusers' inpainting with a plain U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from torch import Tensor

from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.sampling import DenoisingStep, denoise
from shared.sampling.given_files import masked_picture, picture_latents
from shared.sampling.given_frames import GivenFrames, KeptLatents
from shared.sampling.settings import SamplingSettings
from tests.core.runs import paint, sample


@pytest.fixture
def given(tmp_path: Path) -> GivenFrames:
    """A picture whose left half is kept."""
    photos = paint(tmp_path / "photos")
    left = Image.new("L", (32, 32))
    left.paste(255, (0, 0, 16, 32))
    left.save(tmp_path / "left.png")
    return GivenFrames(path=photos / "0.png", mask=tmp_path / "left.png")


class FromPureNoise(KeptLatents):
    """Starts from pure noise, even in the kept region, as diffusers does."""

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        return latents if step.index == 0 else super().latents(step, latents)


def test_inpainting_matches_diffusers(tiny_sd: Any, given: GivenFrames) -> None:
    sd = StableDiffusionBackbone(tiny_sd)
    kept = given.ready(sd, SamplingSettings())
    hook = FromPureNoise(known=kept.known, kept=kept.kept)
    ours = sample(sd, ["a mug"], seeds=[1], negative="bad", guidance=5.0, steps=4, hooks=(hook,))
    pipe = StableDiffusionInpaintPipeline(**tiny_sd.components)
    pipe.set_progress_bar_config(disable=True)
    missing = torch.ones(1, 1, 32, 32)
    missing[..., :16] = 0
    theirs = pipe(
        "a mug", image=picture_latents(sd, given.path, (32, 32)), mask_image=missing, height=32, width=32, strength=1.0,
        num_inference_steps=4, guidance_scale=5.0, negative_prompt="bad", generator=torch.Generator().manual_seed(1),
        output_type="pt", masked_image_latents=torch.zeros(1, 4, 8, 8),
    ).images * 2 - 1  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", ["dpm++", "euler", "unipc"])
def test_the_kept_region_does_not_change(tiny_sd: Any, given: GivenFrames, scheduler: str) -> None:
    """Checks schedulers that use different units. The rest of the picture adapts to the kept region and to the seed."""
    sd = StableDiffusionBackbone(tiny_sd)
    how: dict[str, Any] = {"seeds": [1, 2], "guidance": 1.0, "steps": 3, "scheduler": scheduler}
    settings = SamplingSettings(guidance=1.0, steps=3, scheduler=scheduler, hooks=(given,))
    *_, last = denoise(sd, ["a mug"], seeds=how["seeds"], settings=settings)
    known = picture_latents(sd, given.path, (32, 32))
    assert torch.equal(last.latents[:, :, :, :4], known[:, :, :, :4].expand(2, -1, -1, -1))
    plain = sample(sd, ["a mug"], **how)
    kept = sample(sd, ["a mug"], hooks=(given,), **how)
    assert (kept - plain)[..., 20:].abs().max() > 0.01 and (kept[0] - kept[1])[..., 20:].abs().max() > 0.01


def test_unusable_given_pictures_and_masks_are_refused(tiny_sd: Any, given: GivenFrames, tmp_path: Path) -> None:
    sd = StableDiffusionBackbone(tiny_sd)
    Image.new("L", (16, 16), 255).save(tmp_path / "small.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "all.png")
    for wrong, message in [
        (GivenFrames(path=given.path), "would be kept whole; use a mask"),
        (GivenFrames(path=given.path, mask=tmp_path / "all.png"), "nothing is left to generate"),
        (GivenFrames(path=given.path, mask=tmp_path / "small.png"), "small.png is 16x16 pixels, but its picture"),
        (GivenFrames(path=given.path, mask=tmp_path / "gone.png"), "gone.png does not exist"),
        (GivenFrames(path=given.path, frames=2), "is a picture; set the number of frames only for clips"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(sd, ["a mug"], seeds=[1], steps=2, hooks=(wrong,))
    assert masked_picture(given.path, tmp_path / "left.png", (16, 16))[1].shape == (1, 16, 16)
