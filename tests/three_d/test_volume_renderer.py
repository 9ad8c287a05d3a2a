"""Rendered volumes match closed-form opacity, depth and colour. Their gradients match finite differences, and a view
does not depend on the rest of its batch or on the chunk size."""

from __future__ import annotations

import pytest
import torch

from pcs_3d.cameras import Cameras
from pcs_3d.fields import Tetrahedra, Voxels
from pcs_3d.fields.starts import Blob
from pcs_3d.renderers import Volume
from pcs_3d.renderers.sampling import by_importance, stratified, through_cube
from tests.three_d.closed_forms import COLOR, Solid, view

CAMERAS = Cameras.of([0.0, 77.0, 200.0], [5.0, 30.0, -20.0])


@pytest.mark.parametrize("cube", [False, True])
def test_the_opacity_and_depth_of_a_solid_match_the_closed_form(cube):
    field = Solid(0.6, cube=cube)
    drawn = Volume(samples=400, hidden=0).render(field, CAMERAS, view(3))
    chords = field.chords(CAMERAS, 32)
    opacity = 1 - torch.exp(-3 * chords.length)
    assert (drawn.opacity[:, 0] - opacity).abs().max() < 0.03 and (drawn.opacity[:, 0] - opacity).abs().mean() < 2e-3
    t = chords.length
    # the mean of s over [0, t], weighted by e^{-3s}
    inside = 1 / 3 - t * torch.exp(-3 * t) / (1 - torch.exp(-3 * t)).clamp_min(1e-6)
    hit = t > 0.3
    assert (drawn.depth[:, 0] - chords.near - inside)[hit].abs().max() < 0.01
    colors = opacity[:, None] * torch.tensor(COLOR).view(3, 1, 1) + 0.25 * (1 - opacity[:, None])
    assert (drawn.pixels - colors).abs().mean() < 2e-3


def test_each_view_is_independent_of_its_batch_and_of_the_chunk_size():
    field = Voxels(resolution=12, start=Blob(softness=0.3)).build()
    renderer = Volume(samples=24, importance=16)
    settings = dict(shading="lambertian", normals=True)
    three = renderer.render(field, CAMERAS, view(3, 16, **settings))
    small = Volume(samples=24, importance=16, rays=256).render(field, CAMERAS, view(3, 16, **settings))
    for i in range(3):
        one = renderer.render(field, CAMERAS[i : i + 1], view(1, 16, **settings))
        for name in ("pixels", "opacity", "depth", "normals", "weights"):
            assert torch.allclose(getattr(three, name)[i], getattr(one, name)[0], atol=1e-5), name
            assert torch.allclose(getattr(three, name)[i], getattr(small, name)[i], atol=1e-5), name


def test_gradients_match_finite_differences():
    field = Voxels(resolution=5, start=Blob(softness=0.5, density=3)).build().double()
    field.raw_features.data += torch.randn(field.raw_features.shape, generator=torch.Generator().manual_seed(0))
    cameras = Cameras(*(value.double() for value in vars(CAMERAS[:1]).values()))
    target = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()

    def loss():
        drawn = Volume(samples=16, hidden=0).render(field, cameras, view(1, 8, shading="lambertian"))
        return ((drawn.pixels - target) ** 2).sum()

    field.raw_density.grad = None
    loss().backward()
    for parameter, index in ((field.raw_density, (2, 2, 3, 0)), (field.raw_features, (3, 2, 2, 1))):
        value = parameter.data[index].item()
        sides = []
        for step in (1e-5, -1e-5):
            parameter.data[index] = value + step
            sides.append(loss().item())
        parameter.data[index] = value
        assert parameter.grad[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_skipping_empty_or_hidden_samples_does_not_change_the_picture():
    field = Voxels(resolution=16, start=Blob(density=60, softness=0.1)).build()
    field.raw_density.data += torch.randn(field.raw_density.shape, generator=torch.Generator().manual_seed(0))
    all_of_it = Volume(samples=48, hidden=0).render(field, CAMERAS, view(3))
    rest = Volume(samples=48, hidden=1e-4).render(field, CAMERAS, view(3))
    assert (all_of_it.pixels - rest.pixels).abs().max() < 2e-3
    assert int((rest.weights > 0).sum()) < 0.6 * int((all_of_it.weights > 0).sum())


def test_densities_lie_between_the_bounds_of_their_cells():
    field = Voxels(resolution=9).build()
    field.raw_density.data.normal_(generator=torch.Generator().manual_seed(0))
    points = 2.4 * torch.rand(2000, 3, generator=torch.Generator().manual_seed(1)) - 1.2
    rays = points, torch.zeros_like(points), torch.zeros(len(points), 1)
    least, most = (bound[:, 0] for bound in field.between(*rays))
    density = field.density(points)
    assert bool((least <= density + 1e-5).all() and (density <= most + 1e-5).all())
    field.raw_density.data.add_(5)
    field.raw_density.data = field.raw_density.data.clone()  # moving a field with `to` also creates a new tensor
    assert bool((field.density(points) <= field.between(*rays)[1][:, 0] + 1e-5).all())


def test_importance_sampling_concentrates_edges_where_the_weights_are_large():
    near, far = torch.zeros(2), torch.ones(2)
    edges = stratified(near, far, 10, None)
    weights = torch.zeros(2, 10)
    weights[0, 3], weights[1] = 1.0, 1.0
    found = by_importance(edges, weights, 20, None)
    assert ((found[0] >= 0.3) & (found[0] <= 0.4)).float().mean() > 0.8
    assert torch.allclose(found[1], torch.linspace(0, 1, 21), atol=1e-6)
    jittered = stratified(near, far, 10, torch.Generator().manual_seed(0))
    assert bool((jittered.diff(dim=1) > 0).all()) and not torch.equal(jittered, edges)


def test_rays_enter_and_leave_the_cube_at_the_right_distances():
    origins = torch.tensor([[3.0, 0, 0], [3.0, 0, 0], [0.0, 0, 0]])
    directions = torch.tensor([[-1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]])
    near, far = through_cube(origins, directions, 1.0)
    assert near[0] == 2 and far[0] == 4 and near[1] > far[1] and near[2] == 0 and far[2] == 1


@pytest.mark.parametrize("shading", ["textureless", "normal"])
def test_shading_shows_the_normals_of_a_ball(shading):
    field = Voxels(resolution=32, start=Blob(density=40, softness=0.2)).build()
    camera = Cameras.of([0.0], 0.0)
    drawn = Volume(samples=96).render(field, camera, view(1, shading=shading))
    middle = drawn.pixels[0, :, 15:17, 15:17].mean((1, 2))
    # in the middle of the picture, the ball's surface faces +x and the light
    expected = [1.0, 1.0, 1.0] if shading == "textureless" else [1.0, 0.5, 0.5]
    assert torch.allclose(middle, torch.tensor(expected), atol=0.03)
    rim = drawn.pixels[0, :, 15, :][:, drawn.opacity[0, 0, 15] > 0.9][:, -1]
    assert rim[0] < 0.75 and (shading != "normal" or rim[1] > 0.8)  # +y points to the right in the picture


def test_latents_are_rendered_unchanged_and_without_shading():
    drawn = Volume(samples=64).render(Solid(0.6, 50, channels=4), CAMERAS, view(3, channels=4))
    assert drawn.pixels.shape == (3, 4, 32, 32) and float(drawn.pixels[0, 3, 16, 16].detach()) == pytest.approx(
        0.7, abs=1e-3
    )
    with pytest.raises(ValueError, match="needs 3 channels, but the field has 4"):
        Volume().render(Solid(0.6, channels=4), CAMERAS, view(3, channels=4, shading="normal"))
    with pytest.raises(ValueError, match="does not match"):
        Volume().render(Solid(0.6), CAMERAS, view(2))
    with pytest.raises(ValueError, match="volume cannot render a TetrahedraField"):
        Volume().render(Tetrahedra(resolution=6, color_resolution=4).build(), CAMERAS, view(3))


def test_an_empty_view_shows_its_background_and_has_a_gradient():
    field = Voxels(resolution=8, start=Blob(density=1e-4)).build()
    field.raw_density.data.fill_(-30.0)
    drawn = Volume(samples=8).render(field, CAMERAS, view(3))
    drawn.pixels.sum().backward()
    assert (drawn.pixels - 0.25).abs().max() < 1e-3 and field.raw_density.grad is not None
