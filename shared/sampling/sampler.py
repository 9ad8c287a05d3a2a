"""A sampler for all model families, built on diffusers' schedulers, with hooks between the steps.

Given the same prompt, negative prompt, guidance, steps, scheduler and generators, the sampler generates the same pixels
as the family's diffusers pipeline (tested). Each picture has its own generator, so that the picture does not depend on
the rest of the batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.config import MOST_GUIDANCE
from shared.io.denoising_progress import Steps, part_of
from shared.sampling.hooks import DenoisingStep
from shared.sampling.hooks_in_turn import InTurn
from shared.sampling.schedulers import make_scheduler
from shared.sampling.settings import SamplingSettings, Start
from shared.trainable.merged_forward import merged_layers
from shared.types import Conditioning

#: The maximum number of pixels decoded together (one 512x512 picture). It is small because the autoencoder's
#: activations are large.
DECODE_PIXELS = 2**18
#: The maximum number of latent cells in a picture or clip (8192x8192 pixels with Stable Diffusion).
MOST_CELLS = 2**20
#: The maximum number of pixels denoised together (four 512x512 pictures, or one 1024x1024 picture).
SAMPLE_PIXELS = 2**20


@dataclass(frozen=True)
class Denoised:
    """The state after one step."""

    index: int
    steps: int
    t: Tensor  # the time of the prediction, a scalar
    latents: Tensor  # [B, C, (f), h, w] after the step


def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: SamplingSettings = SamplingSettings(),
    progress: Steps | None = None,
) -> Tensor:
    """Samples pictures [B, 3, H, W] or clips [B, 3, F, H, W] in [-1, 1], float32, one per seed.

    Args:
        prompts: B expanded prompts, or one for all seeds
        seeds: B seeds. Generators are on the CPU, so that a seed gives the same noise on every device.
        progress: called with (done, total) after each step, counting the steps of every picture

    Raises:
        ValueError: if a prompt exceeds the token limit, the size is invalid, the scheduler is unknown, or a negative prompt
            would be ignored
    """
    latents = None
    for state in denoise(backbone, prompts, seeds=seeds, settings=settings):
        latents = state.latents
        if progress:
            progress(len(seeds) * (state.index + 1), len(seeds) * state.steps)
    assert latents is not None
    return decoded(backbone, latents, math.prod(output_size(backbone, settings)))


def sample_all(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: SamplingSettings = SamplingSettings(),
    progress: Steps | None = None,
) -> Tensor:
    """Samples like `sample`, but in batches that fit in memory, and returns pixels on the CPU. Requires one prompt per seed."""
    return torch.cat(list(sample_each(backbone, prompts, seeds=seeds, settings=settings, progress=progress)))


def sample_each(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: SamplingSettings = SamplingSettings(),
    progress: Steps | None = None,
) -> Iterator[Tensor]:
    """Samples like `sample_all`, but yields each batch once it is done, so that memory use does not grow with the number of
    pictures. Checks all prompts before the first batch."""
    for text in dict.fromkeys(prompts):
        backbone.check_prompt(text)
    settings = ready(backbone, settings)
    pixels = math.prod(output_size(backbone, settings))
    at_once = images_per_batch(pixels, SAMPLE_PIXELS)
    for start in range(0, max(1, len(prompts)), at_once):
        some = slice(start, start + at_once)
        on_progress = part_of(progress, start, len(prompts[some]), len(prompts))
        how = settings if settings.start is None else replace(settings, start=settings.start[some])
        yield sample(backbone, prompts[some], seeds=seeds[some], settings=how, progress=on_progress).cpu()


def output_size(backbone: Backbone, settings: SamplingSettings) -> tuple[int, ...]:
    """Returns the size to sample, which is (H, W) in pixels for a picture and (F, H, W) for a clip. Values that are not
    set are the backbone's defaults."""
    height, width = settings.height or backbone.resolution, settings.width or backbone.resolution
    frames = backbone.frames if settings.frames is None else settings.frames
    return (frames, height, width) if frames else (height, width)


def ready(backbone: Backbone, settings: SamplingSettings) -> SamplingSettings:
    """Returns the settings with hooks that have read their files. Calling this again changes nothing."""
    return replace(settings, hooks=InTurn(settings.hooks).ready(backbone, settings).hooks)


@torch.no_grad()
def decoded(backbone: Backbone, latents: Tensor, pixels: int) -> Tensor:
    """Decodes latents to pictures or clips in [-1, 1], in batches of bounded size.

    The autoencoder keeps its loaded precision, even under autocast.

    Args:
        pixels: the number of pixels of each picture or clip, (F *) H * W
    """
    at_once = images_per_batch(pixels, DECODE_PIXELS)
    with torch.autocast(latents.device.type, enabled=False):
        return torch.cat([backbone.decode(part).float().clamp(-1, 1) for part in latents.split(at_once)])


def images_per_batch(pixels: int, limit: int, most: int = 8) -> int:
    """Returns how many pictures of `pixels` pixels fit into `limit` pixels, but at least one and at most `most`."""
    return max(1, min(most, limit // pixels))


def check_guidance(guidance: float | None, where: str = "guidance") -> None:
    """Raises ValueError for a guidance scale so large that predictions could overflow."""
    if guidance is not None and not abs(guidance) <= MOST_GUIDANCE:
        most = MOST_GUIDANCE
        raise ValueError(
            f"{where} = {guidance} is out of range; give a number between -{most} and {most}, such as 7.5 (1 means no guidance)"
        )


def _check_cells(shape: Sequence[int], pixels: Sequence[int]) -> None:
    """Raises ValueError for a size too large for any memory, before an allocation fails in the middle of a run."""
    if math.prod(shape[1:]) > MOST_CELLS:
        needs = f"{'x'.join(map(str, pixels))} pixels need latents of {'x'.join(map(str, shape[1:]))}"
        raise ValueError(
            f"{needs}, above the limit of {MOST_CELLS:,} cells; choose a smaller height and width, or fewer frames"
        )


@torch.no_grad()
def denoise(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: SamplingSettings = SamplingSettings(),
) -> Iterator[Denoised]:
    """Runs the sampler and yields the state after each step. Takes the arguments of `sample`."""
    guidance = backbone.default_guidance if settings.guidance is None else settings.guidance
    check_guidance(guidance)
    steps = backbone.default_steps if settings.steps is None else settings.steps
    texts, negatives = _requests(backbone, prompts, settings.negative, len(seeds), steps, guidance)
    guided, hooks = backbone.needs_negative(guidance), InTurn(settings.hooks).ready(backbone, settings)
    *frames, height, width = output_size(backbone, settings)
    shape = backbone.latent_shape(height, width, *frames)
    _check_cells(shape, (*frames, height, width))
    solver = _solver(backbone, settings, steps, shape)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    conditionings = _ConditioningCache(backbone, negatives if guided else None)
    noise = hooks.initial_noise(backbone, _noise(backbone, shape, generators))
    times, latents = _begun(solver, noise, settings.start, steps)
    options = _step_options(solver, generators)
    clean: Tensor | None = None
    for i, t in enumerate(times):
        scale = _seen(solver, noise.new_ones(1), t)
        order = getattr(solver, "order", 1)
        step = DenoisingStep(i, len(times), t, backbone, texts, seeds, noise, scale, order, clean)
        latents, jumps = hooks.latents(step, latents), hooks.jumps(step)
        if jumps:
            solver = _solver(backbone, settings, steps, shape)
            _begin(solver, len(solver.timesteps) - len(times) + i)
        step = replace(step, prompts=hooks.prompts(step, step.prompts))
        scaled = _seen(solver, latents, t)
        with hooks.during(step), merged_layers():
            positive, unwanted = conditionings(step.prompts, t)
            told = hooks.told(step, t)
            prediction = backbone.predict_guided(scaled, told, positive, unwanted, guidance)
        clean = backbone.to_x0(prediction, scaled, told)
        latents = hooks.after(step, solver.step(prediction, t, latents, **options, return_dict=False)[0])
        if jumps and hasattr(solver, "counter"):
            solver.counter = 2  # otherwise, PNDM's second call would repeat the time of its first call
        yield Denoised(i, len(times), t, latents)


def _begun(solver: Any, noise: Tensor, start: Start | None, steps: int) -> tuple[Tensor, Tensor]:
    """Returns the remaining times ([n]), and the latents ([B, C, (f), h, w]) at the first of them, in the scheduler's units.
    Raises ValueError if `start` has the wrong shape or leaves no steps."""
    if start is None:
        return solver.timesteps, noise * getattr(solver, "init_noise_sigma", 1.0)
    if start.latents.shape != noise.shape:
        raise ValueError(f"start.latents has shape {list(start.latents.shape)}, but must be {list(noise.shape)}")
    taken = int(steps * start.strength)
    if not taken:
        raise ValueError(
            f"strength = {start.strength:g} with {steps} step{'s' if steps > 1 else ''} leaves nothing to sample; use "
            "more steps or a larger strength"
        )
    first = (steps - taken) * getattr(solver, "order", 1)
    times, clean = solver.timesteps[first:], start.latents.to(noise)
    _begin(solver, first)
    at = times[:1].repeat(len(noise))
    flows = hasattr(solver, "scale_noise")
    return times, solver.scale_noise(clean, at, noise) if flows else solver.add_noise(clean, noise, at)


def _solver(backbone: Backbone, settings: SamplingSettings, steps: int, shape: Sequence[int]) -> Any:
    """Returns a new scheduler at its first step."""
    solver = make_scheduler(backbone, settings.scheduler)
    backbone.set_timesteps(solver, steps, shape)
    return solver


def _begin(solver: Any, call: int) -> None:
    """Makes a new scheduler start at the given call."""
    if hasattr(solver, "set_begin_index"):  # only schedulers that count their calls have this method
        solver.set_begin_index(call)


def _seen(solver: Any, latents: Tensor, t: Tensor) -> Tensor:
    """Converts latents from the scheduler's units, which differ for some schedulers, to the network's units."""
    return solver.scale_model_input(latents, t) if hasattr(solver, "scale_model_input") else latents


class _ConditioningCache:
    """Caches conditionings. Prompts are encoded again only if their words, the strengths, or the time (for prompts whose
    encoding depends on it) has changed."""

    def __init__(self, backbone: Backbone, negatives: Sequence[str] | None) -> None:
        self.backbone = backbone
        self.negatives = negatives
        self.words: Any = None
        self.timed = False
        self.key: Any = None
        self.value: tuple[Conditioning, Conditioning | None]

    def __call__(self, prompts: Sequence[str], t: Tensor) -> tuple[Conditioning, Conditioning | None]:
        words = (tuple(prompts), tuple(self.negatives or ()))
        if words != self.words:
            self.words = words
            self.timed = "time" in self.backbone.varies_with([*words[0], *words[1]])
        key = (words, self.backbone.strengths, float(t) if self.timed else None)
        if key != self.key:
            self.key = key
            negative = None if self.negatives is None else self.backbone.encode(self.negatives, t)
            self.value = self.backbone.encode(prompts, t), negative
        return self.value


def _requests(
    backbone: Backbone,
    prompts: Sequence[str],
    negative: str | Sequence[str],
    batch: int,
    steps: int,
    guidance: float,
) -> tuple[list[str], list[str]]:
    """Checks prompts and negative prompts, and returns one of each per picture."""
    if steps < 1 or batch < 1:
        raise ValueError(f"sampling needs at least one step and one seed, but got steps={steps}, len(seeds)={batch}")
    guided = backbone.needs_negative(guidance)
    texts = _texts(prompts, batch, "prompts")
    negatives = _texts([negative] if isinstance(negative, str) else negative, batch, "negative prompts")
    if any(negatives) and not guided:
        raise ValueError(
            f"{backbone.family} ignores negative prompts at guidance={guidance}; leave the negative prompt out"
        )
    for text in dict.fromkeys([*texts, *(negatives if guided else ())]):
        backbone.check_prompt(text)
    return texts, negatives


def _texts(texts: Sequence[str], batch: int, what: str) -> list[str]:
    out = [texts] if isinstance(texts, str) else list(texts)
    if len(out) == 1:
        return out * batch
    if len(out) != batch:
        raise ValueError(f"got {len(out)} {what} for {batch} seeds; give one per seed, or one for all")
    return out


def _noise(backbone: Backbone, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draws noise [B, C, (f), h, w] on the CPU in the sampler's precision. Like diffusers' `randn_tensor`, uses a
    separate generator for each picture."""
    noise = [torch.randn((1, *shape), generator=g, dtype=backbone.latent_dtype) for g in generators]
    return torch.cat(noise).to(backbone.device)


def _step_options(solver: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    return {"generator": generators} if "generator" in inspect.signature(solver.step).parameters else {}
