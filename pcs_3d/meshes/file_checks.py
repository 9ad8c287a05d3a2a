"""Checks untrusted mesh files, before they are decoded or copied, for excessive sizes and references to other files."""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.io.decode import MAX_PIXELS
from shared.io.failures import of_the_machine
from shared.io.safe_paths import safe_relative

MAX_BYTES = 256 * 2**20
MAX_POINTS = 5_000_000
MAX_FACES = 4 * MAX_POINTS
MAX_TEXELS = MAX_PIXELS  # maximum number of pixels in all textures together
_MAX_HEADER = 2**16


def check_size_of(path: Path) -> None:
    """Raises ValueError if the path is not a file, or if the file is empty or larger than 256 MiB."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        much = f"has {size} bytes, but a mesh may have at most {MAX_BYTES}: simplify it first"
        raise ValueError(f"{path} {much if size else 'is empty'}")


def check_glb(path: Path) -> None:
    """Raises ValueError if a GLB file is inconsistent, contains too much data, or needs other files."""
    data = path.read_bytes()
    if len(data) < 20 or data[:4] != b"glTF" or data[16:20] != b"JSON":
        raise ValueError(f"{path} is not a GLB file")
    (length,) = struct.unpack_from("<I", data, 12)
    if 20 + length > len(data):
        raise ValueError(
            f"{path} is cut off: its first part should have {length} bytes, but only {len(data) - 20} are left"
        )
    try:
        tree = json.loads(data[20 : 20 + length])
        binary = data[28 + length :]
        _check_gltf(path, tree, binary)
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{path} is not a GLB file: its JSON part cannot be read") from None


def _check_gltf(path: Path, tree: dict[str, Any], binary: bytes) -> None:
    if needed := tree.get("extensionsRequired"):
        known = {"KHR_texture_transform", "KHR_materials_unlit", "KHR_mesh_quantization"}
        if other := sorted(set(needed) - known):
            raise ValueError(
                f"{path} needs the glTF extension {other[0]}, which is not supported: export it without that extension"
            )
    views, total = tree.get("bufferViews", []), 0
    for item in [*tree.get("buffers", []), *tree.get("images", [])]:
        if (uri := item.get("uri")) is not None and not str(uri).startswith("data:"):
            raise ValueError(f"{path} refers to another file, {uri!r}: export it as a self-contained file")
    _check_views(path, tree, binary)
    for accessor in tree.get("accessors", []):
        count = int(accessor["count"])
        total += count
        view = accessor.get("bufferView")
        if count < 0 or total > 12 * MAX_POINTS or (view is not None and count > int(views[view]["byteLength"])):
            raise ValueError(f"{path} declares {count} values, which is more than it contains or more than is allowed")
    _check_primitives(path, tree)
    for image in tree.get("images", []):
        if "uri" in image:
            check_picture(path, _data_uri(path, image["uri"]))
        else:
            view = views[image["bufferView"]]
            start = int(view.get("byteOffset", 0))
            check_picture(path, binary[start : start + int(view["byteLength"])])


def _check_primitives(path: Path, tree: dict[str, Any]) -> None:
    """Raises ValueError if primitives refer to too many values in total. Each primitive gets its own copy of the values
    that it refers to."""
    counts = [int(accessor["count"]) for accessor in tree.get("accessors", [])]
    total = 0
    for primitive in (p for mesh in tree.get("meshes", []) for p in mesh["primitives"]):
        indices = [primitive["indices"]] if "indices" in primitive else []
        total += sum(counts[i] for i in [*primitive["attributes"].values(), *indices])
    if total > 12 * MAX_POINTS:
        raise ValueError(f"the meshes in {path} refer to more than {12 * MAX_POINTS} values: simplify them first")


def _check_views(path: Path, tree: dict[str, Any], binary: bytes) -> None:
    buffers = tree.get("buffers", [])
    for view in tree.get("bufferViews", []):
        start, size, buffer = int(view.get("byteOffset", 0)), int(view["byteLength"]), int(view.get("buffer", 0))
        inside = not buffers or "uri" not in buffers[buffer]
        if start < 0 or size < 0 or (inside and start + size > len(binary)):
            raise ValueError(
                f"{path} is cut off: one of its parts ends at byte {start + size}, but only {len(binary)} bytes remain"
            )


def _data_uri(path: Path, uri: str) -> bytes:
    try:
        return base64.b64decode(uri.partition("base64,")[2], validate=True)
    except binascii.Error:
        raise ValueError(f"{path} contains an image that cannot be read") from None


def check_picture(path: Path, data: bytes) -> None:
    """Raises ValueError if an image cannot be read or has too many pixels. Reads only the image's header."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError, SyntaxError):
        raise ValueError(f"{path} contains a texture that cannot be read as an image") from None
    if width * height > MAX_PIXELS // 4:
        raise ValueError(f"{path} contains a texture of {width}×{height} pixels: make it smaller first")


def check_total(path: Path, shown: Sequence[Any], textures: Sequence[Any]) -> None:
    """Raises ValueError if the geometries or the textures are too large in total. A small file can repeat a large mesh
    thousands of times, and each repetition is copied.

    Args:
        shown: meshes and points, listed once for every node that shows them
        textures: PIL images
    """
    points = sum(len(geometry.vertices) for geometry in shown)
    faces = sum(len(getattr(geometry, "faces", ())) for geometry in shown)
    for count, what, most in ((points, "points", 2 * MAX_POINTS), (faces, "triangles", MAX_FACES)):
        if count > most:
            raise ValueError(
                f"{path} has {count} {what} in total, including repeated ones, but at most {most} are allowed: "
                "simplify it first"
            )
    pixels = sum(texture.width * texture.height for texture in textures)
    if pixels > MAX_TEXELS:
        raise ValueError(
            f"the textures in {path} have {pixels} pixels in total, but at most {MAX_TEXELS} are allowed: "
            "make them smaller first"
        )


def check_ply(path: Path) -> None:
    """Raises ValueError if the header of a PLY file is invalid, or if it declares more elements than the file can
    contain or more than are allowed."""
    with path.open("rb") as stream:
        head = stream.read(_MAX_HEADER)
    end = head.find(b"end_header")
    if head[:3] != b"ply" or end < 0:
        raise ValueError(f"{path} is not a PLY file")
    for line in head[:end].decode("latin-1").splitlines():
        words = line.split()
        if words[:1] == ["element"] and (len(words) != 3 or not words[2].isdigit()):
            raise ValueError(f"{path} is not a PLY file: its header contains the invalid line {line!r}")
        if words[:1] == ["element"] and (count := int(words[2])) > min(path.stat().st_size, 2 * MAX_POINTS):
            raise ValueError(
                f"{path} declares {count} {words[1]} elements, which is more than it can contain or more than is "
                "allowed"
            )


def check_obj(path: Path) -> None:
    """Raises ValueError if an OBJ file is not text or has too many points."""
    count = 0
    with path.open("rb") as stream:
        for line in stream:
            if b"\0" in line:
                raise ValueError(f"{path} is not an OBJ file")
            count += line.startswith(b"v ")
    if count > MAX_POINTS:
        raise ValueError(f"{path} has {count} points, but at most {MAX_POINTS} are allowed: simplify it first")


class FolderResolver:
    """Reads a mesh's materials and textures for trimesh, but only from inside the mesh's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # trimesh swallows exceptions, so they are kept
        self.refused: list[str] = []  # why files were refused
        self.failure: Exception | None = None  # of the machine

    def get(self, name: str) -> bytes:
        """Returns the contents of the file `name`. Raises ValueError if the file is outside the folder, is too large,
        or is a texture that cannot be read."""
        try:
            name = str(name).strip().removeprefix("./").removeprefix(".\\")
            file = safe_relative(self.path.parent, name)
            check_size_of(file)
            data = file.read_bytes()
            if file.suffix.lower() not in (".mtl", ".bin"):
                check_picture(file, data)
        except ValueError as error:
            self.refused.append(str(error))
            raise
        except Exception as error:
            self.failure = error if of_the_machine(error) else self.failure
            raise
        return data

    def get_many(self, names: list[str]) -> dict[str, bytes]:
        return {name: self.get(name) for name in names}

    def __getitem__(self, name: str) -> bytes:
        return self.get(name)

    def keys(self) -> list[str]:
        return []

    def namespaced(self, namespace: str) -> FolderResolver:
        return self
