"""Tests prompts and guidance for threestudio against the contract that its documentation defines for extensions.

If a checkout is given (`PCS_THREESTUDIO=DIR`), they are also tested against that checkout's base classes.
"""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import scene_prompts
from pcs_3d.guidance.backbone_scores import BackboneScores
from pcs_3d.guidance.engine import guide
from pcs_3d.schedules import Moment
from pcs_3d.threestudio.guide import cameras_of
from pcs_3d.threestudio.teacher import Asked, open_teacher
from shared.train.loop import generator
from tests.three_d.threestudio_checkouts import write_concept

PROMPT, SETTINGS = "a photo of a <my-mug>", ["negative=ugly"]


@pytest.fixture(scope="module")
def folders(make_tiny_sd, tmp_path_factory) -> SimpleNamespace:
    """Saves a backbone and a concept as folders."""
    from shared.backbones.stable_diffusion import StableDiffusionBackbone

    root = tmp_path_factory.mktemp("teacher")
    make_tiny_sd().save_pretrained(root / "tiny")
    concept = write_concept(StableDiffusionBackbone(make_tiny_sd(), str(root / "tiny")), root / "my-mug.concept")
    return SimpleNamespace(backbone=str(root / "tiny"), concept=str(concept), root=root)


def both(threestudio, folders, recipe: str = "dreamfusion", prompt: str = PROMPT, **guidance):
    """Creates a prompt processor and a guidance object from settings, as threestudio does from a configuration."""
    shared = {"backbone": folders.backbone, "concepts": {folders.concept: 0.8}, "recipe": recipe}
    settings = guidance.pop("settings", SETTINGS)
    words = threestudio.find("pcs-prompt-processor")({"prompt": prompt, **shared, "settings": settings})
    return words, threestudio.find("pcs-guidance")({**shared, "settings": settings, "steps": 10, **guidance})


def looked(count: int) -> dict[str, Tensor]:
    azimuth = torch.tensor([0.0, 100.0, -170.0])[:count]
    elevation, distance = torch.tensor([5.0, 70.0, 20.0])[:count], torch.full((count,), 3.0)
    fovy = torch.full((count,), math.radians(40.0))
    return {"elevation": elevation, "azimuth": azimuth, "camera_distances": distance, "fovy": fovy, "c2w": None}


def test_without_a_backbone_the_model_of_the_first_concept_is_opened(folders):
    # Opening a model makes its path known.
    open_teacher(Asked.of(folders.backbone, {folders.concept: 0.8}, "csd", (), "cpu", "auto"))
    teacher = open_teacher(Asked.of("", {folders.concept: 0.8}, "csd", (), "cpu", "auto"))
    assert teacher.recipe.backbone == folders.backbone and teacher.concepts == {"my-mug": 0.8}


@pytest.mark.parametrize("recipe", ["dreamfusion", "csd", "lucid_dreamer", "prolificdreamer"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_gradient_equals_that_of_the_engine_with_the_concept(threestudio, folders, recipe, count):
    words, guidance = both(threestudio, folders, recipe, seed=3)
    rgb = torch.rand(count, 32, 32, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    guidance.update_step(0, 4)

    teacher = open_teacher(Asked.of(folders.backbone, {folders.concept: 0.8}, recipe, SETTINGS, "cpu", "auto"))
    how = teacher.recipe.model_copy(update={"prompt": PROMPT})
    scene = scene_prompts(how, {"my-mug": "mug"})
    scores = BackboneScores(teacher.runner.backbone, scene, {"my-mug": 0.8})
    at, draw = looked(count), generator(3, 4)
    cameras = Cameras.of(at["azimuth"], at["elevation"], 3.0, 40.0)
    again = rgb.detach().permute(0, 3, 1, 2).requires_grad_()
    z = scores.encode(again)
    wanted = guide(how.guidance, scores, z.detach(), scene.views(cameras, draw), scene, Moment(4, 10), draw).grad
    (truth,) = torch.autograd.grad((z * wanted).sum() / count, again)
    assert truth.norm() > 0

    out = guidance(rgb, words(), **looked(count), rgb_as_latents=False)
    assert out["loss_sds"].ndim == 0 and {n for n in out if n.startswith("loss_")} == {"loss_sds"}
    (grad,) = torch.autograd.grad(out["loss_sds"], rgb)
    torch.testing.assert_close(grad, truth.permute(0, 2, 3, 1))
    other, again = both(threestudio, folders, recipe, "a <my-mug> in the snow", seed=3)
    again.update_step(0, 4)
    (moved,) = torch.autograd.grad(again(rgb, other(), **looked(count))["loss_sds"], rgb)
    assert not torch.allclose(grad, moved), "the prompt has an effect"


def test_only_the_student_is_trained_alongside_the_field(threestudio, folders):
    words, guidance = both(threestudio, folders, "prolificdreamer")
    adapters = guidance.teacher.runner.backbone.adapters

    def tensors(name: str) -> list[Tensor]:
        return [p.detach().clone() for a in adapters[name] for p in a.parameters()]

    before, concept = tensors("student"), tensors("my-mug")
    rgb = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = []
    for _ in range(30):  # each step makes the same random draws
        out = guidance(rgb, words(), **looked(2))
        losses.append(out["student"])
    assert losses[-1] < losses[0]
    assert rgb.grad is None, "the student's loss has no gradient with respect to the views"
    assert all(torch.equal(a, b) for a, b in zip(concept, tensors("my-mug"), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, tensors("student"), strict=True))
    words, guidance = both(threestudio, folders, "prolificdreamer", settings=["guidance.scale=2"])
    guidance.update_step(0, 5)
    with pytest.warns(UserWarning, match="starts from scratch at step 5"):
        guidance(rgb, words(), **looked(2))
    with pytest.raises(ValueError, match=r"trainable\.more"):
        both(threestudio, folders, "prolificdreamer", settings=["trainable.more.kind=lora"])


def test_cameras_have_the_same_angles_and_positions_as_in_threestudio():
    given = looked(3)
    cameras = cameras_of(*(given[name] for name in ("elevation", "azimuth", "camera_distances", "fovy")))
    torch.testing.assert_close(cameras.fov_deg, torch.full((3,), 40.0))
    up, around = torch.deg2rad(given["elevation"]), torch.deg2rad(given["azimuth"])
    places = torch.stack([up.cos() * around.cos(), up.cos() * around.sin(), up.sin()], -1)
    torch.testing.assert_close(cameras.positions, 3 * places)


def test_latents_are_guided_without_being_encoded(threestudio, folders):
    words, guidance = both(threestudio, folders)
    latents = torch.zeros(1, 8, 8, 4, requires_grad=True)
    out = guidance(latents, words(), **looked(1), rgb_as_latents=True)
    out["loss_sds"].backward()
    torch.testing.assert_close(latents.grad.norm(), out["grad_norm"])
    with pytest.raises(ValueError, match=r"latents with 3 channels.*needs 4"):
        guidance(torch.zeros(1, 8, 8, 3), words(), **looked(1), rgb_as_latents=True)
    words, guidance = both(threestudio, folders, settings=["guidance.pixel_weight=1"])
    with pytest.raises(ValueError, match=r"guidance\.pixel_weight needs pixels to compare"):
        guidance(latents, words(), **looked(1), rgb_as_latents=True)


def test_the_prompt_processor_and_the_guidance_must_share_one_model(threestudio, folders):
    words, guidance = both(threestudio, folders)
    assert words().teacher is guidance.teacher
    other, _ = both(threestudio, folders, settings=["guidance.scale=3"])
    rgb = torch.rand(1, 32, 32, 3)
    for wrong in (other(), SimpleNamespace(get_text_embeddings=None)):
        with pytest.raises(ValueError, match=r"system\.guidance\.concepts"):
            guidance(rgb, wrong, **looked(1))
    with pytest.raises(ValueError, match="guidance_eval"):
        guidance(rgb, words(), **looked(1), guidance_eval=True)


def test_embeddings_of_the_prompt_come_before_those_of_the_negative_prompt(threestudio, folders):
    words, guidance = both(threestudio, folders)
    at = {k: v for k, v in looked(3).items() if k in ("elevation", "azimuth", "camera_distances")}
    found = words().get_text_embeddings(**at)
    backbone = guidance.teacher.runner.backbone
    name = backbone.placeholders["my-mug"].words
    sides = [f"a photo of a {name}, {side} view" for side in ("front", "overhead", "back")]
    with backbone.active({"my-mug": 0.8}):
        truth = backbone.encode([*sides, "ugly", "ugly", "ugly"]).context
    torch.testing.assert_close(found, truth)
    plain = words().get_text_embeddings(**at, view_dependent_prompting=False)
    assert torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], found[0])


def test_a_concept_that_was_relearned_at_the_same_path_is_read_again(threestudio, folders, sd, tmp_path):
    concept = shutil.copytree(folders.concept, tmp_path / "my-mug.concept")
    folders = SimpleNamespace(backbone=folders.backbone, concept=str(concept))
    at = {k: v for k, v in looked(1).items() if k in ("elevation", "azimuth", "camera_distances")}
    before = both(threestudio, folders)[0]().get_text_embeddings(**at)
    write_concept(sd, concept, seed=1)
    after = both(threestudio, folders)[0]().get_text_embeddings(**at)
    assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a photo of a mug"}, "does not name it"),
        ({"prompt": " "}, "prompt is empty"),
        ({"recipe": "magic3d"}, "phases"),
        ({"recipe": "dreamfusoin"}, "dreamfusion"),
        ({"settings": ["guidance.sclae=3"]}, "sclae"),
        ({"settings": ["guidance.joint_views=2", "cameras.ring=2"]}, r"guidance\.joint_views"),
        ({"settings": ["guidance.regions.hat.kind=sdf"]}, r"guidance\.regions"),
        ({"settings": ["guidance.terms.prompt.adapters=[my-mgu]"]}, r"guidance\.terms\.prompt\.adapters.*my-mug"),
    ],
)
def test_invalid_settings_are_reported_before_the_first_step(threestudio, folders, changes, message):
    with pytest.raises(ValueError, match=message):
        both(threestudio, folders, **changes)


def test_a_configuration_with_an_unknown_key_is_refused(threestudio):
    for name in ("pcs-prompt-processor", "pcs-guidance", "pcs-volume-renderer", "pcs-exporter"):
        with pytest.raises(TypeError):
            threestudio.find(name).Config(no_such_key=1)
