"""Stand-ins for packages that threestudio imports but that are not installed.

threestudio always imports all of its modules, so a single CUDA extension that cannot be built makes it unusable. With a
stand-in, the import succeeds, and an error that names the package is raised only when something in the package is
called.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

#: The modules that threestudio imports and that cannot be replaced, each with the package that contains it.
NEEDED = {
    "cv2": "opencv-python-headless", "einops": "einops", "imageio": "imageio", "imageio_ffmpeg": "imageio-ffmpeg",
    "jaxtyping": "jaxtyping", "matplotlib": "matplotlib", "nerfacc": "nerfacc", "omegaconf": "omegaconf",
    "pytorch_lightning": "lightning", "scipy": "scipy", "tensorboard": "tensorboard", "torchmetrics": "torchmetrics",
    "trimesh": "trimesh", "typeguard": "typeguard",
}  # fmt: skip
#: Modules that some versions of these packages import, each with the package to install if the module is missing.
INDIRECTLY_NEEDED = {"pkg_resources": '"setuptools<81"'}  # imported by Lightning 2.0
#: The packages that can be replaced. Each value names the part of threestudio that needs the package, and says how to
#: install the package.
REPLACEABLE: Mapping[str, str] = {
    "IPython": "Zero-1-to-3; pip install ipython",
    "kornia": "Zero-1-to-3; pip install kornia",
    "controlnet_aux": "ControlNet guidance; pip install controlnet_aux",
    "envlight": "physically based materials; pip install git+https://github.com/ashawkey/envlight",
    "igl": "geometries that start from a mesh; pip install libigl",
    "nvdiffrast": "rasterizers and the stock mesh exporter; needs CUDA, "
    "pip install git+https://github.com/NVlabs/nvdiffrast",
    "tinycudann": "hash grids; needs CUDA, "
    "pip install git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch",
    "wandb": "logging to wandb; pip install wandb",
    "torchvision": "Zero-1-to-3, CO3D data and perceptual losses; pip install torchvision to match PyTorch",
}
_ASKING = ("threestudio", "extern")  # only imports by these packages get stand-ins


class _Missing(type):
    """The metaclass of stand-ins. A stand-in is a class, so it also works in an annotation or as a base class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = stand_in(f"{cls.__name__}.{name}")
        setattr(cls, name, made)
        return made

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        package = cls.__name__.partition(".")[0]
        raise ImportError(f"{cls.__name__} needs {package}, which is not installed ({REPLACEABLE.get(package, '')})")


def stand_in(name: str) -> Any:
    """Returns a stand-in for a package, or for a dotted name in a package. Calling the stand-in raises ImportError."""
    own = {"free_temporary_memory": lambda: None} if name == "tinycudann" else {}  # threestudio always calls this
    return _Missing(name, (), own)


def absent() -> list[str]:
    """Returns the replaceable packages that are not installed."""
    return [name for name in REPLACEABLE if find_spec(name) is None]


@contextmanager
def standing_in(names: Sequence[str]) -> Iterator[None]:
    """Inside the context, threestudio's own modules import stand-ins for these packages. For all other importers, the
    packages remain missing. The stand-ins are kept out of `sys.modules`, because other libraries would otherwise
    conclude that torchvision, for example, is installed."""
    made, real = {name: stand_in(name) for name in names}, builtins.__import__

    def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        asking = str((globals or {}).get("__name__", "")).partition(".")[0]
        package, *inside = name.split(".")
        if level or package not in made or asking not in _ASKING:
            return real(name, globals, locals, fromlist, level)
        found = made[package]
        for part in inside if fromlist else ():
            found = getattr(found, part)
        return found

    builtins.__import__ = imported
    try:
        yield
    finally:
        builtins.__import__ = real
