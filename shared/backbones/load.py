"""From what a user writes (a folder, a file, a hub id, nothing) to a backbone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.backbones.world import World
from shared.config import expanded

if TYPE_CHECKING:
    import torch

    from shared.backbones.protocol import Backbone


def _stable_diffusion(pipe: Any, name: str) -> Backbone:
    from shared.backbones.stable_diffusion import StableDiffusionBackbone

    return StableDiffusionBackbone(pipe, name)


def _flux(pipe: Any, name: str) -> Backbone:
    from shared.backbones.flux import FluxBackbone

    return FluxBackbone(pipe, name)


Wrap = Callable[[Any, str], "Backbone"]  # (pipeline, name as the user gave it) -> the backbone around it
#: diffusers' pipeline classes that a family covers, and how the family wraps one. Packages add theirs: `families`.
FAMILIES: dict[str, Wrap] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "FluxPipeline": _flux,
}
GROUP = "pcs.families"  # entry points: diffusers' pipeline class = "module:function", a `Wrap`
TOYBOX = "toybox"
#: Models that come with a world of their own, by the name that a user gives.
WORLDS: Mapping[str, World] = {
    TOYBOX: World(
        overlay="toybox",
        prompts="toybox",
        instruments="toybox",
        side=64,
        unseen="are not from the toybox, and the toybox has never seen the real world: what it paints will be toys. Give "
        "backbone=PATH to a Stable Diffusion folder for real photos.",
        find=("from shared.toybox.weights import backbone_path  # where the toybox's folder is", "backbone_path()"),
    )
}
_UNUSED = ("feature_extractor", "image_encoder", "safety_checker")  # of no use here, and slow to load
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_backbone(
    source: str | Path | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Backbone:
    """The backbone that `source` names, frozen, on `device` (default: the CPU) in `dtype` (default: float32).

    Args:
        source: nothing or "toybox" for the embedded one; a diffusers folder (with `model_index.json`); a `.safetensors`
            checkpoint of Stable Diffusion 1.x/2.x; or a hub id `owner/name` (downloaded unless cached)

    Raises:
        ValueError: says what was found there, and which families exist
    """
    import torch

    name = TOYBOX if source is None or str(source) == TOYBOX else str(source)
    path = _toybox_path() if name == TOYBOX else expanded(name)
    if name != TOYBOX and path.exists():
        name = str(path.resolve())  # a concept notes it, and is used from other folders
    options = {"torch_dtype": dtype or torch.float32}
    if path.is_dir():
        backbone = _from_folder(path, name, options)
    elif path.is_file():
        backbone = _from_file(path, name, options)
    elif _HUB_ID.fullmatch(name) and not name.startswith((".", "/", "~")):
        backbone = _from_hub(name, options)
    else:
        raise ValueError(f"no model at {name}: there is no such file or folder. {_families()}")
    backbone.world = WORLDS.get(name)
    if name == TOYBOX:
        _toybox_defaults(backbone)
    return backbone.to(device=device) if device is not None else backbone  # type: ignore[attr-defined]


def _toybox_defaults(backbone: Backbone) -> None:
    """The guidance and steps that the toybox's card states."""
    from shared.toybox.weights import sampling_defaults

    stated = sampling_defaults()
    backbone.default_guidance, backbone.default_steps = float(stated["guidance"]), int(stated["steps"])


def register_family(pipeline: str, wrap: Wrap) -> None:
    """Let `load_backbone` open diffusers pipelines of this class, from now on in this process.

    An installed package names its own in the entry points `pcs.families` instead, and is imported when a model is one of
    them. ValueError when the class has a family already.
    """
    if pipeline in families():
        raise ValueError(f"{pipeline} has a family already: each pipeline class is opened in one way")
    FAMILIES[pipeline] = wrap


def families() -> dict[str, Wrap]:
    """diffusers' pipeline classes that can be opened, ours and those of installed packages; nothing is imported yet.

    ValueError when two offer the same class.
    """
    from importlib.metadata import entry_points

    out = dict(FAMILIES)
    for entry in entry_points(group=GROUP):
        if entry.name in out:
            raise ValueError(f"{entry.value} offers {entry.name}, which has a family already: uninstall one of the two")
        out[entry.name] = _imported(entry)
    return out


def _imported(entry: Any) -> Wrap:
    return lambda pipe, name: entry.load()(pipe, name)


def _families() -> str:
    return (
        f"A backbone is a diffusers folder of one of: {', '.join(sorted(families()))}; or leave it out for the toybox."
    )


def _toybox_path() -> Path:
    from shared.toybox.weights import backbone_path

    return Path(backbone_path())


def _from_folder(path: Path, name: str, options: Mapping[str, Any]) -> Backbone:
    index = path / "model_index.json"
    if not index.is_file():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path} is not a diffusers folder: it has no model_index.json, and holds {inside}. {_families()}"
        )
    half = {"variant": "fp16"} if _half_only(path) else {}
    return _wrap(_load(_class_of(index), path, {**options, **half}, name), name)


def _half_only(path: Path) -> bool:
    """Whether some network of a diffusers folder is there only as `….fp16.safetensors`."""
    folders: dict[Path, list[bool]] = {}
    for file in path.glob("*/*.safetensors"):
        if file.parent.name not in _UNUSED:
            folders.setdefault(file.parent, []).append(re.search(r"\.fp16[.-]", file.name) is not None)
    return any(all(half) for half in folders.values())


def _class_of(index: Path) -> str:
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{index} is not readable JSON") from None
    kind = data.get("_class_name") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in families():
        raise ValueError(f"{index.parent} holds a {kind}, and no family here covers that. {_families()}")
    return kind


def _load(kind: str, source: str | Path, options: Mapping[str, Any], name: str) -> Any:
    import diffusers

    extra: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    if kind == "StableDiffusionPipeline":
        extra |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with _quiet():
            return getattr(diffusers, kind).from_pretrained(source, use_safetensors=True, **options, **extra)
    except Exception as error:  # whatever a broken folder raises is about the user's files
        raise ValueError(f"cannot load {name} as {kind}: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars for loading a few files; what was on before is on again afterwards."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    before = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in before:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in before:
            log.enable_progress_bar()


def _from_file(path: Path, name: str, options: Mapping[str, Any]) -> Backbone:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; other formats can run code and are not read. {_families()}"
        )
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    try:
        pipe = StableDiffusionPipeline.from_single_file(str(path), safety_checker=None, **options)
    except Exception as error:
        raise ValueError(
            f"cannot load {path} as a Stable Diffusion 1.x/2.x checkpoint: {_first_line(error)}. "
            "One file needs the model's configuration from the hub (or its cache); a diffusers folder needs nothing"
        ) from error
    return _wrap(pipe, name)


def _from_hub(name: str, options: Mapping[str, Any]) -> Backbone:
    from huggingface_hub import hf_hub_download

    try:
        index = Path(hf_hub_download(name, "model_index.json"))
    except Exception as error:
        raise ValueError(
            f"no model at {name}: no such folder, and the hub did not give it ({_first_line(error)}). {_families()}"
        ) from error
    return _wrap(_load(_class_of(index), name, options, name), name)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _wrap(pipe: Any, name: str) -> Backbone:
    kind = type(pipe).__name__
    known = families()
    if kind not in known:
        raise ValueError(f"{name} holds a {kind}, and no family here covers that. {_families()}")
    return known[kind](pipe, name)
