"""Tests the silhouettes, depths, gradients and occlusion of rendered triangles and Gaussians, for any batch size."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from pcs_3d.cameras import Cameras
from pcs_3d.fields import Gaussians, Tetrahedra
from pcs_3d.fields.starts import Blob
from pcs_3d.renderers import Mesh, Splat, by_gsplat
from pcs_3d.renderers.by_gsplat import gsplat
from pcs_3d.renderers.rasterize import nearest_faces
from tests.three_d.closed_forms import view

CAMERAS = Cameras.of([0.0, 77.0, 200.0], [5.0, 30.0, -20.0])


def area(radius: float) -> float:
    """Returns the share of a picture that a ball of this radius covers."""
    return math.pi * (math.tan(math.asin(radius / 5)) * float(CAMERAS.focal[0])) ** 2 / 4


def ball(radius: float = 0.6):
    return Tetrahedra(resolution=20, color_resolution=8, start=Blob(radius=radius)).build()


def test_a_ball_of_triangles_covers_the_right_area_and_its_outline_has_the_right_gradient():
    field = ball()
    drawn = Mesh().render(field, CAMERAS, view(3, 48, normals=True))
    assert torch.allclose(drawn.opacity.mean((1, 2, 3)), torch.tensor(area(0.6)).expand(3), rtol=0.02)
    assert torch.allclose(drawn.depth[:, 0, 24, 24], torch.tensor(4.4).expand(3), atol=0.02)
    middle = drawn.normals[:, :, 24, 24]
    assert float((middle * CAMERAS.axes[:, 2]).sum(-1).min()) > 0.99
    drawn.opacity.sum().backward()
    grown = -float(field.distances.grad.sum()) / field.cell / 3 / 48**2  # smaller distances mean a larger ball
    assert grown == pytest.approx((area(0.61) - area(0.59)) / 0.02, rel=0.08)


def test_each_view_of_triangles_is_independent_of_the_others():
    field = ball()
    assert_each_is_as_if_alone(Mesh(finer=2), field, shading="lambertian")


def assert_each_is_as_if_alone(renderer, field, **how) -> None:
    """Asserts that each camera's outputs are the same in a batch as alone, and that the cameras' pictures differ."""
    three = renderer.render(field, CAMERAS, view(3, 24, normals=True, **how))
    for i in range(3):
        one = renderer.render(field, CAMERAS[i : i + 1], view(1, 24, normals=True, **how))
        for what in ("pixels", "opacity", "depth", "normals"):
            assert torch.allclose(getattr(three, what)[i], getattr(one, what)[0], atol=1e-6), (i, what)
        assert not torch.allclose(three.pixels[i], three.pixels[i - 1], atol=1e-2)


def test_the_nearest_triangle_is_visible_and_triangles_behind_the_camera_are_not():
    whole = torch.tensor([[-10.0, -10.0], [40.0, -10.0], [-10.0, 40.0]])
    small = torch.tensor([[2.0, 2.0], [6.0, 2.0], [2.0, 6.0]])
    corners = torch.stack([whole, small, whole, small.flip(0), small[[0, 0, 1]]])
    depths = torch.tensor([[4.0] * 3, [2.0] * 3, [-1.0] * 3, [3.0] * 3, [1.0] * 3])
    face = nearest_faces(corners, depths, 10, 12)
    assert face[3, 3] == 1 and face[8, 8] == 0 and set(face.unique().tolist()) == {0, 1}
    assert int((face == 1).sum()) in (6, 10)  # of 16 pixels, 6 are inside and 4 have their centres on the edge


def lone(opacity: float = 0.8, size: float = 0.25):
    field = Gaussians(count=8).build()
    field.load_state_dict({
        "means": torch.zeros(1, 3), "log_scales": torch.full((1, 3), math.log(size)),
        "rotations": torch.tensor([[1.0, 0, 0, 0]]),
        "raw_opacities": torch.full((1,), math.log(opacity / (1 - opacity))), "raw_features": torch.tensor([[5.0, -5, 0]]),
        "pull": torch.zeros(1), "pulled": torch.zeros(1), "advanced": torch.zeros(()),
    })  # fmt: skip
    return field


def test_one_gaussian_is_drawn_according_to_its_formula():
    drawn = Splat(tile=8).render(lone(), CAMERAS, view(3, 32))
    spread = 0.25 * float(CAMERAS.focal[0]) * 16 / 5
    middles = torch.arange(32) + 0.5 - 16
    squared = middles[:, None] ** 2 + middles**2
    expected = 0.8 * torch.exp(-squared / (2 * (spread**2 + 0.3)))
    assert (drawn.opacity - expected).abs().max() < 6e-3  # Gaussians are cut off at three standard deviations
    assert torch.allclose(drawn.depth[:, 0, 16, 16], torch.tensor(5.0), atol=0.01)
    red = 0.8 * torch.sigmoid(torch.tensor(5.0)) + 0.2 * 0.25
    assert float(drawn.pixels[1, 0, 16, 16].detach()) == pytest.approx(float(red), abs=0.02)


def test_gaussians_in_front_hide_those_behind_in_any_order():
    field = lone(0.99)
    one = field.state_dict()
    once = {"advanced": one.pop("advanced")}
    two = {k: torch.cat([v, v]) for k, v in one.items()}
    two["means"] = torch.tensor([[-0.5, 0, 0], [0.5, 0, 0]])
    two["raw_features"] = torch.tensor([[-9.0, 9, -9], [9.0, -9, -9]])  # green behind, red in front
    for order in ([0, 1], [1, 0]):
        field.load_state_dict({**once, **{k: v[order] for k, v in two.items()}})
        drawn = Splat(tile=8).render(field, Cameras.of([0.0, 180.0, 0.0], 0.0), view(3, 16))
        assert drawn.pixels[0, :, 8, 8].argmax() == 0 and drawn.pixels[1, :, 8, 8].argmax() == 1
        assert torch.allclose(drawn.pixels[0], drawn.pixels[2])


@pytest.mark.parametrize("shading", ["albedo", "lambertian"])
def test_each_view_of_gaussians_is_independent_of_the_others(shading):
    field = Gaussians(count=60).build()
    field.raw_features.data.normal_(generator=torch.Generator().manual_seed(2))
    assert_each_is_as_if_alone(Splat(), field, shading=shading)


def test_tiles_of_any_size_draw_the_same_picture():
    field = Gaussians(count=60).build()
    pictures = [Splat(tile=t).render(field, CAMERAS, view(3, 20)).pixels for t in (3, 8, 32)]
    assert torch.allclose(pictures[0], pictures[1], atol=5e-3) and torch.allclose(pictures[1], pictures[2], atol=5e-3)
    with pytest.raises(ValueError, match=r"renderer\.engine"):
        Splat(engine="gsplat").render(field, CAMERAS, view(3))


@pytest.fixture
def installed_gsplat(tmp_path, monkeypatch):
    """Yields a function that installs a stand-in for gsplat with the given source."""

    def install(text: str) -> None:
        (tmp_path / "gsplat.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "gsplat", raising=False)
        gsplat.cache_clear()

    yield install
    gsplat.cache_clear()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12: cannot open"),
        ("import no_such_part_of_it", "No module named 'no_such_part_of_it'"),
        ("def rasterization(*a, **k): raise RuntimeError('Error building extension gsplat_cuda')", "Error building"),
        ("def rasterization(*a, **k): None.fully_fused_projection", "AttributeError"),
    ],
    ids=["library", "dependency", "build", "without-cuda"],
)
def test_a_broken_gsplat_is_not_used_and_the_reason_is_given(installed_gsplat, text, why):
    """gsplat builds its kernels on first use, so it may fail then rather than on import."""
    installed_gsplat(text)
    found = by_gsplat._tried(torch.device("cpu"))
    assert found.rasterization is None and found.why.startswith("it does not work (") and why in found.why


@pytest.mark.parametrize(
    ("text", "patience", "why"),
    [
        ("import os, sys; sys.stderr.write('Bus error'); os._exit(7)", 900, "ended with exit code 7: Bus error"),
        ("import time; time.sleep(900)", 0.5, "took more than 0.5 seconds"),
    ],
    ids=["crash", "hang"],
)
def test_a_gsplat_that_crashes_or_hangs_is_replaced_with_torch_but_is_an_error_if_it_was_requested(
    installed_gsplat, monkeypatch, text, patience, why
):
    installed_gsplat(text)
    monkeypatch.setattr(by_gsplat, "_PATIENCE", patience)
    why = rf"does not work \(trying it {why}\)"
    with pytest.warns(UserWarning, match=f"^gsplat is installed but {why}, so Gaussians are rendered in PyTorch"):
        assert not Splat().uses_gsplat(torch.device("cuda"))
    assert "gsplat" not in sys.modules, "it is tried in another process"
    with pytest.raises(ValueError, match=rf"renderer\.engine = gsplat cannot be used, because it {why}: set .*=torch"):
        Splat(engine="gsplat").uses_gsplat(torch.device("cuda"))


def test_a_gsplat_that_can_draw_a_gaussian_is_used(installed_gsplat, recwarn):
    installed_gsplat(
        "import torch\ndef rasterization(*a, **k): return torch.ones(1, 8, 8, 4), torch.ones(1, 8, 8, 1), {}"
    )
    assert gsplat(torch.device("cpu")).rasterization is not None and not recwarn.list


def test_a_missing_gsplat_is_an_error_only_if_it_was_requested(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    gsplat.cache_clear()
    assert not Splat().uses_gsplat(torch.device("cuda")) and not recwarn.list
    with pytest.raises(ValueError, match=r"renderer\.engine = gsplat cannot be used, because it is not installed"):
        Splat(engine="gsplat").uses_gsplat(torch.device("cuda"))
    gsplat.cache_clear()


def test_gradients_of_gaussians_match_finite_differences():
    field = Gaussians(count=12).build().double()
    cameras = Cameras(*(value.double() for value in vars(CAMERAS[:1]).values()))
    target = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    field.raw_features.data.normal_(generator=torch.Generator().manual_seed(2))

    def loss():
        return ((Splat(tile=16).render(field, cameras, view(1, 12)).pixels - target) ** 2).sum()

    loss().backward()
    for parameter, index in ((field.means, (3, 1)), (field.log_scales, (5, 2)), (field.raw_opacities, (2,))):
        value, sides = parameter.data[index].item(), []
        for step in (1e-6, -1e-6):
            parameter.data[index] = value + step
            sides.append(loss().item())
        parameter.data[index] = value
        assert parameter.grad[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-3, abs=1e-6)
