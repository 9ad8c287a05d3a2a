"""From clean latents back to the noise that sampling would have made them of: the sampler's own equation, run backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.config import PathText
from shared.prompts import expand
from shared.sampling.given_files import encoded, is_clip, picture_latents, read_given
from shared.sampling.hooks import SamplingHookBase
from shared.sampling.sampler import output_size
from shared.sampling.schedulers import make_scheduler
from shared.sampling.settings import SamplingSettings

Share = Annotated[float, Field(ge=0, le=1)]


@torch.no_grad()
def invert(
    backbone: Backbone, latents: Tensor, prompts: Sequence[str] = ("",), *, steps: int | None = None, refine: int = 0
) -> Tensor:
    """The noise [B, C, (f), h, w] that deterministic sampling without guidance takes to `latents`, with these prompts.

    For epsilon, v and sample predictions DDIM backwards (Song et al., arXiv 2010.02502, section 4.3; Mokady et al., arXiv
    2211.09794, section 3.2), over the times of the DDIM scheduler; for flow matching Euler's method backwards, over the
    sigmas of the family's own schedule. A step back needs the prediction at where it leads; it is approximated by that of
    the less noisy latents at the later time, so that the round trip is exact only in the limit of many steps.

    Args:
        latents: clean, in latent units
        prompts: B texts, already expanded, or one for all
        steps: default: the backbone's own
        refine: how many times each step's prediction is made again at where the step led (Pan et al., arXiv 2309.04907):
            a fixed point of it is the exact inverse

    Raises:
        ValueError: for fewer than one step, or a prompt past the token limit
    """
    steps = backbone.default_steps if steps is None else steps
    if steps < 1 or refine < 0:
        raise ValueError(f"inversion needs at least one step, got steps={steps}, refine={refine}")
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
    """Times, rising [N]; alpha and sigma of what the sampler leaves last, then at these times, each [N + 1], float64."""
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
    """The latents from which a deterministic step with this prediction leads to x."""
    (a0, s0), (a1, s1) = levels
    kind = backbone.prediction_type
    if kind == "flow":
        return x + ((s1 - s0) * prediction).to(x.dtype)
    if kind == "v_prediction":  # the step is x = (a0 a1 + s0 s1) y + (s0 a1 - a0 s1) v
        return ((x - (s0 * a1 - a0 * s1) * prediction) / (a0 * a1 + s0 * s1)).to(x.dtype)
    eps = prediction if kind == "epsilon" else backbone.to_eps(prediction, later, t)
    return (a1 * (x - s0 * eps) / a0 + s1 * eps).to(x.dtype)


class NoisePrior(SamplingHookBase):
    """Sampling starts from noise that partly comes from a clip (or picture): sqrt(p) * inverted + sqrt(1 - p) * random.

    With p = 1 it is Tune-A-Video's start (https://arxiv.org/abs/2212.11565); between 0.1 and 0.5
    MotionDirector's for a motion of one clip (https://arxiv.org/abs/2310.08465), which keeps the clip's
    layout and movement without its looks. The clip is inverted by the model as it is, with the concepts that are loaded.
    """

    kind: Literal["noise_prior"] = "noise_prior"
    path: PathText
    share: Share = 0.3  # p
    prompt: str = ""  # what the inversion is told
    steps: Annotated[int, Field(ge=1)] | None = None  # of the inversion; None: as many as sampling
    refine: Annotated[int, Field(ge=0)] = 0  # see `invert`

    def check(self) -> None:
        """ValueError, naming the file, for what can be said before a model is loaded."""
        is_clip(self.path)

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> MixedNoise:
        """ValueError when it cannot be read, is no clip (picture) where one is made, or is shorter than what is made."""
        *frames, height, width = output_size(backbone, settings)
        backbone.latent_shape(height, width, *frames)
        if is_clip(self.path) != bool(frames):
            here, made = ("a clip", "a picture") if not frames else ("a picture", "a clip")
            raise ValueError(f"{self.path} is {here}, and {made} is made: it gives no noise for that")
        if frames:
            clean = encoded(backbone, read_given(self.path, frames[0], (height, width)).frames)
        else:
            clean = picture_latents(backbone, self.path, (height, width))
        prompt = expand(self.prompt, backbone.placeholders)
        steps = self.steps or settings.steps
        return MixedNoise(inverted=invert(backbone, clean, [prompt], steps=steps, refine=self.refine), share=self.share)


class MixedNoise(SamplingHookBase):
    """`share` of the variance from inverted latents [1, C, (f), h, w], the rest from the noise that was drawn."""

    inverted: Tensor
    share: Share

    def initial_noise(self, backbone: Backbone, noise: Tensor) -> Tensor:
        return self.share**0.5 * self.inverted.to(noise) + (1 - self.share) ** 0.5 * noise
