"""Inversion matches diffusers' inverse scheduler, can be undone by sampling, and provides noise to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler
from torch import Tensor

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.sampling import DenoisingStep, SamplingHookBase, denoise
from shared.sampling.given_files import picture_latents
from shared.sampling.inversion import MixedNoise, NoisePrior, invert
from shared.sampling.settings import SamplingSettings
from tests.core.runs import paint, sample


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backbone_of(kind: str, request: Any) -> Any:
    if kind == "flow":
        return FluxBackbone(request.getfixturevalue("tiny_flux")).to(dtype=torch.float64)
    pipe = request.getfixturevalue("tiny_sd" if kind == "epsilon" else "tiny_sd_v")
    pipe.unet.conv_out.weight.data *= 0.3  # random networks are far less smooth than trained ones
    return StableDiffusionBackbone(pipe).to(dtype=torch.float64)


def there_and_back(backbone: Any, clean: Tensor, steps: int, refine: int = 0) -> float:
    """Inverts `clean` (`[2, C, (f), h, w]`), samples back deterministically, and returns the result's relative error."""
    scheduler = "flow_euler" if backbone.prediction_type == "flow" else "ddim"
    inverted = invert(backbone, clean, ["a mug", "a dog"], steps=steps, refine=refine)
    start = MixedNoise(inverted=inverted, share=1.0)
    side = clean.shape[-1] * backbone.vae_factor
    frames = None if clean.ndim == 4 else 1 + (clean.shape[2] - 1) * backbone.frame_factor
    settings = SamplingSettings("", 1.0, steps, scheduler, side, side, frames, hooks=(start,))
    *_, last = denoise(backbone, ["a mug", "a dog"], seeds=[0, 1], settings=settings)
    assert last.latents.dtype == torch.float64
    return float((last.latents - clean).norm() / clean.norm())


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_sampling_from_the_inverted_noise_returns_the_picture(kind: str, request: Any) -> None:
    backbone = backbone_of(kind, request)
    clean = 0.7 * noise(2, 4, 8, 8)
    coarse, fine = there_and_back(backbone, clean, 5), there_and_back(backbone, clean, 40)
    assert fine < coarse / 2 and fine < 0.1  # more steps bring the result closer to the picture
    assert there_and_back(backbone, clean, 5, refine=12) < 1e-5  # the fixed point is the exact inverse


@torch.no_grad()
def test_inversion_matches_diffusers_inverse_scheduler(request: Any) -> None:
    backbone = backbone_of("epsilon", request)
    clean, steps = noise(1, 4, 8, 8), 4
    solver: Any = DDIMInverseScheduler.from_config(backbone.scheduler.config)
    solver.set_timesteps(steps)
    x, text = clean, backbone.encode([""])
    for t in solver.timesteps:
        x = solver.step(backbone.predict(x, t, text), int(t), x, return_dict=False)[0]
    torch.testing.assert_close(invert(backbone, clean, steps=steps), x)


def test_mixing_keeps_the_variance_of_the_noise() -> None:
    a, b = noise(1, 4, 64, 64), noise(3, 4, 64, 64, seed=1)
    backbone: Any = None
    for share in (0.0, 0.3, 1.0):
        mixed = MixedNoise(inverted=a, share=share).initial_noise(backbone, b)
        assert mixed.shape == b.shape and mixed.var().item() == pytest.approx(1, abs=0.03)
        together = (mixed * a).mean().item()
        assert together == pytest.approx(share**0.5, abs=0.03)


class Kept(SamplingHookBase):
    """Stores the scaled latents at the start of every step."""

    seen: list[Tensor]

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        self.seen.append(latents * step.scale)
        return latents


# Euler rounds its first noise level, so its tolerance is larger.
@pytest.mark.parametrize(("scheduler", "close"), [("ddim", 1e-4), ("euler", 5e-3)])
def test_sampling_can_start_from_a_picture(tiny_sd: Any, scheduler: str, close: float, tmp_path: Path) -> None:
    """The inverted noise is in the scheduler's units, and is computed once for all the pictures in a call."""
    sd = StableDiffusionBackbone(tiny_sd)
    photo = paint(tmp_path / "photos") / "0.png"
    prior, kept = NoisePrior(path=photo, share=1.0), Kept(seen=[])
    how: dict[str, Any] = {"seeds": [1, 2], "guidance": 1.0, "steps": 3, "scheduler": scheduler}
    made = sample(sd, ["a mug"], hooks=(prior, kept), **how)
    assert torch.equal(made[0], made[1])  # the seeds have no effect
    first = kept.seen[0]
    assert first.shape == (2, 4, 8, 8) and torch.equal(first[0], first[1])
    inverted = invert(sd, picture_latents(sd, photo, (32, 32)), steps=3)
    torch.testing.assert_close(first[:1], inverted, atol=close, rtol=close)
    part = sample(sd, ["a mug"], hooks=(NoisePrior(path=photo, share=0.3),), **how)
    assert (part[0] - part[1]).abs().max() > 0.01


def test_sources_that_cannot_be_inverted_are_refused(tiny_sd: Any, tmp_path: Path) -> None:
    sd = StableDiffusionBackbone(tiny_sd)
    photo = paint(tmp_path / "photos") / "0.png"
    for prior, message in [
        (NoisePrior(path=tmp_path / "gone.png"), "gone.png does not exist"),
        (NoisePrior(path=tmp_path / "photos"), "photos is a clip, but a picture is generated"),
        (NoisePrior(path=photo, prompt="a <mug>"), "the prompt names <mug>, which is not loaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(sd, ["a mug"], seeds=[1], steps=2, hooks=(prior,))
    with pytest.raises(ValueError, match="less than or equal to 1"):
        NoisePrior(path=photo, share=1.5)
