"""The localisation loss matches that of Break-A-Scene, moves attention, and covers only the right rows and concepts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.backbones.attention_maps_need import AttentionMaps
from shared.regularize import Localisation
from shared.regularize.localisation import localisation_loss
from shared.types import Batch, Step
from tests.core.runs import finish, session, small
from tests.core.test_tokens import FixedPlaceholder, fixed

LENGTH = 7


def example_inputs(batch: int = 3) -> Any:
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(batch, 16, LENGTH, generator=draw).softmax(-1)
    positions = {n: torch.zeros(batch, LENGTH, dtype=torch.bool) for n in ("cat", "mug")}
    positions["mug"][:, 2], positions["cat"][:, 4] = True, True
    masks = {n: (torch.rand(batch, 1, 8, 8, generator=draw) > 0.5).float() for n in positions}
    return maps, positions, masks, torch.ones(batch, dtype=torch.bool)


def test_the_loss_matches_the_published_computation() -> None:
    """The published script divides each concept's attention map by the map's maximum and sums over the concepts."""
    maps, positions, masks, rows = example_inputs()
    expected = torch.zeros(())
    for row in range(3):
        for name, token in (("mug", 2), ("cat", 4)):
            map_ = maps[row, :, token].view(4, 4)
            mask = F.interpolate(masks[name][row][None], size=(4, 4), mode="area")[0, 0]
            expected = expected + F.mse_loss(map_ / map_.max(), mask) / 3
    got = localisation_loss(maps, (4, 4), positions, masks, rows)
    assert torch.allclose(got, expected, atol=1e-6)
    plain = localisation_loss(maps, (4, 4), positions, masks, rows, "none")
    target = F.adaptive_avg_pool2d(masks["mug"], (4, 4)).flatten(1)
    only = {"mug": positions["mug"]}
    assert torch.allclose(
        localisation_loss(maps, (4, 4), only, masks, rows, "none"), ((maps[..., 2] - target) ** 2).mean(), atol=1e-6
    )
    assert plain != got


def test_the_distance_can_be_cross_entropy() -> None:
    """The cross-entropy, which MotionBooth uses as the distance, matches torch's own binary cross-entropy."""
    maps, positions, masks, rows = example_inputs()
    only, target = {"mug": positions["mug"]}, F.adaptive_avg_pool2d(masks["mug"], (4, 4)).flatten(1)
    got = localisation_loss(maps, (4, 4), only, masks, rows, "none", "cross_entropy")
    assert torch.allclose(got, F.binary_cross_entropy(maps[..., 2], target), rtol=1e-5)
    sure = localisation_loss(maps, (4, 4), only, masks, rows, "max", "cross_entropy")
    assert torch.isfinite(sure), "a map divided by its maximum contains a 1, but the loss must stay finite"


def test_the_maps_of_a_concepts_tokens_are_averaged() -> None:
    maps, positions, masks, rows = example_inputs()
    positions["mug"][:, 3] = True
    together = maps.clone()
    together[..., 2] = maps[..., 2:4].mean(-1)
    _, single, _, _ = example_inputs()
    a, b = (localisation_loss(m, (4, 4), p, masks, rows) for m, p in ((maps, positions), (together, single)))
    assert torch.allclose(a, b, atol=1e-6)


def test_only_rows_that_both_show_and_name_a_concept_count() -> None:
    maps, positions, masks, rows = example_inputs()
    one = localisation_loss(maps[:1], (4, 4), {k: v[:1] for k, v in positions.items()}, masks_of(masks, [0]), rows[:1])
    rows[1:] = False  # the other rows are class pictures
    assert torch.allclose(localisation_loss(maps, (4, 4), positions, masks, rows), one, atol=1e-6)
    rows[:] = True
    for name in ("cat", "mug"):
        positions[name][1] = False  # the caption does not name the concept
        masks[name][2] = 0  # the concept is not in the picture, or has no mask
    assert torch.allclose(localisation_loss(maps, (4, 4), positions, masks, rows), one / 3, atol=1e-6)
    assert localisation_loss(maps, (4, 4), positions, masks, torch.zeros(3, dtype=torch.bool)) == 0


def masks_of(masks: Any, rows: list[int]) -> Any:
    return {k: v[rows] for k, v in masks.items()}


@pytest.fixture
def named(request: pytest.FixtureRequest) -> Any:
    """A backbone with two concepts that have learned tokens."""
    backbone = request.getfixturevalue(request.param)
    for i, name in enumerate(("cat", "mug")):
        backbone.add_placeholder(FixedPlaceholder(name, (f"<{name}>",), lambda c, t, s, i=i: fixed(1, i)[c]))
    return backbone


def batch_of(**masks: Tensor) -> Batch:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = ("a photo of <cat> and <mug>", "a <mug>")
    return Batch(captions, (("cat", "mug"), ("mug",)), ("instance", "instance"), latents, owner_masks=masks)


@contextmanager
def step(backbone: Any, batch: Batch, need: AttentionMaps) -> Iterator[Step]:
    """Yields a training step. As in the tuning task, `need` stays open while prediction and loss are computed."""
    t, x_t, conditioning = (
        torch.tensor([300, 600][: len(batch.latents)]),
        batch.latents,
        backbone.encode(batch.captions),
    )
    with need.around(backbone, batch) as entered:
        prediction = backbone.predict(x_t, t, conditioning)
        state = Step(batch, backbone, conditioning, x_t, t, x_t, prediction, x_t, torch.Generator())
        yield replace(state, lazy={need.name: lambda: need.value(state, entered)})


@pytest.mark.parametrize("named", ["sd", "flux"], indirect=True)
def test_training_moves_attention_onto_the_mask(named: Any) -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :4, :4] = 1
    part, batch = Localisation(weight=1.0), batch_of(mug=mask)
    (need,) = part.provides
    assert need.name in Localisation.needs
    named.denoiser.requires_grad_(True)
    optimizer = torch.optim.Adam(named.denoiser.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        with step(named, batch, need) as state:
            with torch.no_grad():
                named.predict(state.x_t.flip(0), state.t, state.conditioning)  # a prediction made by another part
            loss = part(state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    record = state.need("attention_maps")
    kinds = {record.sites[n].kind for n in record}
    assert kinds == ({"cross"} if named.family == "stable_diffusion" else {"joint"})


@pytest.mark.parametrize("named", ["sd"], indirect=True)
def test_attention_is_recorded_at_the_scale_nearest_to_a_resolution_of_sixteen(named: Any) -> None:
    (need,) = Localisation().provides
    for size, scale in ((8, 1), (16, 1), (32, 2), (64, 4)):  # this network's cross-attention is at scales 1, 2 and 4
        batch = replace(batch_of(), latents=torch.zeros(2, 4, size, size))
        with need.around(named, batch) as record:
            at = {s.scale for s in record.sites.values()}
            assert at == {scale}, size
    other, two = Localisation(scales=(3,)).provides[0], Localisation(scales=(1, 2)).provides[0]
    with pytest.raises(ValueError, match="scale 3.*Available: cross at scale 1"), other.around(named, batch_of()):
        pass
    with two.around(named, batch_of()) as record:
        assert record.sites.keys() == {s.name for s in named.sites() if s.kind == "cross" and s.scale in (1, 2)}


@pytest.mark.parametrize("named", ["sd"], indirect=True)
def test_a_batch_without_masks_has_no_localisation_loss(named: Any) -> None:
    part = Localisation()
    with step(named, batch_of(), part.provides[0]) as state:
        assert part(state) == 0


def test_gradient_checkpointing_does_not_change_what_a_run_learns(tiny: Any, photos: Any, tmp_path: Any) -> None:
    asked = ("masks.given.kind=given", "regularize.localisation.weight=0.1", "regularize.prior.kind=prior_prediction")
    after = []
    for name, extra in (("kept", ()), ("again", ("train.gradient_checkpointing=true",)), ("without", ())):
        weight = ("regularize.localisation.weight=0",) if name == "without" else ()
        recipe = small("pivotal_tuning", *asked, *extra, *weight)
        after.append(finish(session(tiny(), recipe, photos, tmp_path / name)))
    kept, again, without = after
    assert all(torch.allclose(v, again[k], atol=1e-6) for k, v in kept.items())
    assert not all(torch.allclose(v, without[k], atol=1e-6) for k, v in kept.items())
