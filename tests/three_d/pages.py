"""Reads pages that show a mesh."""

from __future__ import annotations

import base64
import io
import re
from html import unescape
from typing import Any

import trimesh


def viewer_of(page: str) -> tuple[str, Any]:
    """Returns the page without its viewer, and the mesh in the viewer."""
    frame = re.search(r'srcdoc="([^"]*)"', page)
    assert frame, "the page must contain a viewer in an iframe"
    shown = mesh_in(unescape(frame[1]))
    return page.replace(frame[0], ""), shown


def mesh_in(viewer: str) -> Any:
    """Returns the mesh that a viewer's page contains."""
    return trimesh.load_mesh(io.BytesIO(glb_in(viewer)), file_type="glb", process=False)


def glb_in(viewer: str) -> bytes:
    """Returns the GLB file that a viewer's page contains."""
    held = re.search(r'base64_data="([A-Za-z0-9+/=]+)"', viewer)
    assert held, "the page must contain the mesh"
    return base64.b64decode(held[1])
