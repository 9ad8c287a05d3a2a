"""Builds an interactive page for a mesh. The page is one self-contained file that includes three.js and the mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pcs_3d.meshes.read_mesh import Piece

_FOV_DEG, _ELEVATION_DEG, _FILL = 24.53, 15.0, 0.8  # like the toybox's cameras, with some room to turn
_AMBIENT, _LAMP = 0.75, 0.45  # mostly ambient light, because textures already contain shading
_MARK = "init();"  # trimesh's page starts here; it creates the renderer immediately, but reads the mesh later

#: Adds sRGB textures and ambient light, which trimesh's viewer lacks.
_LIGHT = f"""
if (typeof renderer !== "undefined" && renderer) {{
  renderer.outputEncoding = THREE.sRGBEncoding;
  tracklight.intensity = {_LAMP};
  scene.add(new THREE.AmbientLight(0xffffff, {_AMBIENT}));
}}
"""


def viewer_html(pieces: Sequence[Piece]) -> str:
    """Returns a standalone page that shows the pieces of a mesh (from `read_mesh`) from the front and lets the user
    turn them by mouse or touch. The page is trimesh's viewer, modified to show textures at their true brightness."""
    import trimesh
    from trimesh.scene.cameras import Camera
    from trimesh.viewer.notebook import scene_to_html

    scene = trimesh.Scene({f"piece-{i}": _geometry(piece) for i, piece in enumerate(pieces)})
    scene.camera = Camera(fov=(_FOV_DEG, _FOV_DEG))
    up = math.radians(_ELEVATION_DEG)
    place = trimesh.transformations.rotation_matrix(-up, [1, 0, 0])  # the camera looks along its -z axis
    distance = 1 / (_FILL * math.sin(math.radians(_FOV_DEG) / 2))
    place[:3, 3] = distance * np.array([0.0, math.sin(up), math.cos(up)])
    scene.camera_transform = place
    page = scene_to_html(scene)
    head, mark, tail = page.rpartition(_MARK)
    assert mark, "trimesh's viewer has changed: its start marker was not found"
    return head + mark + _LIGHT + tail


def _geometry(piece: Piece) -> Any:
    """Converts a piece to trimesh's format, with y up and the front facing +z."""
    import trimesh
    from PIL import Image
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    visual = None
    if piece.texture is not None and piece.uv is not None:
        material = PBRMaterial(
            baseColorTexture=Image.fromarray(piece.texture), metallicFactor=0.0, roughnessFactor=1.0, doubleSided=True
        )
        visual = TextureVisuals(uv=piece.uv, material=material)
    made = trimesh.Trimesh(piece.vertices[:, [1, 2, 0]], piece.faces, visual=visual, process=False)
    if visual is None and piece.colors is not None:
        colors: Any = made.visual
        colors.vertex_colors = (piece.colors.clip(0, 1) * 255).round().astype(np.uint8)
    return made
