"""The localisation loss follows a subject through the frames of a clip, in every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from shared.modifiers import LearnableToken
from shared.regularize import Localisation
from shared.regularize.localisation import localisation_loss
from shared.trainable import Lora
from shared.types import Batch
from tests.core.test_localisation import example_inputs, step
from tests.video.clip_models import build_animatediff
from tests.video.transformer_runs import FAMILIES, frames_of


def test_a_clip_costs_as_much_as_its_frames_taken_as_pictures() -> None:
    maps, positions, masks, _ = example_inputs(batch=6)
    one = {name: at[:2] for name, at in positions.items()}
    of_clips = {name: mask.reshape(2, 3, 1, 8, 8).transpose(1, 2) for name, mask in masks.items()}
    every, clips = torch.ones(6, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    expected = localisation_loss(maps, (4, 4), positions, masks, every, "none")
    for rows in (maps, maps.reshape(2, 48, -1)):  # frames along the batch, and frames along the queries
        got = localisation_loss(rows, (4, 4), one, of_clips, clips, "none")
        torch.testing.assert_close(got, expected)
    bright = maps.clone()
    bright[0] *= 2  # a clip's maps are divided by the largest value of all its frames
    largest = bright.reshape(2, 48, -1).amax(1)[:, None].repeat_interleave(3, 0)
    by_clip = localisation_loss(bright / largest, (4, 4), positions, masks, every, "none")
    torch.testing.assert_close(localisation_loss(bright, (4, 4), one, of_clips, clips), by_clip)


@pytest.mark.parametrize("family", ["animatediff", *FAMILIES])
def test_training_moves_attention_to_where_the_subject_is_in_each_frame(
    family: str, make_tiny_sd: Callable[..., Any]
) -> None:
    animated = family == "animatediff"
    backbone: Any = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny") if animated else FAMILIES[family]()
    LearnableToken(vectors=1).attach(backbone, "mug", "mug", 0)
    frames = 3 if animated else 2 * frames_of(backbone) - 1
    shape = backbone.latent_shape(64, 64, frames)
    mask = torch.zeros(1, 1, *shape[1:])
    mask[:, :, 0, :, : shape[-1] // 2] = 1  # the subject is on the left in the first frame, and on the right afterwards
    mask[:, :, 1:, :, shape[-1] // 2 :] = 1
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        (f"a {backbone.placeholders['mug'].words}",), (("mug",),), ("instance",), latents, owner_masks={"mug": mask}
    )
    part = Localisation(weight=1.0)
    group = Lora(roles=("cross_attention",), rank=8).inject(backbone, "mug", "lora", 0)
    optimizer = torch.optim.Adam(group.parameters, 3e-2)
    losses = []
    for _ in range(16):
        with step(backbone, batch, part.provides[0]) as state:
            loss = part(state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    elsewhere = replace(batch, owner_masks={"mug": mask.flip(-1)})
    with torch.no_grad(), step(backbone, elsewhere, part.provides[0]) as state:
        assert part(state) > 1.1 * losses[-1]
