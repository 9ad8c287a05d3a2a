"""Every kind of field can be saved and loaded, trains all its parameters and starts with the configured shape.

Guarantees specific to one kind are tested as well.
"""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter

from pcs_3d.cameras import Cameras
from pcs_3d.fields import FieldSettings, Gaussians, HashGrid, Tetrahedra, Voxels, grids
from pcs_3d.fields.field import GridField, SplatField, SurfaceField, VolumeField
from pcs_3d.fields.starts import Blob
from pcs_3d.renderers import Mesh, Splat, Volume
from tests.three_d.closed_forms import view

SMALL = {
    "voxels": {"resolution": 10},
    "triplane": {"resolution": 8, "features": 4, "width": 8},
    "frequency_mlp": {"bands": 3, "width": 8, "layers": 2},
    "hash_grid": {"levels": 3, "table": 8, "coarsest": 4, "finest": 16, "width": 8},
    "tetrahedra": {"resolution": 10, "color_resolution": 6},
    "gaussians": {"count": 40},
}


def build(kind: str, channels: int = 3, seed: int = 0, **changes):
    return TypeAdapter(FieldSettings).validate_python({"kind": kind, **SMALL[kind], **changes}).build(channels, seed)


def draw(field, cameras, **settings):
    renderer = (
        Mesh() if isinstance(field, SurfaceField) else Splat() if isinstance(field, SplatField) else Volume(samples=24)
    )
    return renderer.render(field, cameras, view(len(cameras), 16, channels=field.channels, **settings))


def stirred(field):
    """Perturbs a field. Otherwise, the last layers of its networks would start at 0 and pass no gradient."""
    pull = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in field.groups()["main"]:
            for p in group.parameters:
                p.add_(0.05 * torch.randn(p.shape, generator=pull))
    return field


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("channels", [3, 4])
def test_every_parameter_gets_a_gradient_and_is_restored_from_the_state(kind, channels):
    field = stirred(build(kind, channels))
    cameras = Cameras.of([10.0, 130.0, 250.0], 20.0)
    drawn = draw(field, cameras)
    target = torch.rand(drawn.pixels.shape, generator=torch.Generator().manual_seed(0))
    ((drawn.pixels - target) ** 2).sum().backward()
    trained = [p for group in field.groups()["main"] for p in group.parameters]
    assert {id(p) for p in trained} == {id(p) for p in field.parameters()}
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained)

    state, other = field.state_dict(), build(kind, channels, seed=1)
    assert all(v.dtype == torch.float32 and v.device.type == "cpu" for v in state.values())
    other.load_state_dict(state)
    assert torch.equal(draw(other, cameras).pixels, drawn.pixels)
    name = next(iter(state))
    with pytest.raises(ValueError, match=name):
        other.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="raw_features|the saved start"):
        build(kind, channels + 1).load_state_dict(state)


@pytest.mark.parametrize("kind", SMALL)
def test_every_field_starts_as_the_configured_blob(kind):
    field = build(kind, start={"kind": "blob", "radius": 0.6, "density": 30.0, "softness": 0.1})
    assert isinstance(field, VolumeField) != isinstance(field, SurfaceField)
    drawn = draw(field, Cameras.of([30.0], 10.0))
    radius = 0.6 / (25 - 0.36) ** 0.5 * Cameras.of([0.0]).focal[0]
    covered = float(drawn.opacity.detach().mean())
    assert covered == pytest.approx(float(torch.pi * radius**2 / 4), rel=0.35 if kind != "gaussians" else 0.6)
    assert float(drawn.depth[0, 0, 8, 8].detach()) == pytest.approx(4.5, abs=0.2 if kind != "gaussians" else 0.4)


@pytest.mark.parametrize("kind", ["voxels", "triplane", "hash_grid", "frequency_mlp"])
def test_normals_point_away_from_dense_regions(kind):
    field = build(kind, start={"kind": "blob", "softness": 0.5})
    points = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=-1) * 0.5
    normals = field.normals(points)
    assert torch.allclose(normals.norm(dim=-1), torch.ones(50), atol=1e-4)
    assert float((normals * points / 0.5).sum(-1).min()) > 0.9
    assert float(field.density(points * 4).abs().max()) == 0  # the density is 0 outside the bound


def test_interpolated_values_and_both_gradients_equal_those_of_torch():
    grid = torch.randn(5, 5, 5, 3, dtype=torch.float64, requires_grad=True)
    points = (1.8 * torch.rand(40, 3, dtype=torch.float64) - 0.9).requires_grad_()
    mine = grids.trilinear(grid, points, 1.0)
    places = points.flip(-1)[None, :, None, None]
    expected = torch.nn.functional.grid_sample(grid.permute(3, 0, 1, 2)[None], places, align_corners=True)
    expected = expected[0, :, :, 0, 0].T
    assert torch.allclose(mine, expected)
    weight = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad((v * weight).sum(), (grid, points)) for v in (mine, expected)), strict=True):
        assert torch.allclose(a, b)


def test_finer_levels_of_a_hash_grid_are_unlocked_later():
    field = stirred(build("hash_grid", unlock=0.5))
    points = torch.rand(20, 3) - 0.5
    assert field.advance(0, 100) is None
    early = field.encoded(points)
    assert bool((early[:, 5:] == 0).all()) and bool((early[:, 3:5] != 0).any())
    field.advance(50, 100)
    assert torch.equal(field.open_levels, torch.ones(3))
    with pytest.raises(ValueError, match="levels"):
        TypeAdapter(FieldSettings).validate_python({"kind": "hash_grid", "levels": 0})


@pytest.mark.parametrize(("opacity", "scale"), [(0.3, 0.05), (0.9, 0.2)])
def test_the_density_of_a_gaussian_blocks_a_ray_through_its_centre_as_much_as_its_opacity_says(opacity, scale):
    field = Gaussians(count=8).build()
    values = {"means": torch.full((8, 3), 3.0), "log_scales": torch.full((8, 3), math.log(scale))}
    values["means"][0] = 0.0  # the others are out of reach
    values["raw_opacities"] = torch.full((8,), opacity).logit()
    for name, value in values.items():
        getattr(field, name).data.copy_(value)
    ray = torch.zeros(2001, 3)
    ray[:, 0] = torch.linspace(-1, 1, 2001)
    passed = torch.exp(-torch.trapezoid(field.density(ray).detach(), ray[:, 0]))
    assert 1 - float(passed) == pytest.approx(opacity, rel=0.01)


def test_gaussians_with_large_gradients_are_split_and_transparent_gaussians_are_removed():
    part = Gaussians(count=30, every=5, threshold=0.5, prune=0.05, most=33)
    field = part.build()
    weight = torch.zeros(30, 1)
    weight[:6] = torch.tensor([5.0, 4, 3, 2, 1, 0.1])[:, None]
    (field.means * weight).sum().backward()
    field.raw_opacities.data[-2:] = -9.0
    before, same = field.means, part.build()
    same.load_state_dict(field.state_dict())
    assert field.advance(4, 100) is None
    came_from = field.advance(5, 100)
    assert came_from is not None and len(came_from) == 5
    former, rows = came_from[field.means]
    assert former is before and len(field.means) == 33 and int((rows == -1).sum()) >= 5
    old = rows >= 0
    assert torch.equal(field.means[old], before[rows[old]]) and not bool((rows >= 28).any())
    assert [len(p) for group in field.groups()["main"] for p in group.parameters] == [33] * 5
    same.advance(5, 100)  # as in a run that resumes at this step
    assert torch.equal(same.means, field.means)


def test_gaussians_are_split_only_once_at_a_step_even_if_a_run_resumes_from_it():
    part = Gaussians(count=30, every=5, threshold=0.5)
    field = part.build()
    field.means.sum().backward()
    field.advance(5, 100)
    field.pull += 1  # accumulated by the step that the resumed run repeats
    again = part.build()
    again.load_state_dict(field.state_dict())
    assert torch.equal(again.means, field.means)
    assert again.advance(5, 100) is None and len(again.means) == len(field.means) > 30
    assert again.advance(0, 100) is None and again.advance(5, 100) is not None, "a later phase splits Gaussians again"


def test_a_surface_is_closed_and_faces_outward_even_where_it_meets_the_bound():
    import trimesh

    for radius in (0.6, 3.0):
        field = Tetrahedra(resolution=12, color_resolution=4, start=Blob(radius=radius)).build()
        surface = field.surface()
        mesh = trimesh.Trimesh(surface.vertices.detach().numpy(), surface.faces.numpy(), process=False)
        expected = 4 / 3 * torch.pi * 0.6**3 if radius < 1 else 2.0**3
        assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume == pytest.approx(expected, rel=0.12)
    field.distances.data.fill_(1.0)
    with pytest.raises(ValueError, match="no surface"):
        field.surface()


def test_only_grid_fields_have_a_total_variation():
    flat = Voxels(resolution=6, start=Blob(density=1e-4)).build()
    flat.raw_density.data.fill_(2.0)
    assert float(flat.total_variation()) == 0
    flat.raw_density.data[3, 3, 3] = 3.0
    assert float(flat.total_variation()) == pytest.approx(3 * 2 / (5 * 36))
    assert not isinstance(HashGrid(levels=1, table=4).build(), GridField)
