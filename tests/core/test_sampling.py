"""Compares the sampler with diffusers' own pipelines, and tests settings that change between sampling steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.sampling import DenoisingStep, SamplingHookBase, StrengthSchedule, denoise, scheduler_names
from shared.sampling.schedulers import DIFFUSION, FLOW
from shared.sampling.settings import SamplingSettings
from shared.trainable.adapter import PeftAdapter
from tests.core.runs import sample

PROMPTS, SEEDS = ["a mug", "a red dog"], [1, 2]
TOLERANCE = 1e-5


def diffusers_pixels(pipe: Any, **options: Any) -> Tensor:
    """Returns the pixels, in [-1, 1], that the model family's own diffusers pipeline generates from the same seeds."""
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    options = {"prompt": PROMPTS, "num_inference_steps": 4, "height": 32, "width": 32, **options}
    return pipe(generator=generators, output_type="pt", **options).images * 2 - 1


@pytest.fixture
def sd(tiny_sd: Any) -> StableDiffusionBackbone:
    return StableDiffusionBackbone(tiny_sd)


def add_lora(backbone: StableDiffusionBackbone, name: str, roles: Sequence[str], seed: int = 0) -> None:
    """Adds a LoRA with random weights, so that it has an effect."""
    for role in roles:
        for group in backbone.group(role):
            config = LoraConfig(r=2, lora_alpha=2, target_modules=list(group.modules), init_lora_weights=False)
            PeftAdapter.inject(backbone, name, role.replace(".", "_"), group.component, config, seed)


# --- the same pixels as diffusers -----------------------------------------------------------------------------


CASES = [("tiny_sd", s) for s in (None, *DIFFUSION)] + [("tiny_sd_v", s) for s in (None, "dpm++", "euler_a")]


@pytest.mark.parametrize(("version", "scheduler"), CASES)
def test_pixels_equal_those_of_the_stable_diffusion_pipeline(version: str, scheduler: str | None, request: Any) -> None:
    pipe = request.getfixturevalue(version)
    options = {"seeds": SEEDS, "negative": "bad", "guidance": 5.0, "steps": 4, "scheduler": scheduler}
    ours = sample(StableDiffusionBackbone(pipe), PROMPTS, **options)
    if scheduler:
        kind, settings = DIFFUSION[scheduler]
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **settings)
    theirs = diffusers_pixels(pipe, negative_prompt=["bad"] * 2, guidance_scale=5.0)
    assert ours.shape == (2, 3, 32, 32) and ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < TOLERANCE


def test_pixels_equal_those_of_the_pipeline_without_guidance(tiny_sd: Any, sd: StableDiffusionBackbone) -> None:
    ours = sample(sd, PROMPTS, seeds=SEEDS, guidance=1.0, steps=4)
    assert (ours - diffusers_pixels(tiny_sd, guidance_scale=1.0)).abs().max() < TOLERANCE


def test_the_comparison_would_detect_a_difference(sd: StableDiffusionBackbone) -> None:
    """Prompt, seed, negative prompt and guidance all change these pixels by far more than the tolerance."""
    options: dict[str, Any] = {"seeds": [1], "guidance": 5.0, "steps": 4}
    plain = sample(sd, ["a mug"], **options)
    for other in (
        sample(sd, ["a red dog"], **options),
        sample(sd, ["a mug"], **{**options, "seeds": [2]}),
        sample(sd, ["a mug"], negative="bad", **options),
        sample(sd, ["a mug"], **{**options, "guidance": 9.0}),
    ):
        assert (other - plain).abs().max() > 0.01


def test_pixels_equal_those_of_the_pipeline_with_a_loaded_concept(tiny_sd: Any, sd: StableDiffusionBackbone) -> None:
    """A LoRA on the U-Net and text encoder has the same effect here as in a pipeline with the same networks."""
    before = sample(sd, PROMPTS, seeds=SEEDS, guidance=5.0, steps=4)
    add_lora(sd, "my-mug", ["cross_attention", "text_encoder"])
    ours = sample(sd, PROMPTS, seeds=SEEDS, guidance=5.0, steps=4)
    assert (ours - diffusers_pixels(sd.pipeline(), guidance_scale=5.0)).abs().max() < TOLERANCE
    assert (ours - before).abs().max() > 5 * TOLERANCE


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("embeds", "guidance"), [(True, 3.5), (True, 1.0), (False, 3.0), (False, 0.0)])
def test_pixels_equal_those_of_the_flux_pipeline(
    make_tiny_flux: Any, embeds: bool, guidance: float, dynamic: bool
) -> None:
    pipe = make_tiny_flux(guidance_embeds=embeds, dynamic=dynamic)
    negative = "bad" if not embeds and guidance > 1 else ""
    backbone = FluxBackbone(pipe)
    ours = sample(backbone, PROMPTS, seeds=SEEDS, negative=negative, guidance=guidance, steps=4, height=32, width=64)
    how = {"guidance_scale": guidance} if embeds else {"true_cfg_scale": guidance, "negative_prompt": ["bad"] * 2}
    theirs = diffusers_pixels(pipe, max_sequence_length=48, width=64, **how)
    assert ours.shape == (2, 3, 32, 64)
    assert (ours - theirs).abs().max() < TOLERANCE


class SeededSde(diffusers.FlowMatchEulerDiscreteScheduler):
    """A diffusers scheduler whose stochastic step draws each picture's noise from that picture's own generator.

    `FluxPipeline` passes no generators to its scheduler. It also packs the latents into patches, so the same noise
    values would be added at different positions. The latents are therefore unpacked for the step.
    """

    generators: Sequence[torch.Generator] = ()

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:  # type: ignore[override]
        flat = [diffusers.FluxPipeline._unpack_latents(x, 32, 64, 4) for x in (model_output, sample)]
        (after,) = super().step(flat[0], timestep, flat[1], generator=list(self.generators), return_dict=False)  # type: ignore[arg-type]
        return (diffusers.FluxPipeline._pack_latents(after, *after.shape),)


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_flux_sde_scheduler_matches_that_of_diffusers(make_tiny_flux: Any, dynamic: bool) -> None:
    pipe = make_tiny_flux(dynamic=dynamic)
    options = {"seeds": SEEDS, "guidance": 3.5, "steps": 4, "height": 32, "width": 64}
    ours = sample(FluxBackbone(pipe), PROMPTS, scheduler="flow_euler_sde", **options)
    plain = sample(FluxBackbone(pipe), PROMPTS, **options)
    kind, settings = FLOW["flow_euler_sde"]
    assert kind == type(pipe.scheduler).__name__
    pipe.scheduler = SeededSde.from_config(pipe.scheduler.config, **settings)
    pipe.scheduler.generators = generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    how = {"height": 32, "width": 64, "max_sequence_length": 48, "guidance_scale": 3.5}
    theirs = pipe(PROMPTS, num_inference_steps=4, generator=generators, output_type="pt", **how).images * 2 - 1
    assert (ours - theirs).abs().max() < TOLERANCE
    assert (ours - plain).abs().max() > 0.01, "noise is added between the steps"


# --- independence, defaults, errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddpm", "euler_a", "dpm++_sde"])
def test_a_picture_does_not_depend_on_the_rest_of_its_batch(sd: StableDiffusionBackbone, scheduler: str) -> None:
    options = {"guidance": 4.0, "steps": 3, "scheduler": scheduler}
    both = sample(sd, PROMPTS, seeds=SEEDS, **options)
    alone = sample(sd, PROMPTS[1:], seeds=SEEDS[1:], **options)
    assert torch.allclose(both[1:], alone, atol=TOLERANCE)


def test_the_same_seed_gives_bit_identical_pictures(sd: StableDiffusionBackbone) -> None:
    one, two = (sample(sd, PROMPTS, seeds=SEEDS, steps=3, scheduler="euler_a") for _ in range(2))
    assert torch.equal(one, two)


def test_one_prompt_is_used_for_all_seeds(sd: StableDiffusionBackbone) -> None:
    got = sample(sd, ["a mug"], seeds=[1, 2, 3], steps=2)
    assert got.shape[0] == 3 and torch.equal(got, sample(sd, ["a mug"] * 3, seeds=[1, 2, 3], steps=2))


def test_the_errors_for_bad_requests_say_what_is_wrong(sd: StableDiffusionBackbone, tiny_flux: Any) -> None:
    def ask(**options: Any) -> Callable[[], Tensor]:
        return lambda: sample(sd, options.pop("prompts", PROMPTS), **{"seeds": SEEDS, "steps": 2, **options})

    for call, message in [
        (ask(scheduler="dmp++"), r"unknown scheduler 'dmp\+\+'. Did you mean 'dpm\+\+'\? Available: ddim"),
        (ask(scheduler="flow_euler"), "unknown scheduler 'flow_euler'"),
        (ask(prompts=["a mug " * 40]), "would cut"),
        (ask(negative="a mug " * 40), "would cut"),
        (ask(seeds=[1, 2, 3]), "2 prompts for 3 seeds"),
        (ask(negative=["a", "b", "c"]), "3 negative prompts for 2 seeds"),
        (ask(seeds=[], prompts=[]), "at least one step and one seed"),
        (ask(steps=0), "at least one step"),
        (ask(guidance=float("nan")), "guidance = nan is out of range; give a number"),
        (ask(height=30), "multiples of 4"),
        (
            ask(height=8192, width=8192),
            r"8192x8192 pixels need latents of 2048x2048, above the limit of 1,048,576 cells",
        ),
        (ask(guidance=1.0, negative="bad"), "ignores negative prompts at guidance=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    flux = FluxBackbone(tiny_flux)
    with pytest.raises(ValueError, match="flux ignores negative prompts"):
        sample(flux, PROMPTS, seeds=SEEDS, steps=2, negative="bad", height=32, width=32)
    with pytest.raises(ValueError, match="Available: flow_euler, flow_euler_sde"):
        sample(flux, PROMPTS, seeds=SEEDS, steps=2, scheduler="ddim", height=32, width=32)
    assert "dpm++" in scheduler_names(sd) and set(scheduler_names(flux)) == set(FLOW)


def test_denoise_yields_one_state_per_step(sd: StableDiffusionBackbone) -> None:
    states = denoise(sd, PROMPTS, seeds=SEEDS, settings=SamplingSettings(steps=3))
    first = next(states)
    assert torch.is_grad_enabled()  # a paused sampler leaves gradients enabled
    rest = list(states)
    assert [first.index, *(s.index for s in rest)] == [0, 1, 2] and first.latents.shape == (2, 4, 8, 8)
    pixels = sd.decode(rest[-1].latents).clamp(-1, 1)
    assert torch.equal(pixels, sample(sd, PROMPTS, seeds=SEEDS, steps=3))


# --- placeholders whose embeddings vary -----------------------------------------------------------------------


class Varying:
    """A placeholder with one token whose embedding is `row(t, site)`."""

    name, words, tokens, components = "x", "<x>", ("<x>",), ()

    def __init__(self, row: Callable[[Tensor | None, str | None], Tensor], varies_with: Sequence[str]) -> None:
        self.row, self.varies_with, self.times = row, frozenset(varies_with), []

    def embeddings(self, component: str, t: Tensor | None, site: str | None) -> Tensor:
        if t is not None:
            self.times.append(float(t[0]))
        return self.row(t, site)

    def edit(self, context: Any, positions: Tensor, t: Any, site: Any) -> Any:
        return context


def test_the_embedding_of_a_placeholder_can_vary_with_time_and_site(sd: StableDiffusionBackbone) -> None:
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    ask: dict[str, Any] = {"prompts": ["a <x>"], "seeds": [1], "steps": 4, "guidance": 5.0}
    pictures = {}
    rows: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
        "plain": (lambda t, s: row, ()),
        "equal in time": (lambda t, s: row.expand(t.shape[0], 1, 16), ("time",)),
        "equal at sites": (lambda t, s: row, ("site",)),
        "by time": (lambda t, s: row * t[:, None, None] / 500, ("time",)),
        "by site": (lambda t, s: row * (1.0 + len(s)), ("site",)),
        "by both": (lambda t, s: row * t[:, None, None] / (500 + len(s)), ("site", "time")),
    }
    for key, (row_of, varies_with) in rows.items():
        placeholder: Any = Varying(row_of, varies_with)
        sd.add_placeholder(placeholder)
        pictures[key] = sample(sd, **ask)
        sd.remove("x")
        if "time" in varies_with:
            assert sorted(set(placeholder.times), reverse=True) == [751.0, 501.0, 251.0, 1.0]
    for key in ("equal in time", "equal at sites"):
        assert torch.allclose(pictures[key], pictures["plain"], atol=TOLERANCE), key
    for key in ("by time", "by site", "by both"):
        assert (pictures[key] - pictures["plain"]).abs().max() > 5 * TOLERANCE, key


# --- changes between steps ------------------------------------------------------------------------------------


def test_a_strength_schedule_changes_the_strength_of_a_concept_between_steps(sd: StableDiffusionBackbone) -> None:
    add_lora(sd, "mug", ["cross_attention", "text_encoder"], seed=1)
    add_lora(sd, "style", ["self_attention"], seed=2)

    def ask(points: dict[float, float] | None, **options: Any) -> Tensor:
        changes = [] if points is None else [StrengthSchedule(strengths={"mug": points}, **options)]
        return sample(sd, PROMPTS, seeds=SEEDS, steps=4, guidance=4.0, hooks=changes)

    on = ask(None)
    with sd.active({"style": 1.0}):
        off = ask(None)
        half_on = ask({0.0: 0.5})  # a schedule changes only the adapters that it names
    with sd.active({"style": 1.0, "mug": 0.5}):
        assert torch.equal(ask(None), half_on)
    assert torch.equal(ask({0.0: 1.0}), on) and torch.equal(ask({0.0: 0.0}), off)
    late, ramp = ask({0.0: 0.0, 0.5: 1.0}), ask({0.0: 0.0, 1.0: 1.0}, linear=True)
    for a, b in [(late, on), (late, off), (ramp, on), (ramp, off), (ramp, late)]:
        assert (a - b).abs().max() > TOLERANCE / 10
    assert sd.strengths == {"mug": 1.0, "style": 1.0}
    with pytest.raises(ValueError, match=r"'cup'.*Loaded: mug, style"):
        sample(sd, PROMPTS, seeds=SEEDS, steps=2, hooks=[StrengthSchedule(strengths={"cup": {0: 1}})])


def test_scheduled_strengths_are_held_or_interpolated_between_the_given_points() -> None:
    held = StrengthSchedule(strengths={"a": {0.2: 0.5, 0.6: 1.0}})
    assert [held.at("a", f) for f in (0.0, 0.2, 0.5, 0.6, 0.9)] == [0.5, 0.5, 0.5, 1.0, 1.0]
    ramp = held.model_copy(update={"linear": True})
    assert [ramp.at("a", f) for f in (0.0, 0.2, 0.4, 0.6, 0.9)] == pytest.approx([0.5, 0.5, 0.75, 1.0, 1.0])
    for points in ({}, {1.5: 1.0}):
        with pytest.raises(ValueError, match="fractions of the steps"):
            StrengthSchedule(strengths={"a": points})


def test_strength_schedules_are_parsed_from_text() -> None:
    held = StrengthSchedule.parse("my-mug=0@0,1@0.2")
    assert held == StrengthSchedule(strengths={"my-mug": {0.0: 0.0, 0.2: 1.0}})
    for text in ("my-mug", "my-mug=", "my-mug=1", "my-mug=a@0", "my-mug=1@0@1", "my-mug=0@0,1@0"):
        with pytest.raises(ValueError, match=r"is not a strength schedule; write NAME=STRENGTH@FRACTION"):
            StrengthSchedule.parse(text)
    for text in ("my-mug=1@2", "my-mug=nan@0"):
        with pytest.raises(ValueError, match="fractions of the steps|finite number") as refused:
            StrengthSchedule.parse(text)
        assert "\n" not in str(refused.value)


class Later(SamplingHookBase):
    """A hook that replaces the prompts during the first half of the steps."""

    def prompts(self, step: DenoisingStep, prompts: Sequence[str]) -> Sequence[str]:
        return ["a dog"] * len(prompts) if step.fraction < 0.5 else prompts


class Shift(SamplingHookBase):
    """A hook that shifts the latents before the first step."""

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        return latents + 1 if step.index == 0 else latents


def test_hooks_can_change_prompts_and_latents(sd: StableDiffusionBackbone) -> None:
    ask: dict[str, Any] = {"seeds": [1], "steps": 4, "guidance": 5.0}
    how = {k: v for k, v in ask.items() if k != "seeds"}
    mug, dog = sample(sd, ["a mug"], **ask), sample(sd, ["a dog"], **ask)
    mixed = sample(sd, ["a mug"], hooks=[Later()], **ask)
    assert not torch.equal(mixed, mug) and not torch.equal(mixed, dog)
    assert torch.equal(sample(sd, ["a dog"], hooks=[Later()], **ask), dog)
    assert torch.equal(sample(sd, ["a mug"], hooks=[SamplingHookBase()], **ask), mug)
    first = next(denoise(sd, ["a mug"], seeds=ask["seeds"], settings=SamplingSettings(**how, hooks=(Shift(),)))).latents
    assert (
        first - next(denoise(sd, ["a mug"], seeds=ask["seeds"], settings=SamplingSettings(**how))).latents
    ).abs().mean() > 0.5
