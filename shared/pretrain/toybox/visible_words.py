"""Lets motion words reach the motion modules through the frozen U-Net.

The modules read a caption only through the cross-attention of the layers before them. This cross-attention was trained
on pictures and ignores words that it has never seen. Replacing "to the right" with "to the left" changes its output
features by 1%, whereas replacing "blue" with "red" changes them by 30%. If the features do not differ, the modules
cannot learn to distinguish motions, and the embeddings of motion words get no gradient. Before the modules are trained,
these embeddings are therefore trained to change the features that the modules read, while changing the picture as
little as possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.pretrain.toybox import models
from shared.pretrain.toybox.latent_cache import tokenize
from shared.toybox.captions import background_phrase, describe, opening
from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.motions.clip_captions import PHRASES
from shared.toybox.motions.clips import sample_moving
from shared.toybox.world import Scene
from shared.train.loop import generator

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


#: Pairs of opposite motions, whose captions share most of their words.
OPPOSITES = {"slide left": "slide right", "rise": "fall", "approach": "recede"}
OPPOSITES |= {other: one for one, other in OPPOSITES.items()}


@dataclass(frozen=True)
class WordTraining:
    """Settings for training the embeddings of motion words.

    differ: the target for the relative difference between the features of two motions after each cross-attention
    opposite: the probability that a motion with an opposite is compared with this opposite rather than with a random
        other motion. The shipped words were trained only on random pairs. At timestep 600, their features differ by
        1% between "left" and "right", and by 45% between "wobbling" and "moving camera". With the current default,
        the differences are 30% and 38%.
    seen: the loss weight of the squared relative change that motion words cause in the prediction
    times: the range from which timesteps are drawn
    """

    steps: int = 240
    batch: int = 6
    lr: float = 1e-2
    differ: float = 0.2
    opposite: float = 0.7
    seen: float = 60.0
    times: tuple[int, int] = (400, 1000)
    seed: int = 0


def make_visible(
    pipe: StableDiffusionPipeline, word_ids: list[int], latents: Tensor, settings: WordTraining = WordTraining()
) -> list[dict[str, float]]:
    """Trains the `word_ids` rows of the text model's embedding table in place. Nothing else is changed.

    Args:
        latents: scaled latents [N, C, h, w] of any pictures from the toybox world

    Returns:
        one dict per step. `differ` is the relative difference between the features of two motions, averaged over
        layers; `least` is this difference in the layer where it is smallest; `seen` is the relative change of the
        prediction.
    """
    unet: Any = pipe.unet.eval().requires_grad_(False)
    text: Any = pipe.text_encoder.eval().requires_grad_(False)
    table = text.get_input_embeddings()
    rows = nn.Parameter(table.weight.detach()[word_ids].clone())
    place = torch.full((len(table.weight),), -1, device=rows.device)
    place[word_ids] = torch.arange(len(word_ids), device=rows.device)

    def learned(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        at = place[args[0]]
        return torch.where((at >= 0)[..., None], rows[at.clamp_min(0)], out)

    features: list[Tensor] = []
    hooks = [table.register_forward_hook(learned)]
    for module in unet.modules():
        if type(module).__name__ == "Transformer2DModel":
            hooks.append(module.register_forward_hook(lambda m, a, out: features.append(out[0])))
    optimizer = torch.optim.Adam([rows], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, settings.steps)
    bars, log = models.alphas_bar().to(rows.device), []
    try:
        for step in range(settings.steps):
            g = generator(settings.seed, step)
            ids = tokenize(pipe.tokenizer, [_texts(settings, step)]).reshape(3 * settings.batch, -1)
            b = settings.batch
            x = latents[torch.randint(len(latents), (b,), generator=g).to(latents.device)].float()
            t = torch.randint(*settings.times, (b,), generator=g)
            noise = torch.randn(x.shape, generator=g).to(x)
            bar = bars[t].view(-1, 1, 1, 1)
            noisy = bar.sqrt() * x + (1 - bar).sqrt() * noise
            features.clear()
            context = text(input_ids=torch.from_numpy(ids.astype(np.int64)).to(x.device)).last_hidden_state
            guess = unet(noisy.repeat(3, 1, 1, 1), t.repeat(3).to(x.device), encoder_hidden_states=context).sample
            apart = torch.stack([_relative(f[:b], f[b : 2 * b], f[2 * b :]) for f in features])  # [layers, B]
            seen = torch.stack([_relative(guess[:b], guess[2 * b :]), _relative(guess[b : 2 * b], guess[2 * b :])])
            loss = (settings.differ - apart).clamp_min(0).square().mean() * 100 + settings.seen * seen.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            layers = apart.detach().mean(1)
            log.append(
                {"differ": layers.mean().item(), "least": layers.min().item(), "seen": seen.detach().mean().item()}
            )
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        table.weight[word_ids] = rows.to(table.weight)
    return log


def _relative(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """Returns |a - b| / |base| for each row, [B]. The default `base` is `b`."""
    size = (b if base is None else base).flatten(1).norm(dim=1)
    return ((a - b).flatten(1).square().sum(1) + 1e-12).sqrt() / size.detach()


def _texts(settings: WordTraining, step: int) -> list[str]:
    """Draws B scenes and returns 3B captions. The first B captions name one motion for each scene, the next B captions
    name another motion, and the last B captions name no motion."""
    rng = np.random.default_rng([settings.seed, 17, step])
    motions, columns = list(MOTIONS), ([], [], [])
    for _ in range(settings.batch):
        one, other = (motions[i] for i in rng.choice(len(motions), 2, replace=False))
        if rng.random() < settings.opposite:
            other = OPPOSITES.get(one, other)
        scene = sample_moving(rng, MOTIONS[one], 2).scene
        for column, motion in zip(columns, (one, other, None), strict=True):
            words = PHRASES[motion][int(rng.integers(len(PHRASES[motion])))] if motion else ""
            column.append(_said(scene, words))
    return [text for column in columns for text in column]


def _said(scene: Scene, words: str) -> str:
    """Adds motion words to a scene's plain caption. They follow the thing or, if they begin with a comma, the
    background."""
    thing = f"{opening(scene.style)} {describe(scene.things[0], 'none')}"
    place = background_phrase(scene.background)
    if not words or words.startswith(","):
        return f"{thing} {place}{words}"
    return f"{thing} {words} {place}"
