"""Compares the renderer and the exporter for threestudio with closed forms.

They are tested against the documented contract and, if a checkout is given, against that checkout's base classes.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pcs_3d.cameras import Cameras

DENSITY, RADIUS = 3.0, 0.7


class Ball(nn.Module):
    """A ball that is red at +x and green at -x.

    If `sharp` is set, the density is constant inside the ball. Otherwise, the ball is denser and has a soft edge.
    """

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
    """Returns the opacity of the ball in closed form, `[B, H, W, 1]`."""
    middle = (given["rays_o"] * given["rays_d"]).sum(-1)
    half = (RADIUS**2 - (given["rays_o"].square().sum(-1) - middle**2)).clamp_min(0).sqrt()
    return -torch.expm1(-DENSITY * 2 * half)[..., None]


def renderer(threestudio, material=None, **cfg):
    parts = {"geometry": Ball(), "material": material or Plain(), "background": White()}
    return threestudio.find("pcs-volume-renderer")({"samples": 128, **cfg}, **parts)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("cfg", [{}, {"hidden": 0.0}, {"importance": 32}])
def test_every_view_in_a_batch_matches_the_closed_form(threestudio, count, cfg):
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
    assert "weights" not in out, "per-sample values are returned only in training"


def test_training_losses_get_the_per_sample_values_that_they_need(threestudio):
    made = renderer(threestudio, type("Lit", (Plain,), {"requires_normal": True})()).train()
    given = batch(2)
    out = made(**given)
    count = len(out["weights"])
    for name, width in {"weights": 1, "t_points": 1, "t_intervals": 1, "t_dirs": 3, "points": 3, "normal": 3}.items():
        assert out[name].shape == (count, width), name
    total = torch.zeros(2 * 16 * 16).index_add(0, out["ray_indices"], out["weights"][:, 0])
    torch.testing.assert_close(total, out["opacity"].flatten())
    facing = out["comp_normal"][0, 8, 8] * 2 / out["opacity"][0, 8, 8] - 1
    assert facing[0] > 0.5, "visible surfaces face the camera"
    out["opacity"].sum().backward()
    assert made.geometry.amount.grad > 0


def test_given_background_colours_replace_the_background(threestudio):
    made, given = renderer(threestudio).eval(), batch(2)
    blue = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    each = made(**given, bg_color=blue)["comp_rgb"][:, 0, 0]
    torch.testing.assert_close(each, blue)
    rays = blue[:, None, None].expand(2, 16, 16, 3)
    torch.testing.assert_close(made(**given, bg_color=rays)["comp_rgb"], made(**given, bg_color=blue)["comp_rgb"])
    flat = made(**given, bg_color=rays.reshape(-1, 3))["comp_rgb"]
    torch.testing.assert_close(flat, made(**given, bg_color=blue)["comp_rgb"])


def test_three_cameras_whose_axes_are_not_orthogonal_are_refused(threestudio):
    made, c2w = renderer(threestudio), torch.eye(4).repeat(3, 1, 1)
    made(**batch(3), c2w=c2w)
    c2w[0, :3, 0] = torch.tensor([0.6, 0.8, 0.0])
    with pytest.raises(ValueError, match="anything but 3"):
        made(**batch(3), c2w=c2w)


def test_the_exporter_writes_files_that_can_be_opened(threestudio):
    import trimesh

    parts = {"geometry": Ball(sharp=False), "material": Plain(), "background": White()}
    made = threestudio.find("pcs-exporter")({"resolution": 32, "texture": 64, "save_name": "ball"}, **parts)
    assert made.cfg.save_video is False
    outputs = made()
    assert {o.save_name for o in outputs} == {"ball.glb", "ball.obj", "ball.mtl", "ball-texture.png", "ball.ply"}
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
