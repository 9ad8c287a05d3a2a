"""The viewer page shows the complete mesh, centred and from the front, and loads no other files."""

from __future__ import annotations

import io
import re

import numpy as np
import trimesh

from pcs_3d.meshes.read_mesh import Piece
from pcs_3d.meshes.viewer import viewer_html
from tests.three_d.pages import glb_in, mesh_in


def pieces() -> list[Piece]:
    """Returns a ball with a texture that colours its halves differently, and a red nose in front of it."""
    ball, nose = trimesh.creation.icosphere(2), trimesh.creation.icosphere(1, radius=0.2)
    corners = np.asarray(ball.vertices) * 0.8
    texture = np.zeros((4, 4, 3), np.uint8)
    texture[:, 2:] = (0, 255, 0)
    painted = Piece(corners, np.asarray(ball.faces), uv=(corners[:, [1, 2]] + 1) / 2, texture=texture)
    red = np.tile([1.0, 0, 0], (len(nose.vertices), 1))
    return [painted, Piece(np.asarray(nose.vertices) + np.array([0.8, 0, 0]), np.asarray(nose.faces), colors=red)]


def test_the_viewer_contains_the_mesh_and_looks_at_its_front():
    page = viewer_html(pieces())
    scene = trimesh.load_scene(io.BytesIO(glb_in(page)), file_type="glb")
    assert sum(len(g.faces) for g in scene.geometry.values()) == sum(len(p.faces) for p in pieces())
    kinds = {name: geometry.visual.kind for name, geometry in scene.geometry.items()}
    assert sorted(kinds.values()) == ["texture", "vertex"]
    eye = scene.camera_transform
    local = np.concatenate([g.vertices for g in scene.geometry.values()]) - eye[:3, 3]
    right, up, depth = (local @ eye[:3, :3]).T * [[1], [1], [-1]]
    shown = np.abs([right, up]) / (depth * np.tan(np.radians(scene.camera.fov[:, None]) / 2))
    assert depth.min() > 0 and 0.5 < shown.max() < 0.95, "the whole mesh is in view and fills most of it"
    (nose,) = [g for name, g in scene.geometry.items() if kinds[name] == "vertex"]
    assert np.linalg.norm(nose.centroid - eye[:3, 3]) < np.linalg.norm(eye[:3, 3]) - 0.5, "the front faces the camera"
    assert eye[1, 1] > 0.9 and 0 < eye[1, 3] < eye[2, 3], "the camera is upright and slightly above the mesh"


def test_the_viewer_loads_no_files_and_draws_textures_with_ambient_light():
    page = viewer_html(pieces()[:1])
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page) and "import(" not in page
    script = page[page.rindex("init();") :]
    assert script.index("sRGBEncoding") < script.index("</script>") and "AmbientLight" in script
    assert len(mesh_in(page).faces) == len(pieces()[0].faces)
