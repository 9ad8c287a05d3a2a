"""Draws Gaussians with gsplat (https://github.com/nerfstudio-project/gsplat)."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.fields.field import Splats
from shared.io.failures import of_the_machine

BLUR = 0.3  # added to the variances, in pixels², so that no Gaussian falls between pixels
_PATIENCE = 900  # time limit for trying gsplat, in seconds; its kernels take minutes to build
_REPORT = "gsplat: "


@dataclass(frozen=True)
class Found:
    """gsplat's rasterization function, or None and the reason why it cannot be used."""

    rasterization: Any = None
    why: str = ""


@lru_cache
def gsplat(device: torch.device) -> Found:
    """Imports gsplat if it can render one Gaussian on the device. This is first tried in a separate process, because
    gsplat builds its kernels on first use, and a broken installation may crash or hang then. Warns once if gsplat is
    installed but does not work."""
    if find_spec("gsplat") is None:
        return Found(why="it is not installed")
    why = _failure_elsewhere(device)
    found = Found(why=why) if why else _tried(device)
    if found.why:
        warnings.warn(
            f"gsplat is installed but {found.why.removeprefix('it ')}, so Gaussians are rendered in PyTorch, which is "
            "slower",
            stacklevel=2,
        )
    return found


def _failure_elsewhere(device: torch.device) -> str:
    """Tries gsplat in a separate process. Returns why it does not work, or "" if it works or if the machine is at
    fault."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    code = "import sys; from pcs_3d.renderers.by_gsplat import report; report(sys.argv[1])"
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(device)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
    )  # fmt: skip
    try:
        said, complaints = child.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return f"it does not work (trying it took more than {_PATIENCE} seconds)"
    finally:
        if child.poll() is None:  # with the compilers that it started
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    reports = [line for line in said.splitlines() if line.startswith(_REPORT)]
    if reports:
        return json.loads(reports[-1].removeprefix(_REPORT))
    last = "".join(f": {line[:200]}" for line in complaints.strip().splitlines()[-1:])
    return f"it does not work (trying it ended with exit code {child.returncode}{last})"


def report(device: str) -> None:
    """Tries gsplat and prints why it does not work. This runs in a separate process."""
    try:
        why = _tried(torch.device(device)).why
    except Exception:  # the machine's failure, which the process that asked then meets itself
        why = ""
    print(f"\n{_REPORT}{json.dumps(why)}", flush=True)


def _tried(device: torch.device) -> Found:
    """Renders one Gaussian with gsplat. Raises only failures of the machine."""
    try:
        from gsplat import rasterization  # pyright: ignore[reportMissingImports]

        found = Found(rasterization)
        origin, one = torch.zeros(1, 3, device=device), torch.ones(1, device=device)
        turn = torch.tensor([[1.0, 0, 0, 0]], device=device)
        ball = Splats(origin, origin + 0.1, turn, one, origin)
        _rasterized(found, ball, Cameras.of([0.0]).to(device), 8, 8)
    except Exception as error:
        if of_the_machine(error):
            raise
        return Found(why=f"it does not work ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    return found


def by_gsplat(splats: Splats, cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return _rasterized(gsplat(splats.means.device), splats, cameras, height, width)


def _rasterized(
    found: Found, splats: Splats, cameras: Cameras, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    b = len(cameras)
    flip = torch.diag(splats.means.new_tensor([1.0, -1, -1]))  # x right, y down, z ahead
    turn = flip @ cameras.axes
    views = torch.eye(4, device=turn.device).repeat(b, 1, 1)
    views[:, :3, :3] = turn
    views[:, :3, 3] = -(turn @ cameras.positions[..., None])[..., 0]
    zoom = cameras.focal * min(height, width) / 2
    lens = torch.zeros(b, 3, 3, device=turn.device)
    lens[:, 0, 0] = lens[:, 1, 1] = zoom
    lens[:, 0, 2], lens[:, 1, 2], lens[:, 2, 2] = width / 2, height / 2, 1
    drawn, opacity, _ = found.rasterization(
        splats.means, splats.rotations, splats.scales, splats.opacities, splats.features, views, lens, width, height,
        render_mode="RGB+ED", eps2d=BLUR,
    )  # fmt: skip
    assert math.prod(opacity.shape) == b * height * width
    return drawn[..., :-1], opacity, drawn[..., -1:]
