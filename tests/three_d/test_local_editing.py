"""A local edit turns a region of an asset into the object that the teacher knows, and leaves the rest unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from pcs_3d.cameras import Cameras, turntable
from pcs_3d.distill.distill import Distill
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.regional import regional_scores
from pcs_3d.export.extract import extract
from pcs_3d.fields import LocalEdit, Voxels
from pcs_3d.fields.local_edit import LocalEditField
from pcs_3d.fields.starts import Blob, MeshFile
from pcs_3d.guidance.oracle import OracleScores
from pcs_3d.recipe import Recipe3D
from pcs_3d.regions import Box
from pcs_3d.renderers import Volume
from pcs_3d.runner import Runner3D
from shared.recipe.resolve import load
from shared.train.training_run import TASKS
from tests.three_d.closed_forms import view
from tests.three_d.distilling import finish, session

BOX = Box(lo=(-0.4, -0.4, 0.3), hi=(0.4, 0.4, 0.9), softness=0.1)


def edited(fill: float = 2.0) -> LocalEditField:
    """Returns a local edit of a ball. The edited region contains random values."""
    start = Blob(radius=0.5, density=40)
    field = LocalEdit(resolution=20, start=start, regions={"hat": BOX}, fill=fill).build()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        field.learned.raw_density.add_(4 * torch.randn(field.learned.raw_density.shape, generator=draw))
        field.learned.raw_features.add_(4 * torch.randn(field.learned.raw_features.shape, generator=draw))
    return field


def places() -> tuple[Tensor, Tensor]:
    """Returns random points and each point's depth inside the box (negative outside it)."""
    at = 2.2 * torch.rand(6000, 3, generator=torch.Generator().manual_seed(1)) - 1.1
    return at, torch.minimum(at - torch.tensor(BOX.lo), torch.tensor(BOX.hi) - at).amin(-1)


def test_a_field_equals_its_start_bit_for_bit_outside_its_regions():
    field, (at, depth) = edited(), places()
    plain = Voxels(resolution=20, start=Blob(radius=0.5, density=40)).build()
    out = depth <= 0
    for got, kept in ((field.at(at), plain.at(at)), (field.at(at[None]), plain.at(at[None]))):
        for name in ("density", "features"):
            a, b = getattr(got, name).reshape(6000, -1), getattr(kept, name).reshape(6000, -1)
            assert torch.equal(a[out], b[out]) and not torch.allclose(a[~out], b[~out])
    assert torch.allclose(field.density(at), field.at(at).density)
    assert torch.equal(field.normals(at)[out], plain.normals(at)[out])
    inner = depth > BOX.softness
    assert torch.allclose(field.at(at).density[inner], field.learned.at(at).density[inner])
    middle = (depth > 0.04) & (depth < 0.06)
    part = (depth / BOX.softness)[middle]
    mixed = (1 - part) * plain.density(at)[middle] + part * field.learned.density(at)[middle]
    assert torch.allclose(field.density(at)[middle], mixed, atol=1e-5), "the edit fades in at the border"
    least, most = (bound[:, 0] for bound in field.between(at, torch.zeros_like(at), torch.zeros(len(at), 1)))
    assert bool((least <= field.density(at) + 1e-5).all() and (field.density(at) <= most + 1e-5).all())


def test_the_surface_outside_the_region_does_not_move():
    """Compares the vertices that marching cubes finds on the same grid and at the same density."""
    before = extract(edited().kept, 40, 5.0, all_parts=True).vertices
    after = extract(edited(), 40, 5.0, all_parts=True).vertices

    def outside(vertices: np.ndarray) -> set[tuple[float, ...]]:
        cell = 2.2 / 39
        near = ((vertices > np.array(BOX.lo) - cell) & (vertices < np.array(BOX.hi) + cell)).all(1)
        return {tuple(v) for v in vertices[~near]}

    assert outside(before) == outside(after) and len(outside(before)) > 200
    assert {tuple(v) for v in before} != {tuple(v) for v in after}


def test_only_the_region_is_trained_and_it_starts_as_fog():
    field = LocalEdit(resolution=20, start=Blob(radius=0.3, density=40), regions={"hat": BOX}, fill=2.0).build()
    at = torch.tensor([[0.0, 0.0, 0.6], [0.0, 0.0, 0.0], [0.7, 0.0, 0.6]])
    assert torch.allclose(field.density(at[:1]), torch.tensor([2.0]), atol=1e-3)
    assert torch.equal(field.density(at[1:]), field.kept.density(at[1:]))
    (group,) = field.groups()["main"][:1]
    assert (
        not any(p.requires_grad for p in field.kept.parameters()) and group.parameters[0] is field.learned.raw_density
    )
    assert torch.equal(field.at(at[2:]).features, field.kept.at(at[2:]).features), "the point is in no region"
    drawn = Volume(samples=24).render(field, turntable(2), view(2, 16))
    drawn.pixels.square().mean().backward()
    assert field.kept.raw_density.grad is None and bool(field.learned.raw_density.grad.any())


def test_a_given_mesh_can_be_scaled_down_to_leave_room_for_an_edit(tmp_path):
    trimesh.creation.box((4, 2, 2)).export(tmp_path / "block.ply")
    start = MeshFile(path=tmp_path / "block.ply", radius=0.5)
    assert float(start.triangles().vertices.norm(dim=-1).max()) == pytest.approx(0.5)
    half = torch.tensor([2.0, 1, 1]) / 6**0.5 / 2
    on_it = torch.stack([half * torch.tensor(s) for s in ([1.0, 0, 0], [0, 0.5, -1.0])])
    assert float(start.shape().distance(on_it).abs().max()) < 0.02


# --- the recipe --------------------------------------------------------------------------------


SMALL = ("backbone=tiny", "prompt=a photo of a ball with a hat", "setting=", "train.mixed_precision=no",
         "train.resolution=24", "train.batch_size=2", "train.checkpoint_every=0", "field.resolution=20", "field.bound=1.1",
         "renderer.samples=32", "guidance.regions.hat.kind=box", "guidance.regions.hat.lo=[-0.4,-0.4,0.3]",
         "guidance.regions.hat.hi=[0.4,0.4,0.9]", "guidance.resolution=32")  # fmt: skip


def recipe(*more: str) -> Recipe3D:
    return load("local_editing", [*SMALL, "field.start={kind: blob, radius: 0.5}", *more], "3d", Recipe3D)


def test_the_region_becomes_the_object_that_its_own_teacher_knows(sd, tmp_path):
    """The region's teacher knows a green block. The teacher for the rest knows plain red, which no edit can match."""
    settings = ("train.steps=40", "field.lr=0.5", "field.lr_features=0.5", "guidance.scale=7.5",
                "guidance.regions.hat.prompt=a photo of a green hat", "cameras.elevation_deg=[0, 40]", "penalties=null",
                "background.random=0.0", "background.colors=[[1.0, 1.0, 1.0]]")  # fmt: skip
    how = recipe(*settings)
    truth = how.made.build()
    with torch.no_grad():
        truth.learned.raw_density.fill_(40.0)
        truth.learned.raw_features[:] = torch.tensor([-3.0, 3.0, -3.0])

    red = 2 * torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 24, 24) - 1

    def opened(_context, prompts, _concepts):
        means = (
            (lambda c: 2 * shown(truth, c) - 1)
            if "green" in prompts.prompt
            else (lambda c: red.expand(len(c), -1, -1, -1))
        )
        return OracleScores({"prompt": (means, 0.05), "negative": (means, 0.7)})

    tasks = {**TASKS, DistillTask: lambda context: Distill(context, opened)}
    run = session(sd, how, tmp_path / "run", tasks=tasks)  # type: ignore[arg-type]
    state = finish(run)
    start, field = how.made.build(), how.made.build()
    field.load_state_dict({k.removeprefix("field/"): v for k, v in state.items()})
    assert torch.equal(field.kept.raw_density, start.kept.raw_density)
    cameras = turntable(3, 20.0)
    seen, wanted, before = (shown(f, cameras) for f in (field, truth, start))
    error, first = (float((v - wanted).square().mean()) for v in (seen, before))
    print(error, first)
    inside = torch.tensor([[0.0, 0.0, 0.7]])
    assert error < 0.2 * first and field.at(inside).features.argmax(-1).tolist() == [1]


def shown(field: LocalEditField, cameras: Cameras) -> Tensor:
    with torch.no_grad():
        return Volume(samples=32).render(field, cameras, view(len(cameras), 24, background=1.0)).pixels


def test_a_regions_concepts_are_active_only_in_that_region():
    more = ("guidance.regions.hat.concepts=[b]", "guidance.regions.like={kind: sdf}", "negative=dull",
            "guidance.regions.bow={kind: sdf, prompt: a bow, negative: ugly}")  # fmt: skip
    asked: list[Any] = []

    def opened(prompts: Any, strengths: Any) -> OracleScores:
        asked.append((prompts.prompt, prompts.negative, dict(strengths)))
        return OracleScores({"prompt": (lambda c: torch.zeros(len(c), 3, 4, 4), 0.1)})

    scores: Any = regional_scores(recipe(*more), {}, {"a": 1.0, "b": 0.5}, opened)
    said = "a photo of a ball with a hat"
    assert asked == [(said, "dull", {"a": 1.0}), (said, "dull", {"b": 0.5}), ("a bow", "ugly", {"a": 1.0})]
    assert set(scores.regions) == {"hat", "bow"}, "a region without its own prompt or concepts is guided like the rest"
    with pytest.raises(ValueError, match=r"regions.hat.concepts: .*'c'.* a, b"):
        regional_scores(recipe("guidance.regions.hat.concepts=[c]"), {}, {"a": 1.0, "b": 0.5}, opened)


def test_a_resumed_edit_equals_an_uninterrupted_one(new_sd, tmp_path):
    how = recipe("train.steps=3", "train.checkpoint_every=1", "train.resolution=16")
    whole = finish(session(new_sd(), how, tmp_path / "whole"))  # type: ignore[arg-type]
    steps = session(new_sd(), how, tmp_path / "run").steps()  # type: ignore[arg-type]
    next(steps)
    next(steps)
    steps.close()
    again = finish(session(new_sd(), how, tmp_path / "run"), resume=True)  # type: ignore[arg-type]
    assert whole.keys() == again.keys() and all(torch.equal(v, again[k]) for k, v in whole.items())
    assert torch.equal(whole["field/kept.raw_density"], how.made.build().kept.raw_density)
    assert not torch.equal(whole["field/learned.raw_density"], how.made.build().learned.raw_density)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["guidance.regions=null"], r"field.kind = local_edit needs a region that may change"),
        (["guidance.regions.hat.concepts=[my-hat]"], r"guidance.regions.hat.concepts: .*'my-hat'"),
        (["guidance.regions.hat.prompt=a photo of a <my-hat>"], r"names <my-hat>, which is not loaded"),
        (["guidance.regions.more={kind: sdf, path: nowhere.glb}"], r"nowhere.glb"),
    ],
)
def test_invalid_regions_are_refused_before_training(sd, tmp_path, settings, why):
    with pytest.raises(ValueError, match=why):
        Runner3D(sd).create(recipe("train.steps=1", *settings), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint-00-0000000").exists()
