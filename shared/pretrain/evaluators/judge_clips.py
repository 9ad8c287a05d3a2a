"""Tests the toybox's motion module against minimum scores (bars). Clips must match their captions, and a thing must
keep its appearance throughout a clip."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.pretrain.evaluators.measure import confusions
from shared.pretrain.evaluators.reconstructions import round_trip
from shared.toybox.evaluators.identity import load_identity
from shared.toybox.evaluators.pose import load_pose, path_of
from shared.toybox.evaluators.recognizer import load_recognizer
from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.motions.captioned_paths import STILL, nearest_captioned
from shared.toybox.motions.clip_captions import clip_caption
from shared.toybox.motions.clips import MovingScene, draw_clip, sample_moving

BARS = {"class": 0.90, "motion": 0.75, "background": 0.90, "ends_agree": 0.85}
FRAMES = 16
_ALIKE = 0.05  # the quantile of the true clips' similarities that serves as the threshold for `ends_agree`


def judge_clips(
    pipe: Any, n: int = 128, guidance: float = 4.0, steps: int = 25, seed: int = 0, batch_size: int = 4
) -> dict[str, Any]:
    """Measures a toybox `AnimateDiffPipeline` against the bars, with one clip of 16 frames for each of `n` random
    captions.

    The captions cycle through the motions. Class and background are read from the recognizer's probabilities, averaged
    over frames. The motion is read from the estimated path. The true clips are renders of the same scenes, encoded and
    decoded by the autoencoder. The ends of a clip agree if the identity encoder's similarity between the first and the
    last frame reaches the level that 95% of the true clips reach. `still` is the share of clips in which nothing
    moves.

    Returns:
        a dictionary with the settings and these entries:
        `scores`: the shares of clips read correctly
        `instrument`: the scores of the true clips, which serve as the ceiling
        `bars`: for each bar, `value`, `bar` and `met`
        `met`: whether all bars are met
        `confusions`: the most common confusions between motions
        `seconds`: the duration of the measurement
    """
    if n < len(MOTIONS):
        raise ValueError(f"n = {n} captions are too few; at least {len(MOTIONS)} are needed, one for each motion")
    started = time.monotonic()
    moving, texts = clip_captions(n, seed)
    made = _Read.of(generate(pipe, texts, guidance, steps, seed, batch_size))
    true = _Read.of([round_trip(pipe.vae, draw_clip(m).frames.permute(0, 3, 1, 2)) for m in moving])
    least = float(np.quantile(true.alike, _ALIKE))
    scores, ceiling = made.scores(moving, least), true.scores(moving, least)
    bars = {name: {"value": scores[name], "bar": bar, "met": scores[name] >= bar} for name, bar in BARS.items()}
    return {
        "n": n,
        "guidance": guidance,
        "steps": steps,
        "seed": seed,
        "scores": scores,
        "instrument": ceiling,
        "bars": bars,
        "met": all(bar["met"] for bar in bars.values()),
        "confusions": confusions(made.motions, [m.motion.name for m in moving], 12),
        "seconds": round(time.monotonic() - started, 1),
    }


def clip_captions(n: int, seed: int) -> tuple[list[MovingScene], list[str]]:
    """Samples `n` clips and their full captions. The clips cycle through the captioned motions. All are in the photo
    style and show no accessories."""
    rng, motions = np.random.default_rng([seed, 107]), tuple(MOTIONS.values())
    moving = [
        sample_moving(rng, motions[i % len(motions)], FRAMES, style="photo", accessory="none", pattern=False)
        for i in range(n)
    ]
    return moving, [clip_caption(m, rng, full=True) for m in moving]


@torch.no_grad()
def generate(
    pipe: Any, texts: Sequence[str], guidance: float, steps: int, seed: int, batch_size: int = 4
) -> list[Tensor]:
    """Generates one clip per text, `[16, 3, H, W]` in [0, 1]. Each clip has its own seed, so the batch size has no
    effect."""
    pipe.set_progress_bar_config(disable=True)
    clips: list[Tensor] = []
    for start in range(0, len(texts), batch_size):
        chunk = list(texts[start : start + batch_size])
        seeds = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(chunk))]
        made = pipe(
            chunk, num_frames=FRAMES, guidance_scale=guidance, num_inference_steps=steps, generator=seeds,
            output_type="pt",
        ).frames  # fmt: skip
        clips += list(made.float().cpu().clamp(0, 1))
    return clips


class _Read:
    """The evaluators' readings of clips."""

    def __init__(self) -> None:
        self.classes: list[str] = []
        self.backgrounds: list[str] = []
        self.motions: list[str] = []
        self.alike: list[float] = []  # cosine similarities between the first and the last frame

    @classmethod
    def of(cls, clips: Sequence[Tensor]) -> _Read:
        """Reads clips `[F, 3, 64, 64]` in [0, 1]."""
        recognizer, pose, identity, read = load_recognizer(), load_pose(), load_identity(), cls()
        for frames in clips:
            seen = {name: int(p.mean(0).argmax()) for name, p in recognizer.probabilities(frames).items()}
            read.classes.append(recognizer.config.values["class"][seen["class"]])
            read.backgrounds.append(recognizer.config.values["background"][seen["background"]])
            read.motions.append(nearest_captioned(path_of(pose.read(frames))))
            first, last = identity.embed(frames[[0, -1]])
            read.alike.append(float(first @ last))
        return read

    def scores(self, moving: Sequence[MovingScene], least: float) -> dict[str, float]:
        """Returns the shares of clips that are read correctly, whose ends agree, and in which nothing moves. The ends
        agree if the similarity between the first and the last frame is at least `least`."""
        right = {
            "class": [a == m.scene.things[0].class_name for a, m in zip(self.classes, moving, strict=True)],
            "background": [a == m.scene.background for a, m in zip(self.backgrounds, moving, strict=True)],
            "motion": [a == m.motion.name for a, m in zip(self.motions, moving, strict=True)],
            "ends_agree": [a >= least for a in self.alike],
            "still": [a == STILL for a in self.motions],
        }
        return {name: round(float(np.mean(hits)), 4) for name, hits in right.items()}
