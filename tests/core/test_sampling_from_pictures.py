"""Tests sampling that starts from pictures, partly by comparing it with diffusers' own pipeline."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.sampling import DenoisingStep, SamplingHookBase, Start
from shared.sampling.sampler import denoise, sample_all
from shared.sampling.schedulers import DIFFUSION, FLOW, adds_noise, make_scheduler
from shared.sampling.settings import SamplingSettings

PROMPTS, SEEDS = ["a mug", "a red dog"], [1, 2]


def clean(backbone: Any, count: int = 2) -> torch.Tensor:
    shape = backbone.latent_shape(32, 32)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("version", "scheduler", "strength"),
    [("tiny_sd", None, 0.5), ("tiny_sd", "ddim", 1.0), ("tiny_sd", "pndm", 0.6), ("tiny_sd", "euler", 0.5),
     ("tiny_sd", "heun", 0.75), ("tiny_sd", "dpm++", 0.5), ("tiny_sd_v", "euler_a", 0.5)],
)  # fmt: skip
def test_pixels_equal_those_of_the_img2img_pipeline(
    version: str, scheduler: str | None, strength: float, request: Any
) -> None:
    pipe = request.getfixturevalue(version)
    backbone = StableDiffusionBackbone(pipe)
    start = Start(clean(backbone), strength)
    how = SamplingSettings("bad", 5.0, 4, scheduler, height=32, width=32, start=start)
    ours = sample_all(backbone, PROMPTS, seeds=SEEDS, settings=how)
    if scheduler:
        kind, settings = DIFFUSION[scheduler]
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **settings)
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    theirs = other(
        prompt=PROMPTS, negative_prompt=["bad"] * 2, image=start.latents, strength=strength, guidance_scale=5.0,
        num_inference_steps=4, generator=[torch.Generator().manual_seed(s) for s in SEEDS], output_type="pt",
    ).images * 2 - 1  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-5


def test_a_flow_starts_on_the_line_between_picture_and_noise(tiny_flux: Any) -> None:
    """With strength 0.5, half of the steps are taken. At the first of them, x_t = (1 - t) x_0 + t noise."""
    backbone = FluxBackbone(tiny_flux)
    start = Start(clean(backbone, 1), 0.5)
    seen: list[Any] = []

    class Watching:
        def __getattr__(self, name: str) -> Any:
            return getattr(backbone, name)

        def predict_guided(self, x_t: Any, t: Any, *rest: Any) -> Any:
            seen.append((x_t.clone(), float(t) / 1000))
            return backbone.predict_guided(x_t, t, *rest)

    how = SamplingSettings("", 1.0, 4, height=32, width=32, start=start)
    steps = list(denoise(Watching(), ["a mug"], seeds=[3], settings=how))  # type: ignore[arg-type]
    noise = torch.randn(1, *start.latents.shape[1:], generator=torch.Generator().manual_seed(3))
    (x_t, t), *_ = seen
    assert len(steps) == 2 and 0 < t < 1
    assert torch.allclose(x_t, (1 - t) * start.latents + t * noise, atol=1e-5)


@pytest.mark.parametrize("name", [*sorted(DIFFUSION), *sorted(FLOW)])
def test_adds_noise_is_true_for_exactly_the_schedulers_that_draw_noise(tiny_sd: Any, tiny_flux: Any, name: str) -> None:
    """A scheduler that draws noise changes the state of its generator."""
    solver = make_scheduler((FluxBackbone(tiny_flux) if name in FLOW else StableDiffusionBackbone(tiny_sd)), name)
    draw, x = torch.Generator().manual_seed(0), torch.randn(1, 4, 4, 4)
    solver.set_timesteps(10, **({"mu": 1.0} if solver.config.get("use_dynamic_shifting") else {}))
    before = draw.get_state()
    takes = "generator" in inspect.signature(solver.step).parameters
    for t in solver.timesteps[:4]:
        x = solver.step(x, t, x, **({"generator": draw} if takes else {}), return_dict=False)[0]
    assert adds_noise(solver) is not torch.equal(draw.get_state(), before)


DETERMINISTIC = ["ddim", "deis", "dpm++", "euler", "heun", "pndm", "unipc"]


@pytest.mark.parametrize("forgets", [True, False])
@pytest.mark.parametrize("scheduler", [*DETERMINISTIC, "dpm++_karras", "euler_a", "ddpm", "dpm++_sde"])
def test_the_sampler_reaches_the_picture_that_a_hook_jumps_to(tiny_sd: Any, scheduler: str, forgets: bool) -> None:
    """Samples with a model that predicts one picture perfectly. At the jump, a hook replaces this picture with another.

    Up to and including the jump, hooks see the first picture as `clean`. After the jump, they see the second picture.
    With a deterministic scheduler, all later latents are the second picture plus noise at the current level.
    Schedulers that remember earlier predictions must forget them at the jump. Otherwise, they would still mix in the
    first picture.
    """
    backbone = StableDiffusionBackbone(tiny_sd)
    one, other = clean(backbone)[:1], clean(backbone)[1:]
    truth, seen, errors = [one], [], []

    class Perfect:
        def __getattr__(self, name: str) -> Any:
            return getattr(backbone, name)

        def predict_guided(self, x_t: Tensor, t: Tensor, *_: Any) -> Tensor:
            alpha, sigma = backbone.alpha_sigma(t)
            return (x_t - alpha * truth[0]) / sigma

    class Jumping(SamplingHookBase):
        def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
            signal, noisy = step.levels
            if seen:
                torch.testing.assert_close(step.clean, seen[-1], atol=2e-3, rtol=0)
            if step.index == 6 * step.order:
                truth[0] = other
                latents = signal * other + noisy * torch.randn_like(other)
            elif step.index > 6 * step.order and step.index % step.order == 0:
                noise = (latents - signal * other) / noisy
                errors.append(float((noise - noises[0]).abs().max()) * noisy)
            noises[:] = [(latents - signal * truth[0]) / noisy]
            seen.append(truth[0])
            return latents

        def jumps(self, step: DenoisingStep) -> bool:
            return forgets and step.index == 6 * step.order

    noises: list[Tensor] = []
    how = SamplingSettings("", 1.0, 12, scheduler, height=32, width=32, hooks=(Jumping(),))
    *_, last = denoise(Perfect(), ["a mug"], seeds=[3], settings=how)  # type: ignore[arg-type]
    assert seen[0] is one and seen[-1] is other
    if forgets:  # DDIM stops at the first training timestep, with a little noise left
        assert (last.latents - other).abs().max() < 0.15
    if scheduler in DETERMINISTIC:
        remembers = scheduler in {"deis", "dpm++", "pndm", "unipc"}
        assert (max(errors) < 2e-2) is (forgets or not remembers), errors


def test_an_invalid_start_is_refused(tiny_sd: Any) -> None:
    backbone = StableDiffusionBackbone(tiny_sd)
    for latents, strength, why in (
        (clean(backbone, 1), 0.5, "start.latents has shape"),
        (clean(backbone), 0.1, "strength = 0.1 with 4 steps leaves nothing to sample"),
    ):
        how = SamplingSettings("", 5.0, 4, height=32, width=32, start=Start(latents, strength))
        with pytest.raises(ValueError, match=why):
            next(denoise(backbone, PROMPTS, seeds=SEEDS, settings=how))
    with pytest.raises(ValueError, match="at most 1"):
        Start(clean(backbone), 1.5)
