"""Writes meshes as GLB, as OBJ with MTL and PNG, and as PLY. Each file is read back and compared with the mesh."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from pcs_3d.export.texture import Textured
from shared.io.outputs import atomic_write

_CLOSE = 1e-5  # relative tolerance for coordinates read back from a file


def write_glb(path: Path, mesh: Textured) -> Path:
    """Writes a binary glTF file with y up, the object's front facing +z, and one rough material with the texture.
    Raises ValueError if the file does not read back as the same mesh and texture."""
    import trimesh
    from trimesh.visual.material import PBRMaterial

    material = PBRMaterial(baseColorTexture=_image(mesh.texture), metallicFactor=0.0, roughnessFactor=0.9)
    material.name = "thing"
    made = _trimesh(_y_up(mesh.vertices), mesh.faces, _y_up(mesh.normals), mesh.uv, material)
    with atomic_write(path) as temporary:
        temporary.write_bytes(trimesh.Scene({"thing": made}).export(file_type="glb"))  # type: ignore[arg-type]
        _compare(temporary, "glb", _y_up(mesh.vertices), mesh.faces, mesh.texture)
    return path


def write_obj(path: Path, mesh: Textured) -> list[Path]:
    """Writes a Wavefront OBJ file with y up, and its material and texture next to it (`x.obj`, `x.mtl`,
    `x-texture.png`). Raises ValueError if the files do not read back as the same mesh and texture."""
    vertices, normals = _y_up(mesh.vertices), _y_up(mesh.normals)
    stem = path.stem
    lines = [f"mtllib {stem}.mtl", "o thing"]
    lines += [f"v {x:.7g} {y:.7g} {z:.7g}" for x, y, z in vertices]
    lines += [f"vt {u:.7g} {v:.7g}" for u, v in mesh.uv]
    lines += [f"vn {x:.5g} {y:.5g} {z:.5g}" for x, y, z in normals]
    lines += ["usemtl thing", *("f " + " ".join(f"{i}/{i}/{i}" for i in face) for face in (mesh.faces + 1).tolist())]
    material = f"newmtl thing\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {stem}-texture.png\n"
    texture, library = path.with_name(f"{stem}-texture.png"), path.with_suffix(".mtl")
    with atomic_write(texture) as temporary:
        _image(mesh.texture).save(temporary, format="PNG")
    with atomic_write(library) as temporary:
        temporary.write_text(material, encoding="utf-8")
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _compare(temporary, "obj", vertices, mesh.faces, mesh.texture)
    return [path, library, texture]


def write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray) -> Path:
    """Writes a binary PLY file with z up and a colour at each vertex (`colors`, `[V, 3]` in [0, 1]). Raises ValueError
    if the file does not read back as the same mesh."""
    rgba = np.concatenate([(colors.clip(0, 1) * 255).round(), np.full((len(colors), 1), 255)], 1).astype(np.uint8)
    made = _trimesh(vertices, faces, None, None, None)
    made.visual.vertex_colors = rgba
    with atomic_write(path) as temporary:
        temporary.write_bytes(made.export(file_type="ply"))
        _compare(temporary, "ply", vertices, faces, None)
    return path


def _trimesh(vertices: np.ndarray, faces: np.ndarray, normals: Any, uv: Any, material: Any) -> Any:
    import trimesh
    from trimesh.visual import TextureVisuals

    visual = None if uv is None else TextureVisuals(uv=uv, material=material)
    return trimesh.Trimesh(vertices, faces, vertex_normals=normals, visual=visual, process=False)


def _y_up(vectors: np.ndarray) -> np.ndarray:
    return vectors[:, [1, 2, 0]]


def _image(texture: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(texture)


def _compare(file: Path, kind: str, vertices: np.ndarray, faces: np.ndarray, texture: np.ndarray | None) -> None:
    """Raises ValueError unless the file contains these triangles in this order and, if `texture` is given, that
    texture."""
    import trimesh
    from trimesh.resolvers import FilePathResolver

    resolver = FilePathResolver(str(file.parent))
    stream = io.BytesIO(file.read_bytes())
    scene = trimesh.load_scene(stream, file_type=kind, resolver=resolver, process=False)  # type: ignore[arg-type]
    (read,) = scene.geometry.values()
    corners = np.asarray(read.vertices)[np.asarray(read.faces)]  # loaders may renumber vertices
    mine = vertices[faces]
    same = corners.shape == mine.shape and np.abs(corners - mine).max() <= _CLOSE * max(1.0, np.abs(mine).max())
    if not same:  # NaN is never the same
        raise ValueError(f"the {kind} file does not contain the mesh that was written to it")
    if texture is None:
        return
    material = read.visual.material
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    if image is None or not np.array_equal(np.asarray(image.convert("RGB")), texture):
        raise ValueError(f"the {kind} file does not contain the texture that was written to it")
