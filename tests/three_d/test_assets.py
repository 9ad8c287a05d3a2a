"""Assets with every kind of field are optimized, interrupted, and written as files that other programs can open."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from pcs_3d.assets import ABOUT, AssetFiles, _nouns, create
from pcs_3d.fields.gaussians import GaussianField
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.concept import Provenance, capture
from shared.config import validate
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.read_subject import read_subject
from shared.modifiers.learnable import LearnableToken
from shared.prompts import without
from shared.recipe.resolve import load
from shared.recipe.schema import dump
from shared.train import checkpoint
from shared.train.training_run import TrainingRun
from tests.three_d.distilling import SMALL, finish, session
from tests.three_d.pages import viewer_of

TINY = (*SMALL, "train.batch_size=1", "train.resolution=16", "guidance.resolution=32", "setting=", "shading.lambertian=0",
        "shading.textureless=0", "cameras.fill=[0.9, 0.95]", "export.resolution=20", "export.texture=64", "export.picture=16",
        "export.frames=8", "export.faces=400")  # fmt: skip
FIELDS = {
    "voxels": ("field.resolution=12", "renderer.samples=16", "penalties.sparsity.weight=[0, 0.1, 1.0, 4]",
               "penalties.orientation={}", "penalties.normal_image_smoothness={}"),
    "triplane": ("field.resolution=8", "field.features=4", "field.width=8", "renderer.samples=16",
                 "field.start.radius=0.8", "penalties.total_variation={}"),
    "tetrahedra": ("field.resolution=8", "field.color_resolution=8", "penalties.normal_consistency={}",
                   "penalties.orientation=null"),
    "gaussians": ("field.count=60", "field.every=2", "field.threshold=1e-9", "field.most=80", "field.opacity=0.9",
                  "field.start.radius=0.7", "penalties.opaque={}", "penalties.orientation=null"),
}  # fmt: skip

FIVE = ("train.steps=5", "train.checkpoint_every=2")


class Silent:
    """A progress display that shows nothing."""

    def step(self, phase, record, total) -> None:
        pass

    def pictures(self, what, done, total) -> None:
        pass


def recipe(kind: str, *settings: str) -> Recipe3D:
    return load("dreamfusion", [*TINY, f"field.kind={kind}", *FIELDS.get(kind, ()), *settings], "3d", Recipe3D)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def run_of(backbone, how: Recipe3D, folder: Path) -> TrainingRun:
    return session(backbone, how, folder)  # type: ignore[arg-type]


# --- from a prompt to files ------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIELDS)
def test_a_field_of_each_kind_becomes_an_asset(sd, tmp_path, kind):
    how, out = recipe(kind, "train.steps=3"), tmp_path / "asset"
    before = how.field.build(3, how.seed)
    asset = create(Runner3D(sd), how, AssetFiles(out))
    assert not same(before.state_dict(), asset.field.state_dict()), "the field has learned"
    files = {str(p.relative_to(out)) for p in out.rglob("*.*")}
    assert {
        "asset.glb",
        "asset.obj",
        "asset.mtl",
        "asset-texture.png",
        "asset.ply",
        "turntable.mp4",
        "renders/045.png",
        "report.html",
    } <= files
    assert ("asset.splats.ply" in files) == (kind == "gaussians")
    mesh = trimesh.load(out / "asset.glb", force="mesh")
    about = json.loads((out / ABOUT).read_text())
    assert about["mesh"]["faces"] == len(mesh.faces) > 20 and mesh.visual.material.baseColorTexture is not None
    assert validate(Recipe3D, about["recipe"]) == how
    clip = read_clip(out / "turntable.mp4", ClipWindow(length=8)).frames
    assert clip.shape[:2] == (3, 8) and float(clip.std()) > 0.05
    assert checkpoint.load(tmp_path / "asset.training") is None
    _, shown = viewer_of((out / "report.html").read_text())
    assert len(shown.faces) == len(mesh.faces) and shown.visual.material.baseColorTexture is not None


def test_the_page_shows_the_concept_the_prompt_and_the_costs(sd, tmp_path):
    preview = tmp_path / "preview.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(preview)
    token = LearnableToken(vectors=1)
    token.attach(sd, "mug", "mug", 0)
    runner, how = Runner3D(sd), recipe("voxels", "train.steps=1", "prompt=a photo & <mug>", "export=null")
    taught = capture(sd, "mug", Provenance("subject", "mug", token, preview=preview))
    sd.remove("mug")
    runner.load(taught, 0.7)
    create(runner, how, AssetFiles(tmp_path / "asset"))
    page = (tmp_path / "asset" / "report.html").read_text()
    assert "a photo &amp; &lt;mug&gt;" in page and "<iframe" not in page
    assert base64.b64encode(preview.read_bytes()).decode() in page and "mug: 0.7" in page
    assert "data:video/mp4;base64," in page and page.count("data:image/png") == 5, (
        "the page shows the preview and four sides"
    )
    assert "whole process" in page and "default-src 'none'" in page


def test_a_field_without_a_surface_produces_no_asset_but_its_state_is_kept(sd, tmp_path):
    how = recipe("voxels", "train.steps=1", "field.start.density=0.001")
    with pytest.raises(ValueError, match="the field is empty"):
        create(Runner3D(sd), how, AssetFiles(tmp_path / "asset"))
    assert not (tmp_path / "asset").exists() and checkpoint.load(tmp_path / "asset.training") is not None


# --- interruption ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stop"), [("voxels", 2), ("gaussians", 3), ("gaussians", 2)])
def test_an_interrupted_run_equals_an_uninterrupted_one(new_sd, tmp_path, kind, stop):
    """The fields are equal bit for bit.

    The Gaussians are split before steps 2 and 4 (counted from 0), so `stop` is just before or just after a split.
    """
    settings = ("train.steps=5", f"train.checkpoint_every={stop}")
    whole = finish(run_of(new_sd(), recipe(kind, *settings), tmp_path / "whole"))
    steps = run_of(new_sd(), recipe(kind, *settings), tmp_path / "run").steps()
    for _ in range(stop):
        next(steps)
    steps.close()
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and state.step == stop
    if kind == "gaussians":
        assert (len(state.learned["field/means"]) == 60) == (stop == 2) and len(whole["field/means"]) == 80
    assert same(finish(run_of(new_sd(), recipe(kind, *settings), tmp_path / "run"), resume=True), whole)


@pytest.mark.parametrize("kind", FIELDS)
def test_previews_do_not_affect_a_run_and_may_change_when_it_resumes(new_sd, tmp_path, kind):
    class Stopped(Silent):
        def step(self, phase, record, total) -> None:
            if record.step == 3:
                raise KeyboardInterrupt

    plain, looked = (recipe(kind, *FIVE, f"train.validation.every={every}") for every in (0, 1))
    whole = Runner3D(new_sd()).create(plain, tmp_path / "whole").field.state_dict()
    with pytest.raises(KeyboardInterrupt):
        Runner3D(new_sd()).create(looked, tmp_path / "run", progress=Stopped())
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 3
    resumed = Runner3D(new_sd()).create(plain, tmp_path / "run", resume=True)
    assert same(resumed.field.state_dict(), whole)


def test_gaussians_keep_their_adam_moments_when_other_gaussians_are_split(new_sd, tmp_path):
    """At the first step after a split, Adam uses the existing Gaussians' moments and does not start from scratch."""
    kept = []

    class Watched(GaussianField):
        def advance(self, step: int, steps: int):
            found = super().advance(step, steps)
            if found is not None:
                kept.append((found, {name: p.detach().clone() for name, p in self.named_parameters()}))
            return found

    run = run_of(new_sd(), recipe("gaussians", "train.steps=3"), tmp_path / "run")
    part = run.recipe.field  # type: ignore[attr-defined]
    object.__setattr__(part, "build", lambda channels, seed: Watched(part, channels, seed))
    after = finish(run)
    (found, at_split), *_ = kept
    rows = next(iter(found.values()))[1]
    moved = (after["field/raw_features"] - at_split["raw_features"])[rows >= 0].abs()
    fresh = part.feature_rate  # Adam's first step has this length, whatever the gradient
    assert float(moved.max()) > 0 and float((moved - fresh).abs().median()) > 1e-3 * fresh


# --- incompatible settings -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FIELDS, "frequency_mlp", "hash_grid"])
def test_a_recipe_uses_the_renderer_for_its_kind_of_field_and_survives_a_round_trip(kind):
    how = recipe(kind)
    assert how.renderer.kind == how.field.drawn_by
    assert validate(Recipe3D, json.loads(json.dumps(dump(how)))) == how


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["field.kind=gaussians", "renderer.kind=volume"], "a field of kind gaussians needs renderer.kind=splat"),
        (["guidance.space=latents", "guidance.resolution=null"], "no colours to write to files: set export=null"),
        (["penalties.silhouette={}"], "penalties.silhouette compares views with the subject's pictures"),
        (["penalties.sparsity.weight=-1"], "a weight must not be negative"),
        (["penalties.sparsty={}"], "Did you mean 'sparsity'"),
    ],
)
def test_a_recipe_refuses_incompatible_settings(settings, why):
    with pytest.raises(ValueError, match=why):
        load("dreamfusion", [*TINY, *settings], "3d", Recipe3D)


def test_an_unsuitable_penalty_that_starts_late_is_refused_before_the_first_step(sd, tmp_path):
    how = recipe("voxels", "penalties.eikonal.weight=[4, 0.0, 1.0, 5]")
    with pytest.raises(ValueError, match=r"penalties: eikonal needs field.kind=tetrahedra"):
        finish(run_of(sd, how, tmp_path / "run"))
    assert checkpoint.load(tmp_path / "run") is None


# --- pictures of the object -------------------------------------------------------------------


def red_pictures(folder: Path) -> Path:
    """Paints two pictures of a red square on a green background, with masks."""
    for name in ("a", "b"):
        picture, mask = Image.new("RGB", (64, 64), (0, 200, 0)), Image.new("L", (64, 64))
        picture.paste((230, 0, 0), (20, 20, 44, 44))
        mask.paste(255, (20, 20, 44, 44))
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
        mask.save(folder / "masks" / f"{name}.png")
    return folder


def test_the_plain_prompt_of_an_asset_has_one_article(sd):
    how = recipe("voxels", "prompt=a photo of a <mug>", "name=mug", "subject={images: photos, class_noun: a mug}")
    assert without(how.prompt, _nouns(Runner3D(sd), how)) == "a photo of a mug"


def test_the_field_learns_to_match_the_reference_pictures_from_their_cameras(sd, tmp_path):
    subject = read_subject(red_pictures(tmp_path / "photos"), "mug", masks=tmp_path / "photos" / "masks")
    references = ("references.azimuth_deg=[0, 90]", "penalties.reference_views={count: 2, weight: 100}",
                  "penalties.silhouette.weight=100", "guidance.weight=0.0")  # fmt: skip
    how = recipe("voxels", "train.steps=8", "prompt=a photo of a mug", *references)
    asset = Runner3D(sd).create(how, tmp_path / "run", {"mug": subject}, tensorboard=False)
    assert how.references is not None
    seen = asset.views(how.references.cameras())
    middle = seen.pixels[:, :, 6:10, 6:10].mean((0, 2, 3))
    assert float(middle[0]) > 0.6 > 0.4 > float(middle[1]), "the middle is red, not green like the background"
    with pytest.raises(
        ValueError, match=r"references.azimuth_deg must have one azimuth per picture \(2\), but has 3.* a.png, b.png"
    ):
        more = recipe("voxels", "prompt=a photo of a mug", *references[1:], "references.azimuth_deg=[0, 90, 180]")
        Runner3D(sd).create(more, tmp_path / "other", {"mug": subject})
    assert not (tmp_path / "other").exists()
