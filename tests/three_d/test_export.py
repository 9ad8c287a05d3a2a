"""The exported mesh of a ball is closed and has the right volume and colours, and unsuitable fields are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from pcs_3d.cameras import Cameras
from pcs_3d.export import write
from pcs_3d.export.asset import ExportSettings, export_asset
from pcs_3d.export.extract import Extracted, automatic_threshold, export_grid, extract, simplified
from pcs_3d.export.gaussian_ply import read_gaussians, write_gaussians
from pcs_3d.export.texture import textured
from pcs_3d.fields import Gaussians, Tetrahedra, TexturedMesh, Voxels
from pcs_3d.fields.starts import Blob, MeshFile
from pcs_3d.renderers import Volume
from tests.three_d.closed_forms import Solid, rendered_radius, view

BALL = 4 / 3 * np.pi * 0.6**3
SMALL = ExportSettings(resolution=28, texture=96, faces=100_000)


class Striped(Solid):
    """A ball with a soft edge, a red left half and a blue right half."""

    def at(self, points):
        density = 40 * torch.sigmoid(50 * (self.size - points.norm(dim=-1)))
        left = (points[..., 1:2] > 0).float()
        colors = left * torch.tensor([1.0, 0, 0]) + (1 - left) * torch.tensor([0, 0, 1.0])
        return SimpleNamespace(density=density, features=colors)


def test_a_ball_becomes_a_closed_mesh_with_the_right_volume_and_colours(tmp_path):
    made = export_asset(Striped(0.6), tmp_path, ExportSettings(resolution=28, texture=96, threshold=20))
    assert made.watertight and made.volume == pytest.approx(BALL, rel=0.06)
    assert [f.name for f in made.files] == ["asset.glb", "asset.obj", "asset.mtl", "asset-texture.png", "asset.ply"]
    assert all(f.is_file() for f in made.files) and any("threshold" in note for note in made.notes)
    for name in ("asset.glb", "asset.obj"):
        mesh = trimesh.load(tmp_path / name, force="mesh", process=False)
        colors = np.asarray(mesh.visual.to_color().vertex_colors)[:, :3] / 255
        left = mesh.vertices[:, 0]  # in the file, y points up, z to the front and x to the left
        assert (colors[left > 0.1, 0] > 0.9).mean() > 0.98 and (colors[left < -0.1, 2] > 0.9).mean() > 0.98
        assert np.abs(mesh.vertices).max(0) == pytest.approx([0.6] * 3, rel=0.05)
        outward = (mesh.face_normals * mesh.triangles_center).sum(1)
        assert (outward > 0).all()
    ply = trimesh.load(tmp_path / "asset.ply", process=False)
    assert ply.is_watertight and (ply.visual.vertex_colors[ply.vertices[:, 1] > 0.1, 0] == 255).all()


def test_the_mesh_has_the_same_silhouette_as_the_render():
    field = Voxels(resolution=16, start=Blob(radius=0.7, softness=0.5, density=15)).build()
    camera = Cameras.of([20.0], 30.0)
    opacity = Volume(samples=64).render(field, camera, view(1)).opacity.detach()
    found = extract(field, 40)
    from pcs_3d.fields.field import Surface
    from pcs_3d.renderers.mesh import on_screen
    from pcs_3d.renderers.rasterize import nearest_faces

    surface = Surface(torch.from_numpy(found.vertices).float(), torch.from_numpy(found.faces))
    places, depth = on_screen(surface.vertices, camera, 32, 32)
    covered = nearest_faces(places[surface.faces], depth[surface.faces], 32, 32) >= 0
    seen = opacity[0, 0] > 0.5
    assert float((covered & seen).sum() / (covered | seen).sum()) > 0.93


def test_disconnected_parts_are_left_out_with_a_note():
    field = Voxels(resolution=24, start=Blob(radius=0.5, density=40)).build()
    field.raw_density.data[20:23, 20:23, 20:23] = 40.0
    found, whole = extract(field, 32), extract(field, 32, all_parts=True)
    assert len(found.faces) < len(whole.faces) and any("not connected" in note for note in found.notes)
    assert np.abs(found.vertices).max() < 0.7 < np.abs(whole.vertices).max()


def test_disconnected_parts_of_a_fields_own_mesh_are_left_out_with_a_note(tmp_path):
    ball, crumb = trimesh.creation.icosphere(1), trimesh.creation.box((0.1, 0.1, 0.1)).apply_translation((0, 0, 1.2))
    trimesh.util.concatenate([crumb, ball]).export(tmp_path / "both.ply")
    field = TexturedMesh(start=MeshFile(path=tmp_path / "both.ply"), resolution=4).build()
    found, whole = extract(field), extract(field, all_parts=True)
    assert (len(found.vertices), len(found.faces)) == (len(ball.vertices), len(ball.faces))
    assert np.allclose(np.ptp(found.vertices, 0), np.ptp(found.vertices[:, 0])), "the ball is kept, not the crumb"
    assert found.notes == ("triangles left out because they were not connected to the rest: 12",)
    assert len(whole.faces) == len(ball.faces) + 12 and not whole.notes
    assert trimesh.Trimesh(found.vertices, found.faces, process=False).is_watertight


def test_an_object_that_fills_the_bound_has_a_closed_mesh():
    found = extract(Solid(5.0, 30.0, cube=True), 24)
    mesh = trimesh.Trimesh(found.vertices, found.faces, process=False)
    assert mesh.is_watertight and mesh.volume == pytest.approx(2.2**3, rel=0.3)


@pytest.mark.parametrize("density", [0.0, 1e-3])
def test_an_empty_field_is_refused_and_leaves_nothing_behind(tmp_path, density):
    with pytest.raises(ValueError, match="the field is empty: its largest density is"):
        export_asset(Solid(0.6, density), tmp_path, SMALL)
    with pytest.raises(ValueError, match="empty"):
        extract(Solid(0.6, 2.0), 16, threshold=5.0)
    assert not list(tmp_path.iterdir())


def test_fields_of_nans_or_latents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        export_asset(Solid(0.6, float("nan")), tmp_path, SMALL)
    with pytest.raises(ValueError, match="4 latent channels"):
        export_asset(Solid(0.6, 9.0, channels=4), tmp_path, SMALL)


@pytest.mark.parametrize(
    ("part", "name", "what"),
    [
        (Voxels(resolution=12, start=Blob(density=40)), "raw_features", "colours"),
        (Tetrahedra(resolution=8, color_resolution=4), "raw_features", "colours"),
        (Tetrahedra(resolution=8, color_resolution=4), "moves", "vertices"),
        (Gaussians(count=200, opacity=0.8), "means", "values"),
    ],
)
def test_values_that_are_not_finite_are_refused_before_anything_is_written(tmp_path, part, name, what):
    field = part.build()
    getattr(field, name).data[::3] = float("nan")
    with pytest.raises(
        ValueError, match=rf"{what} that are not finite \(NaN or Inf\), so (its|their) training must have failed"
    ):
        export_asset(field, tmp_path, SMALL)
    assert not list(tmp_path.iterdir())


def test_the_automatic_threshold_is_in_the_middle_of_the_suitable_range():
    grid = np.zeros((20, 20, 20))
    grid[5:15, 5:15, 5:15] = 50.0
    grid += 0.01
    assert 15 < automatic_threshold(grid, 0.1) < 35


def test_the_automatic_threshold_keeps_the_object_in_one_piece():
    grid = np.zeros((30, 20, 20))
    grid += 0.05
    grid[4:12, 5:15, 5:15] = grid[18:26, 5:15, 5:15] = 50.0
    grid[12:18, 8:12, 8:12] = 1.2  # joins the two halves, but lets most of the light through
    assert automatic_threshold(grid, 0.1) > 1.2, "without the bridge, the silhouettes match exactly"
    assert 0.05 < automatic_threshold(grid, 0.1, all_parts=False) < 1.2


def test_the_grid_is_evaluated_at_its_nodes():
    grid = export_grid(Solid(0.6, 7.0, cube=True), 23)  # the nodes are 0.1 apart
    assert grid.shape == (23,) * 3 and int((grid > 0).sum()) in (11**3, 13**3)


def test_simplification_preserves_the_shape():
    pytest.importorskip("fast_simplification")
    found = extract(Striped(0.6), 28, 20.0)
    fewer = simplified(found, 300)
    mesh = trimesh.Trimesh(fewer.vertices, fewer.faces, process=False)
    assert len(fewer.faces) <= 320 and mesh.is_watertight and mesh.volume == pytest.approx(BALL, rel=0.1)
    assert "simplified" in fewer.notes[-1]


def test_a_mesh_of_one_colour_has_a_texture_of_one_colour_even_at_seams():
    ball = trimesh.creation.icosphere(2)
    mesh = Extracted(np.asarray(ball.vertices), np.asarray(ball.faces))
    made = textured(mesh, lambda p: torch.full((len(p), 3), 0.6), 64)
    assert (made.texture == 153).all() and made.uv.min() >= 0 and made.uv.max() <= 1
    corners = made.vertices[made.faces].reshape(-1, 3)
    assert np.allclose(np.sort(corners, 0), np.sort(mesh.vertices[mesh.faces].reshape(-1, 3), 0), atol=1e-6)


@pytest.fixture
def ball() -> Extracted:
    made = trimesh.creation.icosphere(1)
    return Extracted(np.asarray(made.vertices), np.asarray(made.faces))


@pytest.mark.parametrize("kind", ["ply", "glb", "obj"])
def test_a_file_that_does_not_contain_the_mesh_is_refused_and_not_kept(tmp_path, monkeypatch, ball, kind):
    box = trimesh.creation.box().export(file_type=kind)
    way = "write_text" if kind == "obj" else "write_bytes"
    plain, painted = getattr(Path, way), textured(ball, lambda p: torch.full((len(p), 3), 0.6), 64)
    monkeypatch.setattr(Path, way, lambda self, _, **how: plain(self, box, **how))
    with pytest.raises(ValueError, match=f"the {kind} file does not contain the mesh"):
        if kind == "ply":
            write.write_ply(tmp_path / "x.ply", ball.vertices, ball.faces, np.ones_like(ball.vertices))
        else:
            (write.write_glb if kind == "glb" else write.write_obj)(tmp_path / f"x.{kind}", painted)
    assert not list(tmp_path.glob(f"*.{kind}"))


@pytest.mark.parametrize(("kind", "written"), [("glb", write.write_glb), ("obj", write.write_obj)])
def test_a_file_that_does_not_contain_the_texture_is_refused_and_not_kept(tmp_path, monkeypatch, ball, kind, written):
    painted = textured(ball, lambda p: torch.full((len(p), 3), 0.6), 64)
    monkeypatch.setattr(write, "_image", lambda texture: Image.fromarray(texture + 1))
    with pytest.raises(ValueError, match=f"the {kind} file does not contain the texture"):
        written(tmp_path / f"x.{kind}", painted)
    assert not list(tmp_path.glob(f"*.{kind}"))


def test_vertices_that_are_not_numbers_do_not_count_as_read_back(tmp_path, ball):
    ball.vertices[0] = np.nan
    with pytest.raises(ValueError, match="the ply file does not contain the mesh"):
        write.write_ply(tmp_path / "x.ply", ball.vertices, ball.faces, np.ones_like(ball.vertices))


def test_tetrahedra_and_gaussians_can_also_be_exported(tmp_path):
    made = export_asset(
        Tetrahedra(resolution=14, color_resolution=4, start=Blob(radius=0.6)).build(), tmp_path, SMALL, "t"
    )
    assert made.watertight and made.volume == pytest.approx(BALL, rel=0.1)
    field = Gaussians(count=200, opacity=0.8, start=Blob(radius=0.6)).build()
    made = export_asset(field, tmp_path, ExportSettings(resolution=24, texture=64), "g")
    assert made.files[-1].name == "g.splats.ply" and made.volume == pytest.approx(
        4 / 3 * np.pi * rendered_radius(field) ** 3, rel=0.25
    )


def test_gaussians_are_written_in_the_3dgs_layout(tmp_path):
    field = Gaussians(count=9, opacity=0.25).build()
    file = write_gaussians(tmp_path / "x.ply", field.splats())
    table = read_gaussians(file)
    head = file.read_bytes()[:600].decode("latin-1")
    assert "element vertex 9" in head and head.index("f_dc_0") < head.index("opacity") < head.index(
        "scale_0"
    ) < head.index("rot_0")
    assert np.allclose(table[:, :3], field.means.detach(), atol=1e-6) and np.allclose(
        table[:, 9], np.log(1 / 3), atol=1e-5
    )
    assert np.allclose(table[:, 10:13], field.log_scales.detach(), atol=1e-5)
