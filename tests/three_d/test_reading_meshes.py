"""Tests fields that start from untrusted mesh files, and mesh files that are refused before they are decoded."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial

from pcs_3d.cameras import Cameras
from pcs_3d.fields import Gaussians, Tetrahedra, TexturedMesh, Voxels
from pcs_3d.meshes import file_checks
from pcs_3d.meshes.read_mesh import read_mesh, sampled
from pcs_3d.meshes.shape import shape_of_file
from pcs_3d.renderers import Mesh
from tests.three_d.closed_forms import view

PARTS = [
    Voxels(resolution=24, bound=1.2),
    Tetrahedra(resolution=18, color_resolution=12, bound=1.2),
    Gaussians(count=200),
]


def ball(scale: float = 1.0) -> trimesh.Trimesh:
    """Returns a ball with a red left half (+x in the file is the object's left) and a blue right half."""
    mesh = trimesh.creation.icosphere(3)
    red = np.asarray(mesh.vertices)[:, :1] > 0
    mesh.visual.vertex_colors = np.where(red, [255, 0, 0, 255], [0, 0, 255, 255]).astype(np.uint8)
    return mesh.apply_scale(scale)


@pytest.mark.parametrize("name", ["x.glb", "x.obj", "x.ply"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e7])
def test_a_ball_of_any_size_is_scaled_to_radius_1(tmp_path, name, scale):
    ball(scale).export(tmp_path / name, **({"digits": 12} if name == "x.obj" else {}))
    shape = shape_of_file(tmp_path / name)
    points = 2.4 * torch.rand(1500, 3, generator=torch.Generator().manual_seed(0)) - 1.2
    assert (shape.distance(points) - (points.norm(dim=-1) - 1)).abs().max() < 0.06
    left = 0 if name == "x.ply" else 1  # in PLY files z is up, as in the world; in other formats y is up and x is left
    sides = torch.eye(3)[[left, left]] * torch.tensor([[1.0], [-1]])
    assert shape.colors(sides).argmax(-1).tolist() == [0, 2]


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.kind)
def test_fields_start_as_the_object_in_a_file(tmp_path, part):
    ball().export(tmp_path / "x.glb")
    field = (
        type(part).model_validate({**part.model_dump(), "start": {"kind": "file", "path": tmp_path / "x.glb"}}).build()
    )
    right, left = torch.tensor([[0.0, -0.97, 0]]), torch.tensor([[0.0, 0.97, 0]])
    ask = field.features_at if isinstance(part, Tetrahedra) else lambda p: field.at(p).features
    assert ask(left).argmax() == 0 and ask(right).argmax() == 2
    if isinstance(part, Tetrahedra):
        assert torch.allclose(field.surface().vertices.norm(dim=-1).mean(), torch.tensor(1.0), atol=0.03)
    if isinstance(part, Voxels):
        assert float(field.density(torch.zeros(1, 3)).detach()) > 30 > 0.1 > float(field.density(1.15 * left).detach())
    if isinstance(part, Gaussians):
        assert torch.allclose(field.means.norm(dim=-1), torch.ones(200), atol=0.02)


def test_a_mesh_keeps_its_triangles_while_its_colours_are_trained(tmp_path):
    ball().export(tmp_path / "x.glb")
    field = TexturedMesh(start={"path": tmp_path / "x.glb"}, resolution=16, bound=1.2).build()
    drawn = Mesh().render(field, Cameras.of([90.0, 270.0]), view(2, 24))
    assert drawn.pixels[0, :, 12, 12].argmax() == 0 and drawn.pixels[1, :, 12, 12].argmax() == 2
    drawn.pixels[:, 1].sum().backward()
    assert float(field.raw_features.grad[..., 1].abs().max()) > 0 and set(field.state_dict()) == {
        "raw_features",
        "vertices",
        "faces",
    }
    assert len(field.surface().faces) == 1280
    trimesh.PointCloud(np.asarray(ball().vertices)).export(tmp_path / "p.ply")
    with pytest.raises(ValueError, match="only points, but this field needs triangles"):
        TexturedMesh(start={"path": tmp_path / "p.ply"}).build()


def test_points_without_triangles_become_a_solid(tmp_path):
    points = trimesh.sample.sample_surface(ball(), 4000, seed=0)[0]
    trimesh.PointCloud(points).export(tmp_path / "x.ply")
    shape = shape_of_file(tmp_path / "x.ply")
    assert float(shape.distance(torch.zeros(1, 3))) < -0.8 and float(shape.distance(torch.tensor([[1.15, 0, 0]]))) > 0.1
    assert shape.colors(torch.zeros(1, 3)) is None


def test_open_and_non_manifold_meshes_become_shells(tmp_path):
    plate = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 0.5, 0.8]]
    faces = [[0, 1, 2], [0, 2, 3], [0, 2, 4]]  # three triangles share an edge
    (tmp_path / "x.obj").write_text(_obj(plate, faces))
    surface = (
        Tetrahedra(resolution=24, color_resolution=4, start={"kind": "file", "path": tmp_path / "x.obj"})
        .build()
        .surface()
    )
    assert len(surface.faces) > 50 and float(surface.vertices.detach().norm(dim=-1).max()) < 1.2


def _obj(vertices, faces) -> str:
    return "\n".join(
        ["v " + " ".join(map(str, v)) for v in vertices] + ["f " + " ".join(str(i + 1) for i in f) for f in faces]
    )


def test_non_finite_points_and_degenerate_triangles_are_removed(tmp_path):
    corners = [[0, 0, 0], [1, 0, 0], [0, 1, 0], ["nan", 0, 0], ["1e39", 0, 0], [2, 0, 0]]
    (tmp_path / "x.obj").write_text(_obj(corners, [[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5], [1, 1, 2]]))
    (piece,) = read_mesh(tmp_path / "x.obj")
    assert piece.faces.tolist() == [[0, 1, 2]] and np.isfinite(piece.vertices).all() and len(piece.vertices) == 3


@pytest.mark.parametrize(
    ("vertices", "faces", "why"),
    [
        ([["nan", 0, 0]] * 3, [[0, 1, 2]], "finite coordinates|cannot be read"),
        ([[1, 1, 1]] * 3, [[0, 1, 2]], "finite coordinates"),
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [], "too few points|cannot be read|no triangles"),
    ],
)
def test_empty_meshes_are_refused(tmp_path, vertices, faces, why):
    (tmp_path / "x.obj").write_text(_obj(vertices, faces))
    with pytest.raises(ValueError, match=why):
        read_mesh(tmp_path / "x.obj")


def textured_obj(folder, texture="t.png"):
    folder.mkdir(exist_ok=True)
    text = "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl a\nf 1/1 2/2 3/3\n"
    (folder / "x.obj").write_text(text)
    (folder / "m.mtl").write_text(f"newmtl a\nKd 1 1 1\nmap_Kd {texture}\n")
    return folder / "x.obj"


def test_textures_and_materials_outside_the_mesh_folder_are_not_read(tmp_path):
    file = textured_obj(tmp_path / "in")
    Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "in" / "t.png")
    points, colors = sampled(read_mesh(file), 50)
    assert len(points) == 50 and colors is not None and np.allclose(colors, [0, 1, 0])
    Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(ValueError, match="is not a plain path inside"):
            read_mesh(textured_obj(tmp_path / "in", name))
    textured_obj(tmp_path / "in")
    (tmp_path / "m.mtl").write_text("newmtl a\nKd 1 1 1\n")
    for name in ("../m.mtl", str(tmp_path / "m.mtl")):
        file.write_text(file.read_text().replace("mtllib m.mtl", f"mtllib {name}"))
        with pytest.raises(ValueError, match="is not a plain path inside"):
            read_mesh(file)
        textured_obj(tmp_path / "in")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="points outside"):
        read_mesh(textured_obj(tmp_path / "in", "link.png"))


def test_a_huge_texture_is_refused_from_its_header_alone(tmp_path):
    file = textured_obj(tmp_path / "in")
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head)) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    (tmp_path / "in" / "t.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(ValueError, match="texture"):
        read_mesh(file)


def glb(tree, binary=b"") -> bytes:
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I", len(text)) + b"JSON" + text + struct.pack("<I", len(binary)) + b"BIN\0" + binary
    return b"glTF" + struct.pack("<II", 2, 12 + len(body)) + body


TRIANGLE = {
    "asset": {"version": "2.0"},
    "buffers": [{"byteLength": 36}],
    "accessors": [{"count": 3, "bufferView": 0, "componentType": 5126, "type": "VEC3"}],
    "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
    "nodes": [{"mesh": 0}],
    "scenes": [{"nodes": [0]}],
}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"glTF", "not a GLB"),
        (glb({"buffers": [{"uri": "../../etc/passwd", "byteLength": 4}]}), "refers to another file"),
        (glb({"images": [{"uri": "/etc/passwd"}]}), "refers to another file"),
        (glb({"images": [{"uri": "data:image/png;base64,!!!"}]}), "image that cannot"),
        (glb({"accessors": [{"count": 10**12}]}), "declares"),
        (
            glb({"bufferViews": [{"byteLength": 12}], "accessors": [{"count": 10**6, "bufferView": 0}]}, bytes(12)),
            "declares",
        ),
        (glb({"asset": {"version": "2.0"}})[:12] + struct.pack("<I", 2**31) + b"JSON{}  ", "is cut off"),
        (glb(TRIANGLE | {"bufferViews": [{"buffer": 0, "byteLength": 2**40}]}, bytes(36)), "ends at byte"),
        (
            glb(TRIANGLE | {"bufferViews": [{"buffer": 0, "byteLength": 36, "byteOffset": 2**40}]}, bytes(36)),
            "ends at byte",
        ),
        (glb({"extensionsRequired": ["KHR_draco_mesh_compression"]}), "KHR_draco"),
        (glb({"accessors": "many"}), "cannot be read"),
        (glb({"asset": {"version": "2.0"}}), "no triangles|cannot be read"),
        (glb([1, 2]), "cannot be read"),
    ],
)
def test_hostile_glb_files_are_refused(tmp_path, content, why):
    (tmp_path / "x.glb").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        read_mesh(tmp_path / "x.glb")


def repeated(nodes: int = 1, primitives: int = 1) -> bytes:
    """Returns a GLB file that repeats one triangle."""
    primitive = TRIANGLE["meshes"][0]["primitives"][0]
    tree = TRIANGLE | {
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "meshes": [{"primitives": [primitive] * primitives}],
        "nodes": [{"mesh": 0}] * nodes,
        "scenes": [{"nodes": list(range(nodes))}],
    }
    return glb(tree, np.eye(3, dtype="<f4").tobytes())


def test_points_are_counted_per_node_and_values_per_primitive(tmp_path, monkeypatch):
    monkeypatch.setattr(file_checks, "MAX_POINTS", 30)
    file = tmp_path / "x.glb"
    for nodes, primitives, why in (
        (21, 1, "63 points in total, including repeated ones, but at most 60"),
        (1, 121, "meshes in .* refer to more than 360 values"),
        (2, 11, "66 points"),
    ):
        file.write_bytes(repeated(nodes, primitives))
        with pytest.raises(ValueError, match=why):
            read_mesh(file)
    file.write_bytes(repeated(nodes=20))
    assert len(read_mesh(file)) == 20


def test_too_many_triangles_are_refused(tmp_path, monkeypatch):
    ball().export(tmp_path / "x.ply")
    monkeypatch.setattr(file_checks, "MAX_FACES", 1279)
    with pytest.raises(ValueError, match="has 1280 triangles in total, including repeated ones, but at most 1279"):
        read_mesh(tmp_path / "x.ply")


def test_a_texture_is_counted_once_per_material(tmp_path, monkeypatch):
    scene = trimesh.Scene()
    for green in (100, 200):
        material = PBRMaterial(baseColorTexture=Image.new("RGB", (8, 8), (0, green, 0)))
        for _ in range(3):
            visual = trimesh.visual.TextureVisuals(np.eye(3)[:, :2], material=material)
            scene.add_geometry(trimesh.Trimesh(np.eye(3), [[0, 1, 2]], visual=visual, process=False))
    (tmp_path / "x.glb").write_bytes(scene.export(file_type="glb"))
    monkeypatch.setattr(file_checks, "MAX_TEXELS", 128)
    textures = [p.texture for p in read_mesh(tmp_path / "x.glb")]
    assert sorted(t[0, 0, 1] for t in textures) == [100] * 3 + [200] * 3 and len({id(t) for t in textures}) == 2
    monkeypatch.setattr(file_checks, "MAX_TEXELS", 127)
    with pytest.raises(ValueError, match="textures in .* have 128 pixels in total, but at most 127"):
        read_mesh(tmp_path / "x.glb")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (
            "x.ply",
            b"ply\nformat ascii 1.0\nelement vertex 4000000000\nproperty float x\nend_header\n",
            "more than it can contain",
        ),
        ("x.ply", b"ply\nformat ascii 1.0\nelement vertex -4\nend_header\n", "not a PLY"),
        ("x.ply", b"ply\nformat ascii 1.0\n", "not a PLY"),
        ("x.obj", b"v 0 0 0\n\0\0", "not an OBJ"),
        ("x.obj", b"", "x.obj is empty"),
        ("x.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 99\n", "no triangles|cannot be read|coordinates"),
        ("x.stl", b"solid", "unknown mesh format"),
    ],
)
def test_other_bad_files_are_refused(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=why):
        read_mesh(tmp_path / name)
    with pytest.raises(ValueError, match="is not a file"):
        read_mesh(tmp_path / "missing.obj")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(file_checks, "MAX_BYTES", 10)
    (tmp_path / "x.obj").write_text("v 0 0 0\nv 1 0 0\n")
    with pytest.raises(ValueError, match="simplify"):
        read_mesh(tmp_path / "x.obj")
