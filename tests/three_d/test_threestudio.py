"""The extension for threestudio against the contract that its documentation gives to extensions, and, where a checkout is
given (`PCS_THREESTUDIO=DIR`), against that checkout's own base classes."""

from __future__ import annotations

import math
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import scene_prompts
from pcs_3d.guidance.backbone_scores import BackboneScores
from pcs_3d.guidance.engine import guide
from pcs_3d.schedules import Moment
from pcs_3d.threestudio.guide import cameras_of
from pcs_3d.threestudio.launch import imported, tensors_on_cpu
from pcs_3d.threestudio.stand_ins import absent
from pcs_3d.threestudio.teacher import Asked, open_teacher
from shared.concept import Provenance, capture, save
from shared.modifiers.learnable import LearnableToken
from shared.train.loop import generator
from shared.trainable import Lora

CHECKOUT = os.environ.get("PCS_THREESTUDIO")
CONTRACT = Path(__file__).parent / "contract"
DENSITY, RADIUS = 3.0, 0.7
PROMPT, SETTINGS = "a photo of a <my-mug>", ["negative=ugly"]


def forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "threestudio"]:
        del sys.modules[name]
    sys.modules.pop("pcs_3d.threestudio.extension", None)


@pytest.fixture(scope="module", params=["contract", "checkout"])
def threestudio(request):
    """The registry, with the extension in it."""
    if request.param == "checkout" and not CHECKOUT:
        pytest.skip("no threestudio checkout: set PCS_THREESTUDIO=DIR")
    folder = str(CONTRACT if request.param == "contract" else CHECKOUT)
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        module = imported(absent())
        tensors_on_cpu()
        import_module("pcs_3d.threestudio.extension")
        yield module
    forget()


# --- what is rendered and exported: a ball of which everything is known ----------------------------------


class Ball(nn.Module):
    """A density inside of a ball, red at +x and green at -x."""

    def __init__(self, sharp: bool = True) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(radius=1.0)
        self.amount = nn.Parameter(torch.tensor(DENSITY if sharp else 60.0))
        self.sharp = sharp

    def forward_density(self, points: Tensor) -> Tensor:
        inside = RADIUS - points.norm(dim=-1, keepdim=True)
        return self.amount * ((inside > 0).to(points) if self.sharp else torch.sigmoid(60 * inside))

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        right = (points[..., :1] > 0).to(points)
        found = {"density": self.forward_density(points), "features": torch.cat([right, 1 - right, 0 * right], -1)}
        return {**found, "normal": points / points.norm(dim=-1, keepdim=True)} if output_normal else found


class Plain(nn.Module):
    requires_normal = False

    def forward(self, features: Tensor, viewdirs: Tensor, light_positions: Tensor, **rest: Tensor) -> Tensor:
        assert features.shape == viewdirs.shape == light_positions.shape == rest["positions"].shape
        return features

    def export(self, features: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        return {"albedo": features}


class White(nn.Module):
    def forward(self, dirs: Tensor) -> Tensor:
        return torch.ones_like(dirs)


def batch(count: int, side: int = 16) -> dict[str, Tensor]:
    cameras = Cameras.of([360 * i / count for i in range(count)], 15.0, 3.0, 40.0)
    origins, directions = cameras.rays(side, side)
    return {"rays_o": origins, "rays_d": directions, "light_positions": cameras.positions}


def opacity_of(given: dict[str, Tensor]) -> Tensor:
    """Of the ball, in closed form: [B, H, W, 1]."""
    middle = (given["rays_o"] * given["rays_d"]).sum(-1)
    half = (RADIUS**2 - (given["rays_o"].square().sum(-1) - middle**2)).clamp_min(0).sqrt()
    return -torch.expm1(-DENSITY * 2 * half)[..., None]


def renderer(threestudio, material=None, **cfg):
    parts = {"geometry": Ball(), "material": material or Plain(), "background": White()}
    return threestudio.find("pcs-volume-renderer")({"samples": 128, **cfg}, **parts)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("cfg", [{}, {"hidden": 0.0}, {"importance": 32}])
def test_every_view_of_a_batch_is_drawn_as_it_should_be(threestudio, count, cfg):
    given, made = batch(count), renderer(threestudio, chunk=100, **cfg)
    truth = opacity_of(given)
    for training in (True, False):
        out = made.train(training)(**given)
        assert out["opacity"].shape == (count, 16, 16, 1) and out["comp_rgb"].shape == (count, 16, 16, 3)
        assert (out["opacity"] - truth).abs().max() < 0.08 and (out["opacity"] - truth).abs().mean() < 0.01
        torch.testing.assert_close(out["comp_rgb"], out["comp_rgb_fg"] + (1 - out["opacity"]) * out["comp_rgb_bg"])
        front = out["comp_rgb_fg"][0, 8, 8]
        assert front[0] > 5 * front[1], "the red side faces the camera at azimuth 0"
        hit = truth > 0.9
        assert ((out["depth"] / out["opacity"].clamp_min(1e-5))[hit] - 3.0).abs().max() < RADIUS + 0.1
    assert "weights" not in out, "what is known of each sample is for losses alone"


def test_training_losses_find_what_they_read_of_each_sample(threestudio):
    made = renderer(threestudio, type("Lit", (Plain,), {"requires_normal": True})()).train()
    given = batch(2)
    out = made(**given)
    count = len(out["weights"])
    for name, width in {"weights": 1, "t_points": 1, "t_intervals": 1, "t_dirs": 3, "points": 3, "normal": 3}.items():
        assert out[name].shape == (count, width), name
    total = torch.zeros(2 * 16 * 16).index_add(0, out["ray_indices"], out["weights"][:, 0])
    torch.testing.assert_close(total, out["opacity"].flatten())
    facing = out["comp_normal"][0, 8, 8] * 2 / out["opacity"][0, 8, 8] - 1
    assert facing[0] > 0.5, "what is seen faces the camera"
    out["opacity"].sum().backward()
    assert made.geometry.amount.grad > 0


def test_colours_given_for_the_background_take_its_place(threestudio):
    made, given = renderer(threestudio).eval(), batch(2)
    blue = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    each = made(**given, bg_color=blue)["comp_rgb"][:, 0, 0]
    torch.testing.assert_close(each, blue)
    rays = blue[:, None, None].expand(2, 16, 16, 3)
    torch.testing.assert_close(made(**given, bg_color=rays)["comp_rgb"], made(**given, bg_color=blue)["comp_rgb"])
    flat = made(**given, bg_color=rays.reshape(-1, 3))["comp_rgb"]
    torch.testing.assert_close(flat, made(**given, bg_color=blue)["comp_rgb"])


def test_three_cameras_that_were_crossed_along_the_wrong_axis_are_refused(threestudio):
    made, c2w = renderer(threestudio), torch.eye(4).repeat(3, 1, 1)
    made(**batch(3), c2w=c2w)
    c2w[0, :3, 0] = torch.tensor([0.6, 0.8, 0.0])
    with pytest.raises(ValueError, match="other numbers than 3"):
        made(**batch(3), c2w=c2w)


def test_what_was_made_is_written_as_files_that_open(threestudio):
    import trimesh

    parts = {"geometry": Ball(sharp=False), "material": Plain(), "background": White()}
    made = threestudio.find("pcs-exporter")({"resolution": 32, "texture": 64, "save_name": "ball"}, **parts)
    assert made.cfg.save_video is False
    outputs = made()
    assert {o.save_name for o in outputs} == {"ball.glb", "ball.obj", "ball.mtl", "ball.png", "ball.ply"}
    assert {o.save_type for o in outputs} == {"file"}
    (ply,) = [o.params["src_path"] for o in outputs if o.save_name == "ball.ply"]
    mesh = trimesh.load(ply, process=False)
    lengths = torch.from_numpy(mesh.vertices.copy()).norm(dim=-1)
    assert (lengths - RADIUS).abs().max() < 0.1
    red = torch.from_numpy(mesh.visual.vertex_colors.copy())[:, 0] > 128
    assert (red == torch.from_numpy(mesh.vertices[:, 0] > 0)).float().mean() > 0.97


def test_a_geometry_without_density_is_refused(threestudio):
    class Surface(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cfg, self.radius = SimpleNamespace(radius=1.0), nn.Parameter(torch.ones(1))

        def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
            return {"sdf": points[..., :1], "features": points}

    parts = {"geometry": Surface(), "material": Plain(), "background": White()}
    with pytest.raises(ValueError, match="Surface has no density"):
        threestudio.find("pcs-exporter")({}, **parts)()
    with pytest.raises(ValueError, match="Surface has none"):
        threestudio.find("pcs-volume-renderer")({}, **parts)(**batch(1))


# --- what guides -----------------------------------------------------------------------------------------


def write_concept(backbone, path: Path, seed: int = 0) -> Path:
    """Learned words and a LoRA of which something is to be seen."""
    modifier = LearnableToken(vectors=2, with_class_noun=True)
    modifier.attach(backbone, "my-mug", "mug")
    Lora(roles=("cross_attention",), rank=2).inject(backbone, "my-mug", "lora", 0)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tensors = [p for a in backbone.adapters["my-mug"] for p in a.parameters()]
        for p in [*tensors, *backbone.placeholders["my-mug"].parameters()]:
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    saved = save(capture(backbone, "my-mug", Provenance(class_noun="mug", modifier=modifier)), path, overwrite=True)
    backbone.remove("my-mug")
    assert saved.path is not None
    return saved.path


@pytest.fixture(scope="module")
def folders(make_tiny_sd, tmp_path_factory) -> SimpleNamespace:
    """A backbone and a concept, as folders."""
    from shared.backbones.stable_diffusion import StableDiffusionBackbone

    root = tmp_path_factory.mktemp("teacher")
    make_tiny_sd().save_pretrained(root / "tiny")
    concept = write_concept(StableDiffusionBackbone(make_tiny_sd(), str(root / "tiny")), root / "my-mug.concept")
    return SimpleNamespace(backbone=str(root / "tiny"), concept=str(concept), root=root)


def both(threestudio, folders, recipe: str = "dreamfusion", prompt: str = PROMPT, **guidance):
    """Prompt processor and guidance, as a configuration makes them."""
    shared = {"backbone": folders.backbone, "concepts": {folders.concept: 0.8}, "recipe": recipe}
    settings = guidance.pop("settings", SETTINGS)
    words = threestudio.find("pcs-prompt-processor")({"prompt": prompt, **shared, "settings": settings})
    return words, threestudio.find("pcs-guidance")({**shared, "settings": settings, "steps": 10, **guidance})


def looked(count: int) -> dict[str, Tensor]:
    azimuth = torch.tensor([0.0, 100.0, -170.0])[:count]
    elevation, distance = torch.tensor([5.0, 70.0, 20.0])[:count], torch.full((count,), 3.0)
    fovy = torch.full((count,), math.radians(40.0))
    return {"elevation": elevation, "azimuth": azimuth, "camera_distances": distance, "fovy": fovy, "c2w": None}


@pytest.mark.parametrize("recipe", ["dreamfusion", "csd", "lucid_dreamer", "prolificdreamer"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_gradient_is_that_of_the_engine_with_the_concept(threestudio, folders, recipe, count):
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
    assert not torch.allclose(grad, moved), "the prompt counts"


def test_a_student_learns_beside_the_field_and_nothing_else_does(threestudio, folders):
    words, guidance = both(threestudio, folders, "prolificdreamer")
    adapters = guidance.teacher.runner.backbone.adapters

    def tensors(name: str) -> list[Tensor]:
        return [p.detach().clone() for a in adapters[name] for p in a.parameters()]

    before, concept = tensors("student"), tensors("my-mug")
    rgb = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = []
    for _ in range(30):  # the same draws each time
        out = guidance(rgb, words(), **looked(2))
        losses.append(out["student"])
    assert losses[-1] < losses[0]
    assert rgb.grad is None, "what it learns on is not moved by that"
    assert all(torch.equal(a, b) for a, b in zip(concept, tensors("my-mug"), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, tensors("student"), strict=True))
    words, guidance = both(threestudio, folders, "prolificdreamer", settings=["guidance.scale=2"])
    guidance.update_step(0, 5)
    with pytest.warns(UserWarning, match="begins anew at step 5"):
        guidance(rgb, words(), **looked(2))
    with pytest.raises(ValueError, match=r"trainable\.more"):
        both(threestudio, folders, "prolificdreamer", settings=["trainable.more.kind=lora"])


def test_cameras_are_told_in_degrees_and_placed_as_threestudio_places_them():
    given = looked(3)
    cameras = cameras_of(*(given[name] for name in ("elevation", "azimuth", "camera_distances", "fovy")))
    torch.testing.assert_close(cameras.fov_deg, torch.full((3,), 40.0))
    up, around = torch.deg2rad(given["elevation"]), torch.deg2rad(given["azimuth"])
    places = torch.stack([up.cos() * around.cos(), up.cos() * around.sin(), up.sin()], -1)
    torch.testing.assert_close(cameras.positions, 3 * places)


def test_latents_are_guided_as_they_are(threestudio, folders):
    words, guidance = both(threestudio, folders)
    latents = torch.zeros(1, 8, 8, 4, requires_grad=True)
    out = guidance(latents, words(), **looked(1), rgb_as_latents=True)
    out["loss_sds"].backward()
    torch.testing.assert_close(latents.grad.norm(), out["grad_norm"])
    with pytest.raises(ValueError, match=r"latents of 3 channels.*have 4"):
        guidance(torch.zeros(1, 8, 8, 3), words(), **looked(1), rgb_as_latents=True)


def test_both_ask_one_model_and_nothing_else_will_do(threestudio, folders):
    words, guidance = both(threestudio, folders)
    assert words().teacher is guidance.teacher
    other, _ = both(threestudio, folders, settings=["guidance.scale=3"])
    rgb = torch.rand(1, 32, 32, 3)
    for wrong in (other(), SimpleNamespace(get_text_embeddings=None)):
        with pytest.raises(ValueError, match=r"system\.guidance\.concepts"):
            guidance(rgb, wrong, **looked(1))
    with pytest.raises(ValueError, match="guidance_eval"):
        guidance(rgb, words(), **looked(1), guidance_eval=True)


def test_embeddings_come_first_for_the_prompt_and_then_without_it(threestudio, folders):
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


def test_a_concept_that_was_learned_anew_at_the_same_place_is_read_anew(threestudio, folders, sd, tmp_path):
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
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(threestudio, folders, changes, message):
    with pytest.raises(ValueError, match=message):
        both(threestudio, folders, **changes)


def test_a_configuration_with_an_unknown_key_is_refused(threestudio):
    for name in ("pcs-prompt-processor", "pcs-guidance", "pcs-volume-renderer", "pcs-exporter"):
        with pytest.raises(TypeError):
            threestudio.find(name).Config(no_such_key=1)
