"""A phase can start from the previous phase's field, even if the two fields are of different kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from pcs_3d.distill.hand_over import check_fields, handed, restored
from pcs_3d.export.extract import extract
from pcs_3d.fields import Gaussians, Tetrahedra, TexturedMesh, Voxels
from pcs_3d.fields.base import FieldPart
from pcs_3d.fields.field import SurfaceField
from pcs_3d.fields.grids import nodes
from pcs_3d.fields.starts import Blob, PhaseStart
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.io.read_subject import read_subject
from shared.recipe.overlay import Rules
from shared.recipe.resolve import load
from shared.train import checkpoint
from shared.types import Subject
from tests.three_d.closed_forms import rendered_radius
from tests.three_d.distilling import finish, session

TINY = ("backbone=tiny", "prompt=a photo of a mug", "train.batch_size=1", "train.mixed_precision=no", "setting=",
        "train.checkpoint_every=0", "guidance.resolution=32")  # fmt: skip
START = "start.resolution=20"


def steps(phase: str, count: int = 2) -> tuple[str, ...]:
    return f"phases.{phase}.train.steps={count}", f"phases.{phase}.train.resolution=16"


SMALL = {
    "magic3d": (
        *steps("coarse"), *steps("fine"), "phases.coarse.field.levels=3", "phases.coarse.field.table=8",
        "phases.coarse.field.finest=16", "phases.coarse.field.width=8", "phases.coarse.renderer.samples=16",
        "phases.fine.field.resolution=10", "phases.fine.field.color_resolution=8", f"phases.fine.field.{START}",
    ),
    "dream_gaussian": (
        *steps("gaussians"), *steps("texture"), "phases.gaussians.field.count=60", "phases.gaussians.field.opacity=0.9",
        "phases.gaussians.field.every=1", "phases.texture.field.resolution=8", f"phases.texture.field.{START}",
    ),
    "texture_personalization": ("train.steps=2", "train.resolution=16", "field.resolution=8"),
    "realfusion": (
        *steps("learn"), "phases.learn.train.resolution=32", "phases.learn.train.batch_size=1", *steps("grow"),
        "field.resolution=10", "renderer.samples=16", "prompt=a photo of a <mug>",
    ),
}  # fmt: skip
LAST = {
    "magic3d": "field/distances",
    "dream_gaussian": "field/raw_features",
    "texture_personalization": "field/raw_features",
    "realfusion": "field/raw_density",
}


def small(name: str, folder: Path, *more: str) -> Recipe3D:
    given = []
    if name == "texture_personalization":
        trimesh.creation.icosphere(2).export(folder / "ball.glb")
        given = [f"field.start.path={folder / 'ball.glb'}"]
    return load(name, [*TINY, *SMALL[name], *given, *more], "3d", Recipe3D)


def subjects(name: str, folder: Path) -> dict[str, Subject]:
    if name != "realfusion":
        return {}
    (folder / "masks").mkdir()
    picture, mask = Image.new("RGB", (64, 64), (0, 200, 0)), Image.new("L", (64, 64))
    picture.paste((230, 0, 0), (20, 20, 44, 44))
    mask.paste(255, (20, 20, 44, 44))
    picture.save(folder / "a.png")
    mask.save(folder / "masks" / "a.png")
    return {"mug": read_subject([folder / "a.png"], "mug", masks=folder / "masks")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- the recipes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_recipes_with_several_or_unusual_fields_take_two_steps_per_phase(sd, tmp_path, name):
    how = small(name, tmp_path)
    check_fields(how)
    last = LAST[name]
    asset = Runner3D(sd).create(how, tmp_path / "run", subjects(name, tmp_path), tensorboard=False)
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and {"field/" + k for k in asset.field.state_dict()} == set(state.carried)
    learned = state.carried[last]
    assert bool(learned.isfinite().all()) and float(learned.std()) > 0
    assert bool(asset.views(how.cameras.sample(1, _start(), torch.Generator()), 16).opacity.any())


def _start():
    from pcs_3d.schedules import Moment

    return Moment(0, 1)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("name", ["magic3d", "dream_gaussian"])
def test_a_run_resumed_after_the_hand_over_equals_an_uninterrupted_one(new_sd, tmp_path, name, every):
    """The results are equal bit for bit, and only the later field remains at the end.

    With `every` 0, nothing is saved within phases, so the run resumes from the end of the first phase. With `every` 1,
    it resumes one step later.
    """

    def run(folder: str):
        how = small(name, tmp_path, f"train.checkpoint_every={every}")
        return session(new_sd(), how, tmp_path / folder)  # type: ignore[arg-type]

    whole = finish(run("whole"))
    begun = run("run").steps()
    for _ in range(3):
        next(begun)
    begun.close()
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and (state.phase, state.step) == (1, every)
    assert LAST[name] in whole and "field/means" not in whole and "field/tables" not in whole
    assert same(finish(run("run"), resume=True), whole)


# --- shapes ----------------------------------------------------------------------------------


def first() -> torch.nn.Module:
    """Returns a field with a ball above the middle. The ball is red on its left and blue on its right."""
    field = Voxels(resolution=24, start=Blob(radius=0.55, density=40)).build()
    with torch.no_grad():
        field.raw_density.copy_(field.raw_density.roll(3, 2))  # upwards
        left = nodes(24, 1.1)[..., 1:2] > 0
        field.raw_features.copy_(torch.where(left, torch.tensor([3.0, -3, -3]), torch.tensor([-3.0, -3, 3])))
    return field


def solid(field, resolution: int = 32) -> Tensor:
    """Returns, for each point of a grid, whether it is inside the surface that would be exported."""
    mesh = extract(field, 40)
    inside = trimesh.Trimesh(mesh.vertices, mesh.faces).voxelized(2.2 / resolution).fill()
    places = nodes(resolution, 1.05).reshape(-1, 3).numpy()
    return torch.from_numpy(inside.is_filled(places))


@pytest.mark.parametrize(
    "part",
    [
        Voxels(resolution=30, start=PhaseStart(resolution=40)),
        Tetrahedra(resolution=24, color_resolution=12, start=PhaseStart(resolution=40)),
        TexturedMesh(resolution=12, start=PhaseStart(resolution=40)),
    ],
    ids=lambda part: part.kind,
)
def test_the_later_field_has_the_shape_and_colours_of_the_earlier_field(part: FieldPart):
    field = first()
    start = handed(field, part.start)  # type: ignore[arg-type]
    later = part.model_copy(update={"start": start}).build()
    a, b = solid(field), solid(later)
    assert float((a & b).sum() / (a | b).sum()) > 0.95
    places = torch.tensor([[0.0, 0.5, 0.29], [0.0, -0.5, 0.29]])
    colors = later.features_at(places) if isinstance(later, SurfaceField) else later.at(places).features
    assert colors.argmax(-1).tolist() == [0, 2] and float(colors.amax(-1).min().detach()) > 0.8


def test_gaussians_start_on_the_surface_and_a_mesh_starts_from_gaussians():
    start = handed(first(), PhaseStart(resolution=40))
    splats = Gaussians(count=300).model_copy(update={"start": start}).build().splats()
    away = (splats.means - torch.tensor([0, 0, 0.287])).norm(dim=-1)
    assert float((away - 0.5).abs().max()) < 0.05 and set(splats.features.argmax(-1).tolist()) == {0, 2}
    ball = Gaussians(count=400, opacity=0.9, start=Blob(radius=0.7)).build()
    found = handed(ball, PhaseStart(resolution=32))
    assert found.volume is None and float(found.surface.vertices.norm(dim=-1).mean()) == pytest.approx(
        rendered_radius(ball), abs=0.07
    )
    beyond = torch.tensor([[0.0, 0, 1.0], [0.0, 0, 0]])
    assert float(found.known.distance(beyond)[0]) > 0.1 > 0 > float(found.known.distance(beyond)[1])


def test_a_given_mesh_is_joined_at_its_seams_and_saved_with_the_state(tmp_path):
    split = trimesh.creation.icosphere(1)
    split.unmerge_vertices()  # as exporters do for flat triangles and texture seams
    split.export(tmp_path / "split.obj")
    field = TexturedMesh(start={"path": tmp_path / "split.obj"}, resolution=6).build()  # type: ignore[arg-type]
    assert len(field.vertices) == 42 and len(field.faces) == 80
    (tmp_path / "split.obj").unlink()
    again = restored(TexturedMesh(start=PhaseStart(), resolution=6), 3, 0, field.state_dict())
    assert isinstance(again, SurfaceField) and torch.equal(again.surface().vertices, field.vertices)
    assert torch.equal(again.surface().faces, field.faces)


# --- refused settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("dreamfusion", ["field.start.kind=phase"], r"^field.start.kind = phase, but no earlier phase makes"),
        ("magic3d", ["phases.coarse.field.start.kind=phase"], r"phases.coarse.field.start.kind = phase, but no"),
        ("magic3d", ["phases.fine.field.start={kind: blob}"], r"is of kind hash_grid; .*start.kind=phase"),
        ("texture_personalization", [], r"field.start.path is not set: give a mesh"),
        ("magic3d", ["phases.coarse.guidance={space: latents, resolution: null}", "phases.coarse.export=null"],
         "set the same guidance.space in both"),
    ],
)  # fmt: skip
def test_fields_without_a_valid_start_are_refused_before_anything_begins(sd, tmp_path, name, settings, why):
    how = load(name, [*TINY, *settings], "3d", Recipe3D)
    with pytest.raises(ValueError, match=why):
        Runner3D(sd).create(how, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_starting_from_an_empty_field_is_refused():
    empty = Voxels(resolution=10, start=Blob(density=1e-3)).build()
    with pytest.raises(
        ValueError, match=r"start.kind = phase, but the earlier phase left nothing .* the field is empty"
    ):
        handed(empty, PhaseStart(resolution=12))


def test_the_error_for_an_unsuitable_penalty_explains_how_to_leave_it_out(sd, tmp_path):
    how = load("dreamfusion", [*TINY, "train.resolution=16", "field.kind=gaussians", "field.count=40"], "3d", Recipe3D)
    with pytest.raises(
        ValueError, match=r"orientation needs a field .* to leave this penalty out, set penalties.orientation=null"
    ):
        finish(session(sd, how, tmp_path / "run"))  # type: ignore[arg-type]


def test_overlay_rules_add_no_parts_that_a_recipe_leaves_out():
    rules = Rules({"recipes": {"a": {"penalties": {"sparsity": {"weight": 1}, "opaque": {"weight": 2}}}}}, "3d", {},
                  ("penalties",))  # fmt: skip
    found = rules.of({"penalties": {"sparsity": {}, "opaque": None}}, ["a"])
    assert found["penalties"] == {"sparsity": {"weight": 1}}
