"""Inverts clean latents to the noise that would generate them, by running the sampler's equation backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.config import PathText
from shared.io.noise_prior_settings import NoisePriorSettings
from shared.prompts import expand
from shared.sampling.given_files import encoded, is_clip, picture_latents, read_given
from shared.sampling.hooks import SamplingHook, SamplingHookBase
from shared.sampling.sampler import output_size
from shared.sampling.schedulers import make_scheduler
from shared.sampling.settings import SamplingSettings


@torch.no_grad()
def invert(
    backbone: Backbone, latents: Tensor, prompts: Sequence[str] = ("",), *, steps: int | None = None, refine: int = 0
) -> Tensor:
    """Finds the noise [B, C, (f), h, w] from which deterministic sampling with these prompts, without guidance, generates
    `latents`.

    For epsilon, v and sample predictions, this runs DDIM backwards (Song et al., arXiv 2010.02502, section 4.3; Mokady et
    al., arXiv 2211.09794, section 3.2) over the DDIM scheduler's times. For flow matching, it runs Euler's method backwards
    over the sigmas of the family's own schedule. A backward step needs the prediction at its end point, which is approximated
    by the prediction for the less noisy latents at the noisier time. The round trip is therefore exact only in the limit of
    many steps.

    Args:
        latents: clean latents [B, C, (f), h, w]
        prompts: B expanded prompts, or one for all latents
        steps: the number of steps; if None, the backbone's default
        refine: how many times to recompute each step's prediction at its end point (Pan et al., arXiv 2309.04907). If
            this iteration converges, the inverse is exact.

    Raises:
        ValueError: if `steps` is less than 1, `refine` is negative, or a prompt exceeds the token limit
    """
    steps = backbone.default_steps if steps is None else steps
    if steps < 1 or refine < 0:
        raise ValueError(f"inversion needs steps >= 1 and refine >= 0, but got steps={steps}, refine={refine}")
    for prompt in prompts:
        backbone.check_prompt(prompt)
    texts = list(prompts) * len(latents) if len(prompts) == 1 else list(prompts)
    times, alphas, sigmas = _levels(backbone, steps, latents.shape[1:])
    x = latents
    for i, t in enumerate(times):
        conditioning = backbone.encode(texts, t)
        low, high = (alphas[i], sigmas[i]), (alphas[i + 1], sigmas[i + 1])
        later = x
        for _ in range(1 + refine):
            prediction = backbone.predict(later, t, conditioning).to(x.dtype)
            later = _one_back(backbone, x, prediction, later, t, (low, high))
        x = later
    return x


def _levels(backbone: Backbone, steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns increasing times ([N]), and alphas and sigmas ([N + 1] each, float64). The first alpha and sigma belong
    to the sampler's final latents, and the others belong to the times."""
    flow = backbone.prediction_type == "flow"
    solver: Any = make_scheduler(backbone, "flow_euler" if flow else "ddim")
    backbone.set_timesteps(solver, steps, shape)
    times = solver.timesteps.flip(0)
    if flow:
        sigmas = solver.sigmas.double().flip(0).to(times.device)
        return times, 1 - sigmas, sigmas
    bars = solver.alphas_cumprod.to(times.device)[times.long()]
    bars = torch.cat([torch.as_tensor(solver.final_alpha_cumprod).to(bars)[None], bars]).double()
    return times, bars.sqrt(), (1 - bars).sqrt()


def _one_back(
    backbone: Backbone,
    x: Tensor,
    prediction: Tensor,
    later: Tensor,
    t: Tensor,
    levels: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Returns the latents that a deterministic step with this prediction turns into x."""
    (a0, s0), (a1, s1) = levels
    kind = backbone.prediction_type
    if kind == "flow":
        return x + ((s1 - s0) * prediction).to(x.dtype)
    if kind == "v_prediction":  # the step is x = (a0 a1 + s0 s1) y + (s0 a1 - a0 s1) v
        return ((x - (s0 * a1 - a0 * s1) * prediction) / (a0 * a1 + s0 * s1)).to(x.dtype)
    eps = prediction if kind == "epsilon" else backbone.to_eps(prediction, later, t)
    return (a1 * (x - s0 * eps) / a0 + s1 * eps).to(x.dtype)


class NoisePrior(NoisePriorSettings, SamplingHookBase):
    """Starts sampling from noise that comes partly from a clip or picture. The noise is
    sqrt(p) * inverted + sqrt(1 - p) * random, where p is `share`.

    Tune-A-Video uses p = 1 (https://arxiv.org/abs/2212.11565). For a motion learned from a single clip, MotionDirector
    uses p between 0.1 and 0.5 (https://arxiv.org/abs/2310.08465), which keeps the clip's layout and movement without
    its appearance. The clip is inverted with the current model, including loaded concepts.
    """

    kind: Literal["noise_prior"] = "noise_prior"
    path: PathText
    # the concept that the prior belongs to; only prompts that name it use the prior. If empty, all prompts use the prior
    name: str = ""

    def resting(self) -> NoisePrior:
        """Returns the same hook with a share of 0, so that it takes nothing from the clip."""
        return self.model_copy(update={"share": 0.0})

    def check(self) -> None:
        """Raises ValueError, naming the file, for errors that can be found before a model is loaded."""
        is_clip(self.path)

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> SamplingHook:
        """Returns a hook that mixes the noise, or a hook that does nothing if the share is 0.

        Raises ValueError if the file cannot be read, if it is too short, or if it is a picture although a clip is
        generated (or a clip although a picture is generated).
        """
        if not self.share:
            return SamplingHookBase()
        *frames, height, width = output_size(backbone, settings)
        backbone.latent_shape(height, width, *frames)
        if is_clip(self.path) != bool(frames):
            here, made = ("a clip", "a picture") if not frames else ("a picture", "a clip")
            raise ValueError(f"{self.path} is {here}, but {made} is generated, so it cannot provide the noise")
        if frames:
            clean = encoded(backbone, read_given(self.path, frames[0], (height, width)).frames)
        else:
            clean = picture_latents(backbone, self.path, (height, width))
        prompt = expand(self.prompt, backbone.placeholders)
        steps = self.steps or settings.steps
        return MixedNoise(inverted=invert(backbone, clean, [prompt], steps=steps, refine=self.refine), share=self.share)


class MixedNoise(SamplingHookBase):
    """Mixes initial noise that takes `share` of its variance from inverted latents [1, C, (f), h, w], and the rest from the
    random noise."""

    inverted: Tensor
    share: float

    def initial_noise(self, backbone: Backbone, noise: Tensor) -> Tensor:
        return self.share**0.5 * self.inverted.to(noise) + (1 - self.share) ** 0.5 * noise
