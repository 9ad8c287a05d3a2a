"""A given mesh is painted from pictures that are generated from its own renders. Tests the recipe, the meshes of toybox
classes, and the benchmark that provides them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pcs_3d.benchmark.toybox_assets import _starts
from pcs_3d.cameras import Cameras, turntable
from pcs_3d.distill.hand_over import FIELD
from pcs_3d.evaluation.carving import carved, class_mesh, write_class_mesh
from pcs_3d.evaluation.shape_scores import compared
from pcs_3d.evaluation.truths import TrueToy
from pcs_3d.evaluation.views import cameras, draw, painted_mesh, sphere
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.recipe.resolve import load
from shared.toybox.reference_sets import held_out
from shared.train.loop import Record

PAINTS = ("paint", "second_paint", "third_paint")
VIEWS = ("views", "second_views", "third_views")
TINY = (
    *(f"phases.{p}.train={{steps: 2, batch_size: 1, resolution: 16}}" for p in PAINTS),
    *(f"phases.{v}.task.num=2" for v in VIEWS),
    *(f"phases.{v}.task.elevation_deg=[10]" for v in VIEWS),  # all rounds show the mesh from the same sides
    "field.resolution=8",
    "sampling.steps=4",
)
SMALL = ("backbone=tiny", "prompt=a photo of a mug", "setting=", "train.mixed_precision=no", *TINY,
         "train.checkpoint_every=0", *(f"phases.{v}.train.resolution=32" for v in VIEWS))  # fmt: skip


@pytest.fixture(scope="module")
def mug(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_mesh("mug", tmp_path_factory.mktemp("meshes") / "mug.ply")


def test_the_first_views_are_made_from_the_mesh_and_only_its_colours_are_trained(sd, tmp_path, mug):
    recipe = load("texture_from_views", [*SMALL, f"field.start.path={mug}"], "3d", Recipe3D)
    runner, starts = Runner3D(sd), []
    encode = sd.encode_pixels
    sd.encode_pixels = lambda pixels: starts.append(pixels) or encode(pixels)
    asset = runner.create(recipe, tmp_path / "run", tensorboard=False)
    shown = draw(painted_mesh(mug), Cameras.of([0.0, 180.0], 10.0), 32)
    assert ((starts[0].mean(1) < 0.5) == shown.masks).float().mean() > 0.97, "the render shows the grey mesh on white"
    assert len(starts) == len(VIEWS), "only the views are encoded"
    assert not torch.equal(starts[0], starts[1]), "the second views are made from the coloured mesh"
    for phase in VIEWS:
        assert len(list((tmp_path / "run" / "phases" / phase).glob("*.png"))) == 2
    state = {key.removeprefix(FIELD): value for key, value in asset.field.state_dict().items()}
    first = recipe.field.build(3, 0).state_dict()
    assert torch.equal(state["vertices"], first["vertices"]) and torch.equal(state["faces"], first["faces"])
    assert not torch.equal(state["raw_features"], first["raw_features"])


def test_a_run_is_not_resumed_with_another_mesh(sd, tmp_path, mug):
    mesh = tmp_path / "thing.ply"
    mesh.write_bytes(mug.read_bytes())
    recipe = load(
        "texture_from_views", [*SMALL, "train.checkpoint_every=1", f"field.start.path={mesh}"], "3d", Recipe3D
    )

    class Stopped:
        def step(self, phase: str, record: Record, total: int) -> None:
            if phase == "paint":
                raise KeyboardInterrupt

        def pictures(self, what: str, done: int, of: int) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        Runner3D(sd).create(recipe, tmp_path / "run", progress=Stopped(), tensorboard=False)
    write_class_mesh("duck", mesh)
    with pytest.raises(ValueError, match=r"the file thing\.ply \(file 1\) has changed"):
        Runner3D(sd).create(recipe, tmp_path / "run", resume=True, tensorboard=False)


def test_the_benchmark_finds_the_phases_that_need_a_mesh(mug):
    every = load("texture_from_views", [], "3d", Recipe3D)
    assert _starts(every) == [f"phases.{name}.field.start.path" for name in every.phases]
    assert _starts(load("texture_from_views", [f"field.start.path={mug}"], "3d", Recipe3D)) == []
    assert _starts(load("texture_personalization", [], "3d", Recipe3D)) == ["field.start.path"]
    assert _starts(load("texture_refinement", [], "3d", Recipe3D)) == []


def test_without_a_mesh_the_recipe_says_how_to_give_one(sd, tmp_path):
    with pytest.raises(ValueError, match=r"field\.start\.path is not set: give a mesh"):
        Runner3D(sd).create(load("texture_from_views", list(SMALL), "3d", Recipe3D), tmp_path / "run")
    blob = ("field={kind: voxels, start: {kind: blob}}", "renderer.kind=volume")
    with pytest.raises(
        ValueError, match=r"views renders views, but no earlier phase makes an asset.*start from a mesh"
    ):
        Runner3D(sd).create(load("texture_from_views", [*SMALL, *blob], "3d", Recipe3D), tmp_path / "run")


def test_a_carved_sphere_is_a_sphere():
    around = Cameras.of([45.0 * i for i in range(8)] * 3 + [0.0], [-45.0] * 8 + [0.0] * 8 + [45.0] * 8 + [89.0])
    found = carved(draw(sphere(torch.zeros(3)), around).masks, around, 48)
    radius = torch.from_numpy(found.vertices).norm(dim=1)
    assert radius.min() > 0.97 and radius.max() < 1.1, "a visual hull is never smaller than the object"
    none = torch.zeros(2, 16, 16)
    with pytest.raises(ValueError, match="no point lies inside all silhouettes"):
        carved(none, turntable(2), 16)


def test_a_class_mesh_has_the_silhouettes_of_the_generic_object(mug):
    truth = TrueToy(held_out("development-mug")).plain.views(cameras())
    assert compared(painted_mesh(mug), truth, cameras()).iou.min() > 0.93
    assert len(class_mesh("mug", 500).faces) <= 500
    with pytest.raises(ValueError, match="unknown toybox class 'mgu'. Did you mean 'mug'"):
        class_mesh("mgu")


def test_the_command_writes_a_class_mesh_and_does_not_replace_files(pcs, tmp_path):
    file = tmp_path / "new" / "duck.ply"
    ran = pcs("3d", "class-mesh", "duck", "--out", file)
    assert ran.code == 0 and str(file) in ran.out and len(painted_mesh(file).faces) > 1000
    again = pcs("3d", "class-mesh", "duck", "--out", file)
    assert again.code == 2 and "already exists" in again.err
    assert pcs("3d", "class-mesh", "duck", "--out", file, "--overwrite").code == 0
    other = pcs("3d", "class-mesh", "duck", "--out", tmp_path / "duck.glb")
    assert other.code == 2 and "ends in .ply" in other.err
    unknown = pcs("3d", "class-mesh", "face", "--out", tmp_path / "face.ply")
    assert unknown.code == 2 and "unknown toybox class 'face'" in unknown.err and not (tmp_path / "face.ply").exists()
