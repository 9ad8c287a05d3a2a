"""Compares penalties with closed forms, and tests their gradients and their scheduled weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from pcs_3d.cameras import Cameras
from pcs_3d.fields import Gaussians, Tetrahedra, Voxels
from pcs_3d.fields.starts import Blob
from pcs_3d.regularize import GeometryRegularizer, Pictures, Seen
from pcs_3d.renderers import Mesh, Splat, Volume
from pcs_3d.renderers.rendering import Rendering
from pcs_3d.schedules import Moment
from shared.config import Part, validate
from tests.three_d.closed_forms import view

CAMERAS = Cameras.of([0.0, 100.0, 220.0], 10.0)


def penalty(kind: str, **changes):
    return TypeAdapter(GeometryRegularizer).validate_python({"kind": kind, **changes})


def drawn(field, renderer=None, side: int = 16, **changes) -> Seen:
    renderer = renderer or Volume(samples=32)
    settings = view(3, side, normals=True)
    rendering = renderer.render(field, CAMERAS, settings)
    draw = lambda cameras, how: renderer.render(field, cameras, how)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    return Seen(field, CAMERAS, rendering, generator=generator, draw=draw, settings=settings, **changes)


def of_opacity(*values: float) -> Seen:
    opacity = torch.tensor(values).view(1, 1, 1, -1).requires_grad_()
    return Seen(None, CAMERAS, Rendering(opacity, opacity, opacity))


def test_penalties_on_opacity_equal_their_formulas():
    views = of_opacity(0.0, 0.5, 1.0)
    assert float(penalty("sparsity").value(views)) == pytest.approx((0.1 + math.sqrt(0.26) + math.sqrt(1.01)) / 3)
    assert float(penalty("opaque").value(of_opacity(0.5))) == pytest.approx(math.log(2))
    assert float(penalty("opaque").value(of_opacity(0.0, 1.0))) < 0.01


def test_depth_varies_in_fog_but_not_on_a_surface():
    distances = torch.tensor([1.0, 2, 3]).view(1, 1, 1, 3)
    fog, wall = torch.full((1, 1, 1, 3), 1 / 3), torch.tensor([0.0, 1, 0]).view(1, 1, 1, 3)
    one = torch.ones(1, 1, 1, 1)
    values = [
        float(penalty("z_variance").value(Seen(None, CAMERAS, Rendering(one, one, one, None, w, distances))))
        for w in (fog, wall, 0.3 * fog)
    ]
    assert values == pytest.approx([2 / 3, 0, 0])  # the rays of the last view are too transparent to count


@pytest.mark.parametrize("kind", ["orientation", "normal_smoothness", "normal_image_smoothness", "total_variation"])
def test_a_rough_ball_has_a_higher_penalty_than_a_smooth_one_and_gradient_descent_lowers_it(kind):
    smooth = Voxels(resolution=16, start=Blob(softness=0.4, radius=0.8)).build()
    rough = Voxels(resolution=16, start=Blob(softness=0.4, radius=0.8)).build()
    rough.raw_density.data += 2 * torch.randn(rough.raw_density.shape, generator=torch.Generator().manual_seed(1))
    part = penalty(kind)
    before = part(drawn(rough))
    assert float(before) > 1.2 * float(part(drawn(smooth))) >= 0
    before.backward()
    gradient = rough.raw_density.grad
    assert float(gradient.abs().max()) > 0
    rough.raw_density.data -= 0.3 * gradient / gradient.abs().max()
    assert float(part(drawn(rough))) < float(before)


@pytest.mark.parametrize("kind", ["eikonal", "laplacian", "normal_consistency"])
def test_surface_penalties_prefer_a_ball_with_true_distances(kind):
    ball = Tetrahedra(resolution=14, color_resolution=4, start=Blob(radius=0.7)).build()
    bent = Tetrahedra(resolution=14, color_resolution=4, start=Blob(radius=0.7)).build()
    bent.distances.data += 0.4 * torch.randn(bent.distances.shape, generator=torch.Generator().manual_seed(2))
    part = penalty(kind)
    good, bad = (part(drawn(f, Mesh())) for f in (ball, bent))
    bad.backward()
    assert float(good) < 0.9 * float(bad) and float(bent.distances.grad.abs().max()) > 0
    if kind == "eikonal":
        assert float(good) < 0.05


def test_a_field_that_looks_like_its_pictures_has_no_reference_loss():
    field = Voxels(resolution=12).build()
    with torch.no_grad():
        truth = Volume(samples=32).render(field, CAMERAS, view(3, 20, background=0.5))
    pictures = Pictures(truth.pixels, CAMERAS, truth.opacity)
    part = penalty("reference_views", count=2)
    assert float(part(drawn(field, pictures=Pictures(truth.pixels, CAMERAS)))) < 1e-9
    masked = Pictures(truth.pixels, CAMERAS, (truth.opacity > 0.5).float())
    assert float(part(drawn(field, pictures=masked))) < 0.03
    outline = penalty("silhouette", count=3, weight=2.0)
    assert float(outline(drawn(field, pictures=pictures))) < 1e-9
    empty = Pictures(truth.pixels, CAMERAS, torch.zeros_like(truth.opacity))
    assert float(outline(drawn(field, pictures=empty))) == pytest.approx(2 * float(truth.opacity.square().mean()))
    with pytest.raises(ValueError, match="silhouette needs pictures of the object, all with masks"):
        outline(drawn(field, pictures=Pictures(truth.pixels, CAMERAS)))
    field.raw_features.data += 3
    worse = part(drawn(field, pictures=pictures))
    worse.backward()
    assert float(worse) > 0.005 and float(field.raw_features.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="reference_views needs pictures"):
        part(drawn(field))


def test_pixels_outside_the_masks_can_be_ignored():
    """This lets a field show anything outside the masks, unless its silhouette must match the masks."""
    field = Voxels(resolution=12).build()
    field.raw_features.data += 3  # different from the grey background
    with torch.no_grad():
        truth = Volume(samples=32).render(field, CAMERAS, view(3, 20, background=0.5))
    mask = torch.zeros_like(truth.opacity)
    mask[..., 8:12, 8:12] = 1
    pictures = Pictures(truth.pixels, CAMERAS, mask)
    inside = penalty("reference_views", count=3, mask_weight=0.0, outside=0.0)
    assert float(inside(drawn(field, pictures=pictures))) < 1e-9
    assert float(penalty("reference_views", count=3, mask_weight=0.0)(drawn(field, pictures=pictures))) > 1e-3
    wrong = Pictures(truth.pixels * (1 - mask), CAMERAS, mask)
    assert float(inside(drawn(field, pictures=wrong))) > 1e-3


@pytest.mark.parametrize(
    ("kind", "field", "renderer", "why"),
    [
        ("orientation", Gaussians(count=8), Splat(), "marching rays"),
        ("z_variance", Gaussians(count=8), Splat(), "marches rays"),
        ("total_variation", Gaussians(count=8), Splat(), "grids"),
        ("eikonal", Voxels(resolution=6), Volume(samples=8), "tetrahedra"),
        ("normal_consistency", Voxels(resolution=6), Volume(samples=8), "triangles"),
    ],
)
def test_the_error_for_a_penalty_names_the_field_or_renderer_it_needs(kind, field, renderer, why):
    with pytest.raises(ValueError, match=f"{kind} needs .*{why}"):
        penalty(kind)(drawn(field.build(), renderer))
    assert float(penalty(kind, weight=0.0)(drawn(field.build(), renderer))) == 0


def test_weights_can_be_schedules_and_must_not_be_negative():
    class Holder(Part):
        part: GeometryRegularizer

    part = validate(Holder, {"part": {"kind": "sparsity", "weight": [0, 0, 10, 100]}}).part
    assert float(part(replace(of_opacity(0.0), moment=Moment(50, 100)))) == pytest.approx(0.5)
    for bad in (-1.0, [0, 1.0, -1.0, 10], [20, 1.0, 1.0, 10]):
        with pytest.raises(ValueError, match="weight"):
            validate(Holder, {"part": {"kind": "sparsity", "weight": bad}})
